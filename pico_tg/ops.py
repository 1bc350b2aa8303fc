"""Operations of the model: each computed once, on the device's own terms."""

import functools
import math
from collections.abc import Callable

from tinygrad import Tensor, dtypes, function
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.dtype import DType
from tinygrad.uop.ops import KernelInfo, Ops, UOp

from .cpu.loops import TILE_N, round_up
from .cpu.matmul import gemm
from .precision import BF16, has_tensor_cores, rounded_factor
from .runtime import has_cpu_kernels

# below this many multiplications a product is bound by memory or by the call, not by arithmetic
SMALL = 1 << 15
FEWEST = 8  # a product of fewer rows is left to tinygrad


def materialize(x: Tensor) -> Tensor:
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
    if _gemm_for(x, rows, inputs, outputs) is None:
        return materialize(materialize(x) @ weight.T)
    x = x.reshape(1, rows, inputs)
    out = _product(x, weight.reshape(1, outputs, inputs))
    return out.reshape(*lead, outputs)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., L, N] -> [..., M, N], with the same leading dimensions."""
    if _gemm_for(a, *a.shape[-2:], b.shape[-1]) is None:
        return materialize(materialize(a) @ materialize(b))
    return matmul_transposed(a, b.transpose(-1, -2))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., N, L].T -> [..., M, N], with the same leading dimensions."""
    *lead, M, L = a.shape
    N = b.shape[-2]
    if _gemm_for(a, M, L, N) is None:
        return materialize(materialize(a) @ materialize(b).transpose(-1, -2))
    return _product(a.reshape(-1, M, L), b.reshape(-1, N, L)).reshape(*lead, M, N)


