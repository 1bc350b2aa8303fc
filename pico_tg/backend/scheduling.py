"""No copies of what a custom kernel has written.

Where two kernels read a reshaped tensor in different orders, tinygrad 0.13 gives both a copy of it,
and later removes each copy that could be computed again from at most 3 buffers. If a custom kernel
has written the tensor, it counts the buffers that this kernel and all before it read, so the copy
stays: 63 of 976 kernels of the published model's forward and backward pass
(test_operations.test_operations_are_close_to_the_model_flops).
"""

from tinygrad.dtype import Invalid
from tinygrad.schedule import rangeify
from tinygrad.schedule.indexing import apply_movement_op
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat


def read_directly(written: UOp, copy: UOp, read: UOp) -> UOp | None:
    """For an element of a copy, that element of the buffer: `written`, at the copy's indices."""
    if not copy.arg.removable:
        return None
    indices = zip(copy.src[1:], read.src[1:], strict=True)
    found = {i: j for i, j in indices if i.op is not Ops.CONST and j.arg is not Invalid}
    return written.substitute(found, extra_pm=rangeify.pm_gate_substitute)


def pass_on(written: UOp, copy: UOp, reshaped: UOp) -> UOp | None:
    """For the argument of another custom kernel, a copy in the same order: the buffer."""
    buffer, index = written.src
    if not copy.arg.removable or buffer.shape != (copy.numel(),):
        return None
    in_order = apply_movement_op(Ops.RESHAPE, buffer.shape, copy.shape, copy.src[1:])
    return buffer.reshape(reshaped.shape) if in_order == (index,) else None


# an element of a custom kernel's output, and a copy of all these elements
WRITTEN = UPat(Ops.INDEX, src=(UPat(Ops.AFTER), UPat()), name="written")
COPY = WRITTEN.f(Ops.STAGE, allow_any_len=True, name="copy")

rangeify.pm_remove_bufferize = rangeify.pm_remove_bufferize + PatternMatcher(
    [
        (COPY.f(Ops.INDEX, allow_any_len=True, name="read"), read_directly),
        (COPY.f(Ops.RESHAPE, allow_any_len=True, name="reshaped"), pass_on),
    ]
)
