"""Matmul in tiles whose sums stay in vector registers."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.codegen import do_to_program
from tinygrad.helpers import CPU_COUNT, DEBUG, round_up
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, UOp

from ..backend import scheduling  # noqa: F401  # what these kernels write is not copied
from ..backend.jit_cache import cached_program, installed, without_operations
from ..backend.machine import renderer_of
from . import launcher
from .loops import TILE_N, LoopNest, choose_shared_loop, tile_m

# A kernel of at least LONG operations, or of sums of different lengths, has SHARES shares a thread:
# with one share a thread, the slowest or busiest core would delay the kernel. Only with the
# launcher: without it, tinygrad starts a Python thread for each share.
SHARES = 8
LONG = 1 << 25
STREAMS = 16  # panels that are written in turn: with more, cache and TLB lose them
UNROLL = 4  # terms of a sum that one iteration adds


def kernel(build: Callable[..., UOp]) -> Callable[..., Tensor]:
    """Decorator: `build(numels, *arguments)` of a LoopNest's program -> a function of tensors.

    `function(shape, inputs, *arguments)` returns the kernel's output, a lazy float32 tensor of that
    shape. `numels`: the number of elements of the output and of each input. A kernel is built and
    compiled once for equal numels, arguments, settings and renderer, which must determine it.
    """

    @functools.cache
    def compiled(
        renderer: Renderer, settings: tuple, numels: tuple[int, ...], *arguments: object
    ) -> UOp:
        # Compiled now, and without its operations: at every pass over a graph, of which they are
        # nine tenths, tinygrad 0.13 walks through them (test_cpu.test_graphs_hold_no_operations).
        to_program = cached_program if installed() else do_to_program
        return without_operations(to_program(build(numels, *arguments), renderer))

    @functools.wraps(build)
    def run(shape: tuple[int, ...], inputs: list[Tensor], *arguments: object) -> Tensor:
        assert all(tensor.dtype == dtypes.float32 for tensor in inputs)
        out = Tensor.empty(*shape, device=inputs[0].device)
        settings = CPU_COUNT.value, tile_m(), LONG, launcher.serves(), DEBUG >= 3
        numels = tuple(tensor.numel() for tensor in (out, *inputs))
        program = compiled(renderer_of("CPU"), settings, numels, *arguments)
        return out.custom_kernel(*inputs, fxn=lambda *_: program)[0]

    return run


def gemm(
    a: Tensor,
    b: Tensor,
    M: int,
    N: int,
    L: int,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], float32; with N < TILE_N, [Z, M, TILE_N].

    `trans_a`: a is stored as [Z, L, M]; `trans_b`: b is stored as [Z, N, L]. The factors may have
    other shapes, with the same order of elements. If the two factors are one matrix and its
    transpose, the result is symmetric, and only the tiles on and below its diagonal are computed.

    b, and a if it is transposed, are first copied into panels, which a tile reads from start to
    end. Without the copy, each term of a sum is in a different cache line, and every few terms in a
    different page: 110 GFLOPS instead of 180.
    """
    symmetric = a.uop is b.uop and trans_a != trans_b
    Z, height, columns = a.numel() // (M * L), tile_m(), max(N, TILE_N)
    if N < TILE_N:
        b = b.reshape(Z, *((N, L) if trans_b else (L, N)))
        padding = (0, TILE_N - N)
        b = b.pad((None, padding, None) if trans_b else (None, None, padding))
    b = pack(b, L, columns, TILE_N, panels_of_a_tile(columns), trans_b)
    a = pack(a, L, M, height, 1) if trans_a else a
    return _gemm((Z, M, columns), [a, b], Z, M, N, L, trans_a, symmetric)


