"""Chooses the device and, on a CPU, the code generator.

`import pico_tg` chooses both, before the first Tensor. `DEV` in the environment takes precedence.
Without DEV, the device is the first accelerator that tinygrad can open, else the CPU; an OpenCL
device that is not a GPU is not taken. On a CPU, unless DEV names a code generator, the choice is
the first usable one of libLLVM 16 or later, clang, and tinygrad's own assembler (x86-64 only).
tinygrad itself would assume clang and, without clang, fail at the first kernel.

The import does not fail because a device is missing. `check_backend`, which the command line and
`Pico()` call, raises the error instead.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import itertools
import mmap
import os
import platform
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tinygrad import Device, Tensor, dtypes, getenv
from tinygrad.device import ALL_DEVICES
from tinygrad.helpers import CPU_COUNT, DEV, USE_TC, Target
from tinygrad.runtime.support.c import DLL

from ..files import PicoError
from . import huge_pages
from .cache_file import share_cache_file
from .machine import processor

MACHINE = platform.machine().lower()
MACHINE = {"amd64": "x86_64", "aarch64": "arm64"}.get(MACHINE, MACHINE)  # tinygrad's names

_requested = os.environ.get("DEV", "")  # the user's DEV, before `choose_backend` completes it


def choose_backend() -> None:
    """Determine `tinygrad.Device.DEFAULT` and, on a CPU, its code generator. Idempotent.

    Sets tinygrad's context variables DEV and TC, and DEV and LLVM_PATH in the environment, for
    child processes. Never raises: `check_backend` reports what is wrong with DEV.
    """
    # with DEBUG, tinygrad prints that it opens a device: never among a program's results
    with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
        _choose()


@functools.cache  # keeps a success; an error is raised again by the next call
def _choose() -> None:
    for target in _requested.split(";"):
        Target.parse(target)  # raises RuntimeError
    with without_absent_gpus():
        device = Device.DEFAULT.split(":")[0]
    if device == "CL" and not DEV.device and not _is_gpu():
        device = "CPU"
    if device != "CPU" or DEV.renderer not in ("", "LLVM", "CLANGJIT", "X86"):
        return
    llvm = find_llvm()
    usable = {"LLVM": lambda: llvm, "CLANGJIT": find_clang, "X86": lambda: MACHINE == "x86_64"}
    target = complete_target(DEV.value[0], MACHINE, usable)
    if target.renderer == "LLVM":
        _set_variable("LLVM_PATH", llvm)
    DEV.value = [target, *DEV.value[1:]]
    os.environ["DEV"] = repr(DEV)
    if "AMX" in target.arch:
        USE_TC.value = 0


@contextlib.contextmanager
def without_absent_gpus(buses: Path = Path("/sys/bus")) -> Iterator[None]:
    """Inside the `with`, tinygrad tries no GPU of a maker without a device on Linux's buses.

    tinygrad 0.13 imports its drivers of AMD and NVIDIA to find out: 0.3 s in each process
    (test_backend.test_absent_gpus_are_not_tried).
    """
    names = *buses.glob("pci/devices/*/vendor"), *buses.glob("usb/devices/*/idVendor")
    makers: set[str] = set()  # empty: unknown, as on other systems
    with contextlib.suppress(OSError):
        makers = {path.read_text().strip() for path in names}
    gpus = {"AMD": {"0x1002", "add1"}, "NV": {"0x10de"}}  # add1: an adapter from USB to PCI
    absent = {name for name, known in gpus.items() if makers and not makers & known}
    before = list(ALL_DEVICES)
    ALL_DEVICES[:] = [name for name in before if name not in absent]
    try:
        yield
    finally:
        ALL_DEVICES[:] = before


def complete_target(target: Target, machine: str, usable: dict[str, Callable]) -> Target:
    """`target` as a CPU, with a code generator and a processor.

    `usable` maps the names of code generators, the best first, to functions whose result is true
    if the generator can be used. Raises ValueError if none can, or for another machine's processor.
    """
    if target.arch and not target.arch.startswith(f"{machine},"):
        raise ValueError(f"{target.arch!r} is no processor of this machine; try {machine},native")
    wanted = [target.renderer] if target.renderer else list(usable)
    renderer = next((name for name in wanted if usable[name]()), None)
    if renderer is None:
        problem = f"no code generator (tried {', '.join(wanted)}); {_how_to_get_llvm(machine)}"
        if "CLANGJIT" in wanted and "CC" in os.environ:
            problem += f"; CC={os.environ['CC']} is not clang"
        raise ValueError(problem)
    # AMX makes tinygrad use vectors of 16 floats instead of 4, which doubles the speed of a
    # matmul. `_choose` switches TC off, since it would select the tensor cores named AMX.
    wide = "" if renderer == "X86" else ",AMX"
    arch = target.arch or f"{machine},native{wide}"
    return dataclasses.replace(target, device="CPU", renderer=renderer, arch=arch)


def check_backend() -> None:
    """Open the default device, before the first computation.

    Also calls `share_cache_file`. Raises PicoError if DEV names no usable device, or if this
    machine has none.
    """
    share_cache_file()
    if dtypes.default_float != dtypes.float32:
        given = os.environ.get("DEFAULT_FLOAT")
        raise PicoError(
            f"DEFAULT_FLOAT={given} would change the dtype of the weights; unset it (--precision "
            "bf16 is mixed precision)"
        )
    if CPU_COUNT.value < 1:
        raise PicoError(f"CPU_COUNT={CPU_COUNT.value} leaves no thread to compute; take at least 1")
    try:
        _choose()
        if Device.DEFAULT.split(":")[0] in ("DISK", "NPY", "TINYFS"):
            raise ValueError(f"{Device.DEFAULT} stores data and cannot compute")
        _open(Device.DEFAULT)
    except Exception as error:  # each device raises its own exception types
        reason = _first_line(error)
        if isinstance(error, ModuleNotFoundError) and "runtime.ops_" in (error.name or ""):
            reason = "tinygrad has no such device"
        if not _requested:
            raise PicoError(f"cannot compute: {reason}") from error
        raise PicoError(
            f"cannot compute with DEV={_requested}: {reason}; without DEV, pico_tg chooses a device"
        ) from error


def enable_compile_cache(training_graphs: bool = False) -> None:
    """Cache schedules, kernels and captured graphs on disk, for the next start.

    The file is tinygrad's CACHEDB; CACHELEVEL=0 turns the cache off. The command line calls this
    function; a script may call it once, before its first Tensor. The import does not, because the
    cache replaces functions of tinygrad in the whole process (listed in `jit_cache.install`).

    training_graphs: keep the graphs of training steps and validations too, not only those of
    decoding, as the command line does. A start then takes a tenth of the time. Not in a script
    that changes what they compute, by a function that it replaces or a subclass of `Pico`: a
    graph is found by the config, the settings and the source of this package.
    """
    from . import jit_cache

    share_cache_file()
    jit_cache.install()
    jit_cache.training_graphs |= training_graphs


def parse_devices(text: str) -> tuple[str, ...]:
    """`--devices`: a number of devices of the default backend, or names such as CUDA:0,CUDA:1.

    Raises PicoError on anything else, and on a device that cannot be opened.
    """
    if text.isdigit() and int(text) > 0:
        devices = tuple(f"{Device.DEFAULT}:{i}" for i in range(int(text)))
    else:
        devices = tuple(text.split(","))
    for name in devices:
        try:
            _open(name)
        except Exception as error:  # each device raises its own exception types
            raise PicoError(
                f"--devices {text}: cannot open {name!r} ({_first_line(error)}); give a number, or "
                "names such as CUDA:0,CUDA:1"
            ) from error
    if len({Device.canonicalize(name) for name in devices}) < len(devices):
        raise PicoError(f"--devices {text} names a device twice")
    return tuple(Device.canonicalize(name) for name in devices)


def _open(name: str) -> None:
    """Open a device and load its compiler; raises any exception if the device cannot compute."""
    is_webgpu = name.split(":")[0] == "WEBGPU"
    if is_webgpu:
        _find_dawn()
    compiler = Device[name].renderer.compiler  # loads it
    if name.split(":")[0] == "CPU":
        _check_executable_memory()
        huge_pages.install(Device[name].allocator)
        # tinygrad 0.13 caches clang's objects by source and "native", whatever processor that is
        # (test_backend.test_objects_are_of_one_processor)
        if compiler and compiler.cachekey:
            compiler.cachekey = compiler.cachekey.replace("native", processor())
    # without a driver, Dawn's launches succeed and compute nothing
    if is_webgpu and (Tensor([1.0], device=name) + 1).item() != 2:
        raise ValueError("no GPU; install its driver (Debian: mesa-vulkan-drivers and libvulkan1)")


def _check_executable_memory() -> None:
    """Raise ValueError if this process may not have the memory that tinygrad's kernels need."""
    if sys.platform != "linux":
        return
    try:
        mmap.mmap(-1, 1, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError as error:
        raise ValueError(
            f"this system forbids memory that is writable and executable ({error.strerror}), which "
            "compiled kernels need; permit it (systemd: MemoryDenyWriteExecute=no)"
        ) from error


def describe_backend() -> str:
    """One line: the device, and a way to make it faster, if one is known."""
    if Device.DEFAULT.split(":")[0] != "CPU":
        return f"backend {Device.DEFAULT}"
    threads = "1 thread" if CPU_COUNT.value == 1 else f"{CPU_COUNT.value} threads"
    line = f"backend CPU ({DEV.renderer or 'default'}, {threads})"
    if DEV.renderer == "X86":
        line += f"; {_how_to_get_llvm(MACHINE)}: about five times faster"
    return line


def find_llvm() -> str | None:
    """Path of a libLLVM that tinygrad can use: LLVM_PATH, the extra `cpu`'s, or the system's."""
    if MACHINE not in ("x86_64", "arm64"):  # tinygrad 0.13 has no other targets
        return None
    versions = range(23, 15, -1)
    names = ["LLVM", *(f"LLVM-{version}" for version in versions)]
    kegs = ["llvm", *(f"llvm@{version}" for version in versions)]
    names += [f"/opt/homebrew/opt/{keg}/lib/libLLVM.dylib" for keg in kegs]
    # tinygrad 0.13 lists whole folders for each name: 60 ms, which the extra saves
    system = (DLL.findlib("llvm", [name]) for name in names)
    extra = (str(Path(base) / "lib/libLLVM.so") for base in (sys.prefix, site.getuserbase()))
    both = (system, extra) if getenv("LLVM_PATH", "") else (extra, system)
    return next(filter(_is_llvm_16, filter(None, itertools.chain(*both))), None)


def _is_llvm_16(path: str) -> bool:
    try:
        # LLVM 16 introduced LLVMGetVersion; 15 rejects tinygrad's code, which mixes pointer types
        return hasattr(ctypes.CDLL(path), "LLVMGetVersion")
    except OSError:
        return False


def _find_dawn() -> None:
    """Tell tinygrad the path of Dawn (WebGPU) in the extra `webgpu`, unless it finds another."""
    if os.environ.get("WEBGPU_PATH") or DLL.findlib("webgpu", ["webgpu_dawn"]):
        return
    package = importlib.util.find_spec("pydawn")
    if package is None:
        raise ValueError("no WebGPU library; pip install 'pico_tg[webgpu]' brings Dawn")
    endings = {"win32": ".dll", "darwin": f"_{MACHINE}.dylib"}
    name = "libwebgpu_dawn" + endings.get(sys.platform, f"_{platform.machine()}.so")
    _set_variable("WEBGPU_PATH", str(Path(*package.submodule_search_locations) / "lib" / name))


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value
    getenv.cache_clear()  # tinygrad caches variables, including missing ones


def find_clang() -> str | None:
    """The clang that tinygrad would start: $CC, else the one on PATH. None if it is not clang."""
    path = shutil.which(os.environ.get("CC", "clang"))
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return path if "clang" in done.stdout else None


def _is_gpu() -> bool:
    """Whether tinygrad's OpenCL device is a GPU, unlike pocl and Intel's CPU runtime."""
    from tinygrad.runtime.autogen import opencl  # this import loads the OpenCL library

    device, kind = Device["CL"].device_id, ctypes.c_uint64()
    opencl.clGetDeviceInfo(device, opencl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None)
    return bool(kind.value & opencl.CL_DEVICE_TYPE_GPU)


def _how_to_get_llvm(machine: str) -> str:
    """Advice for this machine: the extra `cpu` has wheels for Linux on x86-64 only."""
    if sys.platform == "linux" and machine == "x86_64":
        return "pip install 'pico_tg[cpu]' brings libLLVM"
    if sys.platform == "darwin":
        return "brew install llvm brings libLLVM"
    return "install clang, or libLLVM 16 or later (LLVM_PATH names it)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
