"""Matrix products and attention on the machine's own terms; what else is not public tinygrad.

Four things are done here that tinygrad does not do by itself:

- `stored`: a value is computed once. Lazy fusion would recompute norms, SiLU and softmax inside
  every product of the backward pass (125 GOP a step instead of 31, measured).
- On a CPU, products are kernels with a schedule of their own: a tile of 6 rows by 16 columns stays
  in vector registers while one loop runs over the summed axis (`_tiles`), on factors copied into
  the order in which they are read. That is as fast as NumPy, and 5 to 9 times tinygrad's own
  choice. `PICO_KERNELS=0` switches them off.
- On an accelerator with matrix units (tensor cores), factors are padded to their tiles: tinygrad
  leaves the units out where a side does not divide, and neither 372 nor a head's 41 does. Plain
  `@` then uses them. Without such units nothing is padded.
- On a CPU, attention is six such products with their softmax in them, on bands that are never
  copied (`band_attention`), and weights of v are summed by the product that uses them.

With `BF16` on, both factors of every product of the model, and of its gradients, are rounded to
bfloat16; sums and results stay float32.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes, function
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.dtype import AddrSpace, DType, _to_np_dtype
from tinygrad.engine import realize
from tinygrad.engine.realize import capturing
from tinygrad.function import pm_transform_unique_const
from tinygrad.helpers import ALLOW_TF32, CPU_COUNT, DEV, USE_TC, Context, ContextVar
from tinygrad.renderer import Estimates
from tinygrad.schedule.rangeify import resolve_function
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, PatternMatcher, UOp, UPat, graph_rewrite

COLUMNS = 16  # of a tile in registers: a vector, or several
# below this many multiplications a product is bound by memory or by the call, not by arithmetic
SMALL = 1 << 15
FEWEST = 8  # a product of fewer rows is left to tinygrad
PARALLEL = 1 << 19  # numbers from which on cores share a copy: to start one takes some time
INT = 1 << 31  # addresses from here on take 64 bits
UNROLL = 4  # terms of a sum in one turn of its loop
VECTOR = dtypes.float32.vec(COLUMNS)
BF16 = ContextVar("PICO_BF16", 0)  # `with Context(PICO_BF16=1)` while a graph is made
RECOMPUTE = ContextVar("PICO_RECOMPUTE", 0)  # likewise: what is inside a block is not kept


def stored(x: Tensor) -> Tensor:
    """`x` computed once, and its gradient as well, instead of again inside each consumer."""
    return x.contiguous().contiguous_backward()


def in_functions(
    block: Callable[[Tensor], Tensor], weights: list[list[Tensor]], x: Tensor
) -> Tensor:
    """x through blocks one after the other, each scheduled as a function, its gradient as another.

    The first one is `block`; the others do the same with their own `weights`, which are all that
    get a gradient through a block beside `x`. tinygrad then cuts one block into kernels where it
    would take one graph of all of them, and many times as long. With RECOMPUTE, nothing of what is
    inside a block is kept for its gradient, which computes it again; otherwise all that the
    gradient needs is.
    """
    traced = _Traced(block, weights[0], x)
    for own in weights:
        x = traced(x, own)
    return x


class _Traced:
    """A block and its gradient as bodies of functions."""

    def __init__(self, block: Callable[[Tensor], Tensor], weights: list[Tensor], x: Tensor) -> None:
        # leaves, with numbers that no function has: what is behind them is none of ours
        inputs = [x.uop, *[w.uop for w in weights]]
        inputs = {uop: uop.param_like(1_000_000 + i) for i, uop in enumerate(inputs)}
        assert len(inputs) == 1 + len(weights), "a tensor is in two places"
        out = block(x)
        upstream = out.uop.param_like(999_999)  # split between devices as `out` is
        gradients = out.gradient(x, *weights, gradient=Tensor(upstream))
        graph = UOp.maketuple(out.uop, *[g.uop for g in gradients]).substitute(inputs)
        graph = graph_rewrite(graph, _plain_graph)
        # what is constant and has a number of its own gets one that is the same in all graphs
        graph = graph_rewrite(graph, pm_transform_unique_const, ctx=(None, itertools.count(0)))
        out, *gradients = graph.src
        x, *weights = inputs.values()

        shared = [] if RECOMPUTE else _shared(out, gradients)
        returned = [uop for uop in shared if uop.op is Ops.CONTIGUOUS]
        forward = UOp.maketuple(out, *returned)
        self.buffers = _written(forward)
        self.forward = _numbered(forward, [x, *weights, *self.buffers])

        # what kernels by hand wrote is not returned: the gradient finds it in their buffers
        in_buffers = {uop: uop.src[0] for uop in shared if uop.op is Ops.AFTER}
        self.kept = [place.base for place in in_buffers.values()]
        known = {uop: uop.param_like(2_000_000 + i) for i, uop in enumerate(returned)}
        backward = UOp.maketuple(*gradients).substitute(known | in_buffers)
        self.buffers_back = [uop for uop in _written(backward) if uop not in self.kept]
        order = [upstream, out, x, *weights, *known.values(), *self.kept, *self.buffers_back]
        self.backward = _numbered(backward, order)

    def __call__(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The block of these weights."""
        buffers = {b: UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.buffers}

        def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
            # contiguous, no copy: 0.13 forgets which buffer the bare result of a function is in,
            # and the planner then gives that buffer to others
            out, *returned = (call.gettuple(i).contiguous() for i in range(len(call.src[0].src)))
            x, own = call.src[1], call.src[2 : 2 + len(weights)]
            kept = [buffers[b] for b in self.kept]
            new = [UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.buffers_back]
            # `out` is there so that this waits until what is in the kernels' buffers is written
            found = self.backward.call(
                *(upstream, out, x, *own, *returned, *kept, *new),
                name="block_backward",
                precompile=True,
            )
            gradients = (found.gettuple(i).contiguous() for i in range(len(self.backward.src)))
            return *gradients, *[None for _ in buffers]

        inputs = x.uop, *[w.uop for w in weights], *buffers.values()
        call = self.forward.call(*inputs, grad_fxn=gradient, name="block", precompile=True)
        return Tensor(call.gettuple(0)).contiguous()


def _written(graph: UOp) -> list[UOp]:
    """The buffers that kernels in a graph write."""
    places = [uop.src[0].base for uop in graph.toposort(enter_calls=False) if uop.op is Ops.AFTER]
    return list(dict.fromkeys(place for place in places if place.op is Ops.BUFFER))


