"""Blocks as functions: scheduled once for all, and recomputed for the gradient if so wanted."""

import itertools
from collections.abc import Callable

from tinygrad import Tensor
from tinygrad.function import pm_transform_unique_const
from tinygrad.helpers import JIT, Context, ContextVar
from tinygrad.schedule.rangeify import resolve_function
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat, graph_rewrite

from .config import TrainSettings
from .precision import choose_precision

RECOMPUTE = ContextVar("PICO_RECOMPUTE", 0)  # likewise: what is inside a block is not kept


def run_blocks(block: Callable[[Tensor], Tensor], weights: list[list[Tensor]], x: Tensor) -> Tensor:
    """x through blocks one after the other, each scheduled as a function, its gradient as another.

    The first one is `block`; the others do the same with their own `weights`, which are all that
    get a gradient through a block beside `x`. tinygrad then cuts one block into kernels where it
    would take one graph of all of them, and many times as long. With RECOMPUTE, nothing of what is
    inside a block is kept for its gradient, which computes it again; otherwise all that the
    gradient needs is.
    """
    traced = BlockFunction(block, weights[0], x)
    for own in weights:
        x = traced(x, own)
    return x


class BlockFunction:
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


def graph_context(settings: TrainSettings, devices: tuple[str, ...]) -> Context:
    """How graphs are made and replayed: the precision of products, what is kept for the gradient,
    and whether as one graph.

    Not on several devices, since 0.13 does not order them there: measured on two CPU devices,
    replayed graphs read weights from before the update.
    """
    options = {
        "PICO_BF16": int(choose_precision(settings.precision, devices) == "bf16"),
        "PICO_RECOMPUTE": int(settings.checkpoint_activations),
    }
    if len(devices) > 1 and JIT.value:
        options["JIT"] = 2
    return Context(**options)
