"""The model's operations with custom gradients: lookup, gather, scatter, SwiGLU, losses.

tinygrad fuses lazily: without `materialize`, every kernel that reads an activation would recompute
that activation.
"""

import functools
import math

from tinygrad import Tensor, UOp, dtypes, function

from .backend.cpu_kernels import cpu_kernels
from .backend.machine import renderer_of
from .backend.runtime import (
    AxisType,
    KernelInfo,
    Opt,
    OptOps,
)


def materialize(x: Tensor) -> Tensor:
    """Compute `x` and its gradient once each, instead of again inside every consumer."""
    return x.contiguous().contiguous_backward()


def as_index(x: Tensor) -> Tensor:
    """Bytes or integers as int32 in memory, to index with.

    tinygrad 0.13 drops the cast of a lone uint8 that becomes an address, and LLVM then reads the
    byte as signed: 200 would address 56 before the array (test_ops.test_a_lone_byte_is_an_index).
    """
    return x.cast(dtypes.int32).contiguous()


def fractional_products(x: Tensor, factors: list[float]) -> Tensor:
    """The fractional parts of x * factor for x >= 0, int [N], and factors below 1: float32 [N, F].

    Exact to 2^-24 for any x: a factor is an integer in units of 2^-64, and overflow drops the whole
    part. The arithmetic is in 32 bits, since WebGPU has no wider integers.
    """
    words = zip(*[divmod(int(factor * 2**64), 2**32) for factor in factors], strict=True)
    full = functools.partial(Tensor.full, (1,), dtype=dtypes.uint32, device=x.device)
    high, low = (Tensor.cat(*map(full, word)) for word in words)  # (F,)
    x = x.cast(dtypes.uint32).unsqueeze(1)  # (N, 1)
    # the upper word of the 64-bit product x * low, from digits of 16 bits
    (x1, x0), (low1, low0) = ((word >> 16, word & 0xFFFF) for word in (x, low))
    left, right = x1 * low0, x0 * low1
    carry = (left & 0xFFFF) + (right & 0xFFFF) + ((x0 * low0) >> 16)
    upper = x * high + x1 * low1 + (left >> 16) + (right >> 16) + (carry >> 16)
    return (upper >> 8).cast(dtypes.int32).cast(dtypes.float32) * 2.0**-24


# sin(2 pi y) / y as a polynomial of y^2 for |y| <= 1/4, interpolated at the Chebyshev nodes
SINE = 6.28318528015, -41.3416806133, 81.6024763689, -76.5811726442, 39.759827083


def cos_and_sin(x: Tensor) -> Tensor:
    """Cosine and sine of x revolutions, 0 <= x < 1, within 2e-7: [...] -> [2, ...].

    tinygrad's own take any angle, and twice as long to compile.
    """
    shifted = Tensor.stack(x - 0.25, x - 0.5)  # the sines of these, with the other sign
    y = shifted.minimum(0.5 - shifted).maximum(-0.5 - shifted)  # folded into [-1/4, 1/4]
    square = y * y
    sines = functools.reduce(lambda power, factor: power * square + factor, reversed(SINE))
    return (-y * sines).contiguous()


