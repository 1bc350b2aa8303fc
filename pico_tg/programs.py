"""Schedules and compiled kernels, kept between processes.

tinygrad remembers on disk what the compiler made of a kernel's source, but in each process it cuts
the graph into kernels and writes their source anew, which takes many times as long. Here both are
remembered, in the same file (CACHEDB) and under the same switch (CACHELEVEL): from a graph to its
kernels, and from a kernel to its binary.
"""

import hashlib
import importlib.metadata
import pickle

import tinygrad.engine.realize
import tinygrad.schedule
from tinygrad.codegen import to_program
from tinygrad.helpers import ContextVar, diskcache_get, diskcache_put
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import CallInfo, Ops, UOp

# they decide what is printed or recorded, not what is made
IRRELEVANT = {"ALLOW_DEVICE_USAGE", "CAPTURING", "DEBUG", "JIT", "PROFILE", "TRACK_MATCH_STATS"}
# these run the list of operations itself, which is not kept
INTERPRETERS = ("PYTHON", "NULL", "DSP")
VERSION = importlib.metadata.version("tinygrad")

_known: dict[tuple, UOp] = {}


def install() -> None:
    """From now on tinygrad looks here first."""
    tinygrad.engine.realize.to_program = remembered_program
    tinygrad.schedule.schedule_cache = Schedules()
    # a graph's key must not hold where in memory a gradient's function happens to lie
    CallInfo.__repr__ = lambda self: f"CallInfo({self.__reduce__()[1]})"


class Schedules(dict):
    """tinygrad's table of schedules by the key of their graph, continued on disk."""

    def get(self, graph: bytes, default: UOp | None = None) -> UOp | None:
        """The schedule of a graph, `default` if it was never made."""
        if graph not in self:
            schedule = _recall("pico_schedules", graph)
            if schedule is None:
                return default
            super().__setitem__(graph, schedule)
        return self[graph]

    def __setitem__(self, graph: bytes, schedule: UOp) -> None:
        super().__setitem__(graph, schedule)
        _keep("pico_schedules", schedule, graph)


def remembered_program(ast: UOp, renderer: Renderer) -> UOp:
    """What `to_program` returns, less the list of operations, which nothing needs once compiled."""
    if renderer.target.device in INTERPRETERS:
        return to_program(ast, renderer)
    within = (ast.key, type(renderer).__name__, str(renderer.target))
    if (known := (*within, _options())) not in _known:
        program = _recall("pico_programs", *within)
        if program is None:
            program = _light(to_program(ast, renderer))
            _keep("pico_programs", program, *within)
        _known[known] = program
    return _known[known]


def _light(program: UOp) -> UOp:
    sink, device, _, source, binary = program.src
    return program.replace(src=(sink.replace(src=()), device, UOp(Ops.LINEAR), source, binary))


def _options() -> str:
    """All that the environment or `Context` may have set, as far as it matters."""
    return str(sorted((k, v.value) for k, v in ContextVar._cache.items() if k not in IRRELEVANT))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, _options(), *parts)).encode()).hexdigest()


def _recall(table: str, *parts: object) -> UOp | None:
    return diskcache_get(table, _key(*parts))


def _keep(table: str, value: UOp, *parts: object) -> None:
    diskcache_put(table, _key(*parts), pickle.dumps(value), prepickled=True)
