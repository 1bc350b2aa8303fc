"""Banded attention on the CPU: matmuls with fused epilogues, and their gradients.

For each query, with S its scores as exponents of 2:

    S = log2(e) * (q . k / sqrt(C) - ALiBi), and -inf where a key is not visible

    P = 2^(S - max S)        weights, not normalized
    l = sum of P             a column of ones in V gives l as one more column of P V
    O = P V / l              the output

and with dO the gradient of the output:

    delta = rowsum(dO * O)
    dS = P * (dO V^T - delta) / l     elementwise; dQ and dK are multiplied by ln 2
    dQ = dS K,  dK = dS^T Q,  dV = P^T dO / l

as in FlashAttention-2 (arXiv 2307.08691), except that P is kept for the backward pass: in a band it
has only O(N * window) elements.

The band is cut into blocks of queries. In a single block, half of S is not visible: its tiles are
not computed, and hold any numbers; nothing reads them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from tinygrad import Tensor, dtypes, function
from tinygrad.helpers import round_up
from tinygrad.uop.ops import Ops, UOp

from ..backend.precision import BF16, rounded_factor
from . import launcher
from .loops import TILE_N, VECTOR, LoopNest, tile_m
from .matmul import UNROLL, at_most, ceil_div, floor_div, kernel, pack, shares, tiled_matmul


@dataclasses.dataclass(frozen=True)
class Band:
    """The sizes of banded attention, and of the blocks of queries that the band is cut into.

    The `group * queries` rows of a block share `keys` keys: those of the block's own positions and
    the `lookback` keys before them. `lookback` is a multiple of `queries`, and `queries` is a
    multiple of TILE_N.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    window: int
    queries: int
    lookback: int
    blocks: int

    @property
    def matrices(self) -> int:
        """Pairs of a sequence and a key/value head."""
        return self.batch * self.kv_heads

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def one_block(self) -> bool:
        """Whether all queries are in one block, in which query i sees the keys 0 to i."""
        return self.lookback == 0

    @property
    def parts(self) -> int:
        """Parts of a matrix's query rows that are multiplied separately: heads or blocks."""
        return self.group if self.one_block else self.blocks

    @property
    def rows(self) -> int:
        """Query rows of a part: `queries` positions of one head, or of all heads of a block."""
        return self.queries if self.one_block else self.group * self.queries

    @property
    def keys(self) -> int:
        return self.lookback + self.queries

    @property
    def positions(self) -> int:
        """Key rows of a sequence, including `lookback` rows of zeros before the first byte."""
        return self.lookback + self.blocks * self.queries

    @property
    def width(self) -> int:
        """Columns of q, k and v in memory: head_dim, the column of ones, padding."""
        return round_up(self.head_dim + 1, TILE_N)

    def query_row(self, z: UOp, part: UOp, m: UOp) -> UOp:
        """The index of a part's m-th query row among all query rows."""
        return (z * self.parts + part) * self.rows + m

    def key(self, part: UOp, n: UOp) -> UOp:
        """The index of a part's n-th visible key among those of its matrix."""
        return n if self.one_block else part * self.queries + n

    def key_row(self, z: UOp, part: UOp, n: UOp) -> UOp:
        """The index of a part's n-th visible key row among all key rows."""
        return z * self.positions + self.key(part, n)

    @property
    def products(self) -> float:
        """Matmuls of a part's scores [rows, keys]; in one block, by the share of tiles computed."""
        share = (1 + tile_m() / self.keys) / 2 if self.one_block else 1
        return self.matrices * self.parts * share


def tiles(length: int, window: int) -> tuple[int, int, int]:
    """`attention.block_sizes` for these kernels: (queries of a block, lookback, blocks).

    Blocks are multiples of TILE_N. They are smaller than those of `block_sizes`, since these
    kernels do not copy the keys for each block.
    """
    if window >= length - 1:
        return round_up(length, TILE_N), 0, 1
    queries = TILE_N if window < 8 * TILE_N else 2 * TILE_N
    return queries, math.ceil(window / queries) * queries, math.ceil(length / queries)


