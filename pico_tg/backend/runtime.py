"""What the model needs of non-public tinygrad: names, memory of tensors, captured graphs, a lock.

Public are the names that `tinygrad` itself exports (`from tinygrad import ...`), and `tinygrad.nn`.
Only backend/ and cpu/ import others; all other files get theirs here (tests/test_structure.py).
"""

import contextlib
import functools
import math
import os
import threading
import weakref
from collections.abc import Callable
from types import ModuleType

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit, getenv
from tinygrad.codegen.opt import Opt, OptOps  # noqa: F401  # for ops.py
from tinygrad.dtype import DType, _from_np_dtype, _to_np_dtype  # noqa: F401  # DType: for matmul.py
from tinygrad.engine import realize
from tinygrad.helpers import BEAM, DEV, JIT, round_up  # noqa: F401  # for ring 1
from tinygrad.uop.ops import AxisType, KernelInfo, Ops  # noqa: F401  # for ops.py

from ..files import PicoError
from ..progress import say
from . import jit_cache
from .jit_cache import StoredGraph

try:
    from .. import cpu
except ImportError:  # the folder cpu/ is optional
    cpu = None


def has_cpu_kernels(device: str | tuple[str, ...]) -> bool:
    """Whether matmul, attention and decoding on `device` use the hand-scheduled kernels of cpu/.

    They do on a single CPU device, except with PICO_KERNELS=0, without the folder cpu/, and with
    tinygrad's X86 assembler, which has no vectors.
    """
    wanted = cpu is not None and os.environ.get("PICO_KERNELS", "1") != "0"
    single = isinstance(device, str) and device.split(":")[0] == "CPU"
    return wanted and single and DEV.renderer != "X86"


def _launcher() -> ModuleType | None:
    """The module `cpu.launcher`; None where the default device has no kernels of cpu/."""
    if not has_cpu_kernels(Device.DEFAULT):
        return None
    from ..cpu import launcher

    return launcher


def write_into(x: Tensor, values: np.ndarray) -> None:
    """Overwrite the memory of the realized tensor `x` in place, on each device that holds a part.

    Unlike `assign`, this builds no graph, and captured graphs keep reading the same buffer. Raises
    AssertionError or ValueError if `values` have another size.
    """
    buffers = _buffers(x)
    parts = [values] * len(buffers)
    if x.uop.axis is not None:
        parts = np.split(values, len(buffers), x.uop.axis)
    for buffer, part in zip(buffers, parts, strict=True):
        memory = memoryview(np.ascontiguousarray(part)).cast("B")
        buffer.ensure_allocated().copyin(memory)


def from_host(values: np.ndarray, device: str) -> Tensor:
    """A realized tensor of a copy of `values`; tinygrad would schedule and run a kernel for it."""
    x = Tensor.empty(values.shape, dtype=_from_np_dtype(values.dtype), device=device)
    write_into(x, values)
    return x


def write_all(tensors: dict[str, Tensor], values: dict[str, np.ndarray]) -> None:
    """`write_into` each tensor of an optimizer's state the values of the same name.

    Raises ValueError, before anything is written, unless all names, shapes and dtypes fit.
    """
    if tensors.keys() != values.keys():
        names = sorted(tensors.keys() ^ values.keys())
        raise ValueError(f"state of another optimizer: {', '.join(names[:4])}")
    for name, tensor in tensors.items():
        shape, dtype = tensor.shape, np.dtype(_to_np_dtype(tensor.dtype))
        if values[name].shape != shape or values[name].dtype != dtype:
            found = f"{values[name].dtype} {values[name].shape}"
            raise ValueError(f"{name}: {found} where {dtype} {shape} is needed")
    for name, tensor in tensors.items():
        write_into(tensor, values[name])


def read(x: Tensor) -> np.ndarray:
    """The values of the realized tensor `x`; a view of its memory where `in_host_memory`."""
    uop = x.uop  # whose attributes cost less than the methods of Tensor, which trace their callers
    if uop.axis is not None:  # parts on several devices
        return x.numpy()
    memory = _buffers(x)[0].as_memoryview(allow_zero_copy=True)
    values = np.frombuffer(memory, _to_np_dtype(uop.dtype), math.prod(uop.shape))
    return values.reshape(uop.shape)


def in_host_memory(x: Tensor) -> bool:
    """Whether `read(x)` is a view of the realized tensor's memory, as on a CPU, not a copy."""
    buffers = _buffers(x)
    return len(buffers) == 1 and hasattr(buffers[0].allocator, "_as_buffer")


