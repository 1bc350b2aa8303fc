"""A cache of schedules and compiled kernels on disk.

tinygrad 0.13 caches on disk only the binary that a compiler made of a kernel's source. Each process
schedules its graphs and generates source code again, which takes many times as long as compiling.
Here two tables in the same file (CACHEDB) cache the rest:

- pico_schedules_2: from a graph to its list of kernels, not compiled yet; graphs on several devices
  are left out where `_has_numbered_buffers`;
- pico_kernels: from a kernel to its program: binary, launch sizes, counts of operations and bytes.

The key of a graph or kernel is `UOp.key`, a hash of its operations, shapes, dtypes and constants.
The key also includes everything else that determines the value: tinygrad's version, all context
variables, the environment variables that tinygrad's code generation reads, and for a kernel the
renderer, its target, its compiler and the processor. So no entry becomes invalid: a different
setting has a different key. A value that cannot be read counts as missing. The file may be
deleted at any time; cache_file.py empties a large one. CACHELEVEL=0 turns both tables off.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import re
from pathlib import Path

import tinygrad.engine.realize
import tinygrad.schedule
from tinygrad import helpers
from tinygrad.codegen import to_program
from tinygrad.helpers import CACHELEVEL, DEBUG, ContextVar
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import CallInfo, Ops, UOp

from .machine import processor

VERSION = importlib.metadata.version("tinygrad")
# context variables that affect what is printed, recorded or cached, but not the result
IRRELEVANT = {
    *("ALLOW_DEVICE_USAGE", "CACHELEVEL", "CAPTURING", "DEBUG", "JIT", "PROFILE"),
    "TRACK_MATCH_STATS",
}
# devices that interpret a kernel's list of operations, which the cache does not store
INTERPRETERS = ("PYTHON", "NULL", "DSP")

_programs: dict[str, UOp] = {}  # the kernels that this process has read or compiled, by key


def install() -> None:
    """Make tinygrad use the cache, for the whole process.

    Replaces `to_program` in tinygrad.engine.realize, `tinygrad.schedule.schedule_cache` and
    `CallInfo.__repr__`.
    """
    if isinstance(tinygrad.schedule.schedule_cache, Schedules):
        return
    tinygrad.schedule.schedule_cache = Schedules()
    tinygrad.engine.realize.to_program = cached_program
    # tinygrad's __repr__ includes id(grad_fxn), so UOp.key would differ between processes
    CallInfo.__repr__ = lambda self: f"CallInfo({self.__reduce__()[1]})"


class Schedules(dict):
    """tinygrad's schedule cache, from a graph's key to its schedule, backed by the file."""

    def get(self, graph: bytes, default: UOp | None = None) -> UOp | None:
        """The schedule of the graph with this key; `default` if no schedule is cached."""
        if graph not in self:
            schedule = _read("pico_schedules_2", _key(graph))
            if schedule is None:
                return default
            super().__setitem__(graph, schedule)
        return self[graph]

    def __setitem__(self, graph: bytes, schedule: UOp) -> None:
        super().__setitem__(graph, schedule)
        if not _has_numbered_buffers(schedule):
            _write("pico_schedules_2", _key(graph), schedule)


def _has_numbered_buffers(schedule: UOp) -> bool:
    """Whether a buffer in the schedule is named by a number that is unique in this process only.

    On several devices this happens (tinygrad 0.13). Another process may have given that number to
    another buffer; if it reads the schedule, one buffer overwrites the other.
    (test_jit_cache.test_buffers_with_a_number_of_this_process_are_not_stored)
    """
    for call in schedule.src:
        kernel, *arguments = call.src
        buffers = {u for argument in arguments for u in argument.toposort()}
        if any(u.op is Ops.UNIQUE for u in buffers):
            return True
        if kernel.op is Ops.LINEAR and _has_numbered_buffers(kernel):
            return True
    return False


def cached_program(ast: UOp, renderer: Renderer) -> UOp:
    """tinygrad's `to_program`, cached: the compiled kernel without its list of operations."""
    # BEAM passes thousands of compiled candidates; DEBUG >= 3 prints while compiling
    if _is_compiled(ast) or renderer.target.device in INTERPRETERS or DEBUG >= 3:
        return to_program(ast, renderer)
    key = _kernel_key(ast, renderer)
    if key not in _programs:
        program = _read("pico_kernels", key)
        if program is None:
            program = _without_operations(to_program(ast, renderer))
            _write("pico_kernels", key, program)
        _programs[key] = program
    return _programs[key]


def _is_compiled(ast: UOp) -> bool:
    return ast.op is Ops.PROGRAM and len(ast.src) == 5


def _without_operations(program: UOp) -> UOp:
    sink, device, _, source, binary = program.src
    # launching a kernel needs only its parameters and variables
    kept = tuple(u for u in sink.toposort() if u.op in (Ops.PARAM, Ops.DEFINE_VAR))
    return program.replace(src=(sink.replace(src=kept), device, UOp(Ops.LINEAR), source, binary))


# Keys


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, _options(), *parts)).encode()).hexdigest()


def _kernel_key(ast: UOp, renderer: Renderer) -> str:
    # the target may be just "native": the compiler's key or `processor` identifies the processor
    compiler = str(renderer.compiler.cachekey) if renderer.compiler else ""
    return _key(ast.key, type(renderer).__name__, str(renderer.target), compiler, processor())


def _options() -> list[tuple[str, object]]:
    context = {k: v.value for k, v in ContextVar._cache.items() if k not in IRRELEVANT}
    return sorted((context | _environment()).items())


@functools.cache  # like tinygrad's getenv, which reads each variable once
def _environment() -> dict[str, str | None]:
    """The environment variables that tinygrad's code generation reads: its source names them."""
    root = Path(tinygrad.__file__).parent
    sources = [root / "dtype.py", *root.glob("runtime/support/compiler_*.py")]
    for folder in ("codegen", "renderer", "schedule", "uop"):
        sources += (root / folder).rglob("*.py")
    names = {n for s in sources for n in re.findall(r'getenv\("(\w+)"', s.read_text("utf-8"))}
    return {f"${name}": os.environ.get(name) for name in names}


# Values


def _read(table: str, key: str) -> UOp | None:
    value = helpers.diskcache_get(table, key)
    with contextlib.suppress(Exception):  # None, or damaged: unpickling raises anything
        found = pickle.loads(value)
        return found if isinstance(found, UOp) else None
    return None


def _write(table: str, key: str, value: UOp) -> None:
    if CACHELEVEL >= 1:
        # bytes, which are quickly unpickled to see whether they are damaged (cache_file.py)
        helpers.diskcache_put(table, key, pickle.dumps(value))
