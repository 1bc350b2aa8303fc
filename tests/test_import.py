"""What `import pico_tg` may change: nothing; what `enable_compile_cache` changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "import_changes.py"


def changes(*arguments: str, **environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "DEV"} | environment
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("environment", [{}, {"DEV": "CPU"}, {"DEV": "NOWHERE"}])
def test_the_import_changes_nothing(environment):
    """No attribute of tinygrad's modules and classes, no signal handler, no fork.

    DEV and TC are values of context variables, and no attributes of tinygrad's modules.
    """
    assert changes(**environment) == []


def test_the_compile_cache_changes_what_its_docstring_says():
    assert [line.split()[1] for line in changes("enable")] == [
        "tinygrad.engine.realize.to_program",
        "tinygrad.helpers._db_connection",
        "tinygrad.schedule.schedule_cache",
        "tinygrad.uop.ops.CallInfo.__repr__",
    ]
