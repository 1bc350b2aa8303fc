"""The command line: `python -m pico_tg`, and the script `pico_tg`."""

import contextlib
import gc
import os
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns its exit status."""
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
