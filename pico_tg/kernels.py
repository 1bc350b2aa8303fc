"""Matrix products, and everything that is not public tinygrad.

Two things are done here that tinygrad does not do by itself:

- `stored`: a value is computed once. Lazy fusion would recompute norms, SiLU and softmax inside
  every product of the backward pass (125 GOP a step instead of 31, measured).
- On a CPU, products are kernels with a schedule of their own: a tile of 8 rows by 16 columns stays
  in vector registers while one loop runs over the summed axis. tinygrad's own choice reaches a
  fifth of it. `PICO_KERNELS=0` switches them off; on accelerators plain `@` is used, so that
  tensor cores apply.

With `BF16` on, both factors of every product of the model, and of its gradients, are rounded to
bfloat16; sums and results stay float32.
"""

import functools
import math
import os
import re
import weakref
from collections.abc import Callable

import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes, function
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.dtype import _to_np_dtype
from tinygrad.engine.realize import capturing
from tinygrad.helpers import CPU_COUNT, DEV, ContextVar
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

ROWS, COLUMNS = 8, 16  # the register tile
# below this many multiplications a product is bound by memory or by the call, not by arithmetic
SMALL = 1 << 15
BF16 = ContextVar("PICO_BF16", 0)  # `with Context(PICO_BF16=1)` while a graph is made


def stored(x: Tensor) -> Tensor:
    """`x` computed once, and its gradient as well, instead of again inside each consumer."""
    return x.contiguous().contiguous_backward()


def as_index(x: Tensor) -> Tensor:
    """Bytes or integers as int32 in memory.

    tinygrad drops the cast of a lone uint8 that becomes an address, and LLVM then takes the byte
    for a signed number: 200 would read before the array.
    """
    return x.cast(dtypes.int32).contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] with weight [O, I] -> x @ weight.T [..., O]."""
    *lead, inputs = x.shape
    rows, outputs = math.prod(lead), weight.shape[0]
    if not BF16 and not _scheduled(x, rows, inputs, outputs):
        return stored(stored(x) @ weight.T)
    x = x.reshape(1, rows, inputs)
    out = _product(x, weight.reshape(1, outputs, inputs))
    return out.reshape(*lead, outputs)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., L, N] -> [..., M, N], with the same leading dimensions."""
    if not BF16 and not _scheduled(a, *a.shape[-2:], b.shape[-1]):
        return stored(stored(a) @ stored(b))
    return matmul_transposed(a, b.transpose(-1, -2))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., N, L].T -> [..., M, N], with the same leading dimensions."""
    *lead, M, L = a.shape
    N = b.shape[-2]
    if not BF16 and not _scheduled(a, M, L, N):
        return stored(stored(a) @ stored(b).transpose(-1, -2))
    return _product(a.reshape(-1, M, L), b.reshape(-1, N, L)).reshape(*lead, M, N)


def product(a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], with no gradient; `transposed`: a is [Z, L, M]."""
    M, L = a.shape[:0:-1] if transposed else a.shape[1:]
    N = b.shape[2]
    if not _scheduled(a, M, L, N):
        return ((a.transpose(1, 2) if transposed else a) @ b).contiguous()
    rows, columns = _round_up(M, 2 * ROWS), _round_up(N, COLUMNS)
    a = _padded(_whole(a), L, rows) if transposed else _padded(_whole(a), rows, L)
    return _gemm(a, _padded(_whole(b), L, columns), M, N, L, transposed)[:, :M, :N]


def _whole(x: Tensor) -> Tensor:
    """`x`; where it is all of a buffer, reshaped, that buffer with only one reshape. No gradient.

    Two reshapes make 0.13 hand a custom kernel a view of the buffer. TinyJit's memory planner does
    not see views: it would give the memory of a buffer that an earlier realize in the same captured
    function made to others while the kernel still needs it (seen: SOAP's gradients).
    """
    base = x.uop.base
    if base.op is not Ops.BUFFER or base.numel() != x.numel():
        return x
    in_order = x.uop.contiguous_view_offset() == 0
    return Tensor(base.reshape(x.shape)) if in_order else x