def lookup(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of weight [V, D] by index int32 [...] -> [..., D]."""
    rows = _lookup(weight, index.reshape(-1).contiguous())  # (N, D)
    return rows.reshape(*index.shape, weight.shape[1])


def _lookup_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    weight, index = (Tensor(uop) for uop in call.src[1:])
    g = Tensor(upstream).contiguous()  # (N, D)
    V = weight.shape[0]
    if isinstance(g.device, str):
        return _sum_rows(g, index, V).uop, None
    # a custom kernel would need a part of the result on each device
    hit = Tensor.arange(V, device=g.device).unsqueeze(1) == index  # (V, N)
    return hit.unsqueeze(2).where(g, 0).sum(axis=1).uop, None  # (V, N, D) -> (V, D)


def _sum_rows(g: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sum each row of g [N, D] into row index[n] of the result [rows, D]; index int32 [N].

    O(N * D) additions, without atomics. A CPU adds vectors, in one pass over g. On a GPU, each of
    `parts` groups of rows has its own copy of the result, to which a thread adds one, two or four
    columns, so that no two threads add to the same number.
    """
    N, D = g.shape
    is_gpu = renderer_of(g.device).has_local
    parts = next(n for n in (16, 8, 4, 2, 1) if N % n == 0) if is_gpu else 1
    width = next(n for n in ((4, 2, 1) if is_gpu else (12, 16, 8, 4, 2, 1)) if D % n == 0)
    threads = max(n for n in range(1, 65) if D // width % n == 0) if is_gpu else 1
    sizes = (OptOps.UPCAST, width), (OptOps.LOCAL, threads)
    opts = [Opt(op, int(parts > 1), size) for op, size in sizes if size > 1]

    def kernel(out: UOp, g: UOp, index: UOp) -> UOp:
        part, d = UOp.range(parts, 0), UOp.range(D, 1)
        n = UOp.range(N // parts, 2, AxisType.REDUCE)  # not LOOP, which may become threads
        source = part * (N // parts) + n
        # % rows bounds the address: without a bound, tinygrad 0.13 computes it in 64 bits, which
        # fails on WebGPU (test_drivers.test_training_and_decoding)
        row = part * rows + index[source].cast(dtypes.weakint) % rows
        info = KernelInfo(name=f"sum_rows_{rows}_{D}_{N}", opts_to_apply=tuple(opts))
        added = out[row, d].store(out[row, d] + g[source, d])
        return added.end(n, d, part).sink(arg=info)

    zeros = Tensor.zeros(parts * rows, D, device=g.device).contiguous()
    sums = zeros.custom_kernel(g, index, fxn=kernel)[0]
    return sums.reshape(parts, rows, D).sum(axis=0)


# tinygrad's gradient of an indexed load is a one-hot sum on every device, O(N * V * D)
@function(grad_fxn=_lookup_gradient)
def _lookup(weight: Tensor, index: Tensor) -> Tensor:
    return weight.gather(0, index.unsqueeze(1).expand(index.shape[0], weight.shape[1]))


def gather(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """x [..., N, D] -> [..., S, D]: row index[..., s] in each slot.

    index int32 [..., S] and slot int32 [..., N] are inverse maps: see `routing.slots`. So the
    gradient of `gather` is `scatter` with the same maps and vice versa; both cost O(N * D).
    """
    return _gather(x.contiguous(), index, slot).contiguous()


def scatter(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """x [..., S, D] -> [..., N, D]: row n is slot slot[..., n] of x, or zeros if that is -1."""
    return _scatter(x.contiguous(), index, slot)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [..., N, D] by index int32 [..., S] -> [..., S, D]; zeros for the index -1.

    The index goes to `gather` as it is: after `index.maximum(0)`, tinygrad 0.13 no longer knows the
    bounds of the address and computes it in 64 bits, which fails on WebGPU
    (test_drivers.test_training_and_decoding).
    """
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _gather_gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    _, _, slot = (Tensor(uop) for uop in call.src[1:])
    return _take_rows(Tensor(gradient).contiguous(), slot).uop, None, None


def _scatter_gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    _, index, slot = (Tensor(uop) for uop in call.src[1:])
    # an unused slot holds index 0, which is not its own row: the slot's gradient is zero
    used = slot.gather(-1, index) == Tensor.arange(index.shape[-1], device=index.device)  # (..., S)
    taken = _take_rows(Tensor(gradient).contiguous(), index)  # (..., S, D)
    return used.unsqueeze(-1).where(taken, 0).uop, None, None


# without grad_fxn, tinygrad's gradient of an indexed load is a one-hot sum, O(N * S * D)
@function(grad_fxn=_gather_gradient)
def _gather(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    # 0 * slot: the gradient needs `slot`, and `call.src` holds only tensors that the function reads
    return _take_rows(x, index) + 0 * slot[..., :1].unsqueeze(-1)


@function(grad_fxn=_scatter_gradient)
def _scatter(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return _take_rows(x, slot)


def swiglu(x: Tensor, width: int) -> Tensor:
    """x [..., value | gate | padding] -> silu(gate) * value [..., width].

    In training the sigmoid is computed once, for the gradient too; otherwise in the same kernel.
    """
    value, gate = x[..., :width], x[..., width : 2 * width]
    if not Tensor.training:
        return (gate.silu() * value).contiguous()
    return _swiglu(x, gate.sigmoid().contiguous())


def _swiglu_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    x, sigmoid = (Tensor(uop) for uop in call.src[1:])
    value, gate = x.chunk(2, dim=-1)
    g = Tensor(upstream).contiguous() * sigmoid
    # stacked, not concatenated: the loop over a half then has no condition, and takes half the time
    halves = Tensor.stack(g * gate, g * value * (1 + gate * (1 - sigmoid)), dim=-2)
    return halves.flatten(-2).uop, None


@function(grad_fxn=_swiglu_gradient)
def _swiglu(x: Tensor, sigmoid: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return gate * sigmoid * value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x [..., D], weight [D] -> [..., D]."""
    scale = (x.detach().square().mean(axis=-1, keepdim=True) + eps).rsqrt().contiguous()
    return _scaled(x, scale, weight)


def _scaled_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    x, scale, weight = (Tensor(uop) for uop in call.src[1:])
    g = Tensor(upstream).contiguous()
    # not (g * weight) * x: tinygrad would store g * weight, which is used below as well
    inner = (g * x * weight).mean(axis=-1, keepdim=True).contiguous()
    dx = (g * weight - x * (scale * scale * inner)) * scale  # `scale` depends on x
    return dx.uop, None, column_sums(g, x, scale).uop


@function(grad_fxn=_scaled_gradient)
def _scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return x * scale * weight


def _add_bias_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    g = Tensor(upstream).contiguous()
    return g.uop, column_sums(g).uop


@function(grad_fxn=_add_bias_gradient)
def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x [..., D] + bias [D]; not in memory: adding again is cheaper than storing the sum."""
    return x + bias


def column_sums(*factors: Tensor) -> Tensor:
    """The product of the factors, summed over all axes but the last: [D].

    The first factor is [..., D], the others [..., D] or [..., 1]. In memory: a GPU would compute a
    kernel of several such sums in a single thread.
    """
    x = factors[0]
    D = x.shape[-1]
    # a single row would be a loop of one iteration, which tinygrad 0.13 renders as none; the
    # kernel's vectors have 16 columns
    if x.numel() > D >= 16 and (cpu := cpu_kernels(x.device)):
        return cpu.column_sums(*factors)
    product = math.prod(factors)
    return product.reshape(-1, product.shape[-1]).sum(axis=0).contiguous()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))): logits [..., 256] -> [..., 1]."""
    # materialize the maximum and the sum, which tinygrad would otherwise recompute for each logit
    top = logits.max(axis=-1, keepdim=True).detach().contiguous()
    return (logits - top).exp().sum(axis=-1, keepdim=True).contiguous().log() + top


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats: logits [..., 256], targets [...] -> [...]."""
    at_target = logits.gather(-1, as_index(targets).unsqueeze(-1))
    return (_log_sum_exp(logits) - at_target).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """-sum(p * log p) in nats, with p = softmax(logits): logits [..., 256] -> [...]."""
    log_p = logits - _log_sum_exp(logits)
    return -(log_p.exp() * log_p).sum(axis=-1)
