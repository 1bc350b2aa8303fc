"""Metal without a Mac: tinygrad's device METAL, whose kernels clang compiles and a CPU runs.

`python metal_device.py SCRIPT ARGUMENT...` runs a script with this device instead of tinygrad's.
tinygrad's own renderer writes the kernels (DEV=METAL::Apple7 names the GPU). clang compiles them as
C++, with tests/metal/metal_stdlib as Metal's standard library. A kernel runs one thread group after
another; the threads of a group take turns at barriers and multiply matrices together.

That proves the kernels to be valid source, within Metal's limits, and their arithmetic. It proves
nothing of Apple's compiler, drivers and hardware, nor of the calls and graphs of tinygrad's METAL,
nor of speed.
"""

import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from tinygrad.device import Compiled, CompileError, Compiler, LRUAllocator
from tinygrad.helpers import to_mv

SHIM = Path(__file__).parent / "metal"
NO_CLANG = "no clang on Linux here (pip install 'pico_tg[clang]' brings one for x86-64)"
MAX_BUFFERS, MAX_THREADS, MAX_SHARED = 31, 1024, 32768  # a kernel's; of Apple7 and later
SHARED = re.compile(r"^ *threadgroup __attribute__\(\(aligned\(16\)\)\) (\w+) \w+\[(\d+)\];", re.M)
BYTES = {"char": 1, "uchar": 1, "bool": 1, "short": 2, "ushort": 2, "half": 2, "bfloat": 2}
ERRORS = "unknown-attributes", "double-promotion", "return-type", "uninitialized"
OPTIONS = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-ffreestanding", "-nostdinc"]
OPTIONS += ["-march=native" if platform.machine() == "x86_64" else "-mcpu=native"]
OPTIONS += [f"-isystem{SHIM}", "-Wno-everything", *(f"-Werror={name}" for name in ERRORS)]


def find_clang(name: str = "clang") -> str | None:
    """The clang of this Python's environment (the extra `clang`) or machine; None unless Linux."""
    if sys.platform != "linux":
        return None
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


LINKER = ["-fuse-ld=lld"] if find_clang("ld.lld") else []  # else the system's


def clang(source: str, *options: str) -> None:
    """Compile `source`; raises CompileError."""
    command = [find_clang(), *OPTIONS, "-", *options]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)


def as_cpp(source: str) -> str:
    """A kernel as C++: what threads share is `threadgroup` in Metal, `static` in C++."""
    return SHARED.sub(lambda line: line[0].replace("threadgroup", "static threadgroup", 1), source)


def parameters(source: str) -> tuple[str, list[str]]:
    """A kernel's name and its parameters, without the two positions of a thread."""
    name, declared = re.search(r"^kernel void (\w+)\((.*)\) \{$", source, re.M).groups()
    return name, declared.split(", ")[:-2]


def check_limits(source: str) -> None:
    """Raises CompileError if the kernel needs more than Metal has, or a type of 64 bits."""
    name, declared = parameters(source)
    shared = sum(BYTES.get(name, 4) * int(size) for name, size in SHARED.findall(source))
    # the sizes of a group, in tinygrad's comments
    threads = math.prod(map(int, re.findall(r"= lid\.\w; /\* (\d+) \*/", source)))
    found, limits = (len(declared), shared, threads), (MAX_BUFFERS, MAX_SHARED, MAX_THREADS)
    if any(x > limit for x, limit in zip(found, limits, strict=True)):
        raise CompileError("{}: {} buffers, {} bytes shared, {} threads".format(name, *found))
    # Metal has integers of 64 bits, but they are slow
    if wide := re.search(r"\b(double|u?long|u?int64_t|size_t)\d?\b", source):
        raise CompileError(f"{name}: {wide[0]}")


def compile_kernels(sources: list[str]) -> None:
    """Compile many kernels as one program, and throw the result away; raises CompileError."""
    parts = ["#include <metal_stdlib>"]
    for i, source in enumerate(sources):
        check_limits(source)
        parts.append(f"namespace kernel{i} {{\n{as_cpp(source)}\n}}")
    clang("\n".join(parts), "-fsyntax-only")


