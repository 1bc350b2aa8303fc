"""Launch a captured graph on the CPU in one native call.

tinygrad 0.13 executes each kernel of a captured graph from Python: a wait, an exec and a signal,
and for a kernel of several threads a queue.Queue.put, a GIL hand-over, a wake-up and a join for
each thread: 50 to 300 µs per kernel. Here the graph becomes a table with one row per kernel
(function, shares, arguments), and one native function runs all rows of the table. A row with 0
shares is a jump: an integer that an earlier kernel wrote selects the next row.

A kernel of T threads has T shares, numbered by the kernel's argument `core_id`. The calling thread
and the helper threads claim shares from one atomic counter, so any subset of the threads completes
a kernel, and a helper that is descheduled before it claims a share delays no other thread. Threads
without work spin briefly and then sleep in a futex, which leaves the cores to other processes.

The graph runs in the calling thread, after all work submitted earlier; results are in memory when
the call returns. tinygrad's own graph handles all other cases: tinygrad's assembler, clang before
version 15, other systems than Linux, copies, symbolic launch sizes, PROFILE, DEBUG >= 2.
"""

import ctypes
import functools
import mmap
import os
import platform
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Device, GlobalCounters
from tinygrad.device import CompileError
from tinygrad.engine import realize
from tinygrad.engine.jit import CapturedJit, GraphRunner, create_graph_call
from tinygrad.helpers import CPU_COUNT, DEBUG, PROFILE, getenv, mv_address
from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.compiler_cpu import ClangJITCompiler, CPULLVMCompiler
from tinygrad.uop.ops import Ops, UOp

from ..backend.machine import cgroup_limit, processor, renderer_of
from . import codegen

# A kernel's row: function, shares, arguments passed, position of core_id, arguments' address.
# A jump's row: address of the choice (int32), 0, unused, unused, address of the targets: the next
# row for each choice (int64).
ROW = 5  # int64s
# Numbers of arguments. A kernel is called with the least that suffices. By the calling conventions
# of x86-64 and arm64, a function does not see arguments that it does not expect.
CALLS = 4, 8, 12, 16, 24, 32, 48, 64, 96
MAX_ARGUMENTS = CALLS[-1]
SPIN = 2000  # polls before a thread sleeps, about 20 to 80 µs
# byte offsets in the shared state, each in a separate cache line to avoid false sharing
STATE = {"TICKET": 0, "DONE": 64, "SEQUENCE": 128, "SLEEPERS": 192, "WAITING": 256, "KERNEL": 320}
STATE_BYTES = 512
FUTEX = {"x86_64": 202, "aarch64": 98}  # the number of the system call
PAUSE = {"x86_64": "pause", "aarch64": "yield"}


class NativeGraph(HCQGraph):
    """A captured graph of kernels of one CPU device, launched natively if possible."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        GraphRunner.__init__(self, linear, input_uops)
        self.launcher = _launcher() if self._is_plain() else None
        if self.launcher is None:
            super().__init__(linear, input_uops)
            return
        self.cpu = self.runtimes[0].dev
        rows = np.zeros((len(self.calls), ROW), np.int64)
        arguments: list[int] = []
        self.inputs: list[tuple[int, int]] = []  # (place among the arguments, number of the input)
        self.values: list[tuple[int, str]] = []  # (place among the arguments, variable's name)
        starts = []
        for row, (_, ast, buffers, fixed), runtime, replaced in zip(
            rows, self.calls, self.runtimes, self.uop_replace, strict=True
        ):
            start = len(arguments)
            starts.append(start)
            self.inputs += [(start + position, number) for position, number in replaced]
            arguments += [buffer._buf.va_addr for buffer in buffers]
            core = -1
            for variable in ast.arg.vars:
                if variable.expr in runtime.runtimevars:  # core_id
                    core = len(arguments) - start
                elif variable.expr not in fixed:
                    self.values.append((len(arguments), variable.expr))
                arguments.append(fixed.get(variable.expr, 0))
            function = ctypes.cast(runtime.fxn, ctypes.c_void_p).value
            shares = (ast.arg.global_size or (1,))[0]
            number = len(arguments) - start
            passed = next(n for n in CALLS if n >= number)
            arguments += [0] * (passed - number)
            row[:4] = function, shares, passed, core
        self.arguments = np.array(arguments, np.int64)
        rows[:, 4] = self.arguments.ctypes.data + 8 * np.array(starts)
        self.rows = rows
        self.table = rows.ctypes.data, len(rows)

    def _is_plain(self) -> bool:
        if PROFILE or DEBUG >= 2:
            return False
        devices = {buffer.device for _, _, buffers, _ in self.calls for buffer in buffers}
        if len(devices) != 1 or not devices.pop().startswith("CPU"):
            return False
        return all(
            type(runtime) is CPUProgram
            and runtime.kernargs_alloc_size == 0
            and len(buffers) + len(ast.arg.vars) <= MAX_ARGUMENTS
            and all(isinstance(size, int) for size in ast.arg.global_size or ())
            for (_, ast, buffers, _), runtime in zip(self.calls, self.runtimes, strict=True)
        )

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        """Run all kernels, with `input_uops` in place of the graph's inputs."""
        if self.launcher is None:
            return super().__call__(input_uops, var_vals, wait)
        start = time.perf_counter()
        with self.launcher.lock:
            self.cpu.synchronize()
            for place, number in self.inputs:
                self.arguments[place] = input_uops[number].buffer._buf.va_addr
            for place, name in self.values:
                self.arguments[place] = var_vals[name]
            self.launcher.run(*self.table)
        return time.perf_counter() - start if wait else None

    def count(self) -> None:
        """Count the kernels of one run; tinygrad's own replay counts a graph as one kernel."""
        GlobalCounters.kernel_count += len(self.rows)
        GlobalCounters.global_ops += self.estimates.ops
        GlobalCounters.global_mem += self.estimates.mem

    def __del__(self) -> None:
        if self.launcher is None:
            super().__del__()


