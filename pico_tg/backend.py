"""Which backend computes. Decided on `import pico_tg`, before the first Tensor.

A `DEV` in the environment is obeyed. Otherwise tinygrad's own order of accelerators holds; where
that ends at the CPU (or `DEV=CPU` leaves the code generator open), a code generator that is really
there is taken: libLLVM, else clang, else tinygrad's own X86 assembler. tinygrad alone would assume
clang and fail at the first kernel without it.
"""

import contextlib
import ctypes
import os
import platform
import shutil
import site
import sys
from pathlib import Path

from tinygrad import Device
from tinygrad.helpers import BEAM, CPU_COUNT, DEV, USE_TC, Context, getenv
from tinygrad.runtime.support.c import DLL

from .files import PicoError

EXTRA_HINT = "pip install 'pico_tg[cpu]' brings libLLVM, which is about five times faster"


def choose_backend() -> None:
    """Settle `tinygrad.Device.DEFAULT` and, on a CPU, its code generator. Idempotent."""
    if Device.DEFAULT.split(":")[0] != "CPU" or DEV.renderer not in ("", "LLVM", "CLANGJIT", "X86"):
        return
    library = find_llvm() if DEV.renderer in ("", "LLVM") else None
    if DEV.renderer and library is None:
        renderer = DEV.renderer
    elif library is not None:
        os.environ["LLVM_PATH"] = library
        getenv.cache_clear()  # tinygrad remembers variables, also that they were missing
        renderer = "LLVM"
    elif "CC" in os.environ or shutil.which("clang"):
        renderer = "CLANGJIT"
    else:
        renderer = "X86"
    if not DEV.arch:
        machine = platform.machine().lower()
        machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
        # AMX is tinygrad's word for vectors of 16 floats; with 4 a product is half as fast. The
        # matrix unit of that name is not meant: its kernels are asked for by TC, which is off.
        wide = "" if renderer == "X86" else ",AMX"
        DEV.value = f"CPU:{renderer}:{machine},native{wide}"
        os.environ["DEV"] = repr(DEV)  # for child processes
    if "AMX" in DEV.arch:
        USE_TC.value = 0


def parse_devices(text: str) -> tuple[str, ...]:
    """`--devices`: a number of the default backend's devices, or names such as CUDA:0,CUDA:1.

    Raises PicoError on anything else, and on a device that cannot be opened.
    """
    if text.isdigit() and int(text) > 0:
        devices = tuple(f"{Device.DEFAULT}:{i}" for i in range(int(text)))
    else:
        devices = tuple(text.split(","))
    for name in devices:
        try:
            Device[name]
        except Exception as error:  # each backend has exceptions of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PicoError(
                f"--devices {text}: cannot open {name!r} ({reason}); give a number, or names such "
                "as CUDA:0,CUDA:1"
            ) from error
    if len({Device.canonicalize(name) for name in devices}) < len(devices):
        raise PicoError(f"--devices {text} names a device twice")
    return tuple(Device.canonicalize(name) for name in devices)


def kernel_search(width: int | None) -> contextlib.AbstractContextManager:
    """While it lasts, tinygrad searches schedules for new kernels, `width` candidates at a time.

    None: as the environment's BEAM says. What is found is kept in tinygrad's cache. Kernels that
    bring a schedule of their own (kernels.py, on a CPU) are not searched. Raises PicoError on a
    width below 0.
    """
    if width is not None and width < 0:
        raise PicoError(f"beam must be at least 0 (no search), not {width}")
    return Context(BEAM=BEAM.value if width is None else width)


def find_llvm() -> str | None:
    """Path of a libLLVM that tinygrad can use: LLVM_PATH, the system's, or the extra `cpu`'s."""
    names = ["LLVM", *(f"LLVM-{version}" for version in range(21, 15, -1))]
    names += [f"/opt/homebrew/opt/llvm@{v}/lib/libLLVM.dylib" for v in range(21, 15, -1)]
    candidates = [DLL.findlib("llvm", [name]) for name in names]
    for folder in (Path(sys.prefix) / "lib", Path(site.getuserbase()) / "lib"):
        candidates.append(str(folder / "libLLVM.so"))
    return next((path for path in candidates if path and _usable(path)), None)


def _usable(path: str) -> bool:
    try:
        # LLVMGetVersion came with LLVM 16: tinygrad's code mixes pointer types, which 15 refuses
        return hasattr(ctypes.CDLL(path), "LLVMGetVersion")
    except OSError:
        return False


def describe_backend() -> str:
    """One line: the backend, and what would make it faster where that is known."""
    name = Device.DEFAULT
    if name.split(":")[0] != "CPU":
        return f"backend {name}"
    line = f"backend CPU ({DEV.renderer or 'default'}, {CPU_COUNT.value} threads)"
    return f"{line}; {EXTRA_HINT}" if DEV.renderer == "X86" else line
