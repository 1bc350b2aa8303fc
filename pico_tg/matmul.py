"""Matmul, with its gradient, and the choice of the function that computes it.

A matmul is computed by the first of these that accepts its sizes and device:

- `cpu.matmul.gemm`, hand-scheduled kernels (see `backend.cpu_kernels`);
- `_tensor_core_gemm`, from factors padded to whole tiles, in a form that maps to tensor cores;
- tinygrad's own `@`.

Shape letters: Z matrices in a batch, [M, L] @ [L, N].
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from tinygrad import Tensor, UOp, dtypes, function

from .backend.cpu_kernels import cpu_kernels
from .backend.precision import BF16, has_tensor_cores, rounded_factor
from .backend.runtime import DType, in_stored_shape, round_up, without_views
from .ops import materialize

TILE = 16  # rows and columns of a tile
# a matmul of fewer multiplications is bound by memory or by the launch, not by arithmetic
SMALL = 1 << 15
MIN_ROWS = 8  # a matmul of fewer rows is left to tinygrad


class Gemm(NamedTuple):
    """A function that computes a matmul.

    - run: (a, b, M, N, L, trans_a, trans_b) -> [Z, M, N], see `_plain_gemm`
    - tile: each side of a factor is padded to a multiple of it
    """

    run: Callable[..., Tensor]
    tile: int


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] with weight [O, I] -> x @ weight.T [..., O], float32."""
    *lead, I = x.shape
    rows, O = math.prod(lead), weight.shape[0]
    gemm = _choose_gemm(x, rows, I, O, _factor_dtype())
    if gemm is None:
        return materialize(materialize(x) @ weight.T)
    return _product(gemm, x.reshape(1, rows, I), weight.reshape(1, O, I)).reshape(*lead, O)


def matmul(a: Tensor, b: Tensor, trans_b: bool = False) -> Tensor:
    """a [..., M, L] @ b [..., L, N] -> [..., M, N], float32; `trans_b`: b is [..., N, L]."""
    *lead, M, L = a.shape
    N = b.shape[-2 if trans_b else -1]
    gemm = _choose_gemm(a, M, L, N, _factor_dtype())
    if gemm is None:
        a, b = materialize(a), materialize(b)
        return materialize(a @ (b.transpose(-1, -2) if trans_b else b))
    b = b if trans_b else b.transpose(-1, -2)
    return _product(gemm, a.reshape(-1, M, L), b.reshape(-1, N, L)).reshape(*lead, M, N)


def bmm(a: Tensor, b: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], from float32 factors and without a gradient.

    `trans_a`: a is [Z, L, M]; `trans_b`: b is [Z, N, L].
    """
    M, L = a.shape[:0:-1] if trans_a else a.shape[1:]
    N = b.shape[1 if trans_b else 2]
    gemm = _choose_gemm(a, M, L, N, dtypes.float32) or Gemm(_plain_gemm, tile=1)
    m, l, n = (round_up(size, gemm.tile) for size in (M, L, N))
    a = _pad(without_views(a).float(), *((l, m) if trans_a else (m, l)))
    b = _pad(without_views(b).float(), *((n, l) if trans_b else (l, n)))
    return gemm.run(a, b, M, N, L, trans_a, trans_b)[:, :M, :N]


def _factor_dtype() -> DType:
    return dtypes.bfloat16 if BF16 else dtypes.float32


def _choose_gemm(x: Tensor, M: int, L: int, N: int, dtype: DType) -> Gemm | None:
    """The function for a matmul [M, L] @ [L, N] of x, factors of `dtype`; None: tinygrad's `@`.

    The matmul sums over L, its two gradients over M and N. A sum of one term has no loop to tile.
    The CPU's tiles need MIN_ROWS rows: the matmul and one gradient have M, the other gradient N.
    """
    has_loops = M >= MIN_ROWS and min(L, N) > 1
    if has_loops and N >= MIN_ROWS and M * L * N >= SMALL and (cpu := cpu_kernels(x.device)):
        return Gemm(cpu.gemm, tile=1)
    rounded = dtype == dtypes.bfloat16
    # one kernel on the tensor cores computes all Z matrices, so the threshold counts all of x
    if (rounded or (has_loops and x.numel() * N >= SMALL)) and has_tensor_cores(x.device, dtype):
        return Gemm(_tensor_core_gemm, TILE)
    return Gemm(_plain_gemm, tile=1) if rounded else None


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.pad((None, (0, rows - x.shape[1]), (0, columns - x.shape[2])))


def _product(gemm: Gemm, a: Tensor, b: Tensor) -> Tensor:
    """a [Z, M, L] @ b [Z, N, L].T by `gemm`, on padded and rounded copies, with its gradient.

    Padding and rounding are fused into the kernels that compute `a`, `b` and the upstream gradient.
    """
    _, M, L = a.shape
    N = b.shape[1]
    m, l, n = (round_up(size, gemm.tile) for size in (M, L, N))
    a, b = (
        materialize(rounded_factor(_pad(x.float(), rows, l), bool(BF16)))
        for x, rows in ((a, m), (b, n))
    )
    if a.uop is b.uop:  # the call below would merge the two arguments and lose one gradient
        raise ValueError("a matmul of a tensor with itself would lose a gradient; clone one factor")
    return _product_function(M, N, L, gemm, bool(BF16))(a, b).contiguous_backward()


@functools.cache
def _product_function(M: int, N: int, L: int, gemm: Gemm, to_bf16: bool) -> Callable[..., Tensor]:
    """a, b (padded) -> a @ b.T [Z, M, N]; the gradients are two more calls of `gemm`."""

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, b, *buffers = (Tensor(uop) for uop in call.src[1:])
        (_, m, l), n = a.shape, b.shape[1]
        if (cpu := cpu_kernels(a.device)) and gemm.run is cpu.gemm:
            a, b = in_stored_shape(a), in_stored_shape(b)
        g = rounded_factor(_pad(Tensor(upstream), m, n), to_bf16).contiguous()
        da = gemm.run(g, b, M, L, N)[:, :m, :l]
        db = gemm.run(g, a, N, L, M, trans_a=True)[:, :n, :l]
        return da.uop, db.uop, *[None for _ in buffers]

    # allow_implicit: the kernel's output buffer is an argument as well
    @function(grad_fxn=gradient, allow_implicit=True)
    def product(a: Tensor, b: Tensor) -> Tensor:
        return gemm.run(a, b, M, N, L, trans_b=True)[:, :M, :N]

    return product


def _plain_gemm(
    a: Tensor, b: Tensor, M: int, N: int, L: int, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] as tinygrad schedules it, summed in float32.

    `trans_a`: a is [Z, L, M]; `trans_b`: b is [Z, N, L]. M, N and L are the sizes before padding;
    here nothing is padded.
    """
    a, b = a.transpose(1, 2) if trans_a else a, b.transpose(1, 2) if trans_b else b
    return (a.float() @ b.float()).contiguous()


def _tensor_core_gemm(
    a: Tensor, b: Tensor, M: int, N: int, L: int, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """`_plain_gemm` of padded factors, in the form that tinygrad maps to tensor cores.

    The zeros of the padding are multiplied as well. The accumulator is float32, in which products
    of bf16 factors are exact.
    """
    a, b = a.contiguous(), (b.transpose(1, 2) if trans_b else b).contiguous()
    a = a.transpose(1, 2) if trans_a else a
    return a.matmul(b, dtype=dtypes.float32).contiguous()