def band_attention(q: Tensor, k: Tensor, v: Tensor, window: int, slopes: Tensor) -> Tensor:
    """`attention.banded_attention` on a CPU.

    q [B, H, N, C], k and v [B, K, N, C], ALiBi's slopes [H] -> [B, H, N, C], float32.
    """
    B, H, N, C = q.shape
    band = Band(B, H, k.shape[1], C, N, window, *tiles(N, window))
    P, to_bf16 = band.width, bool(BF16)
    B, K, G, Q, blocks = band.batch, band.kv_heads, band.group, band.queries, band.blocks
    padding = blocks * Q - band.length

    q, k, v = q.float(), k.float(), v.float()

    def key_rows(x: Tensor, ones: bool) -> Tensor:
        x = x.pad((None, None, (band.lookback, padding), (0, P - C)))
        if ones:
            x = x + (Tensor.arange(P, device=x.device) == C)
        return rounded_factor(x.reshape(-1, P), to_bf16).contiguous()  # (B*K*positions, P)

    q = (q / (math.sqrt(C) * math.log(2))).pad((None, None, (0, padding), (0, P - C)))
    q = q.reshape(B, K, G, blocks, Q, P).permute(0, 1, 3, 2, 4, 5)  # (B, K, blocks, G, Q, P)
    q = rounded_factor(q.reshape(-1, P), to_bf16).contiguous()  # (B*K*blocks*G*Q, P)
    k, v = key_rows(k, ones=False), key_rows(v, ones=True)
    slopes = (slopes.reshape(1, -1).expand(B, -1) / -math.log(2)).reshape(-1).contiguous()  # (B*H,)
    scores = _scores(q, _key_panels(k, band), slopes, band)
    weights = rounded_factor(exps(scores, Q if band.one_block else 0), to_bf16).contiguous()
    sums = _rows_times_keys(q.shape, [weights, v], band)
    out = _output_function(band, to_bf16)(q, k, v, weights, sums)  # (B*K*blocks*G*Q, C)
    out = out.reshape(B, K, blocks, G, Q, C).permute(0, 1, 3, 2, 4, 5)  # (B, K, G, blocks, Q, C)
    return out.reshape(B, band.heads, blocks * Q, C)[:, :, : band.length]


