"""Matrix products and attention on the machine's own terms; what else is not public tinygrad.

Three things are done here that tinygrad does not do by itself:

- `stored`: a value is computed once. Lazy fusion would recompute norms, SiLU and softmax inside
  every product of the backward pass (125 GOP a step instead of 31, measured).
- On a CPU, products are kernels with a schedule of their own: a tile of 8 rows by 16 columns stays
  in vector registers while one loop runs over the summed axis. tinygrad's own choice reaches a
  fifth of it. `PICO_KERNELS=0` switches them off.
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
from collections.abc import Callable, Iterator

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

ROWS, COLUMNS = 8, 16  # the register tile
# below this many multiplications a product is bound by memory or by the call, not by arithmetic
SMALL = 1 << 15
# from this many terms on, the columns of a transposed factor are gathered before they are read
LONG = 2048
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


def product(a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """a [Z, M, L] @ b [Z, L, N] -> [Z, M, N], with no gradient; `transposed`: a is [Z, L, M]."""
    M, L = a.shape[:0:-1] if transposed else a.shape[1:]
    N = b.shape[2]
    gemm = _gemm_for(a, M, L, N, dtypes.float32)
    if gemm is None:
        return ((a.transpose(1, 2) if transposed else a) @ b).contiguous()
    rows, terms, columns = (_whole_tiles(size, gemm) for size in (M, L, N))
    if gemm is _gemm:  # it leaves out what lies beyond L
        terms = L
    a = _padded(_whole(a), terms, rows) if transposed else _padded(_whole(a), rows, terms)
    return gemm(a, _padded(_whole(b), terms, columns), M, N, L, transposed)[:, :M, :N]


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


def _factors() -> DType:
    """What the factors of the model's products are rounded to."""
    return dtypes.bfloat16 if BF16 else dtypes.float32


def _gemm_for(
    x: Tensor, M: int, L: int, N: int, dtype: DType | None = None
) -> Callable[..., Tensor] | None:
    """What computes [M, L] @ [L, N] from padded factors of `dtype`; None: `@`, from them as is."""
    dtype = dtype or _factors()
    # each length is summed over in the product or a gradient; a sum of one term is no loop
    matrices = M >= ROWS and min(L, N) > 1
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
    a, b = _padded(a, rows, terms, _factors()), _padded(b, columns, terms, _factors())
    product = _product_function(M, N, L, gemm, a.uop is b.uop)
    return product(a, b)[:, :M, :N].contiguous_backward()


def _padded(x: Tensor, rows: int, columns: int, dtype: DType = dtypes.float32) -> Tensor:
    padded = x.pad((None, (0, rows - x.shape[1]), (0, columns - x.shape[2])))
    return padded.cast(dtype).contiguous().contiguous_backward()


@functools.cache
def _product_function(M: int, N: int, L: int, gemm: Callable[..., Tensor], same: bool):
    """a, b (padded) -> a @ b.T, whose gradient is two more such products; `same` if a is b."""

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, *others = (Tensor(uop) for uop in call.src[1:])
        b, *buffers = (a, *others) if same else others  # one and the same is one argument
        g = Tensor(upstream).cast(a.dtype).contiguous()
        da, db = gemm(g, b, M, L, N), gemm(g, a, N, L, M, transposed=True)
        gradients = [(da + db).uop] if same else [da.uop, db.uop]
        return *gradients, *[None for _ in buffers]

    # implicit: the buffer that the kernel writes
    @function(grad_fxn=gradient, allow_implicit=True)
    def product(a: Tensor, b: Tensor) -> Tensor:
        # rows of b become columns: the vector's lanes are then next to each other in memory
        return gemm(a, _transposed(b) if gemm is _gemm else b.transpose(1, 2).contiguous(), M, N, L)

    return product