@kernel
def _gemm(
    numels: tuple[int, ...], Z: int, M: int, N: int, L: int, trans_a: bool, symmetric: bool
) -> UOp:
    height, columns = tile_m(), max(N, TILE_N)
    tiles, panels = -(-M // height), panels_of(columns, TILE_N, panels_of_a_tile(columns))

    def a_index(z: UOp, m: UOp, i: int, l: UOp) -> UOp:
        if trans_a:
            return ((z * tiles + ceil_div(m, height)) * L + l) * height + i
        return (z * M + m + i) * L + l

    return tiled_matmul(
        numels,
        f"{'gram' if symmetric else 'gemm'}_{Z}_{M}_{N}_{L}",
        (Z,),
        (M, columns, L),
        a_index,
        b_index=lambda z, l, p: ((z * panels + p) * L + l) * TILE_N,
        c_index=lambda z, m, n: (z * M + m) * columns + n,
        symmetric=symmetric,
    )


def panels_of_a_tile(N: int, overlap: bool = True) -> int:
    """Panels, each one vector of a row, in a tile of a result of N columns.

    `overlap`: the last tile may overlap the one before it.
    """
    if tile_m() == 6 or N < 2 * TILE_N:
        return 1
    # 32 registers of AVX-512 hold 8 rows of up to 3 vectors
    choices = [n for n in (2, 3) if n * TILE_N <= N and (overlap or N % (n * TILE_N) == 0)]
    return min(choices, key=lambda n: round_up(N, n * TILE_N), default=1)


def pack(x: Tensor, L: int, N: int, width: int, last: int, transposed: bool = False) -> Tensor:
    """Columns of x [Z, L, N] in panels: [Z, panels, L, width], in a multiple of `last` panels.

    `transposed`: x is stored as [Z, N, L]. The `last` panels end with the last column, and may
    overlap the panels before them.
    """
    assert last * width <= N, "a panel would begin before the first column"
    Z, panels = x.numel() // (L * N), panels_of(N, width, last)
    threaded = launcher.worth_threads(x.numel())
    return _pack((Z, panels, L, width), [x], Z, L, N, width, last, transposed, threaded)


def panels_of(N: int, width: int, last: int) -> int:
    """Number of panels of N columns, `width` each: a multiple of `last`, the panels of a tile."""
    return last * -(-N // (last * width))


@kernel
def _pack(
    numels: tuple[int, ...],
    Z: int,
    L: int,
    N: int,
    width: int,
    last: int,
    transposed: bool,
    threaded: bool,
) -> UOp:
    panels = panels_of(N, width, last)
    # what an iteration copies: a block of registers, or a cache line of the panel
    rows = min(8 if transposed else TILE_N // width, L)
    blocks = -(-L // rows)
    group = 1 if transposed else min(panels, STREAMS)
    sizes = (Z, -(-panels // group), blocks)
    shared, threads = choose_shared_loop(sizes) if threaded else (0, 1)
    nest = LoopNest(numels, threads)
    with nest.loops(sizes, shared) as (z, g, l):
        first = g * group
        l = first_of(l, rows, L)
        with nest.loops((at_most(panels - first, group) if panels % group else group,)) as (i,):
            panel = first + i
            n = panel * width
            if N % (last * width):
                n = (panel < panels - last).where(n, n - (panels * width - N))
            for row in range(rows):
                if transposed:
                    column = [nest.load(1, (z * N + n + k) * L + l + row, 1) for k in range(width)]
                    values = UOp(Ops.STACK, dtypes.float32.vec(width), tuple(column))
                else:
                    values = nest.load(1, (z * L + l + row) * N + n, width)
                nest.store(((z * panels + panel) * L + l + row) * width, values, width)
    return nest.program(f"pack{'_transposed' * transposed}_{Z}_{L}_{N}_{width}")


def column_sums(*factors: Tensor) -> Tensor:
    """The product of the factors, summed over all axes but the last: [D], with D >= TILE_N.

    A factor is [..., D], at least two rows, or [..., 1]. A row adds several vectors of columns at a
    time; tinygrad would read a column at a time.
    """
    D = max(f.shape[-1] for f in factors)
    N = max(f.numel() for f in factors) // D
    threaded = launcher.worth_threads(N * D)
    whole = tuple(f.shape[-1] == D for f in factors)
    # reshaped: tinygrad 0.13 would return a function's result before the kernel has computed it
    # (test_golden.test_training_step)
    return _column_sums((1, D), list(factors), N, D, whole, threaded).reshape(D)


@kernel
def _column_sums(
    numels: tuple[int, ...], N: int, D: int, whole: tuple[bool, ...], threaded: bool
) -> UOp:
    """`whole`: for each factor, whether it has D columns or one."""
    threads = CPU_COUNT.value if threaded else 1
    # blocks of up to 8 vectors of columns, equally many for each thread if possible
    choices = [v for v in range(8, 0, -1) if v * TILE_N <= D]
    vectors = next((v for v in choices if -(-D // (v * TILE_N)) % threads == 0), choices[-1])
    width = vectors * TILE_N
    blocks = -(-D // width)
    nest = LoopNest(numels, min(threads, blocks))
    with nest.loops((blocks,), 0) as (block,):
        first = first_of(block, width, D)
        registers = nest.registers(vectors)
        for v in range(vectors):
            nest.store_reg(registers, v, nest.broadcast(0.0))
        with nest.loop(N) as row:
            for v in range(vectors):
                column = first + v * TILE_N
                terms = [
                    nest.load(i, row * D + column) if all_columns
                    else nest.broadcast(nest.load(i, row, 1))
                    for i, all_columns in enumerate(whole, 1)
                ]  # fmt: skip
                total = nest.load_reg(registers, v) + math.prod(terms[1:], start=terms[0])
                nest.store_reg(registers, v, total)
        for v in range(vectors):
            nest.store(first + v * TILE_N, nest.load_reg(registers, v))
    return nest.program(f"column_sums_{N}_{D}_{len(whole)}", N * D * len(whole))


def first_of(tile: UOp, width: int, size: int) -> UOp:
    """The first of the `width` elements of a tile; the last tile ends with the last of `size`."""
    return at_most(tile * width, size - width) if size % width else tile * width


def at_most(i: UOp, last: int) -> UOp:
    return (i < last).where(i, i.const_like(last))


def floor_div(i: UOp, n: int) -> UOp:
    return UOp(Ops.CDIV, i.dtype, (i, i.const_like(n)))


def ceil_div(i: UOp, n: int) -> UOp:
    return floor_div(i + (n - 1), n)


def tiled_matmul(
    numels: tuple[int, ...],
    name: str,
    outer: tuple[int, ...],
    sizes: tuple[int, int, int],
    a_index: Callable[..., UOp],
    b_index: Callable[..., UOp],
    c_index: Callable[..., UOp],
    epilogue: Callable[..., UOp] | None = None,
    accumulate_over: Callable[..., UOp] | None = None,
    steps: Callable[[UOp, UOp], tuple[UOp | int, UOp | int]] | None = None,
    products: float | None = None,
    lower: bool = False,
    symmetric: bool = False,
    overlap: bool = True,
) -> UOp:
    """c = a @ b, [M, L] @ [L, N], for each iteration of the `outer` loops; `sizes` is (M, N, L).

    numels: the elements of c, a, b, and of what the epilogue loads. M is at least 8 and N at least
    TILE_N; with accumulate_over, they are multiples of 4 and of TILE_N. A tile whose first row is m
    has the rows m + i. The last tile ends with the last row or column, and may overlap the one
    before it.

    - a_index(*outer, m, i, l): the address of one element of a, in row m + i
    - b_index(*outer, l, p): the address of TILE_N consecutive elements of b, in panel p
    - c_index(*outer, m, n): the address of TILE_N consecutive elements of c
    - epilogue(nest, sums, *outer, m, n): the vector to store, from the vector of sums
    - accumulate_over(*outer): number of iterations of an additional innermost outer loop; c is the
      sum of a @ b over these iterations. a_index and b_index receive the counter of this loop after
      the outer ones, c_index does not
    - steps(m, n): (first, number) of the steps, of UNROLL terms each, that the tile at row m and
      column n needs. The last L % UNROLL terms are always added, and all terms if they are fewer
      than two steps
    - products: total number of matmuls, if accumulate_over or steps vary
    - lower: only the tiles on and below the diagonal are computed
    - symmetric: c is symmetric; `lower`, and each tile is stored a second time, transposed
    - overlap: whether a row's last tile may overlap the one before it; if not, N is a multiple of
      TILE_N, and b has no panels twice
    """
    M, N, L = sizes
    height = tile_m()
    if accumulate_over and (M % height or height % UNROLL):
        height = 4
    assert height <= M, "the last tile would begin before the first row"
    assert overlap or N % TILE_N == 0, "a part of a panel would be left"
    assert not (accumulate_over and overlap), "columns would be added twice"
    wide = panels_of_a_tile(N, overlap)
    width = wide * TILE_N
    tiles_m, tiles_n = -(-M // height), -(-N // width)
    lower = lower or symmetric
    elements = M * (tiles_n + 1) * width // 2 if lower else M * tiles_n * width
    operations = int(2 * elements * L * (products or math.prod(outer)))
    loops = (*outer, tiles_m)
    shared, threads = choose_shared_loop(loops)
    if threads > 1 and (operations >= LONG or steps):
        threads = shares(loops[shared])
    nest = LoopNest(numels, threads)
    zero = nest.broadcast(0.0)
    # tinygrad 0.13 renders no loop of one iteration (test_cpu.test_products_on_other_processors)
    # (first term, iterations, terms in each): loops over the terms of a sum
    term_loops = [(0, L // UNROLL, UNROLL)] if L >= 2 * UNROLL else []
    if term_loops and L % UNROLL == 3:  # else LLVM's code of both takes 1.5 times as long
        term_loops.append((L - 3, 3, 1))
    looped = sum(iterations * unroll for _, iterations, unroll in term_loops)

    def vectors(m: UOp, n: UOp) -> list[tuple[UOp, UOp]]:
        """(row, first column) of each vector of a tile, row by row."""
        return [(m + i, n + v * TILE_N) for i in range(height) for v in range(wide)]

    @contextlib.contextmanager
    def tiles() -> Iterator[tuple[UOp, UOp, UOp]]:
        """(first row, first column, first panel) of each tile.

        Rows are the inner loop, so that a tile finds its panels of b in the cache.
        """
        with nest.loops((tiles_n,)) as (tile,):
            n = first_of(tile, width, N)
            # the first tile that is not above the diagonal
            start = floor_div(n, height) if lower else 0
            with nest.loops((tiles_m - start,), shared - len(outer)) as (m,):
                yield first_of(m + start, height, M), n, tile * wide

    def ahead(outer: list[UOp], m: UOp, l: UOp, count: int) -> list[UOp]:
        """Addresses of a, a cache line each, to prefetch while terms l to l + count are added."""
        if accumulate_over:  # the rows of a are its columns: terms of the same tile
            return [a_index(*outer, m, 0, at_most(l + (i + 16), L - 1)) for i in range(count)]
        # the next tile's rows follow one another (in attention, with padding): as many elements
        following = a_index(*outer, at_most(m + height, M - height), 0, nest.const(0))
        return [following + (l * height + i) for i in range(0, count * height, TILE_N)]

    def compute(outer_c: list[UOp], outer_ab: list[UOp]) -> None:
        with tiles() as (m, n, panel):
            c = [c_index(*outer_c, row, column) for row, column in vectors(m, n)]

            def add_term(sums: list[UOp], l: UOp) -> list[UOp]:
                b = [nest.load(2, b_index(*outer_ab, l, panel + v)) for v in range(wide)]
                a = [nest.load(1, a_index(*outer_ab, m, i, l), 1) for i in range(height)]
                products = (nest.broadcast(x) * y for x in a for y in b)
                return [s + product for s, product in zip(sums, products, strict=True)]

            sums = [nest.load_output(address) if accumulate_over else zero for address in c]
            if term_loops:
                for address in () if accumulate_over else c:  # arrives while terms are added
                    nest.prefetch(0, address)
                registers = nest.registers(len(sums))
                for i, vector in enumerate(sums):
                    nest.store_reg(registers, i, vector)
                for first, iterations, unroll in term_loops:
                    if steps and unroll == UNROLL:
                        first, iterations = steps(m, n)
                        first = first * UNROLL
                    with nest.loop(iterations) as l:
                        for address in ahead(outer_ab, m, l * unroll + first, unroll):
                            nest.prefetch(1, address)
                        sums = [nest.load_reg(registers, i) for i in range(len(c))]
                        for u in range(unroll):
                            sums = add_term(sums, l * unroll + (first + u))
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
                    column = at_most(n + j, M - 1) if M < TILE_N else n + j
                    for i in range(height):
                        element = nest.load_output(c_index(*outer_c, m + i, column), 1)
                        nest.store(c_index(*outer_c, column, m + i), element, 1)

    with nest.loops(outer, shared) as matrix:
        if accumulate_over:
            with tiles() as (m, n, _):
                for row, column in vectors(m, n):
                    nest.store(c_index(*matrix, row, column), zero)
            with nest.loop(accumulate_over(*matrix)) as t:
                compute(matrix, [*matrix, t])
        else:
            compute(matrix, matrix)
    return nest.program(name, operations)


def shares(iterations: int) -> int:
    """Shares of a loop of that many iterations: SHARES a thread with the launcher, else one."""
    return min(CPU_COUNT.value * (SHARES if launcher.serves() else 1), iterations)


def fused_multiply_adds(device: str) -> tuple[Callable[[], None], int]:
    """(a call that computes independent chains of s * x + x in registers, its operations).

    The chains read memory before their first step and write it after their last.
    """
    threads, chains, steps, unroll = CPU_COUNT.value, 12 if tile_m() == 8 else 6, 1 << 18, 8
    operations = 2 * threads * chains * TILE_N * steps * unroll
    start = Tensor.full((chains * TILE_N,), 0.5, device=device).contiguous().realize()

    @kernel
    def multiply_adds(numels: tuple[int, ...]) -> UOp:
        nest = LoopNest(numels, threads)
        with nest.loops((threads,), 0) as (thread,):
            x, registers = nest.load(1, nest.const(0)), nest.registers(chains)
            for c in range(chains):  # separate loads: the compiler would merge equal chains
                nest.store_reg(registers, c, nest.load(1, nest.const(c * TILE_N)))
            with nest.loop(steps):
                sums = [nest.load_reg(registers, c) for c in range(chains)]
                for _ in range(unroll):
                    sums = [s * x + x for s in sums]
                for c, s in enumerate(sums):
                    nest.store_reg(registers, c, s)
            for c in range(chains):
                nest.store((thread * chains + c) * TILE_N, nest.load_reg(registers, c))
        return nest.program("fused_multiply_adds", operations)

    @TinyJit
    def call(x: Tensor) -> Tensor:
        return multiply_adds((threads * chains * TILE_N,), [x]).realize()

    def run() -> None:
        call(start)
        Device[device].synchronize()

    return run, operations