def _buffers(x: Tensor) -> list:
    buffer = (x.uop.src[0] if x.uop.op is Ops.MULTI else x.uop).buffer
    return getattr(buffer, "bufs", [buffer])


def without_views(x: Tensor) -> Tensor:
    """`x`; if `x` is a reshaped whole buffer, that buffer with a single reshape. No gradient.

    After two reshapes, tinygrad 0.13 passes a view of the buffer to a custom kernel. TinyJit's
    memory planner does not see views and reuses the buffer while the kernel still needs it: SOAP's
    gradients were overwritten (test_ops.test_a_gram_matrix_of_one_panel_in_a_jit).
    """
    base = x.uop.base
    if base.op is not Ops.BUFFER or base.numel() != x.numel():
        return x
    in_order = x.uop.contiguous_view_offset() == 0
    return Tensor(base.reshape(x.shape)) if in_order else x


def in_stored_shape(x: Tensor) -> Tensor:
    """`x`; if `x` is a whole buffer, reshaped twice or more, that buffer in its first shape.

    For custom kernels, which look at the memory only: see `without_views`. From a view, a replay of
    TinyJit would read the first call's input (test_ops.test_jit_and_the_switch). Unlike there, the
    tensor that was reshaped remains a part of the graph, as functions of tinygrad require.
    """
    uop = x.uop
    while uop.op in (Ops.RESHAPE, Ops.CONTIGUOUS, Ops.CONTIGUOUS_BACKWARD):
        if uop.op is Ops.RESHAPE and uop.src[0].op is Ops.BUFFER:
            return Tensor(uop)
        uop = uop.src[0]
    return x


Arrays = np.ndarray | tuple[np.ndarray, ...]