def _plain(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """What `_gemm` computes, as tinygrad schedules it; the padding, zeros here, is summed over."""
    return ((a.transpose(1, 2) if transposed else a).float() @ b.float()).contiguous()


def _on_units(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """`_plain` in the form that matrix units take: float32 sums of exact products."""
    a = a.transpose(1, 2) if transposed else a
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


def _gemm(a: Tensor, b: Tensor, M: int, N: int, L: int, transposed: bool = False) -> Tensor:
    """[Z, M, L] @ [Z, L, N], the first one stored as [Z, L, M] if `transposed`.

    The buffers are padded to whole tiles, as is the result; M, N and L say how much of them is
    meant. What the padding holds does not matter: it is summed over by nobody.
    """
    Z = a.shape[0]
    # also where columns lie a multiple of a page apart: they would share a few cache lines
    long = L >= LONG or (L >= LONG // 4 and M % 1024 == 0)
    if transposed and Z == 1 and long and min(M, N) > COLUMNS:
        return _gemm_long(a, b, M, N, L)
    rows, columns = _round_up(M, 2 * ROWS), _round_up(N, COLUMNS)
    # threads share the matrices, or the rows if those divide better
    by_rows = _threads(rows // ROWS) > _threads(Z)
    threads = _threads(rows // ROWS if by_rows else Z)

    name = f"gemm{'_t' if transposed else ''}_{Z}_{M}_{N}_{L}"
    out = Tensor.empty(Z, rows, columns, device=a.device)
    shapes = (out.shape, a.shape, b.shape)
    addressable = max(map(math.prod, shapes)) < 1 << 31  # by int32
    if a.dtype == b.dtype == dtypes.float32 and addressable:
        program = _tiled_program(name, shapes, L, transposed, threads, by_rows, a.device)
        return out.custom_kernel(a, b, fxn=lambda *_: program)[0]

    def kernel(C: UOp, A: UOp, B: UOp) -> UOp:
        m, n = UOp.range(rows, 1), UOp.range(columns, 2)
        l = UOp.range(L, 3, AxisType.REDUCE)
        z = UOp.range(Z, 0) if Z > 1 else 0
        left = A[z, l, m] if transposed else A[z, m, l]
        right = B[z, l, n]
        product = left.cast(dtypes.float32) * right.cast(dtypes.float32)
        total = product.reduce(l, arg=Ops.ADD)
        outer = 1 if Z > 1 else 0
        # from the last axis to the first: one that is used up is gone, and later ones move forward
        opts = [Opt(OptOps.UPCAST, outer + 1, COLUMNS), Opt(OptOps.UPCAST, outer, ROWS)]
        if L % 4 == 0:
            opts.append(Opt(OptOps.UNROLL, 0, 4))
        if threads > 1:
            opts.append(Opt(OptOps.THREAD, outer if by_rows else 0, threads))
        info = KernelInfo(name=name, opts_to_apply=tuple(opts))
        ranges = (z, m, n) if Z > 1 else (m, n)
        return C[z, m, n].store(total).end(*ranges).sink(arg=info)

    return out.custom_kernel(a, b, fxn=kernel)[0]


@functools.cache
def _tiled_program(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    L: int,
    transposed: bool,
    threads: int,
    by_rows: bool,
    device: str,
) -> UOp:
    """The float32 kernel of `_gemm` as the loops and vectors that are to run; `shapes` of C, A, B.

    What tinygrad would make of the kernel in there, after 0.3 s of rewriting it for each size.
    """
    (Z, rows, columns), (_, A_rows, A_columns), (_, B_rows, B_columns) = shapes
    step = (1, A_columns) if transposed else (A_columns, 1)  # to A's next m, and to its next l
    unroll = 4 if L % 4 == 0 else 1
    vector = dtypes.float32.vec(COLUMNS)
    sizes = [math.prod(shape) for shape in shapes]
    C, A, B = (UOp(Ops.PARAM, dtypes.float32.ptr(n), arg=i) for i, n in enumerate(sizes))

    def at(buffer: UOp, place: UOp | int, dtype: DType = vector) -> UOp:
        place = place if isinstance(place, UOp) else UOp.const(dtypes.int, place)
        where = UOp(Ops.INDEX, buffer.dtype, (buffer, place))
        pointer = dtype.ptr(buffer.dtype.size, buffer.dtype.addrspace)
        return where if dtype == dtypes.float32 else where.cast(pointer)

    def load(buffer: UOp, place: UOp | int, dtype: DType = vector) -> UOp:
        return UOp(Ops.LOAD, dtype, (at(buffer, place, dtype),))

    def splat(x: UOp) -> UOp:
        return UOp(Ops.STACK, vector, (x,) * COLUMNS)

    loops: list[UOp] = []

    def loop(turns: int) -> UOp:
        """A loop inside those before it; one of one turn is none."""
        count = UOp.const(dtypes.int, turns)
        if turns == 1:
            return UOp.const(dtypes.int, 0)
        loops.append(UOp(Ops.RANGE, dtypes.int, (count, *loops), (len(loops), AxisType.LOOP)))
        return loops[-1]

    shares = [Z // (1 if by_rows else threads), rows // ROWS // (threads if by_rows else 1)]
    z, m, n = loop(shares[0]), loop(shares[1]), loop(columns // COLUMNS)
    if threads > 1:
        core = UOp.variable("core_id", 0, threads - 1, dtypes.int)
        z, m = (z, m + core * shares[1]) if by_rows else (z + core * shares[0], m)
    row, column = m * ROWS, n * COLUMNS

    sums = UOp(Ops.DEFINE_REG, dtypes.float32.ptr(ROWS * COLUMNS, AddrSpace.REG), arg=0)
    fresh = sums.after(*loops) if loops else sums
    zero = splat(UOp.const(dtypes.float32, 0.0))
    cleared = [at(fresh, i * COLUMNS).store(zero) for i in range(ROWS)]
    count = UOp.const(dtypes.int, L // unroll)
    l = UOp(Ops.RANGE, dtypes.int, (count, *cleared), (len(loops), AxisType.REDUCE))
    inside = sums.after(*cleared, l)
    totals = [load(inside, i * COLUMNS) for i in range(ROWS)]
    for u in range(unroll):
        k = l * unroll + u
        right = load(B, (z * B_rows + k) * B_columns + column)
        for i in range(ROWS):
            place = z * (A_rows * A_columns) + (row + i) * step[0] + k * step[1]
            totals[i] = totals[i] + splat(load(A, place, dtypes.float32)) * right
    kept = [at(inside, i * COLUMNS).store(total) for i, total in enumerate(totals)]
    done = sums.after(UOp.group(*kept).end(l))
    body = UOp.group(
        *[
            at(C, (z * rows + row + i) * columns + column).store(load(done, i * COLUMNS))
            for i in range(ROWS)
        ]
    )
    for x in reversed(loops):
        body = body.end(x)
    # tinygrad counts nothing here: it takes all that precedes an address for part of the address
    work = Estimates(2 * sizes[0] * L, mem=4 * sum(sizes))
    target = UOp(Ops.DEVICE, arg=device.split(":")[0])
    return UOp(Ops.PROGRAM, src=(body.sink(arg=KernelInfo(name=name, estimates=work)), target))


def _gemm_long(a: Tensor, b: Tensor, M: int, N: int, L: int) -> Tensor:
    """`_gemm` with `transposed`, for one pair of matrices and many terms.

    Both are copied into panels of 16 columns first. A tile reads two panels front to back; in the
    matrices themselves each of its steps would touch a new page (43 GFLOPS a core against 100).
    """
    rows, columns = _round_up(M, 2 * ROWS), _round_up(N, COLUMNS)
    by_rows = _threads(rows // COLUMNS) >= _threads(columns // COLUMNS)
    threads = _threads((rows if by_rows else columns) // COLUMNS)

    def kernel(C: UOp, A: UOp, B: UOp) -> UOp:
        (p, c, i, j), axis = _loops(rows // COLUMNS, columns // COLUMNS, COLUMNS, COLUMNS)
        l = UOp.range(L, 4, AxisType.REDUCE)
        left, right = A[p, l, i], B[c, l, j]
        total = (left.cast(dtypes.float32) * right.cast(dtypes.float32)).reduce(l, arg=Ops.ADD)
        opts = [Opt(OptOps.UPCAST, axis[3], COLUMNS), Opt(OptOps.UPCAST, axis[2], ROWS)]
        if L % 4 == 0:
            opts.append(Opt(OptOps.UNROLL, 0, 4))
        if threads > 1:
            opts.append(Opt(OptOps.THREAD, axis[0] if by_rows else axis[1], threads))
        info = KernelInfo(name=f"gemm_long_{M}_{N}_{L}", opts_to_apply=tuple(opts))
        store = C[p * COLUMNS + i, c * COLUMNS + j].store(total)
        return _end(store, p, c, i, j).sink(arg=info)

    out = Tensor.empty(rows, columns, device=a.device)
    return out.custom_kernel(_panels(a[0]), _panels(b[0]), fxn=kernel)[0].reshape(1, rows, columns)


def _transposed(x: Tensor) -> Tensor:
    """[Z, M, N] -> [Z, N, M], both multiples of COLUMNS, in squares."""
    Z, M, N = x.shape

    def kernel(out: UOp, x: UOp) -> UOp:
        (z, m, n), axis = _loops(Z, M, N)
        opts = [Opt(OptOps.UPCAST, axis[2], 4), Opt(OptOps.UPCAST, axis[1], COLUMNS)]
        info = KernelInfo(name=f"transposed_{Z}_{M}_{N}", opts_to_apply=tuple(opts))
        return _end(out[z, n, m].store(x[z, m, n]), z, m, n).sink(arg=info)

    return Tensor.empty(Z, N, M, device=x.device, dtype=x.dtype).custom_kernel(x, fxn=kernel)[0]


def _panels(x: Tensor) -> Tensor:
    """[L, n * COLUMNS] -> [n, L, COLUMNS]."""
    return x.reshape(x.shape[0], -1, COLUMNS).transpose(0, 1).contiguous()


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


def band_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """`attention.banded_attention` on a CPU; `slopes` [H] of ALiBi.

    Scores are kept as powers of two, weights without their sum: v has a column of ones, so that the
    product that weighs it sums them as well. With r = 1 / sum and D = g . out for a query whose
    output has the gradient g, its scores have weights * (r * g . v - r * D) (the softmax's gradient
    with both factors moved into the rows).
    """
    C, P, rounded = band.head_dim, band.width, _factors()
    B, K, G, Q, blocks = band.batch, band.kv_heads, band.group, band.queries, band.blocks
    behind = blocks * Q - band.length

    def keys(x: Tensor, filled: bool) -> Tensor:
        x = x.pad((None, None, (band.reach, behind), (0, P - C)))
        if filled:
            x = x + (Tensor.arange(P, device=x.device) == C)
        return x.reshape(-1, P).cast(rounded).contiguous()

    q = (q / (math.sqrt(C) * math.log(2))).pad((None, None, (0, behind), (0, P - C)))
    q = q.reshape(B, K, G, blocks, Q, P).permute(0, 1, 3, 2, 4, 5).reshape(-1, P)
    q, k, v = q.cast(rounded).contiguous(), keys(k, False), keys(v, True)
    slopes = (slopes.reshape(1, -1).expand(B, -1) / math.log(2)).reshape(-1).contiguous()
    weights = _exps(_band_scores(q, _turned(k, band, C), slopes, band), rounded)
    sums = _band_product(weights, v, band, "weigh")
    out = _band_function(band)(q, k, v, weights, sums)
    out = out.reshape(B, K, blocks, G, Q, C).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(B, band.heads, blocks * Q, C)[:, :, : band.length]


@functools.cache
def _band_function(band: Band):
    """q, k, v, weights, sums (as matrices) -> the output's rows, with the gradient by hand."""
    C, P = band.head_dim, band.width

    def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
        q, k, v, weights, sums = (Tensor(uop) for uop in call.src[1:])
        g = Tensor(upstream).contiguous()
        share = sums[:, C : C + 1].reciprocal()
        dots = ((g * sums[:, :C]).sum(axis=1, keepdim=True) * share * share).contiguous()
        g = (g * share).pad((None, (0, P - C))).cast(q.dtype).contiguous()
        d_scores = _band_score_gradient(g, _turned(v, band, C), weights, dots, band)
        dq = _band_product(d_scores, k, band, "dq", math.log(2))
        dk = _band_key_gradient(d_scores, q, band, "dk", math.log(2))
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


def _turned(x: Tensor, band: Band, columns: int) -> Tensor:
    """Rows [matrices * positions, width] -> [matrices * columns, positions]."""
    x = x.reshape(band.matrices, band.positions, band.width)[:, :, :columns]
    return x.transpose(1, 2).reshape(-1, band.positions).contiguous()


def _band_scores(q: Tensor, k: Tensor, slopes: Tensor, band: Band) -> Tensor:
    """q's rows, k turned -> scores in the unit of powers of two, ALiBi in it, unseen -inf."""
    Z, b, G, Q, s = band.matrices, band.blocks, band.group, band.queries, band.keys

    def body(S: tuple[UOp, ...], z, b_, g, i, n) -> UOp:
        l = UOp.range(band.head_dim, 5, AxisType.REDUCE)
        row = ((z * b + b_) * G + g) * Q + i
        total = _times(S[0][row, l], S[1][z * band.head_dim + l, b_ * Q + n])
        bias = S[2][z * G + g] * S[3][i, n] + S[4][b_ * Q + n]
        return total.reduce(l, arg=Ops.ADD) - bias

    def target(z, b_, g, i, n):
        return ((z * b + b_) * G + g) * Q + i, n

    arange = functools.partial(Tensor.arange, device=q.device)
    distance = arange(Q).reshape(Q, 1) + band.reach - arange(s)
    seen = (distance >= 0) & (distance <= band.window)
    distance = seen.where(distance.cast(dtypes.float32), math.inf).contiguous()
    before = (arange(band.positions) < band.reach).where(math.inf, 0.0).contiguous()
    out = Tensor.empty(Z * b * band.rows, s, device=q.device)
    return _tiled(
        out,
        [q, k, slopes, distance, before],
        "scores",
        (Z, b, G, Q, s),
        body,
        target,
        band.head_dim,
    )


def _band_product(a: Tensor, x: Tensor, band: Band, name: str, factor: float = 1.0) -> Tensor:
    """a (rows of scores) times the keys' rows x -> rows."""
    Z, b, M, P = band.matrices, band.blocks, band.rows, band.width

    def body(S: tuple[UOp, ...], z, b_, m, c) -> UOp:
        l = UOp.range(band.keys, 5, AxisType.REDUCE)
        right = S[1][z * band.positions + b_ * band.queries + l, c]
        total = _times(S[0][(z * b + b_) * M + m, l], right).reduce(l, arg=Ops.ADD)
        return total if factor == 1 else total * factor

    def target(z, b_, m, c):
        return (z * b + b_) * M + m, c

    out = Tensor.empty(Z * b * M, P, device=a.device)
    return _tiled(out, [a, x], name, (Z, b, M, P), body, target, band.keys)


def _band_score_gradient(g: Tensor, v: Tensor, weights: Tensor, dots: Tensor, band: Band) -> Tensor:
    """weights * (g's rows times v turned - dots [rows, 1]), in the dtype of the weights."""
    Z, b, M, s, terms = band.matrices, band.blocks, band.rows, band.keys, band.head_dim

    def body(S: tuple[UOp, ...], z, b_, m, n) -> UOp:
        l = UOp.range(terms, 5, AxisType.REDUCE)
        row = (z * b + b_) * M + m
        total = _times(S[0][row, l], S[1][z * terms + l, b_ * band.queries + n])
        total = total.reduce(l, arg=Ops.ADD) - S[3][row, 0]
        return total * S[2][row, n].cast(dtypes.float32)

    def target(z, b_, m, n):
        return (z * b + b_) * M + m, n

    out = Tensor.empty(Z * b * M, s, device=g.device, dtype=weights.dtype)
    return _tiled(out, [g, v, weights, dots], "ds", (Z, b, M, s), body, target, terms)


def _band_key_gradient(a: Tensor, x: Tensor, band: Band, name: str, factor: float = 1.0) -> Tensor:
    """For each key, the sum of a (its column of the scores) times rows x, over all its queries."""
    Z, b, M, Q, P = band.matrices, band.blocks, band.rows, band.queries, band.width
    later = band.reach // Q  # blocks after a key's own that see it

    def body(S: tuple[UOp, ...], z, b_, n, c) -> UOp:
        t = UOp.range(later + 1, 4, AxisType.REDUCE) if later else UOp.const(dtypes.weakint, 0)
        m = UOp.range(M, 5, AxisType.REDUCE)
        inside = b_ + t < b
        row = (z * b + inside.where(b_ + t, b - 1)) * M + m if later else (z * b + b_) * M + m
        total = _times(S[0][row, (later - t) * Q + n], S[1][row, c]).reduce(m, arg=Ops.ADD)
        if later:
            total = inside.where(total, total.const_like(0)).reduce(t, arg=Ops.ADD)
        return total if factor == 1 else total * factor

    def target(z, b_, n, c):
        return (z * b + b_) * Q + n, c

    out = Tensor.empty(Z * b * Q, P, device=a.device)
    unroll = 1 if later else 0
    return _tiled(out, [a, x], name, (Z, b, Q, P), body, target, M, unroll)


def _times(left: UOp, right: UOp) -> UOp:
    return left.cast(dtypes.float32) * right.cast(dtypes.float32)


def _tiled(
    out: Tensor,
    inputs: list[Tensor],
    name: str,
    sizes: tuple[int, ...],
    body: Callable[..., UOp],
    target: Callable[..., tuple],
    terms: int,
    unroll: int = 0,
) -> Tensor:
    """out[target(loops)] = body(inputs, loops), in register tiles over the last two loops.

    The innermost sum in `body` has `terms`; `unroll` is its number among the sums.
    """

    def kernel(C: UOp, *S: UOp) -> UOp:
        loops, axis = _loops(*sizes)
        value = body(S, *loops).cast(out.dtype)
        opts = [Opt(OptOps.UPCAST, axis[-1], COLUMNS), Opt(OptOps.UPCAST, axis[-2], ROWS)]
        if terms % 4 == 0:
            opts.append(Opt(OptOps.UNROLL, unroll, 4))
        shares = [_threads(n) for n in (*sizes[:-2], sizes[-2] // ROWS)]
        most = shares.index(max(shares))
        if shares[most] > 1:
            opts.append(Opt(OptOps.THREAD, axis[most], shares[most]))
        title = "_".join(map(str, (name, *sizes, terms)))
        info = KernelInfo(name=title, opts_to_apply=tuple(opts))
        return _end(C[target(*loops)].store(value), *loops).sink(arg=info)

    return out.custom_kernel(*inputs, fxn=kernel)[0]


def _exps(scores: Tensor, dtype: DType) -> Tensor:
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
        value = _exp2(scores[row, n] - top).cast(dtype)
        opts = [Opt(OptOps.UPCAST, 1, COLUMNS), Opt(OptOps.UNROLL, s > COLUMNS, COLUMNS)]
        threads = _threads(rows)
        if threads > 1:
            opts.append(Opt(OptOps.THREAD, 0, threads))
        info = KernelInfo(name=f"exps_{rows}_{s}", opts_to_apply=tuple(opts))
        return out[row, n].store(value).end(row, n).sink(arg=info)

    out = Tensor.empty(rows, s, device=scores.device, dtype=dtype)
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
        tile = math.gcd(rows, ROWS)

        def kernel(out: UOp, x: UOp, weight: UOp, *more: UOp) -> UOp:
            (r, p, c), axis = _loops(rows, self.width // panel, panel)
            l = UOp.range(self.inputs, 3, AxisType.REDUCE)
            total = (x[r, l] * weight[p, l, c]).reduce(l, arg=Ops.ADD)
            if scale is not None:
                total = total * more[0][r, 0]
            if residual is not None:
                total = total + more[-1][r, p * panel + c]
            opts = [Opt(OptOps.UPCAST, axis[2], 16), Opt(OptOps.UPCAST, axis[2], panel // 16)]
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
        G, scale, tile = H // K, 1 / math.sqrt(C), math.gcd(R, ROWS)

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
        tile = math.gcd(R, 4)

        def kernel(out: UOp, weights: UOp, values: UOp) -> UOp:
            (k, g, r, c), axis = _loops(K, G, R, P)
            s = UOp.range(S, 4, AxisType.REDUCE)
            weight = weights[(k * G + g) * R + r, s]
            total = (weight * values[k, s, c]).reduce(s, arg=Ops.ADD)
            opts = [Opt(OptOps.UPCAST, axis[3], 16)]
            if 16 < P <= 64:
                opts.append(Opt(OptOps.UPCAST, axis[3], P // 16))
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
        buffer.copyin(memoryview(np.ascontiguousarray(values)).cast("B"))


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
