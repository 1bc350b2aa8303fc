"""CUDA without a GPU: NVRTC compiles kernels to machine code, and reports what each one needs.

Needs the extra `nvrtc`. Nothing is run.
"""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

NO_NVRTC = "no NVRTC here (pip install 'pico_tg[nvrtc]' brings it for Linux)"
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers, used \d+ barriers(?:, (\d+) bytes smem)?",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What one thread of a kernel needs; of `shared`, all threads of a block together."""

    registers: int
    stack: int
    spilled: int  # bytes stored because registers did not suffice, and bytes loaded
    shared: int


@functools.cache
def find_nvrtc() -> tuple[Path, Path] | None:
    """The library, and the folder of CUDA's headers; None without the extra `nvrtc`."""
    package = importlib.util.find_spec("nvidia")
    for folder in map(Path, package.submodule_search_locations if package else []):
        library, headers = folder / "cuda_nvrtc/lib/libnvrtc.so.12", folder / "cuda_runtime/include"
        if library.is_file() and headers.is_dir():
            return library, headers
    return None


def compile_kernels(sources: list[str], architecture: str) -> dict[str, Usage]:
    """Compile kernels of different names, as one program. Raises ValueError with NVRTC's log."""
    library, headers = find_nvrtc()
    nvrtc, program, log = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_size_t()
    lines = [line for source in sources for line in source.splitlines()]
    shared = {line: None for line in lines if line.startswith("#")}  # includes, INFINITY, NAN
    parts = [*shared]
    for i, source in enumerate(sources):
        own = [line for line in source.splitlines() if line not in shared]
        parts += [f"namespace kernel{i} {{", *own, "}"]
    text = "\n".join(parts).encode()
    options = f"--gpu-architecture={architecture}", f"-I{headers}", "--ptxas-options=-v"
    strings = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), strings)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(log))
    report = ctypes.create_string_buffer(log.value)
    nvrtc.nvrtcGetProgramLog(program, report)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise ValueError(report.value.decode())
    found = {}
    for name, stack, stored, loaded, registers, smem in REPORT.findall(report.value.decode()):
        spilled = int(stored) + int(loaded)
        found[name] = Usage(int(registers), int(stack), spilled, int(smem or 0))
    assert len(found) == len(sources), "a report for each kernel"
    return found
