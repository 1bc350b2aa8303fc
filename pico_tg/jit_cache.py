"""Schedules and compiled kernels, kept between processes, and made by two of them.

tinygrad remembers on disk what the compiler made of a kernel's source, but in each process it cuts
the graph into kernels and writes their source anew, which takes many times as long. Here both are
remembered, in the same file (CACHEDB) and under the same switch (CACHELEVEL): from a graph to its
kernels, and from a kernel to its binary.

Making a kernel is mostly Python's work, and so one core's. Where many are to be made, a forked
process begins with the last ones, and the two meet in that file.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import os
import pickle
import platform
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import tinygrad.engine.jit
import tinygrad.engine.realize
import tinygrad.helpers
import tinygrad.schedule
from tinygrad import Device
from tinygrad.codegen import to_program
from tinygrad.helpers import (
    BEAM,
    CACHELEVEL,
    CPU_COUNT,
    DEBUG,
    Context,
    ContextVar,
    diskcache_get,
    diskcache_put,
    getenv,
)
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import CallInfo, Ops, UOp

# they decide what is printed or recorded, not what is made
IRRELEVANT = {"ALLOW_DEVICE_USAGE", "CAPTURING", "DEBUG", "JIT", "PROFILE", "TRACK_MATCH_STATS"}
# what else tinygrad reads from the environment and what it makes depends on
VARIABLES = (
    *("ALIGNED", "ALLOW_HALF8", "EXPAND_SSA", "IGNORE_BEAM_CACHE", "LATE_ALLREDUCE", "LLVMOPT"),
    *("MV", "MV_BLOCKSIZE", "MV_ROWS_PER_THREAD", "MV_THREADS_PER_ROW", "REDUCEOP_SPLIT_SIZE"),
    *("REDUCEOP_SPLIT_THRESHOLD", "RING_ALLREDUCE_THRESHOLD", "THREADS", "UNSAFE_DISABLE_MASK"),
)
# these run the list of operations itself, which is not kept
INTERPRETERS = ("PYTHON", "NULL", "DSP")
VERSION = importlib.metadata.version("tinygrad")

# from so many new kernels on, a second process pays
MANY = 16

_known: dict[tuple, UOp] = {}
_helpers: list[int] = []  # the process that helps, if there is one


def install() -> None:
    """From now on tinygrad looks here first."""
    tinygrad.engine.realize.to_program = remembered_program
    compile_linear = tinygrad.engine.realize.compile_linear
    for module in (tinygrad.engine.realize, tinygrad.engine.jit):
        module.compile_linear = functools.partial(_with_help, compile_linear)
    add_linear = tinygrad.engine.jit.TinyJit.add_linear

    def add_and_begin(jit: tinygrad.engine.jit.TinyJit, linear: UOp, var_vals: dict) -> None:
        add_linear(jit, linear, var_vals)
        _begin_help(linear, getenv("JITBEAM", BEAM.value))  # what TinyJit will use

    call = tinygrad.engine.jit.TinyJit.__call__

    def call_and_end(jit: tinygrad.engine.jit.TinyJit, *args, **kwargs):
        try:
            return call(jit, *args, **kwargs)
        finally:
            _end_help()  # recording may have failed

    tinygrad.engine.jit.TinyJit.add_linear = add_and_begin
    tinygrad.engine.jit.TinyJit.__call__ = call_and_end
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
    # what is finished is a candidate of --beam: thousands of them would be kept
    if _finished(ast) or renderer.target.device in INTERPRETERS or DEBUG >= 3:  # that prints
        return to_program(ast, renderer)
    within = _circumstances(ast, renderer)
    if (known := (*within, _options())) not in _known:
        program = _recall("pico_kernels", *within)
        if program is None:
            program = _light(to_program(ast, renderer))
            _keep("pico_kernels", program, *within)
        _known[known] = program
    return _known[known]


def _finished(ast: UOp) -> bool:
    return ast.op is Ops.PROGRAM and len(ast.src) == 5


def _circumstances(ast: UOp, renderer: Renderer) -> tuple:
    # the target may only say "native": the compiler's key tells processors apart, or we do
    compiler = str(renderer.compiler.cachekey) if renderer.compiler else ""
    return ast.key, type(renderer).__name__, str(renderer.target), compiler, _processor()


def _with_help(compile_linear: Callable[..., UOp], linear: UOp, beam: int | None = None, **rest):
    """`compile_linear`, with a forked process that makes kernels of the list as well."""
    begun = _begin_help(linear, BEAM.value if beam is None else beam)
    try:
        return compile_linear(linear, beam, **rest)
    finally:
        if begun:
            _end_help()  # by now all is made; it may be at the last one still


def _begin_help(linear: UOp, beam: int) -> bool:
    """From now on a process of its own makes the kernels of this list, from the last on.

    While TinyJit records, that is of use before the list is complete. It is for those of the first
    CPU device only, whose compiler needs nothing but memory, and not for a search, which runs what
    it makes and needs the threads that a fork leaves behind. CPU_COUNT=1 and CACHELEVEL=0 do
    without, and so does a short list.
    """
    if sys.platform != "linux" or CACHELEVEL < 1 or CPU_COUNT.value == 1 or DEBUG >= 3 or beam:
        return False
    kernels = [call.src[0] for call in linear.src if call.device == "CPU"]
    kernels = [k for k in kernels if k.op in (Ops.SINK, Ops.PROGRAM) and not _finished(k)]
    if len(kernels) < MANY:
        return False
    _end_help()
    _fork(list(dict.fromkeys(kernels)))
    return True


def _end_help() -> None:
    while _helpers:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(_helpers[-1], signal.SIGKILL)
            os.waitpid(_helpers[-1], 0)
        _helpers.pop()


def _fork(asts: list[UOp]) -> None:
    """A process that makes those of these that are not made yet, from the last on; none if there is
    no need, or no room."""
    with Context(ALLOW_DEVICE_USAGE=1):
        renderer = Device["CPU"].renderer
    options = _options()
    missing = [a for a in asts if (*_circumstances(a, renderer), options) not in _known]
    if len(missing) < MANY:
        return
    # two looks tell, as a rule: all of a list is in the file, or hardly any but what the last
    # helper made, from the end on
    looks = (missing[0], missing[len(missing) // 2])
    if all(_recall("pico_kernels", *_circumstances(a, renderer)) is not None for a in looks):
        return
    # a connection must not be carried into another process; it is made again when it is needed
    if connection := tinygrad.helpers._db_connection:
        connection.close()
        tinygrad.helpers._db_connection = None
    # signals are for this process, which has not got its helper's number yet
    signals = (signal.SIGINT, signal.SIGTERM)
    before, us = signal.pthread_sigmask(signal.SIG_BLOCK, signals), os.getpid()
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            helper = os.fork()  # Python 3.12 warns of threads: the helper needs none
        if helper == 0:
            _help(missing, renderer, us, before)
        _helpers.append(helper)
    except OSError:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _help(asts: list[UOp], renderer: Renderer, parent: int, mask: set[int]) -> NoReturn:
    """In the forked process, which leaves nothing behind and does not outlive the other."""
    with contextlib.suppress(BaseException):
        gc.disable()  # what is freed may belong to a device
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for ast in reversed(asts):
            if os.getppid() != parent:
                break
            remembered_program(ast, renderer)
    os._exit(0)


def _light(program: UOp) -> UOp:
    sink, device, _, source, binary = program.src
    # launching a kernel looks for its parameters and variables
    kept = tuple(u for u in sink.toposort() if u.op in (Ops.PARAM, Ops.DEFINE_VAR))
    return program.replace(src=(sink.replace(src=kept), device, UOp(Ops.LINEAR), source, binary))


@functools.cache
def _processor() -> str:
    """Name and abilities of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        lines = set()
    return hashlib.sha256(repr((platform.uname()[4:], sorted(lines))).encode()).hexdigest()


def _options() -> str:
    """What the environment or `Context` may have set, as far as it matters."""
    options = [(k, v.value) for k, v in ContextVar._cache.items() if k not in IRRELEVANT]
    return str(sorted(options + [(k, os.environ.get(k)) for k in VARIABLES], key=lambda o: o[0]))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, _options(), *parts)).encode()).hexdigest()


def _recall(table: str, *parts: object) -> UOp | None:
    """None as well where the file is damaged: what is in it can be made again."""
    with contextlib.suppress(Exception):
        found = diskcache_get(table, _key(*parts))
        return found if isinstance(found, UOp) else None


def _keep(table: str, value: UOp, *parts: object) -> None:
    if CACHELEVEL >= 1:
        with contextlib.suppress(sqlite3.Error):  # a full disk is no reason to stop
            diskcache_put(table, _key(*parts), pickle.dumps(value), prepickled=True)
