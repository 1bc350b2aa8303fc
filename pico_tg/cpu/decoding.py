"""The kernels of a decoding pass: packed matmul, and attention over a `KVCache`.

A pass has few rows, so reading weights, keys or values dominates the time of each kernel. Every
operand is stored in the order in which a kernel reads the operand, and one kernel computes what
tinygrad would split into several.

H query heads, K key/value heads, G = H / K, C head_dim, S slots, R rows, P columns of the values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tinygrad import Tensor, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.helpers import CPU_COUNT
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from . import launcher
from .band_attention import exps
from .loops import TILE_N, tile_m

if TYPE_CHECKING:
    from ..kv_cache import KVCache

UNROLL = 4  # terms of a sum that one iteration adds if a tile has only one row


def packed_matmul(
    x: Tensor, weight: Tensor, outputs: int, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [R, I...] @ weight in panels [n, I, panel] -> [R, n * panel].

    `scale` [R, 1] multiplies the rows, then `residual` [R, n * panel] is added. `outputs`: number
    of columns that are not padding.
    """
    rows, (panels, inputs, panel) = x.shape[0], weight.shape
    tile = _tile_rows(rows)
    vectors = panel // TILE_N if _tile_rows(rows, panel // TILE_N) == tile else 1
    shared = launcher.serves() and launcher.worth_threads(weight.numel())
    threads = even_threads(panels) if shared else 1

    def kernel(out: UOp, x: UOp, weight: UOp, *more: UOp) -> UOp:
        (r, p, c), axis = _loops(rows, panels, panel)
        l = UOp.range(inputs, 3, AxisType.REDUCE)
        total = (x[r, l] * weight[p, l, c]).reduce(l, arg=Ops.ADD)
        if scale is not None:
            total = total * more[0][r, 0]
        if residual is not None:
            total = total + more[-1][r, p * panel + c]
        opts = _tile_opts(axis[2], vectors, axis[0], tile)
        if tile == 1 and inputs % UNROLL == 0:
            opts.append(Opt(OptOps.UNROLL, 0, UNROLL))
        if threads > 1:
            # a tile of all rows leaves no loop over r, so the axes after it move up by one
            opts.append(Opt(OptOps.THREAD, axis[1] - (rows == tile > 1), threads))
        name = f"packed_{rows}_{outputs}_{inputs}_{len(more)}"
        info = KernelInfo(name=name, opts_to_apply=tuple(opts))
        return _end(out[r, p * panel + c].store(total), r, p, c).sink(arg=info)

    more = [t.contiguous() for t in (scale, residual) if t is not None]
    out = Tensor.empty(rows, panels * panel, device=x.device)
    return out.custom_kernel(x.contiguous(), weight, *more, fxn=kernel)[0]


def attend(cache: KVCache, qkv: Tensor, start: Tensor) -> Tensor:
    """`KVCache.attend`: stores the rows' keys and values, then attends; [R, H*C | ...] -> [R, H*C].

    Intermediate tensors keep (head, row) pairs in one dimension: tinygrad 0.13 copies a tensor that
    is reshaped before or after a custom kernel.
    """
    keys, values = _store(cache, qkv, start)
    weights = exps(_scores(cache, qkv, keys, start))  # (K*G*R, S)
    return _normalize(cache, _weighted_sums(cache, weights, values))


