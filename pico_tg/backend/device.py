"""Chooses the device and, on a CPU, the code generator.

`import pico_tg` chooses both, before the first Tensor. `DEV` in the environment takes precedence.
Without DEV, the device is the first accelerator that tinygrad can open, else the CPU; an OpenCL
device that is not a GPU is not taken. On a CPU, unless DEV names a code generator, the choice is
the first usable one of libLLVM 16 or later, clang, and tinygrad's own assembler (x86-64 only).
tinygrad itself would assume clang and, without clang, fail at the first kernel.

DEV=WEBGPU selects WebGPU, through Dawn: the library of the extra `webgpu`, unless WEBGPU_PATH names
another one.

The import never fails because of DEV. `check_backend`, which the command line and `Pico()` call,
raises the error instead.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import platform
import shutil
import site
import subprocess
import sys
from pathlib import Path

from tinygrad import Context, Device, getenv

from ..files import PicoError
from .cache_file import share_cache_file
from .runtime import BEAM, CPU_COUNT, DEV, DLL, USE_TC, open_webgpu, opencl_bindings

MACHINE = platform.machine().lower()
MACHINE = {"amd64": "x86_64", "aarch64": "arm64"}.get(MACHINE, MACHINE)  # tinygrad's names

_requested = os.environ.get("DEV", "")  # the user's DEV, before `choose_backend` completes it
_problem: str | None = None  # why DEV cannot be used, as far as `choose_backend` knows


def choose_backend(problem: str | None = None) -> None:
    """Determine `tinygrad.Device.DEFAULT` and, on a CPU, its code generator. Idempotent.

    Sets tinygrad's context variables DEV and TC, and DEV and LLVM_PATH in the environment, for
    child processes. Never raises: `check_backend` reports a `problem` with DEV.
    """
    global _problem
    _problem = problem
    if problem is not None:
        return
    try:
        device = Device.DEFAULT.split(":")[0]
    except Exception as error:  # CPU=1 in the environment: an AssertionError
        _problem = _first_line(error)
        return
    if device == "CL" and not DEV.device and not _is_gpu():
        device = "CPU"
    if device == "WEBGPU":
        with contextlib.suppress(ValueError):  # `check_backend` reports it
            _use_dawn()
    if device != "CPU" or DEV.renderer not in ("", "LLVM", "CLANGJIT", "X86"):
        return
    if DEV.arch and not DEV.arch.startswith(f"{MACHINE},"):
        _problem = f"{DEV.arch!r} is no processor of this machine; try {MACHINE},native"
        return
    finders = {"LLVM": find_llvm, "CLANGJIT": find_clang, "X86": lambda: MACHINE == "x86_64"}
    wanted = [DEV.renderer] if DEV.renderer else list(finders)
    found = {}
    renderer = next((name for name in wanted if found.setdefault(name, finders[name]())), None)
    if renderer is None:
        _problem = f"no code generator (tried {', '.join(wanted)}); {_how_to_get_llvm()}"
        if "CLANGJIT" in wanted and "CC" in os.environ:
            _problem += f"; CC={os.environ['CC']} is not clang"
        return
    if renderer == "LLVM":
        _set_variable("LLVM_PATH", found["LLVM"])
    target = dataclasses.replace(DEV.value[0], device="CPU", renderer=renderer)
    if not target.arch:
        # AMX makes tinygrad use vectors of 16 floats instead of 4, which doubles the speed of a
        # matmul. TC is switched off below, since it would select the tensor cores named AMX.
        wide = "" if renderer == "X86" else ",AMX"
        target = dataclasses.replace(target, arch=f"{MACHINE},native{wide}")
    DEV.value = [target, *DEV.value[1:]]
    os.environ["DEV"] = repr(DEV)
    if "AMX" in target.arch:
        USE_TC.value = 0


def check_backend() -> None:
    """Open the default device, before the first computation.

    Also calls `share_cache_file`. Raises PicoError if DEV names no usable device, or if this
    machine has none.
    """
    share_cache_file()
    reason = _problem
    if reason is None:
        try:
            device = Device.DEFAULT
            if device.split(":")[0] in ("DISK", "NPY", "TINYFS"):
                raise ValueError(f"{device} stores data and cannot compute")
            _open(device)
            return
        except Exception as error:  # each device raises its own exception types
            reason = _first_line(error)
            if isinstance(error, ModuleNotFoundError) and "runtime.ops_" in (error.name or ""):
                reason = "tinygrad has no such device"
    if _requested:
        raise PicoError(
            f"cannot compute with DEV={_requested}: {reason}; without DEV, pico_tg chooses a device"
        )
    raise PicoError(f"cannot compute: {reason}")


def enable_compile_cache() -> None:
    """Cache schedules and compiled kernels on disk: the next start takes a third of the time.

    The file is tinygrad's CACHEDB; CACHELEVEL=0 turns the cache off. The command line calls this
    function; a script may call it once, before its first Tensor. The import does not, because the
    cache replaces functions of tinygrad in the whole process (listed in `jit_cache.install`).
    """
    from .jit_cache import install

    share_cache_file()
    install()


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


def kernel_search(width: int | None) -> contextlib.AbstractContextManager:
    """A context in which tinygrad searches schedules for new kernels, `width` candidates at a time.

    `None` leaves the width to the environment's BEAM. tinygrad stores the results in its cache
    file. Hand-scheduled kernels (cpu/) are not searched. Raises PicoError on a width below 0.
    """
    if width is not None and width < 0:
        raise PicoError(f"beam must be at least 0 (no search), not {width}")
    return Context(BEAM=BEAM.value if width is None else width)


def _open(name: str) -> None:
    """Open a device and load its compiler; raises any exception if the device cannot compute."""
    if name.split(":")[0] == "WEBGPU":
        _use_dawn()
        if open_webgpu(name)[1] == "Null":
            raise ValueError(f"Dawn finds no GPU; {_how_to_get_a_driver()}")
    Device[name].renderer  # noqa: B018  # a property that loads the compiler


def describe_backend() -> str:
    """One line: the device, and a way to make it faster, if one is known."""
    name = Device.DEFAULT
    if name.split(":")[0] == "WEBGPU":
        return "backend {} ({}, {})".format(name, *open_webgpu(name))
    if name.split(":")[0] != "CPU":
        return f"backend {name}"
    line = f"backend CPU ({DEV.renderer or 'default'}, {CPU_COUNT.value} threads)"
    if DEV.renderer == "X86":
        line += f"; {_how_to_get_llvm()}: about five times faster"
    return line


def find_llvm() -> str | None:
    """Path of a libLLVM that tinygrad can use: LLVM_PATH, the system's, or the extra `cpu`'s."""
    if MACHINE not in ("x86_64", "arm64"):  # tinygrad 0.13 has no other targets
        return None
    versions = range(23, 15, -1)
    names = ["LLVM", *(f"LLVM-{version}" for version in versions)]
    kegs = ["llvm", *(f"llvm@{version}" for version in versions)]
    names += [f"/opt/homebrew/opt/{keg}/lib/libLLVM.dylib" for keg in kegs]
    candidates = [DLL.findlib("llvm", [name]) for name in names]
    for folder in (Path(sys.prefix) / "lib", Path(site.getuserbase()) / "lib"):
        candidates.append(str(folder / "libLLVM.so"))
    return next((path for path in candidates if path and _is_llvm_16(path)), None)


def _is_llvm_16(path: str) -> bool:
    try:
        # LLVM 16 introduced LLVMGetVersion; 15 rejects tinygrad's code, which mixes pointer types
        return hasattr(ctypes.CDLL(path), "LLVMGetVersion")
    except OSError:
        return False


def find_dawn() -> str | None:
    """Path of Dawn, which implements WebGPU; None if there is none.

    The first of: WEBGPU_PATH, the library of the extra `webgpu`, the system's.
    """
    if os.environ.get("WEBGPU_PATH"):
        return DLL.findlib("webgpu", ["webgpu_dawn"])
    endings = {"win32": ".dll", "darwin": f"_{MACHINE}.dylib"}
    ending = endings.get(sys.platform, f"_{MACHINE.replace('arm64', 'aarch64')}.so")
    package = importlib.util.find_spec("pydawn")
    for folder in package.submodule_search_locations if package else []:
        if (path := Path(folder) / "lib" / f"libwebgpu_dawn{ending}").is_file():
            return str(path)
    return DLL.findlib("webgpu", ["webgpu_dawn"])


def _use_dawn() -> None:
    """Tell tinygrad the path of Dawn; raises ValueError if there is none."""
    path = find_dawn()
    if path is not None:
        _set_variable("WEBGPU_PATH", path)
    elif given := os.environ.get("WEBGPU_PATH"):
        raise ValueError(f"WEBGPU_PATH={given} is not a library")
    else:
        raise ValueError("no WebGPU library; pip install 'pico_tg[webgpu]' brings Dawn")


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
    opencl, kind = opencl_bindings(), ctypes.c_uint64()
    opencl.clGetDeviceInfo(
        Device["CL"].device_id, opencl.CL_DEVICE_TYPE, 8, ctypes.byref(kind), None
    )
    return bool(kind.value & opencl.CL_DEVICE_TYPE_GPU)


def _how_to_get_llvm() -> str:
    """Advice for this machine: the extra `cpu` has wheels for Linux on x86-64 only."""
    if sys.platform == "linux" and MACHINE == "x86_64":
        return "pip install 'pico_tg[cpu]' brings libLLVM"
    if sys.platform == "darwin":
        return "brew install llvm brings libLLVM"
    return "install clang, or libLLVM 16 or later (LLVM_PATH names it)"


def _how_to_get_a_driver() -> str:
    if sys.platform == "linux":
        return "install the GPU's Vulkan driver (Debian: mesa-vulkan-drivers and libvulkan1)"
    return "install the GPU's driver"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
