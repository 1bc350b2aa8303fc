"""Matrix products, and everything that is not public tinygrad.

`linear`, `matmul` and `matmul_transposed` store their result and read stored operands: left to
itself, lazy fusion recomputes norms, SiLU and softmax inside every product of the backward pass.
"""

import numpy as np
from tinygrad import Tensor


def stored(x: Tensor) -> Tensor:
    """`x` computed once, and its gradient as well, instead of again inside each consumer."""
    return x.contiguous().contiguous_backward()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] with weight [O, I] -> x @ weight.T [..., O]."""
    return stored(stored(x) @ weight.T)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., L, N] -> [..., M, N]."""
    return stored(stored(a) @ stored(b))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, L] @ b [..., N, L].T -> [..., M, N]."""
    return stored(stored(a) @ stored(b).transpose(-1, -2))


def write_into(x: Tensor, values: np.ndarray) -> None:
    """Overwrite the realised tensor `x` in place; cheaper than a new Tensor, and jits keep it."""
    assert values.dtype.itemsize * values.size == x.nbytes(), "size of the buffer"
    x.uop.buffer.copyin(memoryview(np.ascontiguousarray(values)).cast("B"))