def _scheduled(x: Tensor, M: int, L: int, N: int) -> bool:
    """Whether the product [M, L] @ [L, N] gets a schedule of its own."""
    one_cpu = isinstance(x.device, str) and x.device.split(":")[0] == "CPU"
    enabled = os.environ.get("PICO_KERNELS", "1") != "0" and DEV.renderer != "X86"
    # each length is summed over in the product or a gradient; a sum of one term is no loop
    return one_cpu and enabled and M >= ROWS and min(L, N) > 1 and M * L * N >= SMALL


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [Z, M, L] @ b [Z, N, L].T, on padded copies; the padding is no work for the reader.

    Padding and rounding happen in the kernel that computes `a` or `b`, and the gradient's in the
    one that computes the gradient.
    """
    _, M, L = a.shape
    N = b.shape[1]
    a = _padded(a, _round_up(M, 2 * ROWS), _round_up(L, COLUMNS))
    b = _padded(b, _round_up(N, COLUMNS), _round_up(L, COLUMNS))
    gemm = _on_units if multiplies_bf16(a.device) else _plain
    if _scheduled(a, M, L, N):
        gemm = _gemm
    return _product_function(M, N, L, gemm)(a, b)[:, :M, :N].contiguous_backward()


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    padded = x.pad((None, (0, rows - x.shape[1]), (0, columns - x.shape[2])))
    return _rounded(padded).contiguous().contiguous_backward()


def _rounded(x: Tensor) -> Tensor:
    return x.cast(dtypes.bfloat16) if BF16 else x


@functools.cache
def _product_function(M: int, N: int, L: int, gemm: Callable[..., Tensor]):
    """a, b (padded) -> a @ b.T, whose gradient is two more such products."""

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, b, *buffers = (Tensor(uop) for uop in call.src[1:])
        g = Tensor(upstream).cast(a.dtype).contiguous()
        da, db = gemm(g, b, M, L, N), gemm(g, a, N, L, M, transposed=True)
        return da.uop, db.uop, *[None for _ in buffers]

    # implicit: the buffer that the kernel writes
    @function(grad_fxn=gradient, allow_implicit=True)
    def product(a: Tensor, b: Tensor) -> Tensor:
        # rows of b become columns: the vector's lanes are then next to each other in memory
        return gemm(a, b.transpose(1, 2).contiguous(), M, N, L)

    return product


def _plain(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """What `_gemm` computes, as tinygrad schedules it; the padding, zeros here, is summed over."""
    return ((a.transpose(1, 2) if transposed else a).float() @ b.float()).contiguous()


def _on_units(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """`_plain` in the form that matrix units take: bfloat16 in, float32 sums of exact products."""
    a = a.transpose(1, 2) if transposed else a
    return a.matmul(b, dtype=dtypes.float32).contiguous()


def multiplies_bf16(device: str | tuple[str, ...]) -> bool:
    """Whether the device has matrix units for bfloat16 (CUDA from sm_80, Apple from the M3 on)."""
    renderer = Device[device if isinstance(device, str) else device[0]].renderer
    apple = re.fullmatch(r"Apple(\d+)", renderer.target.arch)
    if apple and int(apple[1]) < 9:
        return False
    return any(core.dtype_in == dtypes.bfloat16 for core in renderer.tensor_cores)


def _gemm(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """[Z, M, L] @ [Z, L, N], the first one stored as [Z, L, M] if `transposed`.

    The buffers are padded to whole tiles, as is the result; M, N and L say how much of them is
    meant. What the padding holds does not matter: it is summed over by nobody.
    """
    Z = a.shape[0]
    rows, columns = _round_up(M, 2 * ROWS), _round_up(N, COLUMNS)
    # threads share the matrices, or the rows if those divide better
    by_rows = _threads(rows // ROWS) > _threads(Z)
    threads = _threads(rows // ROWS if by_rows else Z)

    def kernel(C: UOp, A: UOp, B: UOp) -> UOp:
        m, n = UOp.range(rows, 1), UOp.range(columns, 2)
        l = UOp.range(L, 3, AxisType.REDUCE)
        z = UOp.range(Z, 0) if Z > 1 else 0
        left = A[z, l, m] if transposed else A[z, m, l]
        right = B[z, l, n]
        product = left.cast(dtypes.float32) * right.cast(dtypes.float32)
        total = product.reduce(l, arg=Ops.ADD)
        outer = 1 if Z > 1 else 0
        # from the last axis to the first: one that is used up is gone, and later ones move forward
        opts = [Opt(OptOps.UPCAST, outer + 1, COLUMNS), Opt(OptOps.UPCAST, outer, ROWS)]
        if L % 4 == 0:
            opts.append(Opt(OptOps.UNROLL, 0, 4))
        if threads > 1:
            opts.append(Opt(OptOps.THREAD, outer if by_rows else 0, threads))
        info = KernelInfo(
            name=f"gemm{'_t' if transposed else ''}_{Z}_{M}_{N}_{L}", opts_to_apply=tuple(opts)
        )
        ranges = (z, m, n) if Z > 1 else (m, n)
        return C[z, m, n].store(total).end(*ranges).sink(arg=info)

    out = Tensor.empty(Z, rows, columns, device=a.device)
    return out.custom_kernel(a, b, fxn=kernel)[0]


def _threads(outer: int) -> int:
    """The most threads, up to the cores, that share the outermost axis evenly."""
    return next(t for t in range(CPU_COUNT.value, 0, -1) if outer % t == 0)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def write_into(x: Tensor, values: np.ndarray) -> None:
    """Overwrite the realised tensor `x` in place; cheaper than a new Tensor, and jits keep it.

    On several devices, each holds all of it.
    """
    assert values.dtype.itemsize * values.size == x.nbytes(), "size of the buffer"
    for buffer in _buffers(x):
        buffer.copyin(memoryview(np.ascontiguousarray(values)).cast("B"))


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


def _buffers(x: Tensor) -> list:
    buffer = x.uop.buffer
    return getattr(buffer, "bufs", [buffer])


def compiled(method: Callable) -> TinyJit:
    """TinyJit of a bound method, kept in an attribute of its own object without a cycle.

    A cycle would leave the graph to Python's garbage collector. That may run on the CPU device's
    own thread, and there freeing a graph waits for that thread itself, for ever (0.13, seen).
    """
    reference = weakref.WeakMethod(method)
    return TinyJit(lambda *inputs: reference()(*inputs))


def is_capturing() -> bool:
    """Whether a TinyJit is recording: what runs on the host now would be lost in its replays."""
    return bool(capturing)
