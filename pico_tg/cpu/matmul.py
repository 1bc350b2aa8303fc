"""Matmul in tiles whose sums stay in vector registers."""

import contextlib
import math
from collections.abc import Callable, Iterator

from tinygrad import Tensor
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.helpers import round_up
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from ..backend.runtime import without_views
from . import launcher
from .loops import TILE_N, VECTOR, LoopNest, choose_shared_loop, even_threads, tile_m

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

    `trans_a`: a is stored as [Z, L, M]; `trans_b`: b is stored as [Z, N, L]. The result's columns
    are padded to a multiple of TILE_N. Padding, also of the factors, is never part of a sum. If the
    two factors are one matrix and its transpose, the result is symmetric, and only the tiles on and
    below its diagonal are computed.

    Both factors are first copied into the order in which a tile reads them, rows of a and panels of
    b, which takes 1 to 2 % of the time. Without the copy, each term of a sum is in a different
    cache line, and every few terms in a different page: 110 GFLOPS instead of 180.
    """
    symmetric = a.uop is b.uop and trans_a != trans_b
    a = transpose(a) if trans_a else a
    b = b.transpose(1, 2) if trans_b else b
    b = pack_panels(b.pad((None, None, (0, -b.shape[2] % TILE_N))))  # (Z, N / TILE_N, L, TILE_N)
    Z, height, depth = a.shape
    columns, terms = b.shape[1] * TILE_N, b.shape[2]
    rows = columns if symmetric else M
    return tiled_matmul(
        Tensor.empty(Z, rows, columns, device=a.device),
        [a, b],
        f"{'gram' if symmetric else 'gemm'}_{Z}_{M}_{N}_{L}",
        (Z,),
        (M, columns, L),
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
    """[Z, M, N] -> [Z, N, M + padding] in blocks of TILE_N x 8 registers; N is at least 8."""
    Z, M, N = x.shape
    width, stride = 8, round_up(M, TILE_N)
    assert width <= N, "the last block would begin before the first column"
    out = Tensor.empty(Z, N, stride, device=x.device)
    sizes = (Z, stride // TILE_N, -(-N // width))
    shared, threads = choose_shared_loop(sizes[:2]) if launcher.worth_threads(x.numel()) else (0, 1)
    nest = LoopNest(out, x, threads=threads)
    with nest.loops(sizes, shared) as (z, m, n):
        m, n = m * TILE_N, at_most(n * width, N - width)
        rows = [z * M + at_most(m + i, M - 1) for i in range(TILE_N)]
        for j in range(width):
            column = [nest.load(1, row * N + n + j, 1) for row in rows]
            nest.store((z * N + n + j) * stride + m, UOp(Ops.STACK, VECTOR, tuple(column)))
    program = nest.program(f"transposed_{Z}_{M}_{N}")
    return out.custom_kernel(x, fxn=lambda *_: program)[0]


def column_sums(*factors: Tensor) -> Tensor:
    """The product of the factors [..., D] or [..., 1], summed over all axes but the last: [D].

    A row adds a vector of columns at a time; tinygrad would read a column at a time.
    """
    D = max(f.shape[-1] for f in factors)
    N = max(f.numel() for f in factors) // D
    width = next(n for n in (TILE_N, 12, 8, 4, 3, 2, 1) if D % n == 0)
    opts = [Opt(OptOps.UPCAST, 0, width)] if width > 1 else []
    if launcher.worth_threads(N * D) and (threads := even_threads(D // width)) > 1:
        opts.append(Opt(OptOps.THREAD, 0, threads))

    def kernel(out: UOp, *factors: UOp) -> UOp:
        d, n = UOp.range(D, 0), UOp.range(N, 1, AxisType.REDUCE)
        factors = [f.reshape(N, f.numel() // N) for f in factors]
        product = math.prod(f[n, d if f.shape[1] > 1 else 0] for f in factors)
        info = KernelInfo(name=f"column_sums_{N}_{D}_{len(factors)}", opts_to_apply=tuple(opts))
        return out[0, d].store(product.reduce(n, arg=Ops.ADD)).end(d).sink(arg=info)

    out = Tensor.empty(1, D, device=factors[0].device)
    # reshaped: tinygrad 0.13 would return a function's result before the kernel has computed it
    # (test_golden.test_training_step)
    return out.custom_kernel(*factors, fxn=kernel)[0].reshape(D)


def at_most(i: UOp, last: int) -> UOp:
    return (i < last).where(i, i.const_like(last))


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

    inputs: a, b, and the tensors that the epilogue loads. M is at least 8 (with accumulate_over, a
    multiple of 8); N is a multiple of TILE_N.

    - a_index(*outer, m, l): the address of one element of a
    - b_index(*outer, l, n): the address of TILE_N consecutive elements of b
    - c_index(*outer, m, n): the address of TILE_N consecutive elements of `out`
    - epilogue(nest, sums, *outer, m, n): the vector to store, from the vector of sums
    - accumulate_over(*outer): number of iterations of an additional innermost outer loop; c is the
      sum of a @ b over these iterations. a_index and b_index receive the counter of this loop after
      the outer ones, c_index does not
    - products: total number of matmuls, if accumulate_over varies
    - symmetric: c is symmetric; only the tiles on and below the diagonal are computed, and each is
      stored a second time, transposed
    """
    M, N, L = sizes
    height = tile_m()
    if accumulate_over and M % height:
        height = 4
    assert height <= M, "the last tile would begin before the first row"
    # with three vectors in a row, a tile takes 27 of the 32 registers of AVX-512
    wide = next(n for n in ((3, 2, 1) if tile_m() == 8 else (1,)) if N % (n * TILE_N) == 0)
    width = wide * TILE_N
    tiles_m = -(-M // height)
    elements = M * (N + width) // 2 if symmetric else M * N
    operations = 2 * elements * L * (products or math.prod(outer))
    loops = (*outer, tiles_m)
    shared, threads = choose_shared_loop(loops)
    if threads > 1 and operations >= LONG and launcher.serves():
        threads = min(SHARES * threads, loops[shared])
    nest = LoopNest(out, *inputs, threads=threads)
    zero = nest.broadcast(0.0)
    # tinygrad 0.13 renders no loop of one iteration (test_cpu.test_products_on_other_processors)
    looped = L - L % UNROLL if L >= 2 * UNROLL else 0

    def vectors(m: UOp, n: UOp) -> list[tuple[UOp, UOp]]:
        """(row, first column) of each vector of a tile, row by row."""
        return [(m + i, n + v * TILE_N) for i in range(height) for v in range(wide)]

    @contextlib.contextmanager
    def tiles() -> Iterator[tuple[UOp, UOp]]:
        """(first row, first column) of each tile.

        Rows are the inner loop, so that a tile finds its panels of b in the cache. The last tile
        may overlap the one before it, and then computes the same values again.
        """
        with nest.loops((N // width,)) as (n,):
            n = n * width
            # the first tile that is not above the diagonal
            start = UOp(Ops.CDIV, n.dtype, (n, nest.const(height))) if symmetric else 0
            with nest.loops((tiles_m - start,), shared - len(outer)) as (m,):
                m = (m + start) * height
                yield at_most(m, M - height) if M % height else m, n

    def compute(outer_c: list[UOp], outer_ab: list[UOp]) -> None:
        with tiles() as (m, n):
            c = [c_index(*outer_c, row, column) for row, column in vectors(m, n)]

            def add_term(sums: list[UOp], l: UOp) -> list[UOp]:
                b = [nest.load(2, b_index(*outer_ab, l, n + v * TILE_N)) for v in range(wide)]
                a = [nest.load(1, a_index(*outer_ab, m + i, l), 1) for i in range(height)]
                products = (nest.broadcast(x) * y for x in a for y in b)
                return [s + product for s, product in zip(sums, products, strict=True)]

            sums = [nest.load_output(address) if accumulate_over else zero for address in c]
            if looped:
                registers = nest.registers(len(sums))
                for i, vector in enumerate(sums):
                    nest.store_reg(registers, i, vector)
                with nest.loop(looped // UNROLL) as l:
                    sums = [nest.load_reg(registers, i) for i in range(len(c))]
                    for u in range(UNROLL):
                        sums = add_term(sums, l * UNROLL + u)
                    for i, vector in enumerate(sums):
                        nest.store_reg(registers, i, vector)
                sums = [nest.load_reg(registers, i) for i in range(len(c))]
            for l in range(looped, L):
                sums = add_term(sums, nest.const(l))
            for (row, column), address, result in zip(vectors(m, n), c, sums, strict=True):
                if epilogue:
                    result = epilogue(nest, result, *outer_ab, row, column)
                nest.store(address, result)
            if symmetric:
                with nest.loop(width) as j:  # unrolled, it would take a second to compile
                    for i in range(height):
                        element = nest.load_output(c_index(*outer_c, m + i, n + j), 1)
                        nest.store(c_index(*outer_c, n + j, m + i), element, 1)

    with nest.loops(outer, shared) as matrix:
        if accumulate_over:
            with tiles() as (m, n):
                for row, column in vectors(m, n):
                    nest.store(c_index(*matrix, row, column), zero)
            with nest.loop(accumulate_over(*matrix)) as t:
                compute(matrix, [*matrix, t])
        else:
            compute(matrix, matrix)
    program = nest.program(name, operations)
    return out.custom_kernel(*inputs, fxn=lambda *_: program)[0]
