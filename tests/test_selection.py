"""Top-k decisions, slots, and the gather/scatter pair whose gradients are each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import GlobalCounters, Tensor

from pico_tg import routing
from pico_tg.ops import gather, scatter
from pico_tg.routing import slots, top_k_decisions


def expected_top_k(z: np.ndarray, capacity: int) -> np.ndarray:
    decisions = np.zeros(z.shape, bool)
    for row, chosen in zip(z, decisions, strict=True):
        chosen[np.argsort(-row, kind="stable")[:capacity]] = True
    return decisions


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 3), st.integers(1, 40))
def test_top_k_with_ties_to_the_earlier(data, B, N):
    capacity = data.draw(st.integers(0, N))
    values = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.5, 2.0])  # few of them: many ties
    z = np.array(data.draw(st.lists(values, min_size=B * N, max_size=B * N)), np.float32)
    z = z.reshape(B, N)
    found = top_k_decisions(Tensor(z), capacity).numpy()
    np.testing.assert_array_equal(found, expected_top_k(z, capacity))


@pytest.mark.parametrize("capacity", [0, 1, 17, 30])
def test_the_threshold_of_long_sequences(capacity, monkeypatch):
    """The radix search is right for every sign, magnitude and tie."""
    rng = np.random.default_rng(0)
    z = rng.choice([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 1.0, -1.0], (3, 30))
    z[1] = rng.standard_normal(30)
    z[2] = 1 + rng.integers(0, 9, 30) * 2.0**-23  # differ only in the radix search's last digit
    z = z.astype(np.float32)
    monkeypatch.setattr(routing, "MAX_RANKED", 0)
    found = top_k_decisions(Tensor(z), capacity).numpy()
    np.testing.assert_array_equal(found, expected_top_k(z, capacity))


@pytest.mark.parametrize("limit", [0, 2048])
def test_slots_are_in_sequence_order(limit, monkeypatch):
    monkeypatch.setattr(routing, "MAX_RANKED", limit)
    decisions = np.array([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    index, slot = (t.numpy() for t in slots(Tensor(decisions), 4))
    assert index.tolist() == [[1, 2, 5, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert slot.tolist() == [[-1, 0, 1, -1, -1, 2], [-1] * 6, [0, 1, 2, 3, -1, -1]]


def routed(B, N, count, seed=0):
    rng = np.random.default_rng(seed)
    decisions = expected_top_k(rng.standard_normal((B, N)), count)
    return decisions, *(t.realize() for t in slots(Tensor(decisions), count))


def test_gather_then_scatter_keeps_the_selected_bytes():
    decisions, index, slot = routed(2, 17, 5)
    x = np.random.default_rng(1).standard_normal((2, 17, 3)).astype(np.float32)
    back = scatter(gather(Tensor(x), index, slot), index, slot).numpy()
    np.testing.assert_array_equal(back, x * decisions[..., None])


def test_gradients_are_each_others_forward():
    decisions, index, slot = routed(2, 17, 5)
    rng = np.random.default_rng(2)
    x = Tensor(rng.standard_normal((2, 17, 3)).astype(np.float32)).realize()
    g = rng.standard_normal((2, 5, 3)).astype(np.float32)
    (dx,) = (gather(x, index, slot) * Tensor(g)).sum().gradient(x)
    expected = np.zeros((2, 17, 3), np.float32)
    for b in range(2):
        expected[b, np.flatnonzero(decisions[b])] = g[b]
    np.testing.assert_array_equal(dx.numpy(), expected)

    s = Tensor(rng.standard_normal((2, 5, 3)).astype(np.float32)).realize()
    g = rng.standard_normal((2, 17, 3)).astype(np.float32)
    (ds,) = (scatter(s, index, slot) * Tensor(g)).sum().gradient(s)
    expected = np.stack([g[b, np.flatnonzero(decisions[b])] for b in range(2)])
    np.testing.assert_array_equal(ds.numpy(), expected)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_cost_is_linear_both_ways(direction):
    def operations(N, dim=8):
        _, index, slot = routed(1, N, N // 4)
        rows = N if direction == "gather" else N // 4
        x = Tensor.ones(1, rows, dim).contiguous().realize()
        GlobalCounters.reset()
        out = (gather if direction == "gather" else scatter)(x, index, slot)
        Tensor.realize(out, *(out * out).sum().gradient(x))
        return GlobalCounters.global_ops

    # the quotient of a quadratic cost would be 16, of a linear one with fixed parts less than 4
    assert operations(2048) <= 4.1 * operations(512)


def test_the_cost_of_selection_is_below_quadratic(monkeypatch):
    monkeypatch.setattr(routing, "MAX_RANKED", 0)

    def operations(N):
        z = Tensor(np.arange(N, dtype=np.float32)[None]).realize()
        GlobalCounters.reset()
        Tensor.realize(*slots(top_k_decisions(z, N // 4).contiguous(), N // 4))
        return GlobalCounters.global_ops

    assert operations(4096) <= 4.5 * operations(1024)
