"""The published implementation's numbers: logits, routing, losses, gradients, decoding."""

from pathlib import Path

import numpy as np
import pytest
from references import assert_close
from tinygrad import Tensor, TinyJit, nn

from pico_tg import Config, Pico, load_weights, loss_fn
from pico_tg.decoder import Decoder

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "small.npz"))


@pytest.fixture(scope="module")
def model() -> Pico:
    model = Pico(Config.from_json(GOLDEN / "small.json"))
    load_weights(model, GOLDEN / "small.safetensors")
    return model


def step(model: Pico, x: Tensor, targets: Tensor) -> list[Tensor]:
    with Tensor.train():
        logits, z, decisions = model(x)
        losses = loss_fn(logits, z, decisions, targets)
        gradients = losses[0].gradient(*nn.state.get_state_dict(model).values())
        outputs = [logits, z, decisions.cast("float32"), *losses, *gradients]
        Tensor.realize(*outputs)
    return outputs


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_step(jit, model, golden):
    x, targets = (Tensor(golden[name]).clone().realize() for name in ("x", "targets"))
    run = TinyJit(lambda x, targets: step(model, x, targets)) if jit else None
    for _ in range(3 if jit else 1):
        found = [t.numpy() for t in (run(x, targets) if jit else step(model, x, targets))]
    assert_close(found[0], golden["train_logits"], 1e-5)
    assert_close(1 / (1 + np.exp(-found[1])), golden["router_weights"][..., 0], 1e-5)
    assert np.array_equal(found[2], golden["router_decisions"][..., 0])
    for value, name in zip(found[3:6], ("loss", "aux_loss", "next_byte_loss"), strict=True):
        assert value == pytest.approx(golden[name], rel=1e-5)
    for gradient, name in zip(found[6:], nn.state.get_state_dict(model), strict=True):
        assert_close(gradient, golden[f"grad/{name}"], 1e-4, name)


def test_one_causal_pass(model, golden):
    logits, _, decisions = model(Tensor(golden["x"][:1]), causal=True)
    assert_close(logits.numpy(), golden["eval_logits"], 1e-5)
    assert np.array_equal(decisions.numpy(), golden["eval_decisions"][..., 0] > 0)


@pytest.mark.parametrize("cuts", [range(1, 64), [], [7, 8, 40]])
def test_decoding(cuts, model, golden):
    """Byte by byte, all at once, and in pieces."""
    decoder = Decoder(model)
    pieces = np.split(golden["x"][0], list(cuts))
    fed = [decoder.forward(piece.tobytes()) for piece in pieces]
    assert_close(np.concatenate([logits for logits, _ in fed]), golden["eval_logits"][0], 1e-5)
    decided = np.concatenate([z for _, z in fed]) > 0
    assert np.array_equal(decided, golden["eval_decisions"][0, :, 0] > 0)
