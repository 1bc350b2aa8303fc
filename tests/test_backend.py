"""The choice of a backend, each in a process of its own, with a fresh compile cache."""

import os
import platform
import subprocess
import sys

import pytest
from tinygrad import Device

from pico_tg.backend import find_llvm, parse_devices
from pico_tg.files import PicoError

NO_LLVM = """
import ctypes
class Refusing(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if "LLVM" in str(name):
            raise OSError(name)
        super().__init__(name, *rest, **options)
ctypes.CDLL = Refusing
"""
CHOICE = """
import pico_tg
from pico_tg.backend import describe_backend
from tinygrad.helpers import DEV
print(repr(DEV), describe_backend(), sep="|")
"""
COMPUTE = CHOICE + "from tinygrad import Tensor\nprint((Tensor.arange(5).float() * 2).sum().item())"


def start(tmp_path, script, **variables) -> list[str]:
    """Run with these variables set, and with no clang on PATH unless one is given."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("DEV", "CC", "LLVM_PATH", "USE_TC")}
    env |= {"CACHEDB": str(tmp_path / "cache.db"), "PATH": str(tmp_path / "bin")} | variables
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\n", "|").split("|")


def on_cpu(tmp_path) -> bool:
    return start(tmp_path, CHOICE)[0].startswith("CPU")


def test_works_without_clang(tmp_path):
    backend, _, total, *_ = start(tmp_path, COMPUTE)
    assert float(total) == 20
    if backend.startswith("CPU"):
        assert backend.split(":")[1] == ("LLVM" if find_llvm() else "X86")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tinygrad assembles for x86-64 only")
def test_without_llvm_and_clang_x86_names_the_extra(tmp_path):
    if not on_cpu(tmp_path):
        pytest.skip("an accelerator comes first")
    backend, line, total, *_ = start(tmp_path, NO_LLVM + COMPUTE)
    assert backend.startswith("CPU:X86")
    assert "pip install 'pico_tg[cpu]'" in line
    assert float(total) == 20


def test_clang_comes_after_llvm(tmp_path):
    if not on_cpu(tmp_path):
        pytest.skip("an accelerator comes first")
    clang = tmp_path / "bin" / "clang"
    clang.parent.mkdir(exist_ok=True)
    clang.write_text("#!/bin/sh\necho clang version 19\n")
    clang.chmod(0o755)
    assert start(tmp_path, NO_LLVM + CHOICE)[0].startswith("CPU:CLANGJIT")
    if find_llvm():
        assert start(tmp_path, CHOICE)[0].startswith("CPU:LLVM")


@pytest.mark.parametrize("dev", ["NULL", "PYTHON", "CPU:CLANGJIT", "CPU:X86", "CPU:LLVM:x86_64"])
def test_the_user_is_obeyed(dev, tmp_path):
    assert start(tmp_path, CHOICE, DEV=dev)[0].startswith(dev)


def test_devices():
    assert len(parse_devices("1")) == 1
    if Device.DEFAULT == "CPU":
        assert parse_devices("2") == ("CPU", "CPU:1")
        assert parse_devices("CPU:1,CPU:3") == ("CPU:1", "CPU:3")
    assert parse_devices("NULL,NULL:1") == ("NULL", "NULL:1")


@pytest.mark.parametrize("text", ["0", "-1", "NOWHERE", "CPU:0,CPU", "", "CPU,"])
def test_wrong_devices(text):
    with pytest.raises(PicoError, match="--devices"):
        parse_devices(text)