class Launcher:
    """The native functions, their shared state, and the threads that help."""

    def __init__(self, library: bytes, helpers: int) -> None:
        self.lock = threading.Lock()
        # private: nothing is shared with a forked child
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self.code = mmap.mmap(-1, len(library), private, executable)
        self.code.write(library)
        first = mv_address(self.code)
        if CPUProgram.rt_lib is not None:
            clear_cache = CPUProgram.rt_lib["__clear_cache"]
            clear_cache(ctypes.c_void_p(first), ctypes.c_void_p(first + len(library)))
        self.native = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(first)
        self.memory = mmap.mmap(-1, STATE_BYTES, private)  # zeros
        self.state = mv_address(self.memory)
        self.syscall = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value
        for _ in range(helpers):
            threading.Thread(target=self._help, daemon=True).start()

    def _help(self) -> None:
        """A helper thread's work. The frame keeps the code and the state in memory until exit."""
        self.native(self.state, 0, 0, self.syscall)

    def run(self, rows: int, count: int) -> None:
        """Run the `count` kernels of the table at address `rows`, in order.

        One native call: Python's signal handlers run before it or after it, never between two
        kernels, where an exception would leave half an optimizer step behind.
        """
        self.native(self.state, rows, count, self.syscall)


def serves() -> bool:
    """Whether graphs are launched natively here: threads then cost about 1 µs per kernel."""
    return _launcher() is not None


def worth_threads(elements: int) -> bool:
    """Whether threads make a copy or a sum of so many elements faster.

    Without the launcher, tinygrad starts them from Python, which takes as long as 2^19 elements.
    """
    return elements >= (codegen.SHARED if serves() else 1 << 19)


def install(device: str) -> None:
    """Make all graphs that are captured on this CPU device from now on `NativeGraph`s."""
    if serves():
        Device[device].graph = NativeGraph
        codegen.install()


def native_graphs(captured: CapturedJit) -> list[NativeGraph] | None:
    """The graphs of `captured`, which has no inputs; None unless all calls are native graphs."""
    graphs = []
    for call in captured.linear.src:
        ast = call.src[0]
        if ast.op is Ops.PROGRAM:  # tinygrad makes no graph of a batch of one kernel
            ast = create_graph_call([call]).src[0]
        if ast.op is not Ops.CUSTOM_FUNCTION or ast.arg != "graph":
            return None
        graph = realize.get_graph_runtime(ast, ())
        if not isinstance(graph, NativeGraph) or graph.launcher is None:
            return None
        graphs.append(graph)
    return graphs


class Table:
    """Rows of kernels and jumps of one CPU device; calling it runs them in one native call."""

    def __init__(self, graph: NativeGraph, rows: list[np.ndarray]) -> None:
        """graph: any one of the device; the caller keeps the graphs of all rows in memory."""
        self.launcher, self.cpu = graph.launcher, graph.cpu
        self.rows = np.array(rows, np.int64)
        self.place = self.rows.ctypes.data, len(self.rows)

    def __call__(self) -> None:
        with self.launcher.lock:  # the launcher runs one table at a time
            self.cpu.synchronize()  # what tinygrad's own queue still has to run comes first
            self.launcher.run(*self.place)


def rows_of(graphs: list[NativeGraph]) -> list[np.ndarray]:
    return [row for graph in graphs for row in graph.rows]


def native_replay(captured: CapturedJit) -> Callable[[], None] | None:
    """`captured([], {})` in one native call; None unless all its calls are native graphs."""
    graphs = native_graphs(captured)
    if graphs is None:
        return None
    table = Table(graphs[0], rows_of(graphs))

    def replay() -> None:
        table()
        for graph in graphs:
            graph.count()

    return replay


