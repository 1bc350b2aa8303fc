"""The choice of a device and a code generator, and the one line where there is none."""

import itertools
import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device
from tinygrad.device import ALL_DEVICES, BufferSpec
from tinygrad.helpers import Target, mv_address

from pico_tg.backend import huge_pages
from pico_tg.backend.device import (
    check_backend,
    complete_target,
    find_clang,
    find_llvm,
    parse_devices,
    without_absent_gpus,
)
from pico_tg.backend.runtime import from_host, read
from pico_tg.files import PicoError

SCRIPT = Path(__file__).parent / "scripts" / "compute.py"
on_cpu = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="an accelerator comes first")


def complete(dev: str, usable: str, machine: str = "x86_64") -> str:
    """What DEV becomes on a `machine` that has the code generators `usable`."""
    names = ("LLVM", "CLANGJIT", "X86")
    finders = {name: lambda name=name: name in usable.split() for name in names}
    return repr(complete_target(Target.parse(dev), machine, finders))


def test_code_generators_in_their_order():
    assert complete("", "LLVM CLANGJIT X86") == "CPU:LLVM:x86_64,native,AMX"
    assert complete("", "CLANGJIT X86") == "CPU:CLANGJIT:x86_64,native,AMX"
    assert complete("", "X86") == "CPU:X86:x86_64,native"
    assert complete("CPU", "CLANGJIT", "arm64") == "CPU:CLANGJIT:arm64,native,AMX"
    assert complete("CPU:X86", "LLVM X86") == "CPU:X86:x86_64,native"
    assert complete("CPU:LLVM:x86_64,native", "LLVM") == "CPU:LLVM:x86_64,native"


@pytest.mark.parametrize(
    ("maker", "absent"),
    [
        ("pci/devices/0/vendor 0x1af4", {"AMD", "NV"}),
        ("pci/devices/0/vendor 0x1002", {"NV"}),
        ("pci/devices/0/vendor 0x10de", {"AMD"}),
        ("usb/devices/1-1/idVendor add1", {"NV"}),
        ("no/device 0", set()),  # another system, or one that hides its buses
    ],
)
def test_absent_gpus_are_not_tried(maker, absent, tmp_path):
    path, number = maker.split()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(number + "\n")
    before = list(ALL_DEVICES)
    with without_absent_gpus(tmp_path):
        assert {*before} - {*ALL_DEVICES} == absent
    assert before == ALL_DEVICES


def test_unreadable_buses_exclude_no_gpu(tmp_path):
    (tmp_path / "pci/devices/0/vendor").mkdir(parents=True)
    before = list(ALL_DEVICES)
    with without_absent_gpus(tmp_path):
        assert before == ALL_DEVICES


@on_cpu
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_buffers_have_huge_pages():
    """Also after others were freed; a large one begins at such a page and is unmapped if freed."""
    check_backend()
    large = 1 << 23
    for elements in large, 1, 1 << 18, large, 1 << 18:
        x = from_host(np.arange(elements, dtype=np.float32), "CPU")
        address = read(x).ctypes.data
        assert "hg" in mapping_flags(address)
        assert (read((x + 1).realize()) == np.arange(1, elements + 1)).all()
        del x
        Device["CPU"].allocator.free_cache()
        if elements == large:
            assert address % huge_pages.HUGE == 0
            assert mapping_flags(address) == []


