"""Ctrl-C while the command line starts: its imports take a second or two."""

import os
import signal
import sys


def quiet_at_start() -> None:
    """Until `as_usual`, Ctrl-C leaves at once with status 130, if this is the command line."""
    command = os.path.basename(sys.argv[0]) if sys.argv else ""
    # `python -m` has no other name yet while it imports the package
    module = command == "-m" and "pico_tg" in sys.orig_argv[1:]
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, say
    if (module or command == "pico_tg") and usual:
        signal.signal(signal.SIGINT, _leave)


def as_usual() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame: object) -> None:
    os._exit(130)