class MetalCompiler(Compiler):
    """From Metal source to a shared library with one function, `launch`."""

    def __init__(self):
        sources = [Path(__file__), *SHIM.iterdir()]
        content = b"".join(path.read_bytes() for path in sources)
        super().__init__(f"metal_on_cpu_{hashlib.sha256(content).hexdigest()[:16]}")

    def compile(self, src: str) -> bytes:
        check_limits(src)
        name, declared = parameters(src)
        arguments = [f"emulator::Argument{{pointers[{i}]}}" for i in range(len(declared))]
        cooperate = "simdgroup" in src or "threadgroup_barrier" in src
        launch = f"""
extern "C" bool launch(void **pointers, const uint *grid, const uint *group, char *stacks) {{
  return emulator::launch(grid, group, {"stacks" if cooperate else "nullptr"},
    [&](uint3 gid, uint3 lid) {{ {name}({", ".join([*arguments, "gid", "lid"])}); }});
}}
"""
        with tempfile.NamedTemporaryFile(suffix=".so") as library:
            clang(as_cpp(src) + launch, "-shared", "-nostdlib", *LINKER, "-o", library.name)
            return Path(library.name).read_bytes()


@functools.cache
def stacks() -> mmap.mmap:
    """Memory for the stacks of a group's threads; what is not used is not there."""
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)
    return mmap.mmap(-1, MAX_THREADS << 16)


class MetalProgram:
    def __init__(self, name: str, lib: bytes, **_):
        self.name = name
        arena = stacks()
        with tempfile.NamedTemporaryFile(suffix=".so") as library:
            Path(library.name).write_bytes(lib)
            self.launch = ctypes.CDLL(library.name).launch
        self.launch.restype = ctypes.c_bool
        self.stacks = ctypes.addressof(ctypes.c_char.from_buffer(arena))

    def __call__(self, *bufs, global_size=(1, 1, 1), local_size=(1, 1, 1), vals=(), **_):
        if math.prod(local_size) > MAX_THREADS:
            raise RuntimeError(f"{self.name}: {local_size} threads in a group")
        values = [ctypes.c_int(value) for value in vals]
        addresses = [*(buf.address for buf in bufs), *(ctypes.addressof(v) for v in values)]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        grid, group = ((ctypes.c_uint * 3)(*size) for size in (global_size, local_size))
        if self.launch(pointers, grid, group, ctypes.c_void_p(self.stacks)):
            raise RuntimeError(f"{self.name}: threads of a group wait at different barriers")


class Memory:
    """A buffer, or a part of one."""

    def __init__(self, storage: mmap.mmap, address: int, size: int):
        self.storage, self.address, self.size = storage, address, size


class MetalAllocator(LRUAllocator):
    """Memory that the host sees, as Metal's shared buffers are."""

    def _alloc(self, size, options):
        storage = mmap.mmap(-1, size)
        return Memory(storage, ctypes.addressof(ctypes.c_char.from_buffer(storage)), size)

    def _as_buffer(self, src):
        return to_mv(src.address, src.size)

    def _copyin(self, dest, src):
        self._as_buffer(dest)[:] = src

    def _copyout(self, dest, src):
        dest[:] = self._as_buffer(src)

    def _offset(self, buf, size, offset):
        return Memory(buf.storage, buf.address + offset, size)


class MetalDevice(Compiled):
    def __init__(self, device: str):
        from tinygrad.renderer.cstyle import MetalRenderer

        super().__init__(device, MetalAllocator(self), [MetalRenderer], MetalProgram, arch="Apple7")


def install() -> None:
    """Replace tinygrad's device METAL, in this process."""
    names = {"MetalDevice": MetalDevice, "MetalCompiler": MetalCompiler}
    sys.modules["tinygrad.runtime.ops_metal"] = types.SimpleNamespace(**names)


if __name__ == "__main__":
    install()
    sys.argv[:] = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
