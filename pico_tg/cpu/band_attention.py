"""Attention in a band: products whose ends are fused with what comes next."""

import dataclasses
import functools
import math
from collections.abc import Callable

from tinygrad import Tensor, dtypes, function
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from ..precision import BF16, rounded_factor
from .loops import TILE_N, LoopNest, even_threads, round_up
from .matmul import pack_panels, tiled_matmul


@dataclasses.dataclass(frozen=True)
class Band:
    """How a band is cut into blocks of queries; sizes as in attention.py.

    A block's G * queries rows share its `keys`: its own and the `reach` before them. `reach` and
    `keys` are multiples of `queries`, and that of TILE_N.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    window: int
    queries: int
    reach: int
    blocks: int

    @property
    def matrices(self) -> int:
        return self.batch * self.kv_heads

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of a block: all its queries, of all the heads that share its keys."""
        return self.group * self.queries

    @property
    def keys(self) -> int:
        return self.reach + self.queries

    @property
    def positions(self) -> int:
        """Keys of a sequence, with the `reach` of nothing before it."""
        return self.reach + self.blocks * self.queries

    @property
    def width(self) -> int:
        """A row of q, k or v in memory: head_dim, one more, and what fills the last vector."""
        return round_up(self.head_dim + 1, TILE_N)

    def row(self, z: UOp, block: UOp, m: UOp) -> UOp:
        """The number, among all queries' rows, of a block's m-th."""
        return (z * self.blocks + block) * self.rows + m

    def key(self, z: UOp, block: UOp, n: UOp) -> UOp:
        """The number, among all keys, of the n-th that a block sees."""
        return z * self.positions + block * self.queries + n


def band_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """`attention.banded_attention` on a CPU; `slopes` [H] of ALiBi.

    Scores are kept as powers of two, weights without their sum: v has a column of ones, so that the
    product that weighs it sums them as well. With r = 1 / sum and D = g . out for a query whose
    output has the gradient g, its scores have weights * (r * g . v - r * D) (the softmax's gradient
    with both factors moved into the rows).
    """
    C, P, rounded = band.head_dim, band.width, bool(BF16)
    B, K, G, Q, blocks = band.batch, band.kv_heads, band.group, band.queries, band.blocks
    behind = blocks * Q - band.length

    q, k, v = q.float(), k.float(), v.float()

    def keys(x: Tensor, filled: bool) -> Tensor:
        x = x.pad((None, None, (band.reach, behind), (0, P - C)))
        if filled:
            x = x + (Tensor.arange(P, device=x.device) == C)
        return rounded_factor(x.reshape(-1, P), rounded).contiguous()

    q = (q / (math.sqrt(C) * math.log(2))).pad((None, None, (0, behind), (0, P - C)))
    q = q.reshape(B, K, G, blocks, Q, P).permute(0, 1, 3, 2, 4, 5).reshape(-1, P)
    q, k, v = rounded_factor(q, rounded).contiguous(), keys(k, False), keys(v, True)
    slopes = (slopes.reshape(1, -1).expand(B, -1) / -math.log(2)).reshape(-1).contiguous()
    weights = rounded_factor(_exps(_band_scores(q, _key_panels(k, band), slopes, band)), rounded)
    weights = weights.contiguous()
    sums = _band_product(weights, v, band, "weigh")
    out = _band_function(band, rounded)(q, k, v, weights, sums)
    out = out.reshape(B, K, blocks, G, Q, C).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(B, band.heads, blocks * Q, C)[:, :, : band.length]


