"""Blocks as functions: scheduled once, called per layer, with optional activation checkpointing.

tinygrad would schedule each block of an n-block graph separately, which takes many times as long.
Here a block and its gradient are traced once, as two functions, and called with each block's
weights. Between the two calls, all activations that the gradient reads stay in memory; with
activation checkpointing, only the block's input does.
"""

import itertools
from collections.abc import Callable

from tinygrad import Tensor, UOp
from tinygrad.function import pm_transform_unique_const
from tinygrad.schedule.rangeify import resolve_function
from tinygrad.uop.ops import Ops, PatternMatcher, UPat, graph_rewrite

from .precision import RECOMPUTE

# slots of PARAMs while a block is traced: numbers that no function inside the block uses
UPSTREAM_SLOT, INPUT_SLOT, SAVED_SLOT, CONSTANT_SLOT = 999_999, 1_000_000, 2_000_000, 3_000_000


def run_blocks(block: Callable[[Tensor], Tensor], weights: list[list[Tensor]], x: Tensor) -> Tensor:
    """x [B, N, D] through len(weights) blocks in sequence -> [B, N, D].

    `block` is the first block, with weights[0]; every other block is the same function of other
    weights. Gradients reach `x` and `weights`, and no other tensor that `block` reads. With
    RECOMPUTE the backward recomputes each block's activations; otherwise the forward saves them.
    """
    function = BlockFunction(block, weights[0], x)
    for block_weights in weights:
        x = function(x, block_weights)
    return x