class MethodJit(TinyJit):
    """A TinyJit from arrays to arrays, which the launcher of cpu/ replays directly if it can.

    Each input has one buffer, which a call overwrites. With new tensors as inputs, and TinyJit's
    checks of them, a training step of a small model takes 1.1 to 1.2 times as long: Python is slow
    when kernels have just filled the processor's caches. The checks alone take longer than a
    decoding pass of a small model.

    A call whose inputs differ in shape or dtype from those of the first raises ValueError. How
    several devices share inputs: see `on_devices`. On a CPU, results are views of memory that the
    next call overwrites and that is freed with this object: copy what is kept.
    """

    forms: list[tuple] | None = None  # shape and dtype of each input
    replay: Callable[[], None] | None = None
    stored: StoredGraph | None = None

    def __init__(
        self,
        function: Callable,
        inputs: list[Tensor],
        devices: tuple[str, ...],
        context: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        """`function()` reads `inputs`, a list that is empty until the first call."""
        super().__init__(function)
        self.cnt = 1  # the first call is captured
        self.inputs, self.devices, self.context = inputs, devices, context
        self.may_replay = len(devices) <= 1  # False once the launcher has been asked

    def __call__(self, *values: np.ndarray) -> Arrays:
        forms = [(array.shape, array.dtype) for array in values]
        if self.forms is None:
            self.inputs += [on_devices(array, self.devices) for array in values]
            self.forms = forms
        elif forms != self.forms:
            raise ValueError(f"inputs {forms}; in the first call they were {self.forms}")
        else:
            for x, array in zip(self.inputs, values, strict=True):
                write_into(x, array)
        if self.replay is not None:
            self.replay()
            return self.results
        with self.context():
            return self._build()

    def _build(self) -> Arrays:
        """Load or capture the graph and run it; with JIT=0, run the method."""
        stored, self.stored = self.stored, None
        # training moves the model to its devices after this object was made
        if stored and not all(isinstance(tensor.device, str) for tensor in stored.tensors):
            stored = None
        found = stored and stored.load(self.inputs)
        if found:
            self.captured, self.cnt = found, 2
        results = super().__call__()
        self.kept = results  # with JIT=0 nothing else keeps the memory of the views
        if stored and not found:
            stored.store(self.captured)
        self.results = tuple(map(read, results)) if type(results) is tuple else read(results)
        if self.may_replay and self.captured is not None and (launcher := _launcher()):
            self.may_replay, self.replay = False, launcher.native_replay(self.captured)
        return self.results


def jit_method(
    method: Callable,
    *constants: int,
    devices: tuple[str, ...] = (),
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    tensors: list[Tensor] | None = None,
    determined_by: object = None,
    of_training: bool = False,
) -> MethodJit:
    """TinyJit of a bound method, to be kept in an attribute of the method's own object.

    `constants` are the method's first arguments in every call; the tensors of the MethodJit's
    inputs follow. The first call is already captured; TinyJit would execute the first call
    uncaptured, and so build and schedule everything twice. Therefore all buffers that the method
    writes must exist before the first call.

    The TinyJit holds a weak reference to the object. A reference cycle would leave the captured
    graph to Python's garbage collector, which may run on the CPU device's own thread. Freeing a
    graph there waits for that same thread: a deadlock in tinygrad 0.13
    (test_resume.test_graphs_are_freed_immediately).

    context: makes the context in which the graph is built.

    tensors: all that the method reads or writes besides its inputs, if the graph may be kept in the
    compile cache. `determined_by`, whose repr is a part of the key, and the shapes of tensors and
    inputs then determine what the method computes. Graphs on several devices are not kept, nor
    those `of_training` where `enable_compile_cache` does not ask for them.
    """
    if launcher := _launcher():
        launcher.install(Device.DEFAULT)
    reference, inputs = weakref.WeakMethod(method), []
    method_jit = MethodJit(lambda: reference()(*constants, *inputs), inputs, devices, context)
    kept = tensors and JIT and jit_cache.installed()
    if kept and (jit_cache.training_graphs or not of_training):
        name = f"{method.__qualname__} {constants} {determined_by!r} {launcher is not None}"
        method_jit.stored = jit_cache.StoredGraph(name, tensors)
    return method_jit


def link_graphs(first: MethodJit, variants: list[MethodJit], last: MethodJit) -> Callable[[], None]:
    """A function that runs captured graphs: `first`, one of the variants or none, and `last`.

    The last result of `first` is its choice, int32 [1]: n > 0 for variants[n - 1], 0 for none. None
    of the graphs has inputs. If the launcher of cpu/ can replay all of them, the function is one
    native call, which halves the time of a decoding pass of a small model.
    """
    graphs = first, *variants, last
    launcher = _launcher()
    if launcher and all(graph.replay is not None for graph in graphs):
        head, *middle, tail = (graph.captured for graph in graphs)
        linked = launcher.link_graphs(head, first.results[-1], middle, tail)
        if linked is not None:
            return linked

    def run() -> None:
        if number := first()[-1][0]:
            variants[number - 1]()
        last()

    return run


def is_capturing() -> bool:
    """Whether a TinyJit is capturing: host work done now would be missing from the replays."""
    return bool(realize.capturing)


def on_devices(values: np.ndarray, devices: tuple[str, ...]) -> Tensor:
    """A realized tensor of a copy of `values`; () is the default device.

    Several devices share an array of two or more dimensions along the first; of an array of one
    dimension, each has a copy.
    """
    if len(devices) > 1:
        return Tensor(values).shard(devices, axis=0 if values.ndim > 1 else None).realize()
    return from_host(values, devices[0] if devices else Device.DEFAULT)


# tinygrad 0.13 has global state without locks: the TinyJit that is capturing, `Context` variables,
# caches of graphs and kernels. All code that builds or runs a graph holds this lock; without the
# lock, threads that decode concurrently fail or compute wrong values
# (test_generation.test_two_threads).
tinygrad_lock = threading.RLock()


_used = _forked = False  # whether this process, or the one it was forked from, has computed


def _note_fork() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache  # once a process
def _say_without_beam() -> None:
    say("pico_tg: warning: BEAM works in the main thread only; this thread goes on without it")


def _search() -> Context:
    """Without BEAM outside the main thread, where tinygrad 0.13 cannot set its signal handler."""
    if threading.current_thread() is threading.main_thread():
        return Context()
    if getenv("JITBEAM"):  # which takes precedence over BEAM
        raise PicoError("JITBEAM works in the main thread only; unset it")
    if not BEAM:
        return Context()
    _say_without_beam()
    return Context(BEAM=0)


def exclusive(function: Callable) -> Callable:
    """The function, holding `tinygrad_lock` while it runs; outside the main thread without BEAM.

    Raises PicoError in a process that was forked from one that has computed: it would wait for the
    parent's threads (test_backend.test_a_forked_child_is_told).
    """

    @functools.wraps(function)
    def locked(*args, **kwargs):
        global _used
        if _forked:
            raise PicoError(
                "this process was forked from one that has already computed, and lacks its "
                'threads; start it by multiprocessing.get_context("spawn")'
            )
        _used = True
        with tinygrad_lock, _search():
            return function(*args, **kwargs)

    return locked