@on_cpu
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_buffers_are_apart_and_inside_their_mappings():
    check_backend()
    installed = Device["CPU"].allocator._alloc
    check_backend()
    assert Device["CPU"].allocator._alloc is installed
    allocate = huge_pages.HugePages(Device["CPU"].allocator)
    sizes = [1, 4097, 1 << 20, 5 << 20, huge_pages.SHARED // 2, huge_pages.SHARED // 2 + 1] * 8
    buffers = [(allocate(size, BufferSpec()), size) for size in sizes]
    ends = sorted((buffer.va_addr, buffer.va_addr + size) for buffer, size in buffers)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
    for buffer, size in buffers:
        start = buffer.va_addr - mv_address(buffer.meta)
        assert 0 <= start <= len(buffer.meta) - size


def mapping_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds `address`; none if there is no mapping."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(bound, 16) for bound in bounds.groups())
            inside = start <= address < stop
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.parametrize(
    ("dev", "machine", "words"),
    [
        ("", "arm64", "LLVM"),  # the assembler is for x86-64
        ("CPU", "riscv64", "clang"),
        ("CPU:X86", "arm64", "X86"),
        ("CPU:LLVM", "x86_64", "LLVM"),
        ("CPU:LLVM:arm64,native", "x86_64", "x86_64,native"),
    ],
)
def test_a_processor_without_a_code_generator(dev, machine, words):
    with pytest.raises(ValueError, match=words) as error:
        complete(dev, "", machine)
    assert "\n" not in str(error.value)
    # the extra has wheels for Linux on x86-64 only
    assert machine == "x86_64" or "pico_tg[cpu]" not in str(error.value)


def test_the_hint_names_cc(monkeypatch):
    monkeypatch.setenv("CC", "gcc")
    with pytest.raises(ValueError, match="CC=gcc is not clang"):
        complete("", "")


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


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A Python process without DEV, but with these variables."""
    env = {k: v for k, v in os.environ.items() if k not in ("DEV", "CC", "LLVM_PATH")} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("dev", ["NULL", "PYTHON", "CUDA:PTX", "CPU;CUDA:PTX"])
def test_the_user_is_obeyed(dev):
    done = python("-c", "import os, pico_tg; print(os.environ['DEV'])", DEV=dev)
    assert done.stdout.strip().split(";")[-1] == dev.split(";")[-1], done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CPU": "1"}, "cannot compute.*DEV"),
        ({"CPU_COUNT": "0"}, "CPU_COUNT=0 leaves no thread"),
        ({"DEV": "FOO"}, "DEV=FOO: tinygrad has no such device"),
        ({"DEV": "A:B:C:D"}, "DEV=A:B:C:D: too many ':'"),  # tinygrad 0.13 raises at its import
        ({"DEV": "NPY"}, "DEV=NPY: NPY stores data"),
        ({"DEV": "CPU:CLANG"}, "cannot compute.*CLANGJIT"),
        ({"DEV": "WEBGPU", "WEBGPU_PATH": "/nowhere"}, "DEV=WEBGPU: .*WEBGPU_PATH"),
    ],
)
def test_the_command_line_says_what_cannot_be_used(variables, words, tmp_path):
    """Status 2 and one line."""
    done = python("-m", "pico_tg", "info", str(tmp_path), **variables)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(words, line)


def test_the_version_needs_no_device():
    assert python("-m", "pico_tg", "--version", DEV="FOO").stdout.startswith("pico_tg 0")


@on_cpu
@pytest.mark.parametrize("llvm", ["LLVM", "no LLVM"])
def test_computes_without_clang(llvm, tmp_path):
    """With an empty cache and PATH, so that no clang can be used."""
    if llvm == "LLVM" and find_llvm() is None:
        pytest.skip("no LLVM here")
    if llvm == "no LLVM" and platform.machine() != "x86_64":
        pytest.skip("tinygrad assembles for x86-64 only")
    done = python(str(SCRIPT), llvm, CACHEDB=str(tmp_path / "cache.db"), PATH=str(tmp_path))
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


@pytest.mark.parametrize(
    "variable",
    ["NO_COLOR=true", "NO_COLOR=", "DEBUG=true", "DEBUG=", "PROFILE=default", "VIZ=yes",
     "IMAGE=nginx:1.2", "CCACHE=/usr/bin/ccache"],
)  # fmt: skip
def test_words_in_the_environment(variable):
    """tinygrad 0.13 would end the import with a ValueError. The variables keep their values."""
    name, value = variable.split("=")
    done = python("-c", f"import os, pico_tg; print(os.environ[{name!r}])", **{name: value})
    assert (done.stdout, done.stderr) == (f"{value}\n", "")


FORKED = """
import os, pickle, pico_tg
sizes = dict(dim=8, att_q_heads=1, att_kv_heads=1, fb_num_blocks=1, latent_num_blocks=1)
config = pico_tg.Config(**sizes, next_tokens=1, fb_att_window_size=4, latent_capacity_factor=0.25,
                        latent_att_window_size=4)
if {computed}:
    model = pico_tg.Pico(config)
if (child := os.fork()) == 0:
    for use in [lambda: pico_tg.Pico(config)] + {computed} * [lambda: pickle.dumps(model)]:
        try:
            use()
            print("computed")
        except pico_tg.PicoError as error:
            print(error)
    os._exit(0 if os.sys.stdout.flush() is None else 1)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_told():
    """At once, if the parent has computed: the child would wait for its threads."""
    assert python("-c", FORKED.format(computed=True)).stdout.count("spawn") == 2
    assert python("-c", FORKED.format(computed=False)).stdout == "computed\n"


BEAM = """
import threading, pico_tg
sizes = dict(dim=8, att_q_heads=1, att_kv_heads=1, fb_num_blocks=1, latent_num_blocks=1)
model = pico_tg.Pico(pico_tg.Config(**sizes, next_tokens=1))
def write():
    print(len(pico_tg.complete(model, "a", max_bytes=2, temperature=0)))
thread = threading.Thread(target=write)
thread.start()
thread.join()
"""


@on_cpu
@pytest.mark.slow
def test_a_thread_goes_on_without_beam(tmp_path):
    """Outside the main thread tinygrad 0.13's search ends with a ValueError."""
    done = python("-c", BEAM, BEAM="1", CACHEDB=str(tmp_path / "cache.db"))
    assert done.stdout.strip(), done.stderr
    (line,) = done.stderr.splitlines()
    assert "BEAM works in the main thread only" in line
    done = python("-c", BEAM, JITBEAM="1", CACHEDB=str(tmp_path / "cache.db"))
    assert "PicoError: JITBEAM works in the main thread only" in done.stderr


FORBIDDEN = """
import ctypes, sys
from pico_tg.tools.cli import main
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE
    sys.exit("not permitted")
sys.exit(main(["info", "."]))
"""


@on_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_a_system_without_executable_memory(tmp_path):
    done = python("-c", FORBIDDEN)
    if "not permitted" in done.stderr:
        pytest.skip("Linux before 6.3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "MemoryDenyWriteExecute=no" in line


KEY = """
import builtins, io, sys
real = builtins.open

def replaced(path, *arguments, **options):
    if path == "/proc/cpuinfo":
        return io.StringIO("model name: " + sys.argv[1])
    return real(path, *arguments, **options)

builtins.open = replaced
from pico_tg.backend.device import check_backend
from tinygrad import Device
check_backend()
print(Device["CPU"].renderer.compiler.cachekey)
"""


@on_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_objects_are_of_one_processor(tmp_path):
    """tinygrad 0.13 would give clang's objects of any processor the same key."""
    clang = tmp_path / "clang"
    clang.write_text("#!/bin/sh\necho clang version 19\n")
    clang.chmod(0o755)
    one, other = (
        python("-c", KEY, name, DEV="CPU:CLANGJIT", CC=str(clang)).stdout for name in "ab"
    )
    assert "clang" in one
    assert one != other


def test_weights_are_float32_or_refused():
    script = FORKED.format(computed=True)
    done = python("-c", script, DEFAULT_FLOAT="HALF")
    assert "PicoError: DEFAULT_FLOAT=HALF would change" in done.stderr


RESULTS = """
import numpy as np
from pico_tg.backend.runtime import jit_method

class Double:
    def method(self, x):
        return (x * 2).contiguous().realize()

double = Double()
graph = jit_method(double.method)
for value in range(3):
    assert (graph(np.full(1 << 20, value, np.float32)) == 2 * value).all()
print("read")
"""


@on_cpu
@pytest.mark.parametrize("jit", ["0", "1"])
def test_results_are_kept_until_the_next_call(jit):
    """Where freed memory is given back to the system at once."""
    done = python("-c", RESULTS, JIT=jit, LRU="0")
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
