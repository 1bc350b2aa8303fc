"""Grouped-query attention in a band, with ALiBi or rotary positions.

Query i sees key j iff i - window <= j <= i. The sequence is cut into blocks of queries; a block is
scored against its own keys and the `lookback` keys before them. So the cost is O(N * window), and
no N x N matrix exists unless the window spans the sequence.

Shape letters: B batch, N positions, H query heads, K key/value heads, G = H / K query heads per
key/value head, C head_dim, b blocks, q queries and s = lookback + q keys of a block.
"""

import math
from functools import partial

from tinygrad import Tensor, dtypes

from .backend.cpu_kernels import cpu_kernels
from .matmul import matmul
from .ops import cos_and_sin, fractional_products


def alibi_slopes(heads: int, device: str | tuple[str, ...] | None = None) -> Tensor:
    """The ALiBi slope of each head, 2^(-8(h+1)/heads): float32 [heads] (arXiv 2108.12409)."""
    head = Tensor.arange(heads, dtype=dtypes.float32, device=device)
    return (-8.0 / heads * (head + 1)).exp2()


def rotate(x: Tensor, positions: Tensor, same_bits: bool = False) -> Tensor:
    """x [..., N, C] rotated by its positions, int [N]: rotary embeddings (arXiv 2104.09864).

    Channels j and j + C // 2 are a pair, rotated by position * 10000^(-2j / C) radians (an odd C
    counts as C - 1, and the last channel is not rotated). The error is at most 6e-7 radians at any
    position. same_bits: give a position the same bits whatever the number of positions.
    """
    half = x.shape[-1] // 2
    if half == 0:
        return x
    rates = [10000 ** (-j / half) / (2 * math.pi) for j in range(half)]  # revolutions per position
    cos, sin = cos_and_sin(fractional_products(positions, rates))  # (N, C // 2)
    pairs = x[..., : 2 * half].unflatten(-1, (2, half))
    a, b = pairs[..., 0, :], pairs[..., 1, :]  # (..., N, C // 2)
    products = a * cos, b * sin, a * sin, b * cos
    if same_bits:  # otherwise a compiler fuses one of the two products with the sum, either one
        products = Tensor.stack(*products).contiguous()
    # stacked: see the gradient of `ops.swiglu`
    rotated = Tensor.stack(products[0] - products[1], products[2] + products[3], dim=-2).flatten(-2)
    return rotated if x.shape[-1] == 2 * half else rotated.cat(x[..., 2 * half :], dim=-1)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int, alibi: bool = True) -> Tensor:
    """Softmax attention of each position to itself and the `window` positions before it.

    q [B, H, N, C], k and v [B, K, N, C], float -> [B, H, N, C]. H is a multiple of K; query head h
    reads key/value head h // (H // K). With `alibi`, slope * distance is subtracted from a score.
    """
    B, H, N, C = q.shape
    K, G = k.shape[1], H // k.shape[1]
    if cpu := cpu_kernels(q.device):
        # no ALiBi: 2^-100 changes no score, while 0 times a masked key's infinite distance is NaN
        slopes = alibi_slopes(H, q.device) * (1.0 if alibi else 2.0**-100)
        return cpu.band_attention(q, k, v, window, slopes)
    queries, lookback, blocks = block_sizes(N, window)
    k, v = k.contiguous(), v.contiguous()  # several blocks read each

    # the G heads that share keys become rows of one matrix, so that each key is read once
    q = q.pad((None, None, (0, blocks * queries - N), None)).reshape(B, K, G, blocks, queries, C)
    q = q.permute(0, 1, 3, 2, 4, 5).reshape(B, K, blocks, G * queries, C)  # (B, K, b, G*q, C)
    k = _keys_of_blocks(k, queries, lookback, blocks)  # (B, K, b, s, C)
    # append a column of ones to v: the matmul with v also computes the softmax's denominator, and
    # its gradient includes that of the denominator, so neither needs a pass over the scores
    v = v.pad((None, None, None, (0, 1)), value=1)
    v = _keys_of_blocks(v, queries, lookback, blocks)  # (B, K, b, s, C + 1)

    scores = matmul(q, k, trans_b=True) / math.sqrt(C)  # (B, K, b, G*q, s)
    scores = scores.reshape(B, K, blocks, G, queries, -1)  # (B, K, b, G, q, s)
    weights = _banded_exp(scores, lookback, window, alibi)
    out = matmul(weights.reshape(B, K, blocks, G * queries, -1), v)  # (B, K, b, G*q, C + 1)
    # contiguous_backward: tinygrad would recompute the denominator's gradient for each channel
    out = out[..., :C] / out[..., C:].contiguous_backward()
    out = out.reshape(B, K, blocks, G, queries, C).permute(0, 1, 3, 2, 4, 5)  # (B, K, G, b, q, C)
    return out.reshape(B, H, blocks * queries, C)[:, :, :N]


def block_sizes(length: int, window: int) -> tuple[int, int, int]:
    """(queries of a block, lookback, blocks); lookback is a multiple of queries, >= window.

    A query is scored against lookback + queries keys, window + 1 of them visible: small blocks
    waste few scores, large blocks make efficient matmuls. A quarter of the window is a compromise.
    """
    if window >= length - 1:
        return length, 0, 1
    queries = min(window, max(16, math.ceil(window / 4)))
    return queries, math.ceil(window / queries) * queries, math.ceil(length / queries)


def _keys_of_blocks(x: Tensor, queries: int, lookback: int, blocks: int) -> Tensor:
    """[B, K, N, C] -> [B, K, b, s, C]: the keys (or values) that each block of queries sees."""
    B, K, N, C = x.shape
    x = x.pad((None, None, (lookback, blocks * queries - N), None))
    shifted = (x[:, :, i : i + blocks * queries] for i in range(0, lookback + 1, queries))
    return Tensor.cat(*[part.reshape(B, K, blocks, queries, C) for part in shifted], dim=3)


def _banded_exp(scores: Tensor, lookback: int, window: int, alibi: bool) -> Tensor:
    """exp(score - maximum of its row), 0 for invisible keys, of scores [B, K, b, G, q, s].

    ALiBi's bias is added if `alibi`. Divided by the sums of the rows, the result is the softmax.
    """
    _, K, blocks, G, queries, keys = scores.shape
    arange = partial(Tensor.arange, device=scores.device)
    start = (arange(blocks) * queries).reshape(blocks, 1, 1, 1)  # position of a block's first query
    i = start + arange(queries).reshape(queries, 1)  # (b, 1, q, 1)
    j = start - lookback + arange(keys)  # (b, 1, 1, s)
    distance = i - j  # (b, 1, q, s)
    visible = (distance >= 0) & (distance <= window) & (j >= 0)
    if alibi:
        scores = scores - alibi_slopes(K * G, scores.device).reshape(K, 1, G, 1, 1) * distance
    scores = visible.where(scores, -math.inf)  # each query sees itself: no row is all -inf
    return (scores - scores.max(axis=-1, keepdim=True).detach().contiguous()).exp()
