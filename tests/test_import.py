"""What `import pico_tg` may change, what `enable_compile_cache` changes; what a wheel holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_script

ROOT = Path(__file__).parent.parent


def changes(*arguments: str, **environment: str) -> list[str]:
    return run_script("import_changes.py", *arguments, **environment).stdout.splitlines()


@pytest.mark.parametrize("dev", ["", "CPU", "NOWHERE"])
def test_the_import_changes_nothing(dev):
    """No attribute of tinygrad's modules and classes, no signal handler, no fork.

    DEV and TC are values of context variables, and no attributes of tinygrad's modules.
    """
    assert changes(DEV=dev) == []


def test_the_compile_cache_changes_what_its_docstring_says():
    assert [line.split()[1] for line in changes("enable", DEV="")] == [
        "tinygrad.engine.realize.to_program",
        "tinygrad.helpers._db_connection",
        "tinygrad.schedule.schedule_cache",
        "tinygrad.uop.ops.CallInfo.__repr__",
    ]


@pytest.mark.slow
def test_an_installed_package_has_its_model(tmp_path):
    """Of a wheel, in another folder than the clone."""
    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "pico_tg", source / "pico_tg")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    install = [sys.executable, "-m", "pip", "install", *options, str(source)]
    subprocess.run(install, check=True, timeout=300)
    shutil.rmtree(source)
    before = {path: path.stat().st_mtime_ns for path in (site / "pico_tg" / "stories").rglob("*")}
    command = [sys.executable, "-m", "pico_tg", "run", "stories", "--max-bytes", "20"]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    shipped = (site / "pico_tg" / "stories").rglob("*")
    assert before == {path: path.stat().st_mtime_ns for path in shipped}
    assert {path.name for path in before} == {p.name for p in (ROOT / "pico_tg/stories").rglob("*")}