def lookup(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of weight [V, D] by index int32 [...] -> [..., D]."""
    rows = _lookup(weight, index.reshape(-1).contiguous())
    return rows.reshape(*index.shape, weight.shape[1])


def _rows(weight: Tensor, index: Tensor) -> Tensor:
    return weight.gather(0, index.unsqueeze(1).expand(index.shape[0], weight.shape[1]))


def _lookup_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    weight, index = (Tensor(uop) for uop in call.src[1:])
    g = Tensor(upstream).contiguous()
    V, D = weight.shape
    if not has_cpu_kernels(g.device):
        hit = Tensor.arange(V, device=g.device).unsqueeze(1) == index  # (V, N)
        return (hit.unsqueeze(2).where(g, 0)).sum(axis=1).uop, None
    wide = next(n for n in (12, 16, 8, 4, 2, 1) if D % n == 0)

    def kernel(out: UOp, g: UOp, index: UOp) -> UOp:
        n, d = UOp.range(g.shape[0], 0), UOp.range(D, 1)
        row = index[n].cast(dtypes.weakint)
        opts = (Opt(OptOps.UPCAST, 1, wide),) if wide > 1 else ()
        info = KernelInfo(name=f"lookup_gradient_{V}_{D}_{g.shape[0]}", opts_to_apply=opts)
        return out[row, d].store(out[row, d] + g[n, d]).end(n, d).sink(arg=info)

    zeros = Tensor.zeros(V, D, device=g.device).contiguous()
    return zeros.custom_kernel(g, index, fxn=kernel)[0].uop, None


# tinygrad's gradient of an indexed load is a one-hot sum, O(N * V * D)
_lookup = function(grad_fxn=_lookup_gradient)(_rows)


def swiglu(x: Tensor) -> Tensor:
    """x [..., value | gate] -> silu(gate) * value."""
    share = x[..., x.shape[-1] // 2 :].sigmoid().contiguous()
    return _swiglu(x, share)


def _swiglu_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    x, share = (Tensor(uop) for uop in call.src[1:])
    value, gate = x.chunk(2, dim=-1)
    g = Tensor(upstream).contiguous() * share
    return (g * gate).cat(g * value * (1 + gate * (1 - share)), dim=-1).uop, None


@function(grad_fxn=_swiglu_gradient)
def _swiglu(x: Tensor, share: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return gate * share * value


def bmm(a: Tensor, b: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], with no gradient.

    `trans_a`: a is [Z, L, M]; `trans_b`: b is [Z, N, L].
    """
    M, L = a.shape[:0:-1] if trans_a else a.shape[1:]
    N = b.shape[1 if trans_b else 2]
    gemm = _gemm_for(a, M, L, N, dtypes.float32) or _plain
    rows, terms, columns = (_whole_tiles(size, gemm) for size in (M, L, N))
    a = _padded(_whole(a).float(), *((terms, rows) if trans_a else (rows, terms)))
    b = _padded(_whole(b).float(), *((columns, terms) if trans_b else (terms, columns)))
    return gemm(a, b, M, N, L, trans_a, trans_b)[:, :M, :N]


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
    return _gemm_for(x, M, L, N, dtypes.float32) is gemm


def _gemm_for(
    x: Tensor, M: int, L: int, N: int, dtype: DType | None = None
) -> Callable[..., Tensor] | None:
    """What computes [M, L] @ [L, N] from padded factors of `dtype`; None: `@`, from them as is."""
    dtype = dtype or (dtypes.bfloat16 if BF16 else dtypes.float32)
    # each length is summed over in the product or a gradient; a sum of one term is no loop
    matrices = M >= FEWEST and min(L, N) > 1
    if matrices and M * L * N >= SMALL and has_cpu_kernels(x.device):
        return gemm
    rounded = dtype == dtypes.bfloat16
    # units share all the matrices that x is made of
    if (rounded or (matrices and x.numel() * N >= SMALL)) and has_tensor_cores(x.device, dtype):
        return _on_tensor_cores
    return _plain if rounded else None


def _whole_tiles(size: int, gemm: Callable[..., Tensor]) -> int:
    """What a side is padded to: a multiple of 16; for matrix units 2 or 4 such if that is next to
    nothing, for tinygrad's kernels then hold so many tiles in registers, and load less.
    """
    if gemm is _plain:
        return size
    least = round_up(size, TILE_N)
    longer = (round_up(size, tiles * TILE_N) for tiles in (4, 2, 1))
    return next(n for n in longer if 20 * n <= 21 * least) if gemm is _on_tensor_cores else least


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [Z, M, L] @ b [Z, N, L].T, on padded copies; the padding is no work for the reader.

    Padding and rounding happen in the kernel that computes `a` or `b`, and the gradient's in the
    one that computes the gradient.
    """
    _, M, L = a.shape
    N = b.shape[1]
    gemm = _gemm_for(a, M, L, N)
    rows, terms, columns = (_whole_tiles(size, gemm) for size in (M, L, N))
    a, b = (
        rounded_factor(_padded(x.float(), height, terms), bool(BF16))
        .contiguous()
        .contiguous_backward()
        for x, height in ((a, rows), (b, columns))
    )
    product = _product_function(M, N, L, gemm, a.uop is b.uop, bool(BF16))
    return product(a, b)[:, :M, :N].contiguous_backward()


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.pad((None, (0, rows - x.shape[1]), (0, columns - x.shape[2])))


@functools.cache
def _product_function(
    M: int, N: int, L: int, gemm: Callable[..., Tensor], same: bool, to_bf16: bool
):
    """a, b (padded) -> a @ b.T, whose gradient is two more such products; `same` if a is b."""

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, *others = (Tensor(uop) for uop in call.src[1:])
        b, *buffers = (a, *others) if same else others  # one and the same is one argument
        g = rounded_factor(Tensor(upstream), to_bf16).contiguous()
        da, db = gemm(g, b, M, L, N), gemm(g, a, N, L, M, trans_a=True)
        gradients = [(da + db).uop] if same else [da.uop, db.uop]
        return *gradients, *[None for _ in buffers]

    # implicit: the buffer that the kernel writes
    @function(grad_fxn=gradient, allow_implicit=True)
    def product(a: Tensor, b: Tensor) -> Tensor:
        return gemm(a, b, M, N, L, trans_b=True)

    return product


def _plain(
    a: Tensor, b: Tensor, M: int, N: int, L: int, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """What `gemm` computes, as tinygrad schedules it, from factors that are not padded."""
    a, b = a.transpose(1, 2) if trans_a else a, b.transpose(1, 2) if trans_b else b
    return (a.float() @ b.float()).contiguous()


def _on_tensor_cores(
    a: Tensor, b: Tensor, M: int, N: int, L: int, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """`_plain` in the form that matrix units take: float32 sums of exact products, over the padding
    as well, which is zeros."""
    a, b = a.contiguous(), (b.transpose(1, 2) if trans_b else b).contiguous()
    a = a.transpose(1, 2) if trans_a else a
    return a.matmul(b, dtype=dtypes.float32).contiguous()
