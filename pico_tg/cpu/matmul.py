"""Matmul in tiles whose sums stay in vector registers."""

import contextlib
import math
from collections.abc import Callable, Iterator

from tinygrad import Tensor
from tinygrad.helpers import round_up
from tinygrad.uop.ops import Ops, UOp

from ..backend.runtime import without_views
from . import launcher
from .loops import TILE_N, VECTOR, LoopNest, choose_shared_loop, tile_m

PARALLEL = 1 << 19  # least number of elements for which threads make a copy faster
# A kernel of at least LONG operations has SHARES shares per thread: with one share per thread, the
# slowest or busiest core would delay the kernel. Only with the launcher: without it, tinygrad
# starts a Python thread for each share.
SHARES = 8
LONG = 1 << 25
UNROLL = 4  # terms of a sum that one iteration adds


def gemm(
    a: Tensor,
    b: Tensor,
    M: int,
    N: int,
    L: int,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], float32.

    `trans_a`: a is stored as [Z, L, M]; `trans_b`: b is stored as [Z, N, L]. All three buffers are
    padded to multiples of TILE_N; M, N and L are the sizes without padding. The padding is never
    part of a sum. If the two factors are one matrix and its transpose, the result is symmetric, and
    only the tiles on and above its diagonal are computed.

    Both factors are first copied into the order in which a tile reads them, rows of a and panels of
    b, which takes 1 to 2 % of the time. Without the copy, each term of a sum is in a different
    cache line, and every few terms in a different page: 110 GFLOPS instead of 180.
    """
    symmetric = a.uop is b.uop and trans_a != trans_b
    a = transpose(a) if trans_a else a
    b = pack_panels(b.transpose(1, 2) if trans_b else b)  # (Z, N / TILE_N, L, TILE_N)
    Z, height, depth = a.shape
    rows, columns, terms = round_up(M, TILE_N), b.shape[1] * TILE_N, b.shape[2]
    return tiled_matmul(
        Tensor.empty(Z, rows, columns, device=a.device),
        [a, b],
        f"{'gram' if symmetric else 'gemm'}_{Z}_{M}_{N}_{L}",
        (Z,),
        (rows, columns, L),
        a_index=lambda z, m, l: (z * height + m) * depth + l,
        b_index=lambda z, l, n: (z * columns + n) * terms + l * TILE_N,
        c_index=lambda z, m, n: (z * rows + m) * columns + n,
        symmetric=symmetric,
    )


def pack_panels(x: Tensor) -> Tensor:
    """[Z, L, n * TILE_N] -> [Z, n, L, TILE_N]."""
    Z, L, _ = x.shape
    panels = x.reshape(Z, L, -1, TILE_N).transpose(1, 2)  # (Z, n, L, TILE_N)
    return without_views(panels).contiguous()  # a single panel is not copied


def transpose(x: Tensor) -> Tensor:
    """[Z, M, N] -> [Z, N, M] in blocks of TILE_N x 8 registers; TILE_N divides M and N."""
    Z, M, N = x.shape
    out = Tensor.empty(Z, N, M, device=x.device)
    width = 8
    sizes = (Z, M // TILE_N, N // width)
    shared, threads = choose_shared_loop(sizes[:2]) if x.numel() >= PARALLEL else (0, 1)
    nest = LoopNest(out, x, threads=threads)
    with nest.loops(sizes, shared) as (z, m, n):
        m, n = m * TILE_N, n * width
        for j in range(width):
            column = [nest.load(1, (z * M + m + i) * N + n + j, 1) for i in range(TILE_N)]
            nest.store((z * N + n + j) * M + m, UOp(Ops.STACK, VECTOR, tuple(column)))
    program = nest.program(f"transposed_{Z}_{M}_{N}")
    return out.custom_kernel(x, fxn=lambda *_: program)[0]


def tiled_matmul(
    out: Tensor,
    inputs: list[Tensor],
    name: str,
    outer: tuple[int, ...],
    sizes: tuple[int, int, int],
    a_index: Callable[..., UOp],
    b_index: Callable[..., UOp],
    c_index: Callable[..., UOp],
    epilogue: Callable[..., UOp] | None = None,
    accumulate_over: Callable[..., UOp] | None = None,
    products: int | None = None,
    symmetric: bool = False,
) -> Tensor:
    """c = a @ b, [M, L] @ [L, N], for each iteration of the `outer` loops; `sizes` is (M, N, L).

    inputs: a, b, and the tensors that the epilogue loads. M and N are multiples of TILE_N.

    - a_index(*outer, m, l): the address of one element of a
    - b_index(*outer, l, n): the address of TILE_N consecutive elements of b
    - c_index(*outer, m, n): the address of TILE_N consecutive elements of `out`
    - epilogue(nest, sums, *outer, m, n): the vector to store, from the vector of sums
    - accumulate_over(*outer): number of iterations of an additional innermost outer loop; c is the
      sum of a @ b over these iterations. a_index and b_index receive the counter of this loop after
      the outer ones, c_index does not
    - products: total number of matmuls, if accumulate_over varies
    - symmetric: c is symmetric; only the tiles on and above the diagonal are computed, and each is
      stored a second time, transposed
    """
    M, N, L = sizes
    tall = tile_m()
    # tiles of tile_m() rows, then tiles of 4 rows: either none or at least two, since the threads
    # may have to share the tiles of 4 rows
    splits = ((n, M - n * tall) for n in range(M // tall, -1, -1))
    tall_tiles, rest = next((n, rows) for n, rows in splits if rows % 4 == 0 and rows != 4)
    elements = M * (N + TILE_N) // 2 if symmetric else M * N
    operations = 2 * elements * L * (products or math.prod(outer))
    loops = (*outer, max(tall_tiles, rest // 4))
    shared, threads = choose_shared_loop(loops)
    if threads > 1 and operations >= LONG and launcher.serves():
        threads = min(SHARES * threads, loops[shared])
    nest = LoopNest(out, *inputs, threads=threads)
    zero = nest.broadcast(0.0)
    # tinygrad 0.13 renders no loop of one iteration (test_cpu.test_products_on_other_processors)
    looped = L - L % UNROLL if L >= 2 * UNROLL else 0

    def add_tiles(first: int, iterations: int, height: int) -> None:
        """The tiles of `height` rows, from row `first` on."""

        @contextlib.contextmanager
        def tiles() -> Iterator[tuple[UOp, UOp]]:
            """(first row, first column) of each tile."""
            with nest.loops((iterations,), shared - len(outer)) as (m,):
                m = m * height + first
                start = UOp(Ops.CDIV, m.dtype, (m, nest.const(TILE_N))) if symmetric else 0
                with nest.loops((N // TILE_N - start,)) as (n,):
                    yield m, (n + start) * TILE_N

        def compute(outer_c: list[UOp], outer_ab: list[UOp]) -> None:
            with tiles() as (m, n):
                c = [c_index(*outer_c, m + i, n) for i in range(height)]

                def add_term(sums: list[UOp], l: UOp) -> list[UOp]:
                    b = nest.load(2, b_index(*outer_ab, l, n))
                    a = [nest.load(1, a_index(*outer_ab, m + i, l), 1) for i in range(height)]
                    return [s + nest.broadcast(x) * b for s, x in zip(sums, a, strict=True)]

                sums = [nest.load_output(address) if accumulate_over else zero for address in c]
                if looped:
                    registers = nest.registers(height)
                    for i in range(height):
                        nest.store_reg(registers, i, sums[i])
                    with nest.loop(looped // UNROLL) as l:
                        sums = [nest.load_reg(registers, i) for i in range(height)]
                        for u in range(UNROLL):
                            sums = add_term(sums, l * UNROLL + u)
                        for i in range(height):
                            nest.store_reg(registers, i, sums[i])
                    sums = [nest.load_reg(registers, i) for i in range(height)]
                for l in range(looped, L):
                    sums = add_term(sums, nest.const(l))
                for i in range(height):
                    result = sums[i]
                    if epilogue:
                        result = epilogue(nest, result, *outer_ab, m + i, n)
                    mirrored = [c_index(*outer_c, n + j, m + i) for j in range(TILE_N)]
                    before = nest.store_elements(mirrored, result) if symmetric else []
                    nest.store(c[i], result, *before)

        with nest.loops(outer, shared) as matrix:
            if not accumulate_over:
                compute(matrix, matrix)
                return
            with tiles() as (m, n):
                for i in range(height):
                    nest.store(c_index(*matrix, m + i, n), zero)
            with nest.loop(accumulate_over(*matrix)) as t:
                compute(matrix, [*matrix, t])

    if tall_tiles:
        add_tiles(0, tall_tiles, tall)
    if rest:
        add_tiles(tall_tiles * tall, rest // 4, 4)
    program = nest.program(name, operations)
    return out.custom_kernel(*inputs, fxn=lambda *_: program)[0]
