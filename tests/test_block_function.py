"""Blocks as functions: what their graphs share."""

import numpy as np
import pytest
from tinygrad import Device, Tensor, dtypes, function

from pico_tg.attention import rotate
from pico_tg.backend.block_function import BlockFunction, run_blocks
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.matmul import bmm


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


@pytest.mark.skipif(not has_cpu_kernels(Device.DEFAULT), reason="needs hand-scheduled CPU kernels")
def test_a_kernel_computes_two_gradients(nan_memory):
    """The second gradient, too, is what the kernel writes, not the memory before it."""

    def gradient(upstream, call):
        x, v, w = (Tensor(uop) for uop in call.src[1:])
        g = Tensor(upstream).contiguous()
        for_both = bmm(g, x, trans_a=True).reshape(32, 32)
        return bmm(g, (v + w).reshape(1, 32, 32)).uop, for_both.uop, for_both.uop

    @function(grad_fxn=gradient)
    def block(x, v, w):
        return x @ (v + w).T

    rng = np.random.default_rng(0)
    x, v, w = (rng.standard_normal(s).astype(np.float32) for s in [(1, 32, 32), *[(32, 32)] * 2])
    inputs = [Tensor(a).clone().realize() for a in (x, v, w)]
    out = run_blocks(lambda x: block(x, *inputs[1:]), [inputs[1:]], inputs[0])
    gradients = out.sum().gradient(*inputs)
    Tensor.realize(out, *gradients)
    expected = np.ones((32, 32)) @ (v + w), np.ones((32, 32)) @ x[0], np.ones((32, 32)) @ x[0]
    for found, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.numpy().reshape(32, 32), reference, rtol=0, atol=1e-4)
