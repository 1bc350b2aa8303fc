"""The gradient of an embedding lookup on a CPU: one pass over the gradient's rows."""

from tinygrad import Tensor, UOp, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.uop.ops import KernelInfo


def lookup_gradient(g: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sum each row of g [N, D] into row index[n] of the result [rows, D]; index int32 [N]."""
    N, D = g.shape
    width = next(n for n in (12, 16, 8, 4, 2, 1) if D % n == 0)  # of the vectors added at a time

    def kernel(out: UOp, g: UOp, index: UOp) -> UOp:
        n, d = UOp.range(N, 0), UOp.range(D, 1)
        row = index[n].cast(dtypes.weakint)
        opts = (Opt(OptOps.UPCAST, 1, width),) if width > 1 else ()
        info = KernelInfo(name=f"lookup_gradient_{rows}_{D}_{N}", opts_to_apply=opts)
        return out[row, d].store(out[row, d] + g[n, d]).end(n, d).sink(arg=info)

    zeros = Tensor.zeros(rows, D, device=g.device).contiguous()
    return zeros.custom_kernel(g, index, fxn=kernel)[0]
