"""A cache of schedules and compiled kernels on disk.

tinygrad 0.13 caches on disk only the binary that a compiler made of a kernel's source. Each process
schedules its graphs and generates source code again, which takes many times as long as compiling.
Here three tables in the same file (CACHEDB) cache the rest:

- pico_schedules_3: from a graph to its list of kernels, of which those of cpu/ are compiled; graphs
  on several devices are left out where `_has_numbered_buffers`;
- pico_kernels: from a kernel to its program: binary, launch sizes, counts of operations and bytes;
- pico_captured_2: from a method of an object to the graph that `StoredGraph` captured of it.

The key of a graph or kernel is `UOp.key`, a hash of its operations, shapes, dtypes and constants.
The key also includes everything else that determines the value: tinygrad's version, all context
variables, the environment variables that tinygrad's code generation reads, and for a kernel the
renderer, its target, its compiler and the processor. So no entry becomes invalid: a different
setting has a different key. The key of a captured method includes the source of this package in
place of operations, so that a second process builds no graph. A value that cannot be read counts as
missing. The file may be deleted at any time; cache_file.py empties a large one. CACHELEVEL=0 turns
all tables off.
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
from tinygrad import Device, Tensor, helpers
from tinygrad.codegen import do_to_program, to_program
from tinygrad.engine.jit import CapturedJit
from tinygrad.helpers import CACHELEVEL, DEBUG, JIT, ContextVar, getenv
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import CallInfo, Ops, UOp, buffers

from .machine import processor

VERSION = importlib.metadata.version("tinygrad")
# context variables that affect what is printed, recorded or cached, but not the result
IRRELEVANT = {
    *("ALLOW_DEVICE_USAGE", "CACHELEVEL", "CAPTURING", "DEBUG", "JIT", "PROFILE"),
    "TRACK_MATCH_STATS",
}
# devices that interpret a kernel's list of operations, which the cache does not store
INTERPRETERS = ("PYTHON", "NULL", "DSP")

# whether graphs of training and validation are kept, too (`device.enable_compile_cache`)
training_graphs = False

_programs: dict[str, UOp] = {}  # the kernels that this process has read or compiled, by key


def installed() -> bool:
    return isinstance(tinygrad.schedule.schedule_cache, Schedules)


def install() -> None:
    """Make tinygrad use the cache, for the whole process.

    Replaces `to_program` in tinygrad.engine.realize, `tinygrad.schedule.schedule_cache` and
    `CallInfo.__repr__`.
    """
    if installed():
        return
    _source()  # now: later the files may no longer be those that were imported
    tinygrad.schedule.schedule_cache = Schedules()
    tinygrad.engine.realize.to_program = cached_program
    # tinygrad's __repr__ includes id(grad_fxn), so UOp.key would differ between processes
    CallInfo.__repr__ = lambda self: f"CallInfo({self.__reduce__()[1]})"


class Schedules(dict):
    """tinygrad's schedule cache, from a graph's key to its schedule, backed by the file."""

    def get(self, graph: bytes, default: UOp | None = None) -> UOp | None:
        """The schedule of the graph with this key; `default` if no schedule is cached."""
        if graph not in self:
            schedule = _read("pico_schedules_3", _key(graph))
            if schedule is None:
                return default
            super().__setitem__(graph, schedule)
        return self[graph]

    def __setitem__(self, graph: bytes, schedule: UOp) -> None:
        super().__setitem__(graph, schedule)
        if not _has_numbered_buffers(schedule):
            _write("pico_schedules_3", _key(graph), schedule)


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
    # compiled already, as a kernel of cpu/ or one of BEAM's thousands of candidates
    if ast.op is Ops.PROGRAM and len(ast.src) == 5:
        return ast
    if renderer.target.device in INTERPRETERS or DEBUG >= 3:  # which prints while compiling
        return to_program(ast, renderer)
    key = _key(ast.key, *_target(renderer))
    if key not in _programs:
        program = _read("pico_kernels", key)
        if program is None:
            # not `to_program`, which would keep the operations in memory
            program = without_operations(do_to_program(ast, renderer))
            _write("pico_kernels", key, program)
        _programs[key] = program
    return _programs[key]


def without_operations(program: UOp) -> UOp:
    """A compiled kernel as its binary and what launching it takes: no operations, no source."""
    sink, device, _, _, binary = program.src
    # launching a kernel needs only its parameters and variables
    kept = tuple(u for u in sink.toposort() if u.op in (Ops.PARAM, Ops.DEFINE_VAR))
    none = UOp(Ops.LINEAR), UOp(Ops.SOURCE, arg="")
    return program.replace(src=(sink.replace(src=kept), device, *none, binary))


class StoredGraph:
    """What TinyJit captures of a method, kept in the file.

    The buffers of a captured graph are those of `tensors` and of the inputs, and buffers that the
    capture makes. In the file each has a number; `load` puts the buffers of this process in their
    place.
    """

    def __init__(self, name: str, tensors: list[Tensor]) -> None:
        """name: with the shapes of tensors and inputs, it determines what the method computes."""
        self.name, self.tensors = name, tensors

    def load(self, inputs: list[Tensor]) -> CapturedJit | None:
        """The stored graph, for the buffers of this process. Called before the first call."""
        self.tensors = [*self.tensors, *inputs]
        self.known: dict[UOp, int] = {}  # the number of each buffer; tensors may share one
        numbers = [self.known.setdefault(x.uop.base, len(self.known)) for x in self.tensors]
        shapes = [(x.shape, x.dtype, x.device) for x in self.tensors]
        settings = JIT.value, getenv("JITBEAM"), Tensor.training  # TinyJit reads JITBEAM
        renderer = Device[self.tensors[0].device].renderer
        self.key = _key(self.name, shapes, numbers, _source(), settings, *_target(renderer))
        self.before = set(buffers)
        stored = _read("pico_captured_2", self.key)
        if stored is None:
            return None
        known, new = list(self.known), {}
        for uop in stored.toposort():
            if uop.op is Ops.BUFFER:
                number, device = (source.arg for source in uop.src)
                made = number >= len(known)
                new[uop] = UOp.new_buffer(device, uop.arg, uop.dtype) if made else known[number]
        linear, *results = _replaced(stored, new).src
        results = tuple(map(Tensor, results))
        return CapturedJit(results if len(results) > 1 else results[0], linear, [], [])

    def store(self, captured: CapturedJit) -> None:
        """Store a graph, unless it has a buffer that is none of `tensors` and was there before."""
        results = captured.ret if isinstance(captured.ret, tuple) else (captured.ret,)
        graph = UOp(Ops.TUPLE, src=(captured.linear, *(tensor.uop for tensor in results)))
        found = [uop for uop in graph.toposort() if uop.op is Ops.BUFFER]
        made = [uop for uop in found if uop not in self.known]
        if not self.before.isdisjoint(made):
            return
        numbered = {
            uop: uop.replace(src=(UOp(Ops.LUNIQUE, arg=i), uop.src[1]))
            for i, uop in enumerate([*self.known, *made])
        }
        _write("pico_captured_2", self.key, _replaced(graph, numbered))


def _replaced(graph: UOp, new: dict[UOp, UOp]) -> UOp:
    """The graph with `new[uop]` in place of each of its operations `uop`."""
    done: dict[UOp, UOp] = {}
    for uop in graph.toposort():
        sources = tuple(done[source] for source in uop.src)
        done[uop] = new[uop] if uop in new else uop.replace(src=sources)
    return done[graph]


# Keys


@functools.cache
def _source() -> str:
    """A hash of the source of this package."""
    root = Path(__file__).parents[1]
    files = [path for path in root.rglob("*") if path.suffix in (".py", ".in") and path.is_file()]
    parts = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(files)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, _options(), *parts)).encode()).hexdigest()


def _target(renderer: Renderer) -> list[str]:
    # the target may be just "native": the compiler's key or `processor` identifies the processor
    compiler = str(renderer.compiler.cachekey) if renderer.compiler else ""
    return [type(renderer).__name__, str(renderer.target), compiler, processor()]


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
