"""Banded attention against dense attention in NumPy, with its gradients; rotary positions."""

import numpy as np
import pytest
from references import check_attention
from tinygrad import GlobalCounters, Tensor

from pico_tg.attention import alibi_slopes, banded_attention, block_sizes, rotate

# (B, query heads, key/value heads, N, head_dim, window)
SHAPES = [
    (1, 1, 1, 1, 3, 1),
    (2, 4, 2, 33, 5, 8),  # the length does not divide the window
    (1, 3, 1, 21, 7, 1),
    (2, 2, 2, 19, 4, 18),  # the window just reaches the first byte
    (2, 2, 2, 20, 4, 18),  # the window just misses the first byte
    (1, 2, 1, 9, 4, 100),  # the window is longer than the sequence
    (1, 9, 3, 300, 41, 70),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape):
    check_attention(shape)


def test_the_plain_path_against_dense(monkeypatch):
    monkeypatch.setenv("PICO_KERNELS", "0")
    check_attention(SHAPES[1])


def test_later_values_are_never_read():
    """A later value that is nearly infinite changes no bit of an earlier output."""
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
def test_blocks_cover_the_band(window, length):
    queries, lookback, blocks = block_sizes(length, window)
    assert (blocks - 1) * queries < length <= blocks * queries
    if blocks > 1:
        assert lookback >= window
        assert lookback % queries == 0


def test_cost_grows_with_the_length_not_its_square():
    def operations(N):
        q, k, v = (Tensor.ones(1, h, N, 8).contiguous().realize() for h in (4, 2, 2))
        GlobalCounters.reset()
        out = banded_attention(q, k, v, 16)
        Tensor.realize(out, *out.sum().gradient(q, k, v))
        return GlobalCounters.global_ops

    assert operations(2048) <= 4.1 * operations(512)


@pytest.mark.parametrize("channels", [1, 8, 41])
def test_rotation_of_far_positions(channels):
    """As exact at a million, and at the largest int, as at 0."""
    positions = np.array([0, 1, 1000, 10**6, 10**6 + 1, 2**31 - 1])
    x = np.random.default_rng(0).standard_normal((2, len(positions), channels)).astype(np.float32)
    found = rotate(Tensor(x), Tensor(positions.astype(np.int32))).numpy()
    half = channels // 2
    rotated = x[..., :half] + 1j * x[..., half : 2 * half]
    rates = 10000.0 ** -(np.arange(half) / max(1, half))
    rotated = rotated * np.exp(1j * positions[:, None] * rates)
    expected = np.concatenate([rotated.real, rotated.imag, x[..., 2 * half :]], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
