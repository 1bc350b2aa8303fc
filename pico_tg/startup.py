"""Start of a process: Ctrl-C during the imports, and a DEV that makes tinygrad's import fail."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_interrupts() -> Iterator[None]:
    """On the command line, turn KeyboardInterrupt into exit status 130; elsewhere, do nothing.

    No signal handler is installed: a program that imports pico_tg keeps its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not _is_command_line():
            raise
        raise SystemExit(130) from None


def _is_command_line() -> bool:
    """Whether this process was started by `python -m pico_tg` or by the script `pico_tg`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    # while `python -m pico_tg` imports the package, sys.argv[0] is still "-m"
    if name in ("-m", "__main__.py"):
        return "pico_tg" in sys.orig_argv
    return name in ("pico_tg", "pico_tg.exe")


def import_tinygrad() -> str | None:
    """Import tinygrad even if DEV is malformed; returns tinygrad's error message about DEV.

    tinygrad 0.13 parses DEV on import and raises RuntimeError ("too many ':' in target string"), so
    not even --help would work (test_backend). During a second import, DEV names a device that does
    not exist.
    """
    dev = os.environ.get("DEV", "")
    try:
        import tinygrad
    except RuntimeError as error:
        if not dev:
            raise
        os.environ["DEV"] = re.sub(r"\W", "_", dev)
        import tinygrad  # noqa: F401

        os.environ["DEV"] = dev
        return str(error)
    return None
