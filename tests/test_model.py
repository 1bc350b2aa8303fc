"""The model against the oracle on odd configurations: outputs, losses, gradients, causality."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import oracle
import pytest
from helpers import TINY
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from references import assert_close, build
from tinygrad import Tensor, dtypes, nn

from pico_tg import matmul
from pico_tg.backend.runtime import write_into
from pico_tg.config import Config
from pico_tg.decoder import Decoder
from pico_tg.files import PicoError
from pico_tg.model import Pico, loss_fn
from pico_tg.ops import cross_entropy

ODD = Config(
    dim=22,  # 3 heads of 7: one channel is in no head
    next_tokens=3,
    att_q_heads=3,
    att_kv_heads=1,
    fb_num_blocks=1,
    fb_att_window_size=5,
    latent_capacity_factor=0.3,
    latent_num_blocks=2,
    latent_att_window_size=4,
)


# every example compiles some hundred kernels of its own: few examples, and no shrinking
FEW = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])


@st.composite
def configs(draw) -> Config:
    kv_heads = draw(st.integers(1, 3))
    q_heads = kv_heads * draw(st.integers(1, 3))
    return Config(
        dim=q_heads * draw(st.integers(3, 7)) + draw(st.integers(0, 2)),
        next_tokens=draw(st.integers(1, 4)),
        att_q_heads=q_heads,
        att_kv_heads=kv_heads,
        fb_num_blocks=draw(st.integers(1, 2)),
        fb_att_window_size=draw(st.integers(1, 14)),
        latent_capacity_factor=draw(st.floats(0.3, 1.0)),
        latent_num_blocks=draw(st.integers(1, 2)),
        latent_att_window_size=draw(st.integers(1, 6)),  # mostly fewer than the selected bytes
    )


def compare_training(config: Config, B: int, N: int) -> None:
    model, weights = build(config)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (B, N), np.uint8)
    targets = rng.integers(0, 256, (B, N, config.next_tokens), np.uint8)
    state = nn.state.get_state_dict(model)
    with Tensor.train():
        logits, z, decisions = model(Tensor(x))
        losses = loss_fn(logits, z, decisions, Tensor(targets))
        gradients = losses[0].gradient(*state.values())
        Tensor.realize(logits, z, decisions, *losses, *gradients)

    chosen = decisions.numpy()
    # the decisions are those of our own router logits; the oracle's may differ in the last bit
    np.testing.assert_array_equal(
        chosen,
        np.stack([oracle.decide(r, b, config, False) for r, b in zip(z.numpy(), x, strict=True)]),
    )
    expected = oracle.forward(weights, config, x, decisions=chosen)
    assert_close(logits.numpy(), expected[0], 1e-4)
    assert_close(z.numpy(), expected[1], 1e-4)
    expected_losses, expected_gradients = oracle.loss_and_grads(
        weights, config, x, targets, decisions=chosen
    )
    np.testing.assert_allclose([t.item() for t in losses], expected_losses, rtol=1e-5)
    for (name, _), gradient in zip(state.items(), gradients, strict=True):
        assert_close(gradient.numpy(), expected_gradients[name], 1e-4, name)


@pytest.mark.slow
@FEW
@given(configs(), st.integers(1, 2), st.integers(10, 40))
def test_training_on_odd_configurations(config, B, N):
    compare_training(config, B, N)


@pytest.mark.slow
def test_training_with_cpu_kernels_for_every_product(monkeypatch):
    monkeypatch.setattr(matmul, "SMALL", 0)
    compare_training(ODD, 2, 37)


def test_a_capacity_of_zero_skips_the_latent_blocks():
    compare_training(dataclasses.replace(ODD, latent_capacity_factor=0.01), 1, 20)


@pytest.mark.slow
@FEW
@given(configs(), st.integers(1, 2), st.integers(10, 40))
def test_causal_on_odd_configurations(config, B, N):
    model, weights = build(config)
    x = np.random.default_rng(2).integers(0, 256, (B, N), np.uint8)
    logits, z, decisions = (t.numpy() for t in model(Tensor(x), causal=True))
    np.testing.assert_array_equal(decisions, z > 0)
    expected = oracle.forward(weights, config, x, causal=True, decisions=decisions)
    assert_close(logits, expected[0], 1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_weight_of_the_extra_heads(heads):
    """Against the losses of the heads one by one, of which `next_byte_loss` is the unweighted."""
    rng = np.random.default_rng(5)
    logits = Tensor(rng.standard_normal((2, 7, heads, 256)).astype(np.float32))
    targets = Tensor(rng.integers(0, 256, (2, 7, heads), np.uint8))
    z, decisions = Tensor(rng.standard_normal((2, 7)).astype(np.float32)), Tensor.ones(2, 7) > 0
    per_head = [
        loss_fn(logits[:, :, k : k + 1], z, decisions, targets[:, :, k : k + 1])[2].item()
        for k in range(heads)
    ]
    loss, aux, _ = (t.item() for t in loss_fn(logits, z, decisions, targets, None, 0.2))
    lm = per_head[0] if heads == 1 else (per_head[0] + 0.2 * np.mean(per_head[1:])) / 1.2
    assert loss == pytest.approx(0.9 * lm + 0.1 * aux, rel=1e-5)


@pytest.mark.parametrize("chosen", ["none", "all"])
def test_causal_when_the_router_is_extreme(chosen):
    model, weights = build(ODD)
    x = np.random.default_rng(3).integers(0, 256, (2, 30), np.uint8)
    h = model.fb_in(model.embedding(Tensor(x))).numpy()
    # a router weight for which all logits have the same sign
    direction = np.linalg.lstsq(h.reshape(-1, ODD.dim)[: ODD.dim], np.ones(ODD.dim), rcond=None)[0]
    x = x[:1, : ODD.dim]
    direction = direction.astype(np.float32) * (1 if chosen == "all" else -1)
    weights["latent.router.weight"] = direction[None]
    model.latent.router.weight.assign(Tensor(direction[None])).realize()
    logits, _, decisions = (t.numpy() for t in model(Tensor(x), causal=True))
    assert decisions.all() if chosen == "all" else not decisions.any()
    assert_close(logits, oracle.forward(weights, ODD, x, causal=True)[0], 1e-3)


def test_changing_a_byte_changes_no_causal_logits_before_it():
    model, _ = build(ODD)
    x = np.random.default_rng(4).integers(0, 256, (1, 40), np.uint8)
    before, _, routed = (t.numpy() for t in model(Tensor(x), causal=True))
    assert routed.any()
    for j in (1, 17, 39):
        changed = x.copy()
        changed[0, j] ^= 255
        after = model(Tensor(changed), causal=True)[0].numpy()
        np.testing.assert_array_equal(before[0, :j], after[0, :j])
        assert np.abs(before[0, j] - after[0, j]).max() > 1e-3


def test_the_first_selected_bytes_are_served():
    model, weights = build(ODD)
    x = np.random.default_rng(5).integers(0, 256, (1, 40), np.uint8)
    h, z = model.encode(Tensor(x))
    selected = model.decide(Tensor(x), z, causal=True)
    logits, decisions = model.finish(h, z, selected, 3).numpy(), selected.numpy()
    served = decisions & (np.cumsum(decisions, axis=1) <= 3)
    assert served.sum() == 3 < decisions.sum()
    assert_close(logits, oracle.forward(weights, ODD, x, causal=True, decisions=served)[0], 1e-4)


@pytest.mark.parametrize("byte", [0, 127, 128, 255])
def test_a_lone_byte(byte):
    """One position, one target: 0.13's lookup by a lone uint8 would read out of bounds."""
    logits = np.random.default_rng(6).standard_normal((1, 1, 1, 256)).astype(np.float32)
    found = cross_entropy(Tensor(logits), Tensor(np.full((1, 1, 1), byte, np.uint8))).item()
    expected = np.logaddexp.reduce(logits.astype(np.float64), axis=-1) - logits[..., byte]
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_bytes_may_be_any_integer():
    model, _ = build(ODD)
    x = np.arange(40).reshape(1, 40)
    plain = model(Tensor(x.astype(np.uint8)), causal=True)[0].numpy()
    wide = model(Tensor(x).cast(dtypes.int64), causal=True)[0].numpy()
    np.testing.assert_array_equal(wide, plain)


