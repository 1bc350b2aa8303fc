"""Blocks as functions: what their graphs share."""

import numpy as np
from tinygrad import Tensor, dtypes

from pico_tg.attention import rotate
from pico_tg.backend.block_function import BlockFunction


def test_equal_blocks_have_equal_graphs():
    """tinygrad 0.13 numbers constants uniquely: it would schedule the second graph again."""
    x, weight = (Tensor(np.ones(shape, np.float32)).realize() for shape in ((1, 4, 8), (8, 8)))
    first, second = (
        BlockFunction(lambda x: (x @ weight) * Tensor.full((8,), 0.5), [weight], x)
        for _ in range(2)
    )
    assert first.forward.key == second.forward.key
    assert first.backward.key == second.backward.key


def test_blocks_share_what_depends_on_no_input():
    """RoPE's sines and cosines: each call of a block reads them."""
    x = Tensor(np.ones((1, 4, 8), np.float32)).realize()
    function = BlockFunction(lambda x: rotate(x, Tensor.arange(4)) + x, [], x)
    assert len(function.constants) == 1  # both in one
    # only they are computed from unsigned integers
    assert any(uop.dtype == dtypes.uint32 for uop in function.constants[0].toposort())
    assert not any(uop.dtype == dtypes.uint32 for uop in function.forward.toposort())
