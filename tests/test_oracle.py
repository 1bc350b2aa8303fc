"""The oracle against the recorded model, finite differences, and its own decoder."""

import dataclasses
from pathlib import Path

import numpy as np
import oracle
import pytest
from oracle import decode, forward, loss, loss_and_grads, random_weights

from pico_tg.config import Config
from pico_tg.safetensors import read_safetensors

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(
    dim=10,  # q_heads * head_dim = 8 < dim
    next_tokens=3,
    att_q_heads=4,
    att_kv_heads=2,
    fb_num_blocks=1,
    fb_att_window_size=2,
    latent_capacity_factor=0.5,
    latent_num_blocks=2,
    latent_att_window_size=3,
)
ROPE = dataclasses.replace(TINY, dim=26, position="rope")  # heads of 6 channels


@pytest.fixture(scope="module")
def golden():
    """(config, weights, arrays) of the published implementation."""
    config = Config.from_json(GOLDEN / "small.json")
    with np.load(GOLDEN / "small.npz") as arrays:
        return config, read_safetensors(GOLDEN / "small.safetensors")[0], dict(arrays)


def tiny(seed=0, config=TINY, B=2, N=9):
    """(float64 weights away from their initial values, x [B, N], targets [B, N, P])."""
    rng = np.random.default_rng(seed)
    weights = {
        name: value + 0.1 * rng.standard_normal(value.shape)
        for name, value in random_weights(config, rng).items()
    }
    x = rng.integers(0, 256, (B, N), np.uint8)
    return weights, x, rng.integers(0, 256, (B, N, config.next_tokens), np.uint8)


def test_names_and_shapes_are_the_checkpoints(golden):
    config, weights, _ = golden
    fresh = random_weights(config, np.random.default_rng(0))
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in weights.items()}
    assert all(v.dtype == np.float32 for v in fresh.values())
    assert sum(v.size for v in fresh.values()) == config.parameters


def test_training_pass(golden):
    config, weights, arrays = golden
    logits, z, decisions = forward(weights, config, arrays["x"])
    np.testing.assert_allclose(logits, arrays["train_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        oracle.sigmoid(z), arrays["router_weights"][..., 0], rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(decisions, arrays["router_decisions"][..., 0] == 1)


def test_losses_and_gradients(golden):
    config, weights, arrays = golden
    losses, grads = loss_and_grads(weights, config, arrays["x"], arrays["targets"])
    recorded = [arrays["loss"], arrays["aux_loss"], arrays["next_byte_loss"]]
    np.testing.assert_allclose(losses, recorded, rtol=1e-6)
    assert grads.keys() == {k.removeprefix("grad/") for k in arrays if k.startswith("grad/")}
    for name, grad in grads.items():
        expected = arrays[f"grad/{name}"]
        error = np.abs(grad - expected).max() / np.abs(expected).max()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_causal_pass_and_decoding(golden):
    config, weights, arrays = golden
    x = arrays["x"][:1]
    logits, _, decisions = forward(weights, config, x, causal=True)
    np.testing.assert_allclose(logits, arrays["eval_logits"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(decisions, arrays["eval_decisions"][..., 0] == 1)
    np.testing.assert_allclose(decode(weights, config, bytes(x[0])), logits[0], atol=1e-11)


@pytest.mark.parametrize("config", [TINY, ROPE], ids=lambda config: config.position)
@pytest.mark.parametrize("name", oracle.shapes(TINY))
def test_gradients_are_central_differences(name, config):
    weights, x, targets = tiny(config=config)
    decisions = forward(weights, config, x)[2]
    _, grads = loss_and_grads(weights, config, x, targets, decisions)
    direction = np.random.default_rng(1).standard_normal(weights[name].shape)

    def at(step):
        moved = weights | {name: weights[name] + step * direction}
        return loss(*forward(moved, config, x, decisions=decisions), targets, config)[0]

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert (grads[name] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_ties_go_to_the_earlier_byte():
    weights, x, _ = tiny()
    weights["latent.router.weight"][:] = 0  # every logit is 0
    decisions = forward(weights, TINY, x)[2]
    np.testing.assert_array_equal(decisions, [[True] * 4 + [False] * 5] * 2)
    assert not forward(weights, TINY, x, causal=True)[2].any(), "0.5 is not above 0.5"
    some = oracle.decide(np.array([1.0, 3, 1, 2, 1, 1, 3, 0]), bytes(8), TINY, causal=False)
    np.testing.assert_array_equal(np.flatnonzero(some), [0, 1, 3, 6])


def test_nothing_selected_is_without_latent_blocks():
    weights, x, targets = tiny()
    broken = {k: v * np.nan if k.startswith("latent.blocks") else v for k, v in weights.items()}
    weights["latent.router.weight"][:] = broken["latent.router.weight"][:] = 0
    logits, _, _ = forward(broken, TINY, x, causal=True)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(decode(broken, TINY, bytes(x[0])), logits[0], atol=1e-12)
    # a capacity of int(1 * 0.5) = 0
    _, grads = loss_and_grads(broken, TINY, x[:, :1], targets[:, :1])
    assert all(np.isfinite(g).all() for g in grads.values())
    assert not any(g.any() for k, g in grads.items() if k.startswith("latent.blocks"))


@pytest.mark.parametrize(("seed", "config"), [(0, TINY), (1, TINY), (2, ROPE)])
def test_decoding_is_the_causal_pass(seed, config):
    weights, x, _ = tiny(seed, config, N=24)
    logits, _, decisions = forward(weights, config, x, causal=True)
    assert 0 < decisions.sum() < decisions.size
    for b in range(len(x)):
        np.testing.assert_allclose(decode(weights, config, bytes(x[b])), logits[b], atol=1e-12)


def test_only_the_causal_pass_is_causal():
    weights, x, _ = tiny(N=24)
    before = forward(weights, TINY, x, causal=True)[0]
    x = x.copy()
    x[:, 15] ^= 1
    after = forward(weights, TINY, x, causal=True)[0]
    np.testing.assert_allclose(after[:, :15], before[:, :15], atol=1e-12)
    assert (np.abs(after[:, 15] - before[:, 15]).max(axis=(1, 2)) > 1e-3).all()


def test_full_capacity_takes_every_byte():
    config = Config(**(vars(TINY) | {"latent_capacity_factor": 1.0}))
    weights, x, _ = tiny(config=config)
    logits, _, decisions = forward(weights, config, x)
    assert decisions.all()
    forced = forward(weights, config, x, causal=True, decisions=np.ones(x.shape, bool))[0]
    np.testing.assert_array_equal(logits, forced)
