"""The choice of a device and a code generator, and the one line where there is none."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tinygrad import Device
from tinygrad.helpers import DEV, USE_TC

from pico_tg.backend import device as backend
from pico_tg.backend.device import check_backend, choose_backend, find_clang, parse_devices
from pico_tg.backend.runtime import _silent_stderr
from pico_tg.files import PicoError

SCRIPT = Path(__file__).parent / "scripts" / "compute.py"
on_cpu = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="an accelerator comes first")


@pytest.fixture
def choose(monkeypatch):
    """A function that chooses again, for other findings on this machine: what DEV becomes."""
    for variable in ("DEV", "LLVM_PATH", "CC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(DEV, "_value", DEV.value)
    monkeypatch.setattr(USE_TC, "value", 1)

    def choose(dev="", llvm=None, clang=None, machine="x86_64") -> str:
        monkeypatch.setattr(backend, "_requested", dev)
        monkeypatch.setattr(backend, "_problem", None)
        monkeypatch.setattr(backend, "MACHINE", machine)
        monkeypatch.setattr(backend, "find_llvm", lambda: llvm)
        monkeypatch.setattr(backend, "find_clang", lambda: clang)
        DEV.value = dev
        choose_backend()
        return repr(DEV)

    return choose


@on_cpu
def test_code_generators_in_their_order(choose):
    assert choose(llvm="/l.so", clang="clang") == "CPU:LLVM:x86_64,native,AMX"
    assert os.environ["LLVM_PATH"] == "/l.so"
    assert os.environ["DEV"] == repr(DEV)
    assert USE_TC.value == 0
    assert choose(clang="clang") == "CPU:CLANGJIT:x86_64,native,AMX"
    assert choose() == "CPU:X86:x86_64,native"
    assert choose("CPU", clang="clang", machine="arm64") == "CPU:CLANGJIT:arm64,native,AMX"
    assert choose("CPU:X86", llvm="/l.so") == "CPU:X86:x86_64,native"
    assert choose("CPU;CUDA:PTX", llvm="/l.so") == "CPU:LLVM:x86_64,native,AMX;CUDA:PTX"


@pytest.mark.parametrize("dev", ["NULL", "PYTHON", "CUDA:PTX", "CPU:LLVM:x86_64,native"])
def test_the_user_is_obeyed(dev, choose):
    assert choose(dev, llvm="/l.so") == dev


@on_cpu
@pytest.mark.parametrize(
    ("dev", "machine", "words"),
    [
        ("", "arm64", "LLVM"),  # the assembler is for x86-64
        ("CPU", "riscv64", "clang"),
        ("CPU:X86", "arm64", "X86"),
        ("CPU:CLANGJIT", "x86_64", "DEV=CPU:CLANGJIT"),
        ("CPU:LLVM", "x86_64", "DEV=CPU:LLVM"),
        ("CPU:CLANG", "x86_64", "CLANGJIT"),
        ("CPU:LLVM:arm64,native", "x86_64", "x86_64,native"),
        ("NPY", "x86_64", "DEV=NPY"),
        ("FOO", "x86_64", "DEV=FOO"),
    ],
)
def test_what_cannot_compute_is_one_line(dev, machine, words, choose):
    choose(dev, machine=machine)
    with pytest.raises(PicoError, match=words) as error:
        check_backend()
    assert "\n" not in str(error.value)
    # the extra has wheels for Linux on x86-64 only
    assert machine == "x86_64" or "pico_tg[cpu]" not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="writes scripts")
@pytest.mark.parametrize(
    ("says", "is_clang"), [("Debian clang version 19.1.7", True), ("gcc (Debian 12.2.0)", False)]
)
def test_cc_must_be_clang(says, is_clang, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert find_clang() == (str(compiler) if is_clang else None)
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    assert find_clang() is None


@on_cpu
def test_the_hint_names_cc(choose, monkeypatch):
    monkeypatch.setenv("CC", "gcc")
    choose(machine="arm64")
    with pytest.raises(PicoError, match="CC=gcc is not clang"):
        check_backend()


@on_cpu
def test_opencl_without_a_gpu_is_not_preferred_to_the_cpu(choose, monkeypatch):
    device = SimpleNamespace(DEFAULT="CL")
    monkeypatch.setattr(backend, "Device", device)
    monkeypatch.setattr(backend, "_is_gpu", lambda: False)
    assert choose(llvm="/l.so").startswith("CPU:LLVM")
    assert choose("CL", llvm="/l.so") == "CL"
    monkeypatch.setattr(backend, "_is_gpu", lambda: True)
    assert choose(llvm="/l.so") == ""


@pytest.mark.parametrize(
    ("path", "interface", "words"),
    [(None, "Vulkan", r"pico_tg\[webgpu\]"), ("/dawn.so", "Null", "no GPU; install the GPU's")],
)
def test_webgpu_without_its_library_or_a_driver(path, interface, words, choose, monkeypatch):
    monkeypatch.setenv("WEBGPU_PATH", "")  # which `choose` sets
    monkeypatch.setattr(backend, "find_dawn", lambda: path)
    monkeypatch.setattr(backend, "open_webgpu", lambda name: ("an adapter", interface))
    choose("WEBGPU")
    with pytest.raises(PicoError, match=f"DEV=WEBGPU: .*{words}"):
        check_backend()


def test_standard_error_may_be_closed(capfd):
    """Opening WebGPU discards what is written to it, and does without it in a daemon."""
    saved = os.dup(2)
    with _silent_stderr():
        os.write(2, b"discarded")
    os.write(2, b"shown")
    os.close(2)
    try:
        with _silent_stderr():
            pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)  # still closed
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert capfd.readouterr().err == "shown"


@pytest.mark.parametrize(("kind", "is_gpu"), [(2, False), (4, True), (5, True)])
def test_kinds_of_opencl_devices(kind, is_gpu, monkeypatch):
    """CL_DEVICE_TYPE is a set of bits: 1 default, 2 CPU, 4 GPU."""
    opencl = pytest.importorskip("tinygrad.runtime.autogen.opencl")

    def answer(device, name, size, value, size_written) -> int:
        assert (device, name, size) == ("id", opencl.CL_DEVICE_TYPE, 8)
        value._obj.value = kind
        return 0

    monkeypatch.setattr(opencl, "clGetDeviceInfo", answer)
    monkeypatch.setattr(backend, "Device", {"CL": SimpleNamespace(device_id="id")})
    assert backend._is_gpu() == is_gpu


@pytest.mark.parametrize(
    "variables",
    [
        {"DEV": "A:B:C:D"},
        {"CPU": "1"},
        {"DEV": "WEBGPU", "WEBGPU_PATH": "/nowhere"},
    ],
)
def test_the_command_line_says_what_cannot_be_used(variables, tmp_path):
    """Status 2 and one line; --version works."""
    env = {k: v for k, v in os.environ.items() if k != "DEV"} | variables

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pico_tg", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    done = run("info", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "cannot compute" in done.stderr
    assert next(iter(variables.values())) in done.stderr
    assert run("--version").returncode == 0


@on_cpu
@pytest.mark.parametrize("llvm", ["LLVM", "no LLVM"])
def test_computes_without_clang(llvm, tmp_path):
    """With an empty cache and PATH, so that no clang can be used."""
    env = {k: v for k, v in os.environ.items() if k not in ("DEV", "CC", "LLVM_PATH")}
    env |= {"CACHEDB": str(tmp_path / "cache.db"), "PATH": str(tmp_path)}
    if llvm == "LLVM" and backend.find_llvm() is None:
        pytest.skip("no LLVM here")
    if llvm == "no LLVM" and platform.machine() != "x86_64":
        pytest.skip("tinygrad assembles for x86-64 only")
    command = [sys.executable, str(SCRIPT), llvm]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    renderer, line, total = done.stdout.split("|")
    assert (renderer, float(total)) == ("LLVM" if llvm == "LLVM" else "X86", 20)
    assert ("five times faster" in line) == (renderer == "X86")


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
