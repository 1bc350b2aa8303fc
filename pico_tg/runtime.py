"""What is not public tinygrad: memory of tensors, captured graphs, kernels counted."""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.dtype import _to_np_dtype
from tinygrad.engine import realize
from tinygrad.engine.realize import capturing
from tinygrad.uop.ops import Ops, UOp

try:
    from . import cpu
except ImportError:  # the folder cpu/ may be deleted
    cpu = None


def has_cpu_kernels(device: str | tuple[str, ...]) -> bool:
    """Whether this device gets kernels with schedules of their own."""
    return cpu is not None and cpu.enabled(device)


def write_into(x: Tensor, values: np.ndarray) -> None:
    """Overwrite the realised tensor `x` in place; cheaper than a new Tensor, and jits keep it.

    On several devices, each holds all of it.
    """
    assert values.dtype.itemsize * values.size == x.nbytes(), "size of the buffer"
    for buffer in _buffers(x):
        memory = memoryview(np.ascontiguousarray(values)).cast("B")
        buffer.ensure_allocated().copyin(memory)


def write_all(tensors: dict[str, Tensor], values: dict[str, np.ndarray]) -> None:
    """`write_into` an optimizer's state, by name.

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
    """The values of the realised tensor `x`; on a CPU its very memory, not a copy."""
    buffer = _buffers(x)[0]
    memory = buffer.as_memoryview(allow_zero_copy=True)[: x.nbytes()]
    return np.frombuffer(memory, _to_np_dtype(x.dtype)).reshape(x.shape)


def in_host_memory(x: Tensor) -> bool:
    """Whether `read(x)` is the realised tensor's own memory."""
    buffers = _buffers(x)
    return len(buffers) == 1 and hasattr(buffers[0].allocator, "_as_buffer")


def _buffers(x: Tensor) -> list:
    buffer = x.uop.buffer
    return getattr(buffer, "bufs", [buffer])


def jit_method(method: Callable, *constants: int) -> TinyJit:
    """TinyJit of a bound method, kept in an attribute of its own object without a cycle.

    `constants` are its first arguments, for good. The first call is captured already, where TinyJit
    would run it once without: that would build and schedule everything twice. So whatever the
    method leaves behind must be in buffers that existed before.

    A cycle would leave the graph to Python's garbage collector. That may run on the CPU device's
    own thread, and there freeing a graph waits for that thread itself, for ever (0.13, seen).
    """
    reference = weakref.WeakMethod(method)
    jit = TinyJit(lambda *inputs: reference()(*constants, *inputs))
    jit.cnt = 1
    return jit


def is_capturing() -> bool:
    """Whether a TinyJit is recording: what runs on the host now would be lost in its replays."""
    return bool(capturing)


@contextlib.contextmanager
def count_kernels() -> Iterator[list[int]]:
    """The list's one number becomes how many kernels run while it lasts.

    tinygrad's own counter takes a captured graph, which is many kernels, for one.
    """
    count, estimate = [0], realize.estimate_uop

    def counting(call: UOp):  # called for each call that is run
        ast = call.src[0]
        graph = ast.op is Ops.CUSTOM_FUNCTION and ast.arg == "graph"
        count[0] += len(ast.src[0].src) if graph else 1
        return estimate(call)

    realize.estimate_uop = counting
    try:
        yield count
    finally:
        realize.estimate_uop = estimate


def on_devices(values: np.ndarray, devices: tuple[str, ...], axis: int | None = None) -> Tensor:
    """A realised tensor: split along `axis` over the devices, or whole on each."""
    x = Tensor(values)
    return (x.shard(devices, axis=axis) if len(devices) > 1 else x).realize()