def _numbered(body: UOp, inputs: list[UOp]) -> UOp:
    """The body of a function of these inputs."""
    return body.substitute({uop: uop.param_like(i) for i, uop in enumerate(inputs)})


# functions resolved, and no contiguous of what is in memory already: in a function it were a copy
_plain_graph = PatternMatcher(
    [
        (UPat(Ops.FUNCTION, name="c"), resolve_function),
        (UPat(Ops.GETTUPLE, src=(UPat(Ops.TUPLE, name="t"),), name="g"), lambda g, t: t.src[g.arg]),
        (UPat((Ops.DETACH, Ops.CONTIGUOUS_BACKWARD), name="x"), lambda x: x.src[0]),
        (UPat(Ops.CONTIGUOUS, src=(UPat(name="x"),)), lambda x: x if _in_memory(x) else None),
    ]
)


def _in_memory(uop: UOp) -> bool:
    if uop.op is Ops.AFTER:
        uop = uop.src[0]
    return uop.op is Ops.CONTIGUOUS or uop.has_buffer_identity()


def _shared(out: UOp, gradients: list[UOp]) -> list[UOp]:
    """What of the graph of `out` is in memory and used by the gradients.

    Nothing that depends on no input: it is as soon computed again.
    """
    varies: dict[UOp, bool] = {}
    for uop in out.toposort(enter_calls=False):
        varies[uop] = uop.op is Ops.PARAM or any(varies.get(s) for s in uop.src)

    def is_shared(uop: UOp) -> bool:
        return uop.op in (Ops.CONTIGUOUS, Ops.AFTER) and varies.get(uop, False)

    own = UOp.maketuple(*gradients).toposort(lambda uop: not is_shared(uop), enter_calls=False)
    return list(dict.fromkeys(source for uop in own for source in uop.src if is_shared(source)))


def as_index(x: Tensor) -> Tensor:
    """Bytes or integers as int32 in memory.

    tinygrad drops the cast of a lone uint8 that becomes an address, and LLVM then takes the byte
    for a signed number: 200 would read before the array.
    """
    return x.cast(dtypes.int32).contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] with weight [O, I] -> x @ weight.T [..., O]."""
    *lead, inputs = x.shape
    rows, outputs = math.prod(lead), weight.shape[0]
    if _gemm_for(x, rows, inputs, outputs) is None:
        return stored(stored(x) @ weight.T)
    x = x.reshape(1, rows, inputs)
    out = _product(x, weight.reshape(1, outputs, inputs))
    return out.reshape(*lead, outputs)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., L, N] -> [..., M, N], with the same leading dimensions."""
    if _gemm_for(a, *a.shape[-2:], b.shape[-1]) is None:
        return stored(stored(a) @ stored(b))
    return matmul_transposed(a, b.transpose(-1, -2))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., N, L].T -> [..., M, N], with the same leading dimensions."""
    *lead, M, L = a.shape
    N = b.shape[-2]
    if _gemm_for(a, M, L, N) is None:
        return stored(stored(a) @ stored(b).transpose(-1, -2))
    return _product(a.reshape(-1, M, L), b.reshape(-1, N, L)).reshape(*lead, M, N)


def lookup(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of weight [V, D] by index int32 [...] -> [..., D]."""
    rows = _lookup(weight, index.reshape(-1).contiguous())
    return rows.reshape(*index.shape, weight.shape[1])


def _rows(weight: Tensor, index: Tensor) -> Tensor:
    return weight.gather(0, index.unsqueeze(1).expand(index.shape[0], weight.shape[1]))


def _lookup_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    weight, index = (Tensor(uop) for uop in call.src[1:])
    g = Tensor(upstream).contiguous()
    V, D = weight.shape
    if not by_hand(g.device):
        hit = Tensor.arange(V, device=g.device).unsqueeze(1) == index  # (V, N)
        return (hit.unsqueeze(2).where(g, 0)).sum(axis=1).uop, None
    wide = next(n for n in (12, 16, 8, 4, 2, 1) if D % n == 0)

    def kernel(out: UOp, g: UOp, index: UOp) -> UOp:
        n, d = UOp.range(g.shape[0], 0), UOp.range(D, 1)
        row = index[n].cast(dtypes.weakint)
        opts = (Opt(OptOps.UPCAST, 1, wide),) if wide > 1 else ()
        info = KernelInfo(name=f"lookup_gradient_{V}_{D}_{g.shape[0]}", opts_to_apply=opts)
        return out[row, d].store(out[row, d] + g[n, d]).end(n, d).sink(arg=info)

    zeros = Tensor.zeros(V, D, device=g.device).contiguous()
    return zeros.custom_kernel(g, index, fxn=kernel)[0].uop, None


# tinygrad's gradient of an indexed load is a one-hot sum, O(N * V * D)
_lookup = function(grad_fxn=_lookup_gradient)(_rows)


