"""The command line: `python -m pico_tg`, and the script `pico_tg`."""

import sys

from .startup import quiet_interrupts


def main() -> int:
    """Run the command line; returns its exit status."""
    with quiet_interrupts():
        from .tools.cli import main as run

        return run()


if __name__ == "__main__":
    sys.exit(main())