@functools.cache
def _band_function(band: Band, rounded: bool):
    """q, k, v, weights, sums (as matrices) -> the output's rows, with the gradient by hand."""
    C, P = band.head_dim, band.width

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        q, k, v, weights, sums = (Tensor(uop) for uop in call.src[1:])
        g = Tensor(upstream).contiguous()
        share = sums[:, C : C + 1].reciprocal()
        dots = (-(g * sums[:, :C]).sum(axis=1, keepdim=True) * share * share).contiguous()
        g = rounded_factor((g * share).pad((None, (0, P - C))), rounded).contiguous()
        d_scores = _band_score_gradient(g, _key_panels(v, band), weights, dots, band)
        d_scores = rounded_factor(d_scores, rounded).contiguous()
        dq = _band_product(d_scores, k, band, "dq") * math.log(2)
        dk = _band_key_gradient(d_scores, q, band, "dk") * math.log(2)
        dv = _band_key_gradient(weights, g, band, "dv")
        dk, dv = (
            x.reshape(band.matrices, -1, P).pad((None, (band.reach, 0), None)).reshape(-1, P)
            for x in (dk, dv)
        )
        return dq.uop, dk.uop, dv.uop, None, None

    @function(grad_fxn=gradient)
    def attended(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        return sums[:, :C] / sums[:, C : C + 1]

    return attended


def _key_panels(x: Tensor, band: Band) -> Tensor:
    """Rows [matrices * positions, width] -> [matrices, positions / TILE_N, width, TILE_N]."""
    return pack_panels(x.reshape(band.matrices, band.positions, band.width).transpose(1, 2))


def _band_scores(q: Tensor, k: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """q's rows, k in panels -> scores in the unit of powers of two, ALiBi in it, unseen -inf.

    `slopes` are negative: added is what a position of distance adds to a score.
    """
    Q, s = band.queries, band.keys

    def biased(code: LoopNest, total: UOp, z: UOp, b: UOp, m: UOp, n: UOp) -> UOp:
        head = UOp(Ops.CDIV, m.dtype, (m, code.number(Q)))
        slope = code.load(3, z * band.group + head, 1)
        distance = code.load(4, (m - head * Q) * s + n)
        return total + code.broadcast(slope) * distance + code.load(5, b * Q + n)

    arange = functools.partial(Tensor.arange, device=q.device)
    distance = arange(Q).reshape(Q, 1) + band.reach - arange(s)
    seen = (distance >= 0) & (distance <= band.window)
    distance = seen.where(distance.cast(dtypes.float32), math.inf).contiguous()
    before = (arange(band.positions) < band.reach).where(-math.inf, 0.0).contiguous()
    return _band_against_keys([q, k, slopes, distance, before], band, "scores", biased)


def _band_score_gradient(g: Tensor, v: Tensor, weights: Tensor, dots: Tensor, band: Band) -> Tensor:
    """weights * (g's rows times v, in panels, + dots [rows, 1])."""

    def weighed(code: LoopNest, total: UOp, z: UOp, b: UOp, m: UOp, n: UOp) -> UOp:
        row = band.row(z, b, m)
        return (total + code.broadcast(code.load(4, row, 1))) * code.load(3, row * band.keys + n)

    return _band_against_keys([g, v, weights, dots], band, "ds", weighed)


def _band_against_keys(
    inputs: list[Tensor], band: Band, name: str, finish: Callable[..., UOp]
) -> Tensor:
    """Queries' rows times the keys that each sees, in panels -> rows of scores."""
    Z, b, M, P, s = band.matrices, band.blocks, band.rows, band.width, band.keys
    return tiled_matmul(
        Tensor.empty(Z * b * M, s, device=inputs[0].device),
        inputs,
        f"{name}_{Z}_{b}_{M}_{s}_{band.head_dim}",
        (Z, b),
        (M, s, band.head_dim),
        left=lambda z, b, m, l: band.row(z, b, m) * P + l,
        right=lambda z, b, l, n: band.key(z, b, n) * P + l * TILE_N,
        target=lambda z, b, m, n: band.row(z, b, m) * s + n,
        finish=finish,
    )


def _band_product(a: Tensor, x: Tensor, band: Band, name: str) -> Tensor:
    """a (rows of scores) times the keys' rows x -> rows."""
    Z, b, M, P, s = band.matrices, band.blocks, band.rows, band.width, band.keys
    return tiled_matmul(
        Tensor.empty(Z * b * M, P, device=a.device),
        [a, x],
        f"{name}_{Z}_{b}_{M}_{P}_{s}",
        (Z, b),
        (M, P, s),
        left=lambda z, b, m, l: band.row(z, b, m) * s + l,
        right=lambda z, b, l, c: band.key(z, b, l) * P + c,
        target=lambda z, b, m, c: band.row(z, b, m) * P + c,
    )


def _band_key_gradient(a: Tensor, x: Tensor, band: Band, name: str) -> Tensor:
    """For each key the sum of a (its column of the scores) times rows x, over all its queries."""
    Z, b, M, Q, P = band.matrices, band.blocks, band.rows, band.queries, band.width
    later = band.reach // Q  # blocks after a key's own that see it

    def again(z: UOp, block: UOp) -> UOp:
        there = b - block
        return (there < later + 1).where(there, there.const_like(later + 1))

    def left(z: UOp, block: UOp, *rest: UOp) -> UOp:
        t, n, m = rest if later else (0, *rest)
        return band.row(z, block + t, m) * band.keys + (later - t) * Q + n

    def right(z: UOp, block: UOp, *rest: UOp) -> UOp:
        t, m, c = rest if later else (0, *rest)
        return band.row(z, block + t, m) * P + c

    return tiled_matmul(
        Tensor.empty(Z * b * Q, P, device=a.device),
        [a, x],
        f"{name}_{Z}_{b}_{Q}_{P}_{M}_{band.keys}",
        (Z, b),
        (Q, P, M),
        left,
        right,
        target=lambda z, block, n, c: ((z * b + block) * Q + n) * P + c,
        again=again if later else None,
        products=Z * sum(min(later + 1, b - i) for i in range(b)),
    )


def _exps(scores: Tensor) -> Tensor:
    """2^(scores - the largest of the row), each row [s] of which s is a multiple of TILE_N."""
    rows, s = scores.shape

    def kernel(out: UOp, scores: UOp) -> UOp:
        row, n = UOp.range(rows, 0), UOp.range(s, 1)
        lane = UOp.range(TILE_N, 3, AxisType.REDUCE)
        if s > TILE_N:
            step = UOp.range(s // TILE_N, 2, AxisType.REDUCE)
            top = scores[row, step * TILE_N + lane].reduce(step, arg=Ops.MAX)
        else:
            top = scores[row, lane]
        top = top.reduce(lane, arg=Ops.MAX)
        value = _exp2(scores[row, n] - top)
        opts = [Opt(OptOps.UPCAST, 1, TILE_N), Opt(OptOps.UNROLL, s > TILE_N, TILE_N)]
        threads = even_threads(rows)
        if threads > 1:
            opts.append(Opt(OptOps.THREAD, 0, threads))
        info = KernelInfo(name=f"exps_{rows}_{s}", opts_to_apply=tuple(opts))
        return out[row, n].store(value).end(row, n).sink(arg=info)

    out = Tensor.empty(rows, s, device=scores.device)
    return out.custom_kernel(scores, fxn=kernel)[0]


# 2^x over -0.5 ... 0.5, interpolated at Chebyshev's points: 1e-7 of the value at most
POWERS = (0.0013400432653725147, 0.009676037356257439, 0.05550327152013779)
POWERS = (*POWERS, 0.2402210682630539, 0.6931471824645996, 1.0000001192092896)


def _exp2(x: UOp) -> UOp:
    """2^x for x <= 0, exactly 0 below 2^-126: a third of what tinygrad's own takes."""
    x = x.maximum(x.const_like(-127.0))
    whole = (x - 0.5).cast(dtypes.int32)  # cut towards 0: the nearest
    rest = x - whole.cast(dtypes.float32)
    power = rest.const_like(POWERS[0])
    for coefficient in POWERS[1:]:
        power = power * rest + coefficient
    return power * ((whole + 127) * (1 << 23)).bitcast(dtypes.float32)
