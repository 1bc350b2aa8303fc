"""Schedules and compiled kernels on disk, and a second process that compiles.

tinygrad 0.13 keeps on disk only the binary that a compiler made of a kernel's source. Each process
cuts its graphs into kernels and generates their source anew, which takes many times as long. Here
two tables in the same file (CACHEDB) keep the rest:

- pico_schedules: from a graph to its list of kernels, not compiled yet;
- pico_kernels: from a kernel to its program: binary, launch sizes, counts of operations and bytes.

The key of a graph or kernel is `UOp.key`, a hash of its operations, shapes, dtypes and constants.
Beside it, the key holds everything else that decides the value: tinygrad's version, all context
variables, the environment variables that tinygrad's code generation reads, and for a kernel the
renderer, its target, its compiler and the processor. So an entry never becomes invalid: what
differs has another key. A value that cannot be read counts as missing. The file only grows; it may
be deleted at any time. CACHELEVEL=0 turns both tables off.

Generating code is mostly Python's work, on one core. Where many kernels are missing, a worker (a
process of its own) compiles them from the last to the first and puts them into the file, while this
process starts with the first.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import tinygrad.engine.jit
import tinygrad.engine.realize
import tinygrad.schedule
from tinygrad import Device
from tinygrad.codegen import to_program
from tinygrad.engine.jit import TinyJit
from tinygrad.helpers import BEAM, CACHELEVEL, CPU_COUNT, DEBUG, Context, ContextVar, getenv
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import CallInfo, Ops, UOp

from . import cache_file

VERSION = importlib.metadata.version("tinygrad")
# context variables that decide what is printed, recorded or kept, not what is made
IRRELEVANT = {
    *("ALLOW_DEVICE_USAGE", "CACHELEVEL", "CAPTURING", "DEBUG", "JIT", "PROFILE"),
    "TRACK_MATCH_STATS",
}
# devices that run the list of operations itself, which the cache does not keep
INTERPRETERS = ("PYTHON", "NULL", "DSP")
# the least number of missing kernels that is worth a worker: it takes half a second to start
MIN_FOR_WORKER = 16

_programs: dict[tuple, UOp] = {}  # this process's copy of what it read or compiled


def install() -> None:
    """Make tinygrad use the cache, for the whole process.

    Replaces `to_program` and `compile_linear` in tinygrad.engine.realize, `compile_linear` in
    tinygrad.engine.jit, `TinyJit.add_linear`, `tinygrad.schedule.schedule_cache` and
    `CallInfo.__repr__`.
    """
    if isinstance(tinygrad.schedule.schedule_cache, Schedules):
        return
    tinygrad.schedule.schedule_cache = Schedules()
    tinygrad.engine.realize.to_program = cached_program
    compile_linear = tinygrad.engine.realize.compile_linear
    add_linear = TinyJit.add_linear

    def compile_with_worker(linear: UOp, beam: int | None = None, **options: Any) -> UOp:
        _use_worker(linear, BEAM.value if beam is None else beam)
        return compile_linear(linear, beam, **options)

    def add_with_worker(jit: TinyJit, linear: UOp, var_vals: dict) -> None:
        add_linear(jit, linear, var_vals)
        # the worker compiles while this process goes on recording
        _use_worker(linear, getenv("JITBEAM", BEAM.value))

    tinygrad.engine.realize.compile_linear = compile_with_worker
    tinygrad.engine.jit.compile_linear = compile_with_worker
    TinyJit.add_linear = add_with_worker
    # tinygrad's own holds id(grad_fxn), which differs between processes, and so would UOp.key
    CallInfo.__repr__ = lambda self: f"CallInfo({self.__reduce__()[1]})"


class Schedules(dict):
    """tinygrad's schedule cache, from a graph's key to its schedule, continued on disk."""

    def get(self, graph: bytes, default: UOp | None = None) -> UOp | None:
        """The schedule of the graph with this key, `default` if it was never made."""
        if graph not in self:
            schedule = _read("pico_schedules", _key(graph))
            if schedule is None:
                return default
            super().__setitem__(graph, schedule)
        return self[graph]

    def __setitem__(self, graph: bytes, schedule: UOp) -> None:
        super().__setitem__(graph, schedule)
        _write("pico_schedules", _key(graph), schedule)


def cached_program(ast: UOp, renderer: Renderer) -> UOp:
    """tinygrad's `to_program`: the compiled kernel, without the list of operations it came from."""
    # BEAM's candidates arrive compiled, in thousands; DEBUG >= 3 prints while it compiles
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
    # launching a kernel looks for its parameters and variables only
    kept = tuple(u for u in sink.toposort() if u.op in (Ops.PARAM, Ops.DEFINE_VAR))
    return program.replace(src=(sink.replace(src=kept), device, UOp(Ops.LINEAR), source, binary))


# Keys


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, _options(), *parts)).encode()).hexdigest()


def _kernel_key(ast: UOp, renderer: Renderer) -> str:
    # the target may say "native" only: the compiler's key, or else _processor, names the processor
    compiler = str(renderer.compiler.cachekey) if renderer.compiler else ""
    return _key(ast.key, type(renderer).__name__, str(renderer.target), compiler, _processor())


