"""Grouped-query attention in a band, with ALiBi; rotation, its alternative.

Query i sees key j iff i - window <= j <= i. The sequence is cut into blocks of queries; a block
sees its own keys and those of the `window` positions before it, so the cost is O(N * window) and
no N x N matrix exists unless the window spans the sequence. On a CPU `kernels.band_attention` does
it, elsewhere plain products.

Shape letters: B batch, N positions, H query heads, K key/value heads, G = H // K query heads that
share one of them, C head_dim, W window, b blocks, q queries a block, s = q + reach keys a block.
"""

import math
from functools import partial

from tinygrad import Tensor, dtypes

from .cpu.band_attention import Band, band_attention
from .cpu.loops import TILE_N
from .ops import matmul, matmul_transposed
from .runtime import has_cpu_kernels


def alibi_slopes(heads: int, device: str | tuple[str, ...] | None = None) -> Tensor:
    """The ALiBi slope of each head, 2^(-8(h+1)/heads): float32 [heads] (arXiv 2108.12409)."""
    head = Tensor.arange(heads, dtype=dtypes.float32, device=device)
    return (-8.0 / heads * (head + 1)).exp2()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [..., N, C] turned by its positions, int [N]: rotary embeddings (arXiv 2104.09864).

    Channels j and j + C // 2 are a pair, turned by position * 10000^(-2j / C) radians (C less one
    if odd: the last channel is left alone). Off by at most 2e-6 radians at any position: turns are
    counted in units of 2^-64, and whole ones drop out of the product by themselves.
    """
    half = x.shape[-1] // 2
    turns = [10000 ** (-j / half) / (2 * math.pi) for j in range(half)]
    units = [Tensor.full((1,), int(t * 2**64), dtype=dtypes.uint64, device=x.device) for t in turns]
    if not units:
        return x
    product = positions.cast(dtypes.uint64).unsqueeze(1) * Tensor.cat(*units)  # (N, C // 2)
    angle = (product >> 40).cast(dtypes.int32).cast(dtypes.float32) * (2 * math.pi / 2**24)
    cos, sin = angle.cos().contiguous(), angle.sin().contiguous()
    a, b = x[..., :half], x[..., half : 2 * half]
    return Tensor.cat(a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :], dim=-1)


def block_sizes(length: int, window: int) -> tuple[int, int, int]:
    """How the band is cut: (queries a block, keys before them, blocks).

    A block of q queries sees its own q keys and `reach` before them, a multiple of q that covers
    the window: q + reach scores a query, window + 1 of them visible. Smaller blocks waste fewer
    scores, larger ones make better matrices; a quarter of the window, at least 16, is the middle.
    """
    if window >= length - 1:
        return length, 0, 1
    queries = min(window, max(16, math.ceil(window / 4)))
    return queries, math.ceil(window / queries) * queries, math.ceil(length / queries)


def tiles(length: int, window: int) -> tuple[int, int, int]:
    """`block_sizes` for kernels by hand: multiples of their vectors, and smaller blocks.

    Nothing is copied for a block, so that many are cheap.
    """
    if window >= length - 1:
        return math.ceil(length / TILE_N) * TILE_N, 0, 1
    queries = TILE_N if window < 8 * TILE_N else 2 * TILE_N
    return queries, math.ceil(window / queries) * queries, math.ceil(length / queries)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int, alibi: bool = True) -> Tensor:
    """Softmax attention of each position over itself and the `window` positions before it.

    q [B, H, N, C], k and v [B, K, N, C], float -> [B, H, N, C]. H must be a multiple of K; query
    head h reads key/value head h // (H // K). Without `alibi` the distance has no part in a score.
    """
    B, H, N, C = q.shape
    K = k.shape[1]
    G = H // K
    if has_cpu_kernels(q.device):
        slopes = alibi_slopes(H, q.device)
        if not alibi:  # too little to change a score; 0 times an infinite distance would be NaN
            slopes = slopes * 2.0**-100
        return band_attention(q, k, v, slopes, Band(B, H, K, C, N, window, *tiles(N, window)))
    queries, reach, blocks = block_sizes(N, window)
    padding = blocks * queries - N

    # the G heads that share keys become rows of one matrix: no key is read or materialize twice
    q = q.pad((None, None, (0, padding), None)).reshape(B, K, G, blocks, queries, C)
    q = q.permute(0, 1, 3, 2, 4, 5).reshape(B, K, blocks, G * queries, C)  # (B, K, b, G*q, C)
    k = _windows(k, queries, reach, blocks)  # (B, K, b, s, C)
    v = _windows(v, queries, reach, blocks)  # (B, K, b, s, C)

    scores = matmul_transposed(q, k)  # (B, K, b, G*q, s)
    scores = scores.reshape(B, K, blocks, G, queries, reach + queries)
    weights = _banded_softmax(scores / math.sqrt(C), queries, reach, window, alibi)
    out = matmul(weights.reshape(B, K, blocks, G * queries, reach + queries), v)
    out = out.reshape(B, K, blocks, G, queries, C).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(B, H, blocks * queries, C)[:, :, :N]


def _windows(x: Tensor, queries: int, reach: int, blocks: int) -> Tensor:
    """[B, K, N, C] -> [B, K, b, s, C]: the keys that each block of queries sees."""
    B, K, N, C = x.shape
    padded = x.pad((None, None, (reach, blocks * queries - N), None))
    shifted = [
        padded[:, :, start : start + blocks * queries].reshape(B, K, blocks, queries, C)
        for start in range(0, reach + 1, queries)
    ]
    return shifted[0] if len(shifted) == 1 else Tensor.cat(*shifted, dim=3)


def _banded_softmax(scores: Tensor, queries: int, reach: int, window: int, alibi: bool) -> Tensor:
    """Softmax over the visible keys of scores [B, K, b, G, q, s], with ALiBi added if so."""
    _, K, blocks, G, _, keys = scores.shape
    arange = partial(Tensor.arange, device=scores.device)
    first = (arange(blocks) * queries).reshape(blocks, 1, 1, 1)
    i = first + arange(queries).reshape(queries, 1)
    j = first - reach + arange(keys)
    distance = i - j  # (b, 1, q, s)
    visible = (distance >= 0) & (distance <= window) & (j >= 0)
    if alibi:
        scores = scores - alibi_slopes(K * G, scores.device).reshape(K, 1, G, 1, 1) * distance
    # every real query sees itself, so no row is empty
    biased = visible.where(scores, -math.inf)
    exps = (biased - biased.max(axis=-1, keepdim=True).detach().contiguous()).exp()
    return exps / exps.sum(axis=-1, keepdim=True).contiguous()
