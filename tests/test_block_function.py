"""Blocks as functions: what their graphs share."""

import numpy as np
from tinygrad import Tensor

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