def _options() -> list[tuple[str, object]]:
    context = {k: v.value for k, v in ContextVar._cache.items() if k not in IRRELEVANT}
    return sorted((context | _environment()).items())


@functools.cache  # as tinygrad's getenv, which never reads a variable twice
def _environment() -> dict[str, str | None]:
    """The environment variables that tinygrad's code generation reads: its source names them."""
    root = Path(tinygrad.__file__).parent
    sources = [root / "dtype.py", *root.glob("runtime/support/compiler_*.py")]
    for folder in ("codegen", "renderer", "schedule", "uop"):
        sources += (root / folder).rglob("*.py")
    names = {n for s in sources for n in re.findall(r'getenv\("(\w+)"', s.read_text("utf-8"))}
    return {f"${name}": os.environ.get(name) for name in names}


@functools.cache
def _processor() -> str:
    """Name and instruction sets of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        lines = set()
    return hashlib.sha256(repr((platform.uname()[4:], sorted(lines))).encode()).hexdigest()


# Values


def _read(table: str, key: str) -> UOp | None:
    value = cache_file.read(table, key)
    if value is not None:
        with contextlib.suppress(Exception):  # damaged: unpickling raises anything
            found = pickle.loads(value)
            return found if isinstance(found, UOp) else None
    return None


def _write(table: str, key: str, value: UOp) -> None:
    if CACHELEVEL >= 1:
        cache_file.write(table, key, pickle.dumps(value))


# Worker


def _use_worker(linear: UOp, beam: int) -> None:
    """Let the worker compile the kernels of a schedule, from the last, where many are missing.

    It compiles for the device CPU only, whose compiler needs no driver. It leaves BEAM alone, which
    runs what it compiles. CPU_COUNT=1 and CACHELEVEL=0 do without a worker.
    """
    if CACHELEVEL < 1 or CPU_COUNT.value == 1 or DEBUG >= 3 or beam:
        return
    asts = [call.src[0] for call in linear.src if call.device == "CPU"]
    asts = [ast for ast in asts if ast.op in (Ops.SINK, Ops.PROGRAM) and not _is_compiled(ast)]
    if len(asts) < MIN_FOR_WORKER:
        return
    with Context(ALLOW_DEVICE_USAGE=1):
        renderer = Device["CPU"].renderer
    missing = {}
    for ast in asts:
        key = _kernel_key(ast, renderer)
        if key not in _programs and not cache_file.contains("pico_kernels", key):
            missing[key] = ast
    if len(missing) >= MIN_FOR_WORKER:
        _worker().send(missing)


class _Worker:
    """A process that runs `work` on the kernels that it receives, and ends with this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._sent: set[str] = set()
        self._messages: queue.SimpleQueue = queue.SimpleQueue()
        command = [sys.executable, "-P", "-c", "from pico_tg.jit_cache import work; work()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        atexit.register(self._end)
        threading.Thread(target=self._write, daemon=True).start()

    def send(self, kernels: dict[str, UOp]) -> None:
        """Give it those of the kernels, by key, that it did not receive before."""
        kernels = {key: ast for key, ast in kernels.items() if key not in self._sent}
        self._sent |= kernels.keys()
        if kernels:
            context = {name: variable.value for name, variable in ContextVar._cache.items()}
            self._messages.put((context, list(kernels.values())))

    def _write(self) -> None:
        """In a thread: the pipe may be full, and the worker busy."""
        with contextlib.suppress(Exception):  # then there is no worker; this process compiles all
            while True:
                message = pickle.dumps(self._messages.get())
                self._process.stdin.write(len(message).to_bytes(8, "little") + message)
                self._process.stdin.flush()

    def _end(self) -> None:
        if os.getpid() == self.owner:
            self._process.kill()
            self._process.wait()


_workers: list[_Worker] = []
_starting = threading.Lock()


def _worker() -> _Worker:
    with _starting:
        # a process that was forked from the owner must not write into the owner's pipe
        if not _workers or _workers[-1].owner != os.getpid():
            _workers.append(_Worker())
        return _workers[-1]


def work() -> None:
    """The worker's program: compile what arrives on stdin, the last first, until stdin closes."""
    cache_file.share_cache_file()
    messages: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        # bytes only: tinygrad's table of UOps, into which unpickling writes, is not thread-safe
        while size := sys.stdin.buffer.read(8):
            messages.put(sys.stdin.buffer.read(int.from_bytes(size, "little")))
        os._exit(0)  # the other process has ended

    threading.Thread(target=receive, daemon=True).start()
    kernels: list[tuple[dict, UOp]] = []
    while True:
        while not (kernels and messages.empty()):
            context, asts = pickle.loads(messages.get())
            kernels += [(context, ast) for ast in asts]
        context, ast = kernels.pop()
        # the other process meets the same error, and reports it
        with contextlib.suppress(Exception), Context(**context):
            cached_program(ast, Device["CPU"].renderer)
