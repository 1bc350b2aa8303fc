"""No copies of what a custom kernel has written.

tinygrad 0.13 makes a copy of a reshaped tensor that two kernels read in different orders, and of a
value that is stored over one of its own operands. Later it removes each copy that could be computed
again from at most 3 buffers. For a value that depends on a custom kernel's output, it counts all
buffers that this kernel and those before it read, so the copy stays: 65 of 976 kernels of the
published model's forward and backward pass, and SOAP's moving averages
(test_operations.test_operations_are_close_to_the_model_flops,
test_soap.test_moving_averages_are_updated_in_place).

Do not assign to a custom kernel's output in the schedule that computes it: tinygrad does not order
the store after the reads of that output, which may then find the new value.
"""

from tinygrad.dtype import Invalid
from tinygrad.schedule import rangeify
from tinygrad.schedule.indexing import apply_movement_op
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat


def without_copy(value: UOp, copy: UOp, read: UOp) -> UOp | None:
    """tinygrad's `remove_bufferize`, which counts a custom kernel's output as one buffer."""
    if not copy.arg.removable or value.op in rangeify.ALWAYS_RUN_OPS:
        return None
    buffers = {Ops.AFTER, Ops.PARAM, Ops.STAGE, Ops.MSTACK}
    graph = value.toposort(gate=lambda uop: uop.op not in buffers)
    if any(u.op is Ops.REDUCE for u in graph) or sum(u.op in buffers for u in graph) > 3:
        return None
    indices = zip(copy.src[1:], read.src[1:], strict=True)
    found = {i: j for i, j in indices if i.op is not Ops.CONST and j.arg is not Invalid}
    return value.substitute(found, extra_pm=rangeify.pm_gate_substitute)


def pass_on(written: UOp, copy: UOp, reshaped: UOp) -> UOp | None:
    """For the argument of another custom kernel, a copy in the same order: the buffer."""
    buffer, index = written.src
    if not copy.arg.removable or buffer.shape != (copy.numel(),):
        return None
    in_order = apply_movement_op(Ops.RESHAPE, buffer.shape, copy.shape, copy.src[1:])
    return buffer.reshape(reshaped.shape) if in_order == (index,) else None


def copy_of(value: UPat) -> UPat:
    return value.f(Ops.STAGE, allow_any_len=True, name="copy")


KERNEL_OUTPUT = UPat(Ops.AFTER, src=(UPat(), UPat(Ops.CALL)))
WRITTEN = UPat(Ops.INDEX, src=(KERNEL_OUTPUT, UPat()), name="written")
READ = copy_of(UPat.var("value")).f(Ops.INDEX, allow_any_len=True, name="read")
RESHAPED = copy_of(WRITTEN).f(Ops.RESHAPE, allow_any_len=True, name="reshaped")

rangeify.pm_remove_bufferize = rangeify.pm_remove_bufferize + PatternMatcher(
    [(READ, without_copy), (RESHAPED, pass_on)]
)