def swiglu(x: Tensor) -> Tensor:
    """x [..., value | gate] -> silu(gate) * value."""
    share = x[..., x.shape[-1] // 2 :].sigmoid().contiguous()
    return _swiglu(x, share)


def _swiglu_gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
    x, share = (Tensor(uop) for uop in call.src[1:])
    value, gate = x.chunk(2, dim=-1)
    g = Tensor(upstream).contiguous() * share
    return (g * gate).cat(g * value * (1 + gate * (1 - share)), dim=-1).uop, None


@function(grad_fxn=_swiglu_gradient)
def _swiglu(x: Tensor, share: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return gate * share * value


def product(a: Tensor, b: Tensor, a_turned: bool = False, b_turned: bool = False) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], with no gradient.

    `a_turned`: a is [Z, L, M]; `b_turned`: b is [Z, N, L].
    """
    M, L = a.shape[:0:-1] if a_turned else a.shape[1:]
    N = b.shape[1 if b_turned else 2]
    gemm = _gemm_for(a, M, L, N, dtypes.float32) or _plain
    rows, terms, columns = (_whole_tiles(size, gemm) for size in (M, L, N))
    a = _padded(_whole(a).float(), *((terms, rows) if a_turned else (rows, terms)))
    b = _padded(_whole(b).float(), *((columns, terms) if b_turned else (terms, columns)))
    return gemm(a, b, M, N, L, a_turned, b_turned)[:, :M, :N]


def _whole(x: Tensor) -> Tensor:
    """`x`; where it is all of a buffer, reshaped, that buffer with only one reshape. No gradient.

    Two reshapes make 0.13 hand a custom kernel a view of the buffer. TinyJit's memory planner does
    not see views: it would give the memory of a buffer that an earlier realize in the same captured
    function made to others while the kernel still needs it (seen: SOAP's gradients).
    """
    base = x.uop.base
    if base.op is not Ops.BUFFER or base.numel() != x.numel():
        return x
    in_order = x.uop.contiguous_view_offset() == 0
    return Tensor(base.reshape(x.shape)) if in_order else x


def _scheduled(x: Tensor, M: int, L: int, N: int) -> bool:
    """Whether the product [M, L] @ [L, N] gets a schedule of its own."""
    return _gemm_for(x, M, L, N, dtypes.float32) is _gemm


def _gemm_for(
    x: Tensor, M: int, L: int, N: int, dtype: DType | None = None
) -> Callable[..., Tensor] | None:
    """What computes [M, L] @ [L, N] from padded factors of `dtype`; None: `@`, from them as is."""
    dtype = dtype or (dtypes.bfloat16 if BF16 else dtypes.float32)
    # each length is summed over in the product or a gradient; a sum of one term is no loop
    matrices = M >= FEWEST and min(L, N) > 1
    if matrices and M * L * N >= SMALL and by_hand(x.device):
        return _gemm
    rounded = dtype == dtypes.bfloat16
    # units share all the matrices that x is made of
    if (rounded or (matrices and x.numel() * N >= SMALL)) and _has_units(x.device, dtype):
        return _on_units
    return _plain if rounded else None


def _whole_tiles(size: int, gemm: Callable[..., Tensor]) -> int:
    """What a side is padded to: a multiple of 16; for matrix units 2 or 4 such if that is next to
    nothing, for tinygrad's kernels then hold so many tiles in registers, and load less.
    """
    if gemm is _plain:
        return size
    least = _round_up(size, COLUMNS)
    longer = (_round_up(size, tiles * COLUMNS) for tiles in (4, 2, 1))
    return next(n for n in longer if 20 * n <= 21 * least) if gemm is _on_units else least


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [Z, M, L] @ b [Z, N, L].T, on padded copies; the padding is no work for the reader.

    Padding and rounding happen in the kernel that computes `a` or `b`, and the gradient's in the
    one that computes the gradient.
    """
    _, M, L = a.shape
    N = b.shape[1]
    gemm = _gemm_for(a, M, L, N)
    rows, terms, columns = (_whole_tiles(size, gemm) for size in (M, L, N))
    a, b = (
        _rounded(_padded(x.float(), height, terms), bool(BF16)).contiguous().contiguous_backward()
        for x, height in ((a, rows), (b, columns))
    )
    product = _product_function(M, N, L, gemm, a.uop is b.uop, bool(BF16))
    return product(a, b)[:, :M, :N].contiguous_backward()


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.pad((None, (0, rows - x.shape[1]), (0, columns - x.shape[2])))


def _rounded(x: Tensor, to_bf16: bool) -> Tensor:
    """What a product's factor is made of; kernels by hand read bfloat16's values as float32."""
    if not to_bf16:
        return x
    rounded = x.cast(dtypes.bfloat16)
    # added up so that a gradient is not rounded on its way back
    return x + (rounded.float() - x).detach() if by_hand(x.device) else rounded


@functools.cache
def _product_function(
    M: int, N: int, L: int, gemm: Callable[..., Tensor], same: bool, to_bf16: bool
):
    """a, b (padded) -> a @ b.T, whose gradient is two more such products; `same` if a is b."""

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, *others = (Tensor(uop) for uop in call.src[1:])
        b, *buffers = (a, *others) if same else others  # one and the same is one argument
        g = _rounded(Tensor(upstream), to_bf16).contiguous()
        da, db = gemm(g, b, M, L, N), gemm(g, a, N, L, M, a_turned=True)
        gradients = [(da + db).uop] if same else [da.uop, db.uop]
        return *gradients, *[None for _ in buffers]

    # implicit: the buffer that the kernel writes
    @function(grad_fxn=gradient, allow_implicit=True)
    def product(a: Tensor, b: Tensor) -> Tensor:
        return gemm(a, b, M, N, L, b_turned=True)

    return product


def _plain(
    a: Tensor, b: Tensor, M: int, N: int, L: int, a_turned: bool = False, b_turned: bool = False
) -> Tensor:
    """What `_gemm` computes, as tinygrad schedules it, from factors that are not padded."""
    a, b = a.transpose(1, 2) if a_turned else a, b.transpose(1, 2) if b_turned else b
    return (a.float() @ b.float()).contiguous()


def _on_units(
    a: Tensor, b: Tensor, M: int, N: int, L: int, a_turned: bool = False, b_turned: bool = False
) -> Tensor:
    """`_plain` in the form that matrix units take: float32 sums of exact products, over the padding
    as well, which is zeros."""
    a, b = a.contiguous(), (b.transpose(1, 2) if b_turned else b).contiguous()
    a = a.transpose(1, 2) if a_turned else a
    return a.matmul(b, dtype=dtypes.float32).contiguous()


def multiplies_bf16(device: str | tuple[str, ...]) -> bool:
    """Whether the device has matrix units for bfloat16 (CUDA from sm_80, Apple from the M3 on)."""
    return _has_units(device, dtypes.bfloat16)


def _has_units(device: str | tuple[str, ...], dtype: DType) -> bool:
    """Whether tinygrad uses matrix units of the device for factors of `dtype`.

    For float32 that is Apple's; CUDA's would round factors to 10 bits, which ALLOW_TF32=1 allows.
    """
    with Context(ALLOW_DEVICE_USAGE=1):  # also asked while a function is being made
        renderer = Device[device if isinstance(device, str) else device[0]].renderer
    arch = renderer.target.arch
    if dtype == dtypes.bfloat16:
        apple = re.fullmatch(r"Apple(\d+)", arch)
        allowed = not apple or int(apple[1]) >= 9
    else:
        allowed = ALLOW_TF32 or not arch.startswith("sm_")
    units = (core.dtype_in for core in renderer.tensor_cores)
    return bool(USE_TC and allowed) and dtype in units


def _gemm(
    a: Tensor,
    b: Tensor,
    M: int,
    N: int,
    L: int,
    a_turned: bool = False,
    b_turned: bool = False,
) -> Tensor:
    """[Z, M, L] @ [Z, L, N]; stored as [Z, L, M] if `a_turned`, as [Z, N, L] if `b_turned`.

    The buffers are padded to whole tiles, as is the result; M, N and L say how much of them is
    meant. What the padding holds does not matter: it is summed over by nobody.

    A tile reads a few rows of `a` and one panel of `b` front to back, so that each core's loads
    come from where the last ones did. In a matrix of rows each step of a column would touch a new
    line, and every few steps a new page (110 GFLOPS where panels reach 180). Both factors are
    copied into that order first: a percent or two of the time.
    """
    a = _transposed(a) if a_turned else a
    b = _panels(b.transpose(1, 2) if b_turned else b)
    Z, height, depth = a.shape
    rows, columns, terms = _round_up(M, COLUMNS), b.shape[1] * COLUMNS, b.shape[2]
    return _tiles(
        Tensor.empty(Z, rows, columns, device=a.device),
        [a, b],
        f"gemm_{Z}_{M}_{N}_{L}",
        (Z,),
        (rows, columns, L),
        left=lambda z, m, l: (z * height + m) * depth + l,
        right=lambda z, l, n: (z * columns + n) * terms + l * COLUMNS,
        target=lambda z, m, n: (z * rows + m) * columns + n,
    )


def _panels(x: Tensor) -> Tensor:
    """[Z, L, n * COLUMNS] -> [Z, n, L, COLUMNS]."""
    Z, L, _ = x.shape
    return x.reshape(Z, L, -1, COLUMNS).transpose(1, 2).contiguous()


def _transposed(x: Tensor) -> Tensor:
    """[Z, M, N] -> [Z, N, M], both multiples of COLUMNS, in rectangles that stay in registers."""
    Z, M, N = x.shape
    out = Tensor.empty(Z, N, M, device=x.device)
    wide = 8
    sizes = (Z, M // COLUMNS, N // wide)
    shared, threads = _share(sizes[:2]) if x.numel() >= PARALLEL else (0, 1)
    code = _Code(out, x, threads=threads)
    z, m, n = code.loops(sizes, shared)
    m, n = m * COLUMNS, n * wide
    stores = []
    for j in range(wide):
        column = [code.load(1, (z * M + m + i) * N + n + j, 1) for i in range(COLUMNS)]
        place = (z * N + n + j) * M + m
        stores.append(code.store(place, UOp(Ops.STACK, VECTOR, tuple(column))))
    code.end(*stores)
    program = code.program(f"transposed_{Z}_{M}_{N}")
    return out.custom_kernel(x, fxn=lambda *_: program)[0]


def _tiles(
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
    COLUMNS others are in the second, `target(*outer, m, n)` where as many results go. M and N are
    multiples of COLUMNS. `finish(code, total, *outer, m, n)` turns a vector of sums into one of
    results. `again(*outer)` adds an innermost loop of so many turns to the outer ones, whose
    products are summed up in `out`, without its number; `products` says how many there are in all.
    """
    M, N, L = sizes
    # what is left is a multiple of 4, so that there is one smaller size, and not one tile alone: no
    # thread could be told to leave it to another
    tall = tile_rows()
    lefts = ((n, M - n * tall) for n in range(M // tall, -1, -1))
    main, left_rows = next((n, rows) for n, rows in lefts if rows % 4 == 0 and rows != 4)
    shared, threads = _share((*outer, max(main, left_rows // 4)))
    code = _Code(out, *inputs, threads=threads)
    zero = code.splat(0.0)
    looped = L - L % UNROLL if L >= 2 * UNROLL else 0  # a loop of one turn would be none

    def tiles(first: int, turns: int, height: int) -> None:
        where = matrix = code.loops(outer, shared)

        def tile() -> tuple[UOp, UOp, list[UOp]]:
            m, n = code.loops((turns, N // COLUMNS), shared - len(outer))
            m, n = m * height + first, n * COLUMNS
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
            return [total + code.splat(x) * b for total, x in zip(totals, a, strict=True)]

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


class _Code:
    """A kernel as the loops and vectors that are to run: tinygrad's renderer only writes it down.

    From the sums alone tinygrad would make the same, in 0.3 to 1 s for each size. All tensors are
    float32, the first one is written, and places are counted in numbers from a tensor's start.
    """

    def __init__(self, *tensors: Tensor, threads: int) -> None:
        self.threads = threads
        assert all(tensor.dtype == dtypes.float32 for tensor in tensors)
        sizes = [tensor.numel() for tensor in tensors]
        self.index = dtypes.int if max(sizes) < INT else dtypes.long
        self.buffers = [UOp(Ops.PARAM, dtypes.float32.ptr(n), arg=i) for i, n in enumerate(sizes)]
        self.device, self.bytes = tensors[0].device.split(":")[0], 4 * sum(sizes)
        self.numbers = itertools.count()
        self.open: list[UOp] = []  # the loops that what comes next is in
        self.done: list[UOp] = []  # what has ended, and comes before them

    def number(self, n: int) -> UOp:
        return UOp.const(self.index, n)

    def loop(self, turns: UOp | int, after: Sequence[UOp] = ()) -> UOp:
        """A loop inside those that are open; itself open until `end`."""
        turns = turns if isinstance(turns, UOp) else self.number(turns)
        before = turns, *(self.open or self.done), *after
        loop = UOp(Ops.RANGE, self.index, before, (next(self.numbers), AxisType.LOOP))
        self.open.append(loop)
        return loop

    def loops(self, sizes: tuple[int, ...], shared: int) -> list[UOp]:
        """One inside the other; threads share out the one numbered `shared`."""
        return [self._turns(n, i == shared) for i, n in enumerate(sizes)]

    def _turns(self, n: int, shared: bool) -> UOp:
        if n == 1:
            assert not shared or self.threads == 1, "every thread would do the same, at once"
            return self.number(0)
        if not shared or self.threads == 1:
            return self.loop(n)
        core = UOp.variable("core_id", 0, self.threads - 1, dtypes.int).cast(self.index)
        ends = ((core + i) * n for i in range(2))
        start, stop = (UOp(Ops.CDIV, self.index, (x, self.number(self.threads))) for x in ends)
        return self.loop(stop - start) + start

    def end(self, *stores: UOp, leave: int = 0) -> UOp:
        """All open loops but so many end; if all do, the next ones come after them."""
        body = UOp.group(*stores)
        while len(self.open) > leave:
            body = body.end(self.open.pop())
        if not leave:
            self.done.append(body)
        return body

    def _at(self, buffer: UOp, place: UOp, wide: int) -> UOp:
        where = UOp(Ops.INDEX, buffer.dtype, (buffer, place))
        if wide == 1:
            return where
        vector = dtypes.float32.vec(wide)
        return where.cast(vector.ptr(buffer.dtype.size, buffer.dtype.addrspace))

    def load(self, tensor: int, place: UOp, wide: int = COLUMNS) -> UOp:
        where = self._at(self.buffers[tensor], place, wide)
        return UOp(Ops.LOAD, dtypes.float32.vec(wide), (where,))

    def load_so_far(self, place: UOp) -> UOp:
        """What the last turn of the loops that are open has stored."""
        return UOp(Ops.LOAD, VECTOR, (self._at(self.buffers[0].after(*self.open), place, COLUMNS),))

    def store(self, place: UOp, vector: UOp) -> UOp:
        return self._at(self.buffers[0], place, COLUMNS).store(vector)

    def registers(self, vectors: int) -> UOp:
        size = dtypes.float32.ptr(vectors * COLUMNS, AddrSpace.REG)
        return UOp(Ops.DEFINE_REG, size, arg=next(self.numbers))

    def get(self, registers: UOp, i: int) -> UOp:
        return UOp(Ops.LOAD, VECTOR, (self._at(registers, self.number(i * COLUMNS), COLUMNS),))

    def put(self, registers: UOp, i: int, vector: UOp) -> UOp:
        return self._at(registers, self.number(i * COLUMNS), COLUMNS).store(vector)

    def splat(self, x: UOp | float) -> UOp:
        x = x if isinstance(x, UOp) else UOp.const(dtypes.float32, x)
        return UOp(Ops.STACK, VECTOR, (x,) * COLUMNS)

    def program(self, name: str, operations: int = 0) -> UOp:
        # tinygrad counts nothing here: it takes all that precedes an address for part of it
        info = KernelInfo(name=name, estimates=Estimates(operations, mem=self.bytes))
        target = UOp(Ops.DEVICE, arg=self.device)
        return UOp(Ops.PROGRAM, src=(UOp.sink(*self.done, arg=info), target))


def _share(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Which of these loops threads share out most evenly, the outermost first; how many threads."""

    def longest(i: int) -> float:
        return -(-sizes[i] // min(CPU_COUNT.value, sizes[i])) / sizes[i]

    best = min(range(len(sizes)), key=longest)
    return best, min(CPU_COUNT.value, sizes[best])


@functools.cache
def tile_rows() -> int:
    """Rows of a tile: 8 vectors of 512 bits; else 6, which 16 registers of 256 bits can hold."""
    try:
        with open("/proc/cpuinfo") as file:
            return 8 if " avx512f " in file.read() else 6
    except OSError:
        return 6


# Attention in a band: products whose ends are fused with what comes next -------------------------


@dataclasses.dataclass(frozen=True)
class Band:
    """How a band is cut into blocks of queries; sizes as in attention.py.

    A block's G * queries rows share its `keys`: its own and the `reach` before them. `reach` and
    `keys` are multiples of `queries`, and that of COLUMNS.
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
        return _round_up(self.head_dim + 1, COLUMNS)

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
        return _rounded(x.reshape(-1, P), rounded).contiguous()

    q = (q / (math.sqrt(C) * math.log(2))).pad((None, None, (0, behind), (0, P - C)))
    q = q.reshape(B, K, G, blocks, Q, P).permute(0, 1, 3, 2, 4, 5).reshape(-1, P)
    q, k, v = _rounded(q, rounded).contiguous(), keys(k, False), keys(v, True)
    slopes = (slopes.reshape(1, -1).expand(B, -1) / -math.log(2)).reshape(-1).contiguous()
    weights = _rounded(_exps(_band_scores(q, _key_panels(k, band), slopes, band)), rounded)
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
        g = _rounded((g * share).pad((None, (0, P - C))), rounded).contiguous()
        d_scores = _band_score_gradient(g, _key_panels(v, band), weights, dots, band)
        d_scores = _rounded(d_scores, rounded).contiguous()
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
    """Rows [matrices * positions, width] -> [matrices, positions / COLUMNS, width, COLUMNS]."""
    return _panels(x.reshape(band.matrices, band.positions, band.width).transpose(1, 2))


def _band_scores(q: Tensor, k: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """q's rows, k in panels -> scores in the unit of powers of two, ALiBi in it, unseen -inf.

    `slopes` are negative: added is what a position of distance adds to a score.
    """
    Q, s = band.queries, band.keys

    def biased(code: _Code, total: UOp, z: UOp, b: UOp, m: UOp, n: UOp) -> UOp:
        head = UOp(Ops.CDIV, m.dtype, (m, code.number(Q)))
        slope = code.load(3, z * band.group + head, 1)
        distance = code.load(4, (m - head * Q) * s + n)
        return total + code.splat(slope) * distance + code.load(5, b * Q + n)

    arange = functools.partial(Tensor.arange, device=q.device)
    distance = arange(Q).reshape(Q, 1) + band.reach - arange(s)
    seen = (distance >= 0) & (distance <= band.window)
    distance = seen.where(distance.cast(dtypes.float32), math.inf).contiguous()
    before = (arange(band.positions) < band.reach).where(-math.inf, 0.0).contiguous()
    return _band_against_keys([q, k, slopes, distance, before], band, "scores", biased)


def _band_score_gradient(g: Tensor, v: Tensor, weights: Tensor, dots: Tensor, band: Band) -> Tensor:
    """weights * (g's rows times v, in panels, + dots [rows, 1])."""

    def weighed(code: _Code, total: UOp, z: UOp, b: UOp, m: UOp, n: UOp) -> UOp:
        row = band.row(z, b, m)
        return (total + code.splat(code.load(4, row, 1))) * code.load(3, row * band.keys + n)

    return _band_against_keys([g, v, weights, dots], band, "ds", weighed)


def _band_against_keys(
    inputs: list[Tensor], band: Band, name: str, finish: Callable[..., UOp]
) -> Tensor:
    """Queries' rows times the keys that each sees, in panels -> rows of scores."""
    Z, b, M, P, s = band.matrices, band.blocks, band.rows, band.width, band.keys
    return _tiles(
        Tensor.empty(Z * b * M, s, device=inputs[0].device),
        inputs,
        f"{name}_{Z}_{b}_{M}_{s}_{band.head_dim}",
        (Z, b),
        (M, s, band.head_dim),
        left=lambda z, b, m, l: band.row(z, b, m) * P + l,
        right=lambda z, b, l, n: band.key(z, b, n) * P + l * COLUMNS,
        target=lambda z, b, m, n: band.row(z, b, m) * s + n,
        finish=finish,
    )


def _band_product(a: Tensor, x: Tensor, band: Band, name: str) -> Tensor:
    """a (rows of scores) times the keys' rows x -> rows."""
    Z, b, M, P, s = band.matrices, band.blocks, band.rows, band.width, band.keys
    return _tiles(
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

    return _tiles(
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
    """2^(scores - the largest of the row), each row [s] of which s is a multiple of COLUMNS."""
    rows, s = scores.shape

    def kernel(out: UOp, scores: UOp) -> UOp:
        row, n = UOp.range(rows, 0), UOp.range(s, 1)
        lane = UOp.range(COLUMNS, 3, AxisType.REDUCE)
        if s > COLUMNS:
            step = UOp.range(s // COLUMNS, 2, AxisType.REDUCE)
            top = scores[row, step * COLUMNS + lane].reduce(step, arg=Ops.MAX)
        else:
            top = scores[row, lane]
        top = top.reduce(lane, arg=Ops.MAX)
        value = _exp2(scores[row, n] - top)
        opts = [Opt(OptOps.UPCAST, 1, COLUMNS), Opt(OptOps.UNROLL, s > COLUMNS, COLUMNS)]
        threads = _threads(rows)
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


def _threads(outer: int) -> int:
    """The most threads, up to the cores, that share the outermost axis evenly."""
    return next(t for t in range(CPU_COUNT.value, 0, -1) if outer % t == 0)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# Decoding: few rows, so that time is memory traffic and launches --------------------------------


class Packed:
    """A weight [O, I] as decoding reads it: x [R, I...] -> x @ weight.T [R, O...], no gradient.

    On a CPU the weight is copied into panels of PANEL outputs, so that a pass reads memory front to
    back, and rows are PANEL-padded: `x` may be wider than I, and the result is as wide as whole
    panels. Elsewhere it is the weight itself, and nothing is padded.
    """

    PANEL = 32

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """`scale` [I] multiplies x, once and for all."""
        self.outputs, self.inputs = weight.shape
        weight = weight.detach() if scale is None else weight.detach() * scale.detach()
        self.panels = by_hand(weight.device)
        if self.panels:
            self.width = padded_width(self.outputs, weight.device)
            weight = weight.pad(((0, self.width - self.outputs), None))
            weight = weight.reshape(-1, self.PANEL, self.inputs).transpose(1, 2)
        else:
            self.width = self.outputs
        self.weight = weight.contiguous().realize()

    def __call__(
        self, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`scale` [R, 1] multiplies the rows of the result, then `residual` [R, O...] is added."""
        if not self.panels:
            out = x @ self.weight.T
            out = out if scale is None else out * scale
            return (out if residual is None else out + residual).contiguous()
        rows, panel = x.shape[0], self.PANEL
        tile = _rows_in_registers(rows)
        wide = panel // 16 if _rows_in_registers(rows, panel // 16) == tile else 1

        def kernel(out: UOp, x: UOp, weight: UOp, *more: UOp) -> UOp:
            (r, p, c), axis = _loops(rows, self.width // panel, panel)
            l = UOp.range(self.inputs, 3, AxisType.REDUCE)
            total = (x[r, l] * weight[p, l, c]).reduce(l, arg=Ops.ADD)
            if scale is not None:
                total = total * more[0][r, 0]
            if residual is not None:
                total = total + more[-1][r, p * panel + c]
            opts = [Opt(OptOps.UPCAST, axis[2], 16)]
            if wide > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], wide))
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[0], tile))
            elif self.inputs % 4 == 0:  # of one row there is too little to do in a turn
                opts.append(Opt(OptOps.UNROLL, 0, 4))
            info = KernelInfo(
                name=f"packed_{rows}_{self.outputs}_{self.inputs}_{len(more)}",
                opts_to_apply=tuple(opts),
            )
            return _end(out[r, p * panel + c].store(total), r, p, c).sink(arg=info)

        more = [t.contiguous() for t in (scale, residual) if t is not None]
        out = Tensor.empty(rows, self.width, device=x.device)
        return out.custom_kernel(x.contiguous(), self.weight, *more, fxn=kernel)[0]


def _loops(*sizes: int, first: int = 0) -> tuple[list[UOp | int], list[int]]:
    """Loops of these sizes, and the axis that each is for `Opt`. A loop of one turn is none."""
    loops = [UOp.range(n, first + i) if n > 1 else 0 for i, n in enumerate(sizes)]
    return loops, [sum(n > 1 for n in sizes[:i]) for i in range(len(sizes))]


def _rows_in_registers(rows: int, vectors: int = 1) -> int:
    """The most rows of a tile that divide `rows`, each of so many vectors of 16 numbers."""
    room = 16 if tile_rows() > 6 else 6
    return next(n for n in (8, 4, 2, 1) if rows % n == 0 and n * vectors <= room)


def _end(store: UOp, *loops: UOp | int) -> UOp:
    return store.end(*[loop for loop in loops if isinstance(loop, UOp)])


def by_hand(device: str | tuple[str, ...]) -> bool:
    """Whether this device gets kernels with schedules of their own."""
    enabled = os.environ.get("PICO_KERNELS", "1") != "0" and DEV.renderer != "X86"
    return enabled and isinstance(device, str) and device.split(":")[0] == "CPU"


def padded_width(width: int, device: str) -> int:
    """How wide a row of `width` numbers is in decoding."""
    return _round_up(width, Packed.PANEL) if by_hand(device) else width


def ring_shape(head_dim: int, window: int, rows: int) -> tuple[int, int]:
    """(slots, columns) of a `Ring`: keys are [K, C, slots], values [K, slots, columns]."""
    return _round_up(window + rows, Packed.PANEL), _round_up(head_dim + 1, 16)


class Ring:
    """Keys and values of one attention for the last positions: position p is in slot p % slots.

    A pass writes its rows at `start`, start + 1, …, and may then be taken back by starting the next
    one earlier: `slots` leaves room for `rows` beyond the window, so what it overwrote was out of
    every window already, and what it leaves lies ahead of every later query or is overwritten.

    H query heads, K key/value heads, G = H / K, C head_dim, S slots, R rows of a pass.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, window: int, rows: int, slopes: Tensor
    ) -> None:
        """`slopes` [H]: what ALiBi takes off a score a position of distance."""
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        # one column more, of ones: the sum of the weights is a value like any other
        self.slots, self.columns = ring_shape(head_dim, window, rows)
        self.slopes = slopes.contiguous().realize()
        self.by_hand = by_hand(self.slopes.device)
        zeros = np.zeros((kv_heads, head_dim, self.slots), np.float32)
        ones = np.zeros((kv_heads, self.slots, self.columns), np.float32)
        ones[:, :, head_dim] = 1
        device = self.slopes.device
        self.keys = Tensor(zeros, device=device).clone().realize()  # (K, C, S): lanes are slots
        self.values = Tensor(ones, device=device).clone().realize()  # (K, S, C + 1 …)

    def attend(self, qkv: Tensor, start: Tensor) -> Tensor:
        """Rows [R, H*C | K*C | K*C …] at positions from `start` (int [1]) on -> [R, H*C].

        Their keys and values are stored first; each row sees itself and `window` before it.
        """
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        if self.by_hand:
            keys, values = self._store(qkv, start)
            return self._divide(self._weigh(self._exps(self._scores(qkv, keys, start)), values))
        keys, values = self._store_plainly(qkv, start)
        scores = self._scores_plainly(qkv, keys, start)  # (H*R, S)
        weights = (scores - scores.max(axis=-1, keepdim=True)).exp()
        sums = weights.reshape(K, -1, self.slots) @ values
        sums = sums.reshape(H, R, -1).transpose(0, 1)
        return (sums[:, :, :C] / sums[:, :, C : C + 1]).reshape(R, H * C).contiguous()

    def _distances(self, start: Tensor, rows: int) -> Tensor:
        """How far each slot is before each row, int [R, S]; negative: it lies ahead."""
        newest = start + rows - 1
        slot = Tensor.arange(self.slots, device=start.device)
        position = newest - (newest + self.slots - slot) % self.slots
        row = start + Tensor.arange(rows, device=start.device)
        # what was never written is as far as can be
        position = (position >= 0).where(position, -self.slots - 1)
        return row.reshape(-1, 1) - position.reshape(1, -1)

    def _store_plainly(self, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        new = qkv[:, H * C : (H + 2 * K) * C].reshape(R, 2, K, C)
        row = (Tensor.arange(self.slots, device=start.device) + self.slots - start) % self.slots
        here = row < R
        row = here.where(row, 0)
        keys, values = (new[:, i].contiguous()[row].permute(1, 0, 2) for i in range(2))  # (K, S, C)
        self.keys.assign(here.reshape(1, 1, -1).where(keys.transpose(1, 2), self.keys))
        values = values.pad((None, None, (0, self.columns - C)))
        column = Tensor.arange(self.columns, device=start.device) < C
        fresh = here.reshape(1, -1, 1) & column.reshape(1, 1, -1)
        self.values.assign(fresh.where(values, self.values))
        return self.keys, self.values

    def _scores_plainly(self, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        q = qkv[:, : H * C].reshape(R, K, H // K, C).permute(1, 2, 0, 3)  # (K, G, R, C)
        scores = (q.reshape(K, -1, C) @ keys).reshape(K, H // K, R, self.slots)
        distance = self._distances(start, R)
        slopes = self.slopes.reshape(K, H // K, 1, 1)
        visible = (distance >= 0) & (distance <= self.window)
        scores = visible.where(scores / math.sqrt(C) - slopes * distance, -math.inf)
        return scores.reshape(H * R, self.slots).contiguous()

    def _store(self, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        R, H, K, C, S = qkv.shape[0], self.heads, self.kv_heads, self.head_dim, self.slots

        def kernel(keys: UOp, values: UOp, qkv: UOp, start: UOp) -> UOp:
            stores = []
            for i in range(2):
                (r, k, c), _ = _loops(R, K, C, first=3 * i)
                slot = (start[0] + r) % S
                new = qkv[r, (H + i * K) * C + k * C + c]
                place = values[k, slot, c] if i else keys[k, c, slot]
                stores.append(_end(place.store(new), r, k, c))
            return UOp.sink(*stores, arg=KernelInfo(name=f"ring_{R}_{K}_{C}", opts_to_apply=()))

        return self.keys.custom_kernel(self.values, qkv, start, fxn=kernel)[:2]

    def _scores(self, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        """`_scores_plainly` in one kernel: [H*R, S]."""
        R, H, K, C, S = qkv.shape[0], self.heads, self.kv_heads, self.head_dim, self.slots
        G, scale, tile = H // K, 1 / math.sqrt(C), _rows_in_registers(R)

        def kernel(out: UOp, qkv: UOp, keys: UOp, slopes: UOp, start: UOp) -> UOp:
            (k, g, r, s), axis = _loops(K, G, R, S)
            c = UOp.range(C, 4, AxisType.REDUCE)
            total = (qkv[r, (k * G + g) * C + c] * keys[k, c, s]).reduce(c, arg=Ops.ADD)
            newest = start[0] + (R - 1)
            age = (newest + S - s) % S  # of what the slot holds, before the newest row
            distance = age + r - (R - 1)
            visible = (distance >= 0) & (distance <= self.window) & (age <= newest)
            biased = total * scale - slopes[k * G + g] * distance.cast(dtypes.float32)
            score = visible.where(biased, UOp.const(dtypes.float32, -math.inf))
            opts = [Opt(OptOps.UPCAST, axis[3], 16)]
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], tile))
            info = KernelInfo(name=f"scores_{R}_{H}_{K}_{C}_{S}", opts_to_apply=tuple(opts))
            row = (k * G + g) * R + r
            return _end(out[row, s].store(score), k, g, r, s).sink(arg=info)

        # rows are numbered, not shaped: 0.13 copies what is reshaped on its way to or from a kernel
        out = Tensor.empty(H * R, S, device=qkv.device)
        return out.custom_kernel(qkv, keys, self.slopes, start, fxn=kernel)[0]

    def _exps(self, scores: Tensor) -> Tensor:
        """exp(scores - the row's largest): [H*R, S]."""
        rows, S = scores.shape

        def kernel(out: UOp, scores: UOp) -> UOp:
            (row, s), axis = _loops(rows, S)
            other = UOp.range(S, 2, AxisType.REDUCE)
            top = scores[row, other].reduce(other, arg=Ops.MAX)
            exps = ((scores[row, s] - top) * (1 / math.log(2))).exp2()
            opts = (Opt(OptOps.UPCAST, axis[1], 16), Opt(OptOps.UNROLL, 0, 16))
            info = KernelInfo(name=f"exps_{rows}_{S}", opts_to_apply=opts)
            return _end(out[row, s].store(exps), row, s).sink(arg=info)

        out = Tensor.empty(rows, S, device=scores.device)
        return out.custom_kernel(scores, fxn=kernel)[0]

    def _divide(self, sums: Tensor) -> Tensor:
        """sums [R*H, P], whose column C is the weights' -> [R, H*C]."""
        H, C = self.heads, self.head_dim
        R = sums.shape[0] // H

        def kernel(out: UOp, sums: UOp) -> UOp:
            (r, h, c), _ = _loops(R, H, C)
            quotient = sums[r * H + h, c] * sums[r * H + h, C].reciprocal()
            info = KernelInfo(name=f"divide_{R}_{H}_{C}", opts_to_apply=())
            return _end(out[r, h * C + c].store(quotient), r, h, c).sink(arg=info)

        return Tensor.empty(R, H * C, device=sums.device).custom_kernel(sums, fxn=kernel)[0]

    def _weigh(self, weights: Tensor, values: Tensor) -> Tensor:
        """weights [K*G*R, S] @ values [K, S, P] -> [R*K*G, P]."""
        K, S, P = values.shape
        G, R = self.heads // K, weights.shape[0] // self.heads
        wide = P // 16 if P <= 64 else 1
        tile = _rows_in_registers(R, wide)

        def kernel(out: UOp, weights: UOp, values: UOp) -> UOp:
            (k, g, r, c), axis = _loops(K, G, R, P)
            s = UOp.range(S, 4, AxisType.REDUCE)
            weight = weights[(k * G + g) * R + r, s]
            total = (weight * values[k, s, c]).reduce(s, arg=Ops.ADD)
            opts = [Opt(OptOps.UPCAST, axis[3], 16)]
            if wide > 1:
                opts.append(Opt(OptOps.UPCAST, axis[3], wide))
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], tile))
            else:
                opts.append(Opt(OptOps.UNROLL, 0, 4))
            info = KernelInfo(name=f"weigh_{K}_{G}_{R}_{S}_{P}", opts_to_apply=tuple(opts))
            return _end(out[(r * K + k) * G + g, c].store(total), k, g, r, c).sink(arg=info)

        out = Tensor.empty(R * K * G, P, device=weights.device)
        return out.custom_kernel(weights, values, fxn=kernel)[0]


def write_into(x: Tensor, values: np.ndarray) -> None:
    """Overwrite the realised tensor `x` in place; cheaper than a new Tensor, and jits keep it.

    On several devices, each holds all of it.
    """
    assert values.dtype.itemsize * values.size == x.nbytes(), "size of the buffer"
    for buffer in _buffers(x):
        memory = memoryview(np.ascontiguousarray(values)).cast("B")
        buffer.ensure_allocated().copyin(memory)


def write_all(tensors: dict[str, Tensor], values: dict[str, np.ndarray]) -> None:
    """`write_into` an optimizer's state, by name.

    Raises ValueError, before anything is written, unless all names, shapes and dtypes fit.
    """
    if tensors.keys() != values.keys():
        names = sorted(tensors.keys() ^ values.keys())
        raise ValueError(f"state of another optimizer: {', '.join(names[:4])}")
    for name, tensor in tensors.items():
        shape, dtype = tensor.shape, np.dtype(_to_np_dtype(tensor.dtype))
        if values[name].shape != shape or values[name].dtype != dtype:
            found = f"{values[name].dtype} {values[name].shape}"
            raise ValueError(f"{name}: {found} where {dtype} {shape} is needed")
    for name, tensor in tensors.items():
        write_into(tensor, values[name])


def read(x: Tensor) -> np.ndarray:
    """The values of the realised tensor `x`; on a CPU its very memory, not a copy."""
    buffer = _buffers(x)[0]
    memory = buffer.as_memoryview(allow_zero_copy=True)[: x.nbytes()]
    return np.frombuffer(memory, _to_np_dtype(x.dtype)).reshape(x.shape)


def in_host_memory(x: Tensor) -> bool:
    """Whether `read(x)` is the realised tensor's own memory."""
    buffers = _buffers(x)
    return len(buffers) == 1 and hasattr(buffers[0].allocator, "_as_buffer")


def _buffers(x: Tensor) -> list:
    buffer = x.uop.buffer
    return getattr(buffer, "bufs", [buffer])


def compiled(method: Callable, *constants: int) -> TinyJit:
    """TinyJit of a bound method, kept in an attribute of its own object without a cycle.

    `constants` are its first arguments, for good. The first call is captured already, where TinyJit
    would run it once without: that would build and schedule everything twice. So whatever the
    method leaves behind must be in buffers that existed before.

    A cycle would leave the graph to Python's garbage collector. That may run on the CPU device's
    own thread, and there freeing a graph waits for that thread itself, for ever (0.13, seen).
    """
    reference = weakref.WeakMethod(method)
    jit = TinyJit(lambda *inputs: reference()(*constants, *inputs))
    jit.cnt = 1
    return jit


def is_capturing() -> bool:
    """Whether a TinyJit is recording: what runs on the host now would be lost in its replays."""
    return bool(capturing)


@contextlib.contextmanager
def counted_kernels() -> Iterator[list[int]]:
    """The list's one number becomes how many kernels run while it lasts.

    tinygrad's own counter takes a captured graph, which is many kernels, for one.
    """
    count, estimate = [0], realize.estimate_uop

    def counting(call: UOp):  # called for each call that is run
        ast = call.src[0]
        graph = ast.op is Ops.CUSTOM_FUNCTION and ast.arg == "graph"
        count[0] += len(ast.src[0].src) if graph else 1
        return estimate(call)

    realize.estimate_uop = counting
    try:
        yield count
    finally:
        realize.estimate_uop = estimate
