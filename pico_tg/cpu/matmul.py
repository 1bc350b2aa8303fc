"""Matrix products in tiles that stay in vector registers."""

import math
from collections.abc import Callable

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, UOp

from .loops import TILE_N, VECTOR, LoopNest, round_up, share_threads, tile_m

PARALLEL = 1 << 19  # numbers from which on cores share a copy: to start one takes some time
UNROLL = 4  # terms of a sum in one turn of its loop


def gemm(
    a: Tensor,
    b: Tensor,
    M: int,
    N: int,
    L: int,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Tensor:
    """[Z, M, L] @ [Z, L, N]; materialize as [Z, L, M] if `trans_a`, as [Z, N, L] if `trans_b`.

    The buffers are padded to whole tiles, as is the result; M, N and L say how much of them is
    meant. What the padding holds does not matter: it is summed over by nobody.

    A tile reads a few rows of `a` and one panel of `b` front to back, so that each core's loads
    come from where the last ones did. In a matrix of rows each step of a column would touch a new
    line, and every few steps a new page (110 GFLOPS where panels reach 180). Both factors are
    copied into that order first: a percent or two of the time.
    """
    a = transpose(a) if trans_a else a
    b = pack_panels(b.transpose(1, 2) if trans_b else b)
    Z, height, depth = a.shape
    rows, columns, terms = round_up(M, TILE_N), b.shape[1] * TILE_N, b.shape[2]
    return tiled_matmul(
        Tensor.empty(Z, rows, columns, device=a.device),
        [a, b],
        f"gemm_{Z}_{M}_{N}_{L}",
        (Z,),
        (rows, columns, L),
        left=lambda z, m, l: (z * height + m) * depth + l,
        right=lambda z, l, n: (z * columns + n) * terms + l * TILE_N,
        target=lambda z, m, n: (z * rows + m) * columns + n,
    )


def pack_panels(x: Tensor) -> Tensor:
    """[Z, L, n * TILE_N] -> [Z, n, L, TILE_N]."""
    Z, L, _ = x.shape
    return x.reshape(Z, L, -1, TILE_N).transpose(1, 2).contiguous()


def transpose(x: Tensor) -> Tensor:
    """[Z, M, N] -> [Z, N, M], both multiples of TILE_N, in rectangles that stay in registers."""
    Z, M, N = x.shape
    out = Tensor.empty(Z, N, M, device=x.device)
    wide = 8
    sizes = (Z, M // TILE_N, N // wide)
    shared, threads = share_threads(sizes[:2]) if x.numel() >= PARALLEL else (0, 1)
    code = LoopNest(out, x, threads=threads)
    z, m, n = code.loops(sizes, shared)
    m, n = m * TILE_N, n * wide
    stores = []
    for j in range(wide):
        column = [code.load(1, (z * M + m + i) * N + n + j, 1) for i in range(TILE_N)]
        place = (z * N + n + j) * M + m
        stores.append(code.store(place, UOp(Ops.STACK, VECTOR, tuple(column))))
    code.end(*stores)
    program = code.program(f"transposed_{Z}_{M}_{N}")
    return out.custom_kernel(x, fxn=lambda *_: program)[0]


def tiled_matmul(
    out: Tensor,
    inputs: list[Tensor],
    name: str,
    outer: tuple[int, ...],
    sizes: tuple[int, int, int],
    left: Callable[..., UOp],
    right: Callable[..., UOp],
    target: Callable[..., UOp],
    finish: Callable[..., UOp] | None = None,
    again: Callable[..., UOp] | None = None,
    products: int | None = None,
) -> Tensor:
    """For each turn of the `outer` loops a product of `sizes` (M, N, L), in tiles in registers.

    `left(*outer, m, l)` says where a factor is in the first input, `right(*outer, l, n)` where
    TILE_N others are in the second, `target(*outer, m, n)` where as many results go. M and N are
    multiples of TILE_N. `finish(code, total, *outer, m, n)` turns a vector of sums into one of
    results. `again(*outer)` adds an innermost loop of so many turns to the outer ones, whose
    products are summed up in `out`, without its number; `products` says how many there are in all.
    """
    M, N, L = sizes
    # what is left is a multiple of 4, so that there is one smaller size, and not one tile alone: no
    # thread could be told to leave it to another
    tall = tile_m()
    lefts = ((n, M - n * tall) for n in range(M // tall, -1, -1))
    main, left_rows = next((n, rows) for n, rows in lefts if rows % 4 == 0 and rows != 4)
    shared, threads = share_threads((*outer, max(main, left_rows // 4)))
    code = LoopNest(out, *inputs, threads=threads)
    zero = code.broadcast(0.0)
    looped = L - L % UNROLL if L >= 2 * UNROLL else 0  # a loop of one turn would be none

    def tiles(first: int, turns: int, height: int) -> None:
        where = matrix = code.loops(outer, shared)

        def tile() -> tuple[UOp, UOp, list[UOp]]:
            m, n = code.loops((turns, N // TILE_N), shared - len(outer))
            m, n = m * height + first, n * TILE_N
            return m, n, [target(*matrix, m + i, n) for i in range(height)]

        if again:
            around = len(code.open)
            _, _, places = tile()
            cleared = code.end(*[code.store(place, zero) for place in places], leave=around)
            where = [*matrix, code.loop(again(*matrix), [cleared])]
        m, n, places = tile()

        def add(totals: list[UOp], l: UOp) -> list[UOp]:
            b = code.load(2, right(*where, l, n))
            a = [code.load(1, left(*where, m + i, l), 1) for i in range(height)]
            return [total + code.broadcast(x) * b for total, x in zip(totals, a, strict=True)]

        totals = [code.load_so_far(place) if again else zero for place in places]
        if looped:
            sums, before = code.registers(height), code.open or code.done
            filled = [code.put(sums.after(*before), i, total) for i, total in enumerate(totals)]
            l = code.loop(looped // UNROLL, filled)
            inside = sums.after(*filled, l)
            totals = [code.get(inside, i) for i in range(height)]
            for u in range(UNROLL):
                totals = add(totals, l * UNROLL + u)
            kept = [code.put(inside, i, total) for i, total in enumerate(totals)]
            summed = sums.after(code.end(*kept, leave=len(code.open) - 1))
            totals = [code.get(summed, i) for i in range(height)]
        for last in range(looped, L):
            totals = add(totals, code.number(last))
        if finish:
            totals = [finish(code, total, *where, m + i, n) for i, total in enumerate(totals)]
        code.end(*[code.store(place, t) for place, t in zip(places, totals, strict=True)])

    if main:
        tiles(0, main, tall)
    if left_rows:
        tiles(main * tall, left_rows // 4, 4)
    program = code.program(name, 2 * M * N * L * (products or math.prod(outer)))
    return out.custom_kernel(*inputs, fxn=lambda *_: program)[0]