@functools.cache
def _output_function(band: Band, to_bf16: bool):
    """A function of the rows of q, k, v, weights and sums -> output rows, with its gradient."""
    C, P = band.head_dim, band.width

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        q, k, v, weights, sums = (Tensor(uop) for uop in call.src[1:])
        g = Tensor(upstream).contiguous()
        inv_l = sums[:, C : C + 1].reciprocal()
        # -delta / l, since the epilogue adds
        minus_delta = (-(g * sums[:, :C]).sum(axis=1, keepdim=True) * inv_l * inv_l).contiguous()
        g = rounded_factor((g * inv_l).pad((None, (0, P - C))), to_bf16).contiguous()  # dO / l
        inputs = [g, _key_panels(v, band), weights, minus_delta]
        ds = _score_gradient(weights.shape, inputs, band)
        ds = rounded_factor(ds, to_bf16).contiguous()
        dq = _rows_times_keys(q.shape, [ds, k], band) * math.log(2)
        dk = _key_gradient(ds, q, band) * math.log(2)
        dv = _key_gradient(weights, g, band)
        dk, dv = (  # zeros for the rows before the first byte: (B*K*positions, P)
            x.reshape(band.matrices, -1, P).pad((None, (band.lookback, 0), None)).reshape(-1, P)
            for x in (dk, dv)
        )
        return dq.uop, dk.uop, dv.uop, None, None

    @function(grad_fxn=gradient)
    def output(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        return sums[:, :C] / sums[:, C : C + 1]

    return output


def _key_panels(x: Tensor, band: Band) -> Tensor:
    """Rows [matrices * positions, width] -> [matrices, positions / TILE_N, width, TILE_N]."""
    return pack(x, band.width, band.positions, TILE_N, 1, transposed=True)


def _scores(q: Tensor, k: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """Query rows, keys in panels, slopes [B * H] times -log2(e) -> score rows S."""
    Q, s = band.queries, band.keys
    arange = functools.partial(Tensor.arange, device=q.device)
    distance = arange(Q).reshape(Q, 1) + band.lookback - arange(s)  # (Q, s)
    visible = (distance >= 0) & (distance <= band.window)
    # the slopes are negative, so an infinite distance makes the score -inf
    distance = visible.where(distance.cast(dtypes.float32), math.inf).contiguous()
    before_start = (arange(band.positions) < band.lookback).where(-math.inf, 0.0).contiguous()
    return _score_kernel((len(q), s), [q, k, slopes, distance, before_start], band)


@kernel
def _score_kernel(numels: tuple[int, ...], band: Band) -> UOp:
    Q = band.queries

    def add_bias(nest: LoopNest, sums: UOp, z: UOp, part: UOp, m: UOp, n: UOp) -> UOp:
        head = floor_div(m, Q)  # of the part's heads
        slope = nest.load(3, z * band.group + (part if band.one_block else head), 1)
        distance = nest.load(4, (m - head * Q) * band.keys + n)
        return sums + nest.broadcast(slope) * distance + nest.load(5, band.key(part, n))

    return _rows_times_panels(numels, band, "scores", add_bias)


@kernel
def _score_gradient(numels: tuple[int, ...], band: Band) -> UOp:
    """dS from dO / l (rows), V in panels, P (rows) and -delta / l [rows, 1]."""

    def times_weights(nest: LoopNest, sums: UOp, z: UOp, part: UOp, m: UOp, n: UOp) -> UOp:
        row = band.query_row(z, part, m)
        return (sums + nest.broadcast(nest.load(4, row, 1))) * nest.load(3, row * band.keys + n)

    return _rows_times_panels(numels, band, "ds", times_weights)


def _rows_times_panels(
    numels: tuple[int, ...], band: Band, name: str, epilogue: Callable[..., UOp]
) -> UOp:
    """Each part's query rows @ its visible keys, in panels -> rows of `keys` elements."""
    Z, parts, M, P, s = band.matrices, band.parts, band.rows, band.width, band.keys
    return tiled_matmul(
        numels,
        f"{name}_{Z}_{parts}_{M}_{s}_{band.head_dim}",
        (Z, parts),
        (M, s, band.head_dim),
        a_index=lambda z, part, m, i, l: band.query_row(z, part, m + i) * P + l,
        b_index=lambda z, part, l, p: band.key_row(z, part, p * TILE_N) * P + l * TILE_N,
        c_index=lambda z, part, m, n: band.query_row(z, part, m) * s + n,
        epilogue=epilogue,
        lower=band.one_block,
        overlap=False,
    )


@kernel
def _rows_times_keys(numels: tuple[int, ...], band: Band) -> UOp:
    """Each part's score rows a @ its visible key rows x -> query rows."""
    Z, parts, M, P, s = band.matrices, band.parts, band.rows, band.width, band.keys
    return tiled_matmul(
        numels,
        f"weigh_{Z}_{parts}_{M}_{P}_{s}",
        (Z, parts),
        (M, P, s),
        a_index=lambda z, part, m, i, l: band.query_row(z, part, m + i) * s + l,
        b_index=lambda z, part, l, p: band.key_row(z, part, l) * P + p * TILE_N,
        c_index=lambda z, part, m, c: band.query_row(z, part, m) * P + c,
        steps=(lambda m, c: (0, ceil_div(m + tile_m(), UNROLL))) if band.one_block else None,
        products=band.products,
        overlap=False,
    )


def _key_gradient(a: Tensor, x: Tensor, band: Band) -> Tensor:
    """a^T x -> key rows. For each key: the sum, over the queries that see the key, of a * x."""
    rows = band.matrices * band.blocks * band.queries
    return _key_gradient_kernel((rows, band.width), [a, x], band)


@kernel
def _key_gradient_kernel(numels: tuple[int, ...], band: Band) -> UOp:
    Z, b, M, Q, P = band.matrices, band.blocks, band.rows, band.queries, band.width
    later = band.lookback // Q  # a key is visible to its own block and to this many later ones

    def parts(z: UOp, block: UOp) -> UOp | int:
        """Number of parts that see keys of the block: all heads, or this block and later ones."""
        if band.one_block:
            return band.parts
        return at_most(b - block, later + 1)

    def a_index(z: UOp, block: UOp, t: UOp, n: UOp, i: int, m: UOp) -> UOp:
        key = n + i if band.one_block else (later - t) * Q + n + i
        return band.query_row(z, block + t, m) * band.keys + key

    def b_index(z: UOp, block: UOp, t: UOp, m: UOp, p: UOp) -> UOp:
        return band.query_row(z, block + t, m) * P + p * TILE_N

    def steps(n: UOp, _: UOp) -> tuple[UOp, UOp]:
        """The steps from the key's own query on."""
        first = floor_div(n, UNROLL)
        return first, Q // UNROLL - first

    products = band.products if band.one_block else Z * sum(min(later + 1, b - i) for i in range(b))
    return tiled_matmul(
        numels,
        f"key_gradient_{Z}_{b}_{Q}_{P}_{M}_{band.keys}",
        (Z, b),
        (Q, P, M),
        a_index,
        b_index,
        c_index=lambda z, block, n, c: ((z * b + block) * Q + n) * P + c,
        accumulate_over=parts,
        steps=steps if band.one_block else None,
        products=products,
        overlap=False,
    )


def exps(scores: Tensor, queries: int = 0) -> Tensor:
    """2^(scores - row maximum): [rows, s] -> [rows, s], with s a multiple of TILE_N.

    With `queries` > 0, row i sees the keys 0 to i % queries. Only the tiles of scores that contain
    such keys are read and written.
    """
    rows, s = scores.shape
    return _exps((rows, s), [scores], rows, s, queries, launcher.worth_threads(rows * s))


@kernel
def _exps(numels: tuple[int, ...], rows: int, s: int, queries: int, threaded: bool) -> UOp:
    period, vectors = queries or rows, s // TILE_N
    nest = LoopNest(numels, shares(period) if threaded else 1)

    def lanes(vector: UOp) -> list[UOp]:
        return [vector.gep(i) for i in range(TILE_N)]

    def largest(x: UOp, y: UOp) -> UOp:
        return (x < y).where(y, x)

    with nest.loops((rows // period, period), 1) as (part, query):
        row = part * period + query
        # what a row of the same tile sees; rounded up to vectors, also where the last tile overlaps
        if queries:
            keys = at_most(ceil_div(query + 1, tile_m()) * tile_m(), queries)
            vectors = ceil_div(keys, TILE_N)
        start, top = row * s, nest.registers(1)
        nest.store_reg(top, 0, nest.load(1, start))
        with nest.loop(vectors) as v:
            scores = nest.load(1, start + v * TILE_N)
            pairs = zip(lanes(nest.load_reg(top, 0)), lanes(scores), strict=True)
            nest.store_reg(top, 0, UOp(Ops.STACK, VECTOR, tuple(largest(x, y) for x, y in pairs)))
        highest = functools.reduce(largest, lanes(nest.load_reg(top, 0)))
        with nest.loop(vectors) as v:
            address = start + v * TILE_N
            powers = (_exp2(score - highest) for score in lanes(nest.load(1, address)))
            nest.store(address, UOp(Ops.STACK, VECTOR, tuple(powers)))
    return nest.program(f"exps_{rows}_{s}_{queries}")


# 2^x over [-0.5, 0.5], interpolated at the Chebyshev nodes: relative error at most 1e-7
EXP2_COEFFICIENTS = (
    *(0.0013400432653725147, 0.009676037356257439, 0.05550327152013779),
    *(0.2402210682630539, 0.6931471824645996, 1.0000001192092896),
)


def _exp2(x: UOp) -> UOp:
    """2^x for x <= 0, exactly 0 below 2^-126; three times as fast as tinygrad's exp2."""
    x = (x < -127.0).where(x.const_like(-127.0), x)
    whole = (x - 0.5).cast(dtypes.int32)  # x <= 0, so truncation after -0.5 rounds to nearest
    rest = x - whole.cast(dtypes.float32)
    power = rest.const_like(EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        power = power * rest + coefficient
    return power * ((whole + 127) * (1 << 23)).bitcast(dtypes.float32)
