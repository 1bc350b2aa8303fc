"""Banded attention against dense attention in NumPy, values, gradients and operations."""

import math

import numpy as np
import pytest
from oracle import softmax
from tinygrad import GlobalCounters, Tensor, TinyJit
from tinygrad.helpers import Context

from pico_tg.attention import alibi_slopes, banded_attention, block_sizes, tiles
from pico_tg.cpu import loops
from pico_tg.cpu.band_attention import band_attention
from pico_tg.ops import matmul

# (B, query heads, key/value heads, N, head_dim, window)
SHAPES = [
    (1, 1, 1, 1, 3, 1),
    (2, 4, 2, 33, 5, 8),  # the length does not divide the window
    (1, 6, 3, 70, 4, 16),
    (1, 3, 1, 21, 7, 1),
    (2, 2, 2, 19, 4, 18),  # the window just reaches the first byte
    (2, 2, 2, 20, 4, 18),  # and just does not
    (1, 2, 1, 9, 4, 100),  # longer than the sequence
    (1, 9, 3, 300, 41, 70),
]


def dense(q, k, v, window, upstream):
    """Output and the gradients of q, k, v, from the full N x N matrix in float64."""
    q, k, v, upstream = (x.astype(np.float64) for x in (q, k, v, upstream))
    B, H, N, C = q.shape
    K = k.shape[1]
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    distance = np.arange(N)[:, None] - np.arange(N)[None]
    slopes = 2.0 ** (-8 * (np.arange(H) + 1) / H)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(C) - slopes[:, None, None] * distance
    p = softmax(np.where((distance >= 0) & (distance <= window), scores, -np.inf))
    dp = upstream @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(C)
    dk, dv = (
        x.reshape(B, K, H // K, N, C).sum(2)
        for x in (ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ upstream)
    )
    return p @ v, ds @ k, dk, dv


@pytest.mark.parametrize(
    ("shape", "by_hand"),
    [*((shape, True) for shape in SHAPES), *((shape, False) for shape in SHAPES[1::3])],
    ids=str,
)
def test_against_dense(shape, by_hand, monkeypatch):
    monkeypatch.setenv("PICO_KERNELS", str(int(by_hand)))
    B, H, K, N, C, window = shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, heads, N, C)).astype(np.float32) for heads in (H, K, K, H)]

    q, k, v, upstream = (Tensor(a).clone().realize() for a in arrays)
    out = banded_attention(q, k, v, window)
    found = [out, *(out * upstream).sum().gradient(q, k, v)]
    Tensor.realize(*found)
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"), found, dense(*arrays[:3], window, arrays[3]), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("tall", [6, 8])
@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[5], (1, 6, 3, 70, 9, 16), (1, 2, 1, 300, 5, 130)]
)
def test_other_processors(shape, tall, cores, monkeypatch):
    """Tiles of AVX2 and of AVX-512, other numbers of threads, addresses of 64 bits."""
    monkeypatch.setattr(matmul, "tile_m", lambda: tall)
    monkeypatch.setattr(loops, "INT", 1 << 8)
    monkeypatch.setattr(
        band_attention, "even_threads", lambda _: 1
    )  # tinygrad takes no more than there are
    with Context(CPU_COUNT=cores):
        test_against_dense(shape, True, monkeypatch)


def test_jit_gives_the_same(monkeypatch):
    """Values and gradients, also with another number of threads."""

    def step(q, k, v):
        out = banded_attention(q, k, v, 8)
        found = [out, *out.square().sum().gradient(q, k, v)]
        Tensor.realize(*found)
        return found

    rng = np.random.default_rng(1)
    jitted = TinyJit(step)
    for _ in range(4):
        arrays = [rng.standard_normal((1, h, 50, 6)).astype(np.float32) for h in (4, 2, 2)]
        tensors = [Tensor(a).clone().realize() for a in arrays]
        ours = [t.numpy() for t in jitted(*tensors)]
        with monkeypatch.context() as patch:
            patch.setattr(loops, "CPU_COUNT", type("Count", (), {"value": 1}))
            plain = [t.numpy() for t in step(*tensors)]
        for found, expected in zip(ours, plain, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_lies_ahead_is_never_read():
    """Not even as a weight of nearly nothing: a later value without bounds changes no output."""
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((1, h, 40, 6)).astype(np.float32) for h in (4, 2, 2)]
    before = banded_attention(*(Tensor(a) for a in arrays), 8).numpy()
    arrays[2][:, :, 30:] = 1e38
    after = banded_attention(*(Tensor(a) for a in arrays), 8).numpy()
    np.testing.assert_array_equal(before[:, :, :30], after[:, :, :30])


def test_large_scores_stay_finite():
    q, k, v = (Tensor.ones(1, h, 40, 6) for h in (4, 2, 2))
    out = banded_attention(q * 1e4, k * 1e4, v, 8)
    np.testing.assert_allclose(out.numpy(), 1, rtol=1e-6)


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8).numpy(), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(9).numpy()[2], 2 ** (-24 / 9), rtol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 100, 512])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 100, 513, 514, 5000])
@pytest.mark.parametrize("cut", [block_sizes, tiles])
def test_blocks_cover_the_band(window, length, cut):
    queries, reach, blocks = cut(length, window)
    assert (blocks - 1) * queries < length <= blocks * queries
    if blocks > 1:
        assert reach >= window
        assert reach % queries == 0
    if cut is tiles:
        assert queries % loops.TILE_N == 0


def test_cost_grows_with_the_length_not_its_square():
    def operations(N):
        q, k, v = (Tensor.ones(1, h, N, 8).contiguous().realize() for h in (4, 2, 2))
        GlobalCounters.reset()
        out = banded_attention(q, k, v, 16)
        Tensor.realize(out, *out.sum().gradient(q, k, v))
        return GlobalCounters.global_ops

    assert operations(2048) <= 4.1 * operations(512)
