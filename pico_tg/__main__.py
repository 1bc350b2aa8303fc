"""The command line: `python -m pico_tg`, and the script `pico_tg`."""

import _thread
import contextlib
import gc
import os
import sys
import threading
from typing import Any

INTERRUPTED = 130


def repeat_interrupt(ignored: Any) -> None:
    """`sys.unraisablehook` that raises an ignored KeyboardInterrupt once more.

    Python ignores an exception in a `__del__` and in a function that C calls. tinygrad 0.13 has
    both, for its operations and for LLVM's diagnostics: while it compiled, every second Ctrl-C was
    lost (test_cli.test_an_ignored_interrupt_is_repeated).

    An operation or a graph whose constructor was interrupted, or had no memory, lacks attributes
    when it is freed: that second error is not shown.
    """
    freed = getattr(ignored.object, "__qualname__", "").endswith(".__del__")
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()
    elif not (freed and ignored.exc_type is AttributeError):
        sys.__unraisablehook__(ignored)


def main() -> int:
    """Run the command line; returns its exit status."""
    sys.unraisablehook = repeat_interrupt
    # tinygrad creates many objects and few cycles: with Python's default thresholds, garbage
    # collection took 7 % of the CPU time of compiling
    gc.set_threshold(50_000, 20, 100)
    try:
        from .tools.cli import main as run

        status = run()
    except KeyboardInterrupt:  # during the import
        status = INTERRUPTED
    if status == INTERRUPTED:
        # Ctrl-C may have interrupted tinygrad 0.13 while it held the lock of its CPU queue, for
        # which its exit handler would wait forever (seen in test_cli.test_ctrl_c_is_quiet)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