class BlockFunction:
    """A block and its gradient, traced into two graphs of PARAMs.

    forward:  x, weights, constants, scratch -> out, saved
    backward: upstream, out, x, weights, constants, saved, kernels' buffers, scratch -> gradients

    `constants` depend on no input, such as RoPE's sines: all calls share them. `saved` are the
    activations that both graphs need. Hand-scheduled kernels write into buffers
    (scratch), which each call allocates and passes in; a kernel that computes a whole gradient
    writes into that result. The backward receives the forward's scratch buffers that the gradient
    reads ("kernels' buffers").
    """

    def __init__(self, block: Callable[[Tensor], Tensor], weights: list[Tensor], x: Tensor) -> None:
        # replace inputs by PARAMs with unused slots, so that traversal stops there
        inputs = [x.uop, *[w.uop for w in weights]]
        params = {uop: uop.param_like(INPUT_SLOT + i) for i, uop in enumerate(inputs)}
        assert len(params) == 1 + len(weights), "two inputs of a block are the same tensor"
        out = block(x)
        upstream = out.uop.param_like(UPSTREAM_SLOT)  # sharded over the devices as `out` is
        gradients = out.gradient(x, *weights, gradient=Tensor(upstream))
        graph = UOp.maketuple(out.uop, *[g.uop for g in gradients]).substitute(params)
        graph = graph_rewrite(graph, _inline_functions)
        # tinygrad 0.13 numbers constants uniquely: number them from 0 in each trace, so that equal
        # graphs are scheduled once (test_block_function.test_equal_blocks_have_equal_graphs)
        graph = graph_rewrite(graph, pm_transform_unique_const, ctx=(None, itertools.count(0)))
        self.constants = _constants(graph)
        constants = {u: u.param_like(CONSTANT_SLOT + i) for i, u in enumerate(self.constants)}
        out, *gradients = graph.substitute(constants).src
        x, *read = *params.values(), *constants.values()  # read: the weights, then the constants

        shared = [] if RECOMPUTE else _shared(out, gradients)
        saved = [uop for uop in shared if uop.op is Ops.CONTIGUOUS]
        forward = UOp.maketuple(out, *saved)
        self.scratch = _written_buffers(forward)
        self.forward = _as_function(forward, [x, *read, *self.scratch])

        # hand-scheduled kernels' results are not returned: the gradient reads the scratch buffers
        in_buffers = {uop: uop.src[0] for uop in shared if uop.op is Ops.AFTER}
        self.kept = [buffer.base for buffer in in_buffers.values()]
        params = {uop: uop.param_like(SAVED_SLOT + i) for i, uop in enumerate(saved)}
        backward = UOp.maketuple(*gradients).substitute(params | in_buffers)
        backward, outputs = _with_outputs(backward)
        written = _written_buffers(backward)
        self.scratch_back = [uop for uop in written if uop not in self.kept + outputs]
        order = [upstream, out, x, *read, *params.values(), *self.kept, *self.scratch_back]
        self.backward = _as_function(backward, order)

    def __call__(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The block with these weights: x [B, N, D] -> [B, N, D]."""
        scratch = {b: UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.scratch}

        def gradient(upstream: UOp, call: UOp) -> tuple[UOp | None, ...]:
            # `contiguous` copies nothing here: without it, tinygrad 0.13's memory planner loses
            # track of the buffer of a function's result and reuses that buffer too early
            out, *saved = (call.gettuple(i).contiguous() for i in range(len(call.src[0].src)))
            x, *read = call.src[1 : 2 + len(weights) + len(self.constants)]
            kept = [scratch[b] for b in self.kept]
            new = [UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.scratch_back]
            # `out` is an argument so that the backward waits until the kernels' buffers are written
            found = self.backward.call(
                *(upstream, out, x, *read, *saved, *kept, *new),
                name="block_backward",
                precompile=True,
            )
            gradients = [
                found.gettuple(i).contiguous().reshape(inputs[i].shape)
                for i in range(1 + len(weights))
            ]
            return *gradients, *[None for _ in (*self.constants, *scratch)]

        inputs = x.uop, *[w.uop for w in weights], *self.constants, *scratch.values()
        call = self.forward.call(*inputs, grad_fxn=gradient, name="block", precompile=True)
        return Tensor(call.gettuple(0)).contiguous()


def _constants(graph: UOp) -> list[UOp]:
    """The largest parts of the graph that it puts in memory and that depend on no input."""
    depends = _depends(graph, Ops.PARAM, Ops.BUFFER)
    return _highest(graph, lambda uop: uop.op is Ops.CONTIGUOUS and not depends[uop])


def _depends(graph: UOp, *inputs: Ops) -> dict[UOp, bool]:
    """For each operation of the graph, whether it is one of `inputs` or depends on one."""
    found: dict[UOp, bool] = {}
    for uop in graph.toposort(enter_calls=False):
        found[uop] = uop.op in inputs or any(found.get(s) for s in uop.src)
    return found


def _highest(graph: UOp, wanted: Callable[[UOp], bool]) -> list[UOp]:
    """The wanted operations below the graph's root, without those that only others lead to."""
    above = graph.toposort(lambda uop: not wanted(uop), enter_calls=False)
    return list(dict.fromkeys(s for uop in above for s in uop.src if wanted(s)))


def _written_buffers(graph: UOp) -> list[UOp]:
    """The buffers that the hand-scheduled kernels of a graph write."""
    written = [uop.src[0].base for uop in graph.toposort(enter_calls=False) if uop.op is Ops.AFTER]
    return list(dict.fromkeys(buffer for buffer in written if buffer.op is Ops.BUFFER))


def _with_outputs(graph: UOp) -> tuple[UOp, list[UOp]]:
    """The results of a graph, and those buffers of hand-scheduled kernels that are whole results.

    Such a result loses its shape: only then does tinygrad let the kernel write into the function's
    output, in place of a copy. A buffer that is two results is copied twice; else tinygrad 0.13
    would make the second copy before the kernel has run
    (test_block_function.test_a_kernel_computes_two_gradients).
    """
    flat = [_flat_buffer(uop) for uop in graph.src]
    outputs = {uop for uop in flat if uop is not None and flat.count(uop) == 1}
    pairs = zip(flat, graph.src, strict=True)
    results = (new if new in outputs else old for new, old in pairs)
    return UOp.maketuple(*results), [uop.src[0] for uop in outputs]


def _flat_buffer(uop: UOp) -> UOp | None:
    """The buffer that a hand-scheduled kernel writes, after the kernel, if `uop` is all of it."""
    n = uop.numel()
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    if uop.op is not Ops.AFTER:
        return None
    buffer = uop.src[0].base
    return buffer.after(*uop.src[1:]) if buffer.op is Ops.BUFFER and buffer.numel() == n else None


def _as_function(graph: UOp, inputs: list[UOp]) -> UOp:
    """The graph as a function's body: input i becomes PARAM i."""
    return graph.substitute({uop: uop.param_like(i) for i, uop in enumerate(inputs)})


# inline nested functions; drop each `contiguous` of a value that is in memory already: inside a
# function tinygrad would execute that `contiguous` as a copy
_inline_functions = PatternMatcher(
    [
        (UPat(Ops.FUNCTION, name="c"), resolve_function),
        (UPat(Ops.GETTUPLE, src=(UPat(Ops.TUPLE, name="t"),), name="g"), lambda g, t: t.src[g.arg]),
        (UPat((Ops.DETACH, Ops.CONTIGUOUS_BACKWARD), name="x"), lambda x: x.src[0]),
        (UPat(Ops.CONTIGUOUS, src=(UPat(name="x"),)), lambda x: x if _in_memory(x) else None),
    ]
)


def _in_memory(uop: UOp) -> bool:
    while uop.op in (Ops.AFTER, Ops.RESHAPE):
        uop = uop.src[0]
    return uop.op is Ops.CONTIGUOUS or uop.has_buffer_identity()


def _shared(out: UOp, gradients: list[UOp]) -> list[UOp]:
    """The activations that the graph of `out` puts in memory and that the gradients read.

    Activations that depend on no input, such as masks, are left out: recomputing them is cheap.
    """
    depends, in_memory = _depends(out, Ops.PARAM), (Ops.CONTIGUOUS, Ops.AFTER)
    graph = UOp.maketuple(*gradients)
    return _highest(graph, lambda uop: uop.op in in_memory and depends.get(uop, False))