def _store(cache: KVCache, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    R, H, K, C, S = qkv.shape[0], cache.heads, cache.kv_heads, cache.head_dim, cache.slots

    def kernel(keys: UOp, values: UOp, qkv: UOp, start: UOp) -> UOp:
        stores = []
        for i in range(2):
            (r, k, c), _ = _loops(R, K, C, first=3 * i)
            slot = (start[0] + r) % S
            target = values[k, slot, c] if i else keys[k, c, slot]
            stores.append(_end(target.store(qkv[r, (H + i * K) * C + k * C + c]), r, k, c))
        return UOp.sink(*stores, arg=KernelInfo(name=f"store_{R}_{K}_{C}", opts_to_apply=()))

    return cache.keys.custom_kernel(cache.values, qkv, start, fxn=kernel)[:2]


def _scores(cache: KVCache, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
    """Scores as exponents of 2, -inf where a slot is not visible: [K*G*R, S]."""
    R, H, K, C, S = qkv.shape[0], cache.heads, cache.kv_heads, cache.head_dim, cache.slots
    G, tile = H // K, _tile_rows(R)

    def kernel(out: UOp, qkv: UOp, keys: UOp, slopes: UOp, start: UOp) -> UOp:
        (k, g, r, s), axis = _loops(K, G, R, S)
        c = UOp.range(C, 4, AxisType.REDUCE)
        total = (qkv[r, (k * G + g) * C + c] * keys[k, c, s]).reduce(c, arg=Ops.ADD)
        newest = start[0] + (R - 1)
        age = (newest + S - s) % S  # positions from the newest row back to the slot's content
        distance = age + r - (R - 1)
        visible = (distance >= 0) & (distance <= cache.window) & (age <= newest)
        score = total / math.sqrt(C) - slopes[k * G + g] * distance.cast(dtypes.float32)
        score = visible.where(score / math.log(2), UOp.const(dtypes.float32, -math.inf))
        opts = _tile_opts(axis[3], 1, axis[2], tile)
        info = KernelInfo(name=f"scores_{R}_{H}_{K}_{C}_{S}", opts_to_apply=tuple(opts))
        return _end(out[(k * G + g) * R + r, s].store(score), k, g, r, s).sink(arg=info)

    out = Tensor.empty(H * R, S, device=qkv.device)
    return out.custom_kernel(qkv, keys, cache.slopes, start, fxn=kernel)[0]


def _weighted_sums(cache: KVCache, weights: Tensor, values: Tensor) -> Tensor:
    """weights [K*G*R, S] @ values [K, S, P] -> [R*K*G, P]."""
    K, S, P = values.shape
    G, R = cache.heads // K, weights.shape[0] // cache.heads
    vectors = P // TILE_N if P <= 4 * TILE_N else 1
    tile = _tile_rows(R, vectors)

    def kernel(out: UOp, weights: UOp, values: UOp) -> UOp:
        (k, g, r, c), axis = _loops(K, G, R, P)
        s = UOp.range(S, 4, AxisType.REDUCE)
        total = (weights[(k * G + g) * R + r, s] * values[k, s, c]).reduce(s, arg=Ops.ADD)
        opts = _tile_opts(axis[3], vectors, axis[2], tile)
        if tile == 1:
            opts.append(Opt(OptOps.UNROLL, 0, UNROLL))
        info = KernelInfo(name=f"weigh_{K}_{G}_{R}_{S}_{P}", opts_to_apply=tuple(opts))
        return _end(out[(r * K + k) * G + g, c].store(total), k, g, r, c).sink(arg=info)

    out = Tensor.empty(R * K * G, P, device=weights.device)
    return out.custom_kernel(weights, values, fxn=kernel)[0]


def _normalize(cache: KVCache, sums: Tensor) -> Tensor:
    """Sums [R*H, P] divided by their column C, which is the sum of the weights -> [R, H*C]."""
    H, C = cache.heads, cache.head_dim
    R = sums.shape[0] // H

    def kernel(out: UOp, sums: UOp) -> UOp:
        (r, h, c), _ = _loops(R, H, C)
        quotient = sums[r * H + h, c] * sums[r * H + h, C].reciprocal()
        info = KernelInfo(name=f"normalize_{R}_{H}_{C}", opts_to_apply=())
        return _end(out[r, h * C + c].store(quotient), r, h, c).sink(arg=info)

    return Tensor.empty(R, H * C, device=sums.device).custom_kernel(sums, fxn=kernel)[0]


def _loops(*sizes: int, first: int = 0) -> tuple[list[UOp | int], list[int]]:
    """Loops of these sizes, numbered from `first`, and the axis of each for `Opt`.

    A size of 1 gets no loop and no axis: its counter is 0.
    """
    loops = [UOp.range(n, first + i) if n > 1 else 0 for i, n in enumerate(sizes)]
    return loops, [sum(n > 1 for n in sizes[:i]) for i in range(len(sizes))]


def _end(store: UOp, *loops: UOp | int) -> UOp:
    return store.end(*[loop for loop in loops if isinstance(loop, UOp)])


def _tile_rows(rows: int, vectors: int = 1) -> int:
    """Rows of a register tile: the most that divide `rows` and fit, at `vectors` vectors a row."""
    capacity = 16 if tile_m() > 6 else 6  # vectors of TILE_N elements that the registers hold
    return next(n for n in (8, 4, 2, 1) if rows % n == 0 and n * vectors <= capacity)


def _tile_opts(column_axis: int, vectors: int, row_axis: int, rows: int) -> list[Opt]:
    """The options for a register tile of `rows` rows and `vectors` * TILE_N columns."""
    opts = [Opt(OptOps.UPCAST, column_axis, TILE_N)]
    if vectors > 1:
        opts.append(Opt(OptOps.UPCAST, column_axis, vectors))
    if rows > 1:
        opts.append(Opt(OptOps.UPCAST, row_axis, rows))
    return opts


def even_threads(iterations: int) -> int:
    """The largest number of threads, at most CPU_COUNT, that divides `iterations`."""
    return next(t for t in range(CPU_COUNT.value, 0, -1) if iterations % t == 0)