def test_fresh_weights():
    config = Config()
    model = Pico(config, seed=0)
    state = nn.state.get_state_dict(model)
    assert sum(t.numel() for t in state.values()) == config.parameters
    for name, tensor in state.items():
        value = tensor.numpy()
        assert value.dtype == np.float32
        if "norm" in name:
            assert (value == 1).all()
        elif name == "embedding.weight":
            assert abs(value.mean()) < 0.02
            assert abs(value.std() - 1) < 0.02
        else:
            bound = 1 / np.sqrt(config.dim if value.ndim == 1 else value.shape[1])
            assert np.abs(value).max() <= bound
            if value.size > 1000:
                assert abs(value.std() * np.sqrt(3) / bound - 1) < 0.05
    again, other = (nn.state.get_state_dict(Pico(config, seed)) for seed in (0, None))
    assert all(np.array_equal(t.numpy(), again[name].numpy()) for name, t in state.items())
    name = "unembedding.weight"
    assert not np.array_equal(again[name].numpy(), other[name].numpy())


def test_repr():
    shown = repr(Pico(TINY, fresh=False))
    assert shown == (
        f"<Pico {TINY.parameters:,} parameters, dim 24, next_tokens 3, latent_num_blocks 1, "
        "router learned>"
    )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_copy(copied):
    """What changes the model afterwards does not change the copy, and the other way round."""
    model = Pico(ODD, seed=1)
    before = model.unembedding.weight.numpy().copy()
    other = copied(model)
    write_into(model.unembedding.weight, np.zeros_like(before))
    np.testing.assert_array_equal(other.unembedding.weight.numpy(), before)


def test_a_pickle_holds_its_own_weights():
    """Read by a process that has made another model before, as spawned workers do."""
    script = "import pickle, sys, pico_tg; mine = pico_tg.Pico(pico_tg.Config(**{!r}), seed=2);"
    script += "sent = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write("
    script += "sent.unembedding.weight.numpy().tobytes())"
    model = Pico(ODD, seed=1)
    command = [sys.executable, "-c", script.format(ODD.to_dict())]
    done = subprocess.run(command, input=pickle.dumps(model), capture_output=True, check=True)
    assert done.stdout == model.unembedding.weight.numpy().tobytes()
    with pytest.raises(PicoError, match=r"Decoder\(model\)"):
        copy.deepcopy(Decoder(model))