class LinkedGraphs:
    """The graphs of `first`, one of `variants` or none, and `last`, run in one native call.

    `choice` is memory, int32 [1], that `first` writes: 0 for none, n for variants[n - 1].
    """

    def __init__(
        self,
        first: list[NativeGraph],
        choice: np.ndarray,
        variants: list[list[NativeGraph]],
        last: list[NativeGraph],
    ) -> None:
        self.by_choice = [[*first, *chosen, *last] for chosen in ([], *variants)]
        self.choice = (ctypes.c_int32 * 1).from_address(choice.ctypes.data)
        self.zero = np.zeros(1, np.int32)  # the choice of an unconditional jump
        self.targets = np.zeros(1 + len(variants), np.int64)

        def jump(choice: int) -> list[np.ndarray]:
            return [np.array([choice, 0, 0, 0, self.targets.ctypes.data])]

        rows = rows_of(first) + jump(choice.ctypes.data)
        for number, variant in enumerate(variants, 1):
            self.targets[number] = len(rows)
            rows += rows_of(variant) + jump(self.zero.ctypes.data)
        self.targets[0] = len(rows)
        self.table = Table(first[0], rows + rows_of(last))

    def __call__(self) -> None:
        self.table()
        for graph in self.by_choice[self.choice[0]]:
            graph.count()


def link_graphs(
    first: CapturedJit, choice: np.ndarray, variants: list[CapturedJit], last: CapturedJit
) -> LinkedGraphs | None:
    """The linked graphs of captured functions; None unless all their calls are native graphs."""
    parts = [native_graphs(captured) for captured in (first, *variants, last)]
    return None if None in parts else LinkedGraphs(parts[0], choice, parts[1:-1], parts[-1])


class IRCompiler(ClangJITCompiler):
    """clang, for LLVM IR instead of C; version 15 is the first that reads the launcher's IR."""

    def __init__(self, arch: str) -> None:
        super().__init__([arch, "native"], cachekey=f"compile_clang_ir_{processor()}")

    def compile_to_obj(self, src: str) -> bytes:
        """The object file of LLVM IR."""
        target = f"--target={self.arch}-none-unknown-elf"
        options = ["-c", "-x", "ir", "-w", "-O2", "-fPIC", target, *self.args, "-", "-o", "-"]
        clang = [getenv("CC", "clang"), *options]
        return subprocess.run(clang, input=src.encode(), capture_output=True, check=True).stdout


@functools.cache
def _launcher() -> Launcher | None:
    """The process's launcher; None unless on Linux, x86-64 or arm64, with LLVM or clang."""
    compiler = renderer_of("CPU").compiler
    machine = platform.machine()
    if sys.platform != "linux" or machine not in PAUSE:
        return None
    if isinstance(compiler, ClangJITCompiler):
        compiler = IRCompiler(compiler.arch)
    elif not isinstance(compiler, CPULLVMCompiler):
        return None
    try:
        library = compiler.compile_cached(_source(machine))
    except (CompileError, RuntimeError, OSError, subprocess.SubprocessError):
        return None
    return Launcher(library, usable_cores() - 1)


def usable_cores() -> int:
    """CPU_COUNT, bounded by this process's affinity and by the quota of its cgroup (cpu.max)."""
    cores = min(CPU_COUNT.value, len(os.sched_getaffinity(0)), cgroup_limit("cpu.max"))
    return max(1, int(cores))


def _source(architecture: str) -> str:
    """LLVM IR of `launch(state, rows, count, syscall)`, from the template launcher.ll.in."""
    cases, labels = [], []
    for n in CALLS:  # a call with n arguments
        lines = [f"call.{n}:"]
        for i in range(n):
            lines.append(f"  %p.{n}.{i} = getelementptr i64, ptr %arguments, i64 {i}")
            lines.append(f"  %v.{n}.{i} = load i64, ptr %p.{n}.{i}")
        values = ", ".join(f"i64 %v.{n}.{i}" for i in range(n))
        cases += [*lines, f"  call void %function({values})", "  ret void"]
        labels.append(f"i64 {n}, label %call.{n}")
    template = string.Template((Path(__file__).parent / "launcher.ll.in").read_text("utf-8"))
    return template.substitute(
        STATE,
        ROW_BYTES=8 * ROW,
        MAX_ARGUMENTS=MAX_ARGUMENTS,
        SPIN=SPIN,
        PAUSE=PAUSE[architecture],
        FUTEX=FUTEX[architecture],
        WAIT=128,  # FUTEX_WAIT | FUTEX_PRIVATE_FLAG
        WAKE=129,  # FUTEX_WAKE | FUTEX_PRIVATE_FLAG
        CASES="\n".join(cases),
        LABELS=" ".join(labels),
    )
