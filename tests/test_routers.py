"""Each router and position end to end: pass, loss, gradients and decoding against the oracle."""

import dataclasses
import itertools
import math

import numpy as np
import oracle
import pytest
from references import TEXT, assert_close, build
from tinygrad import Tensor, nn

from pico_tg import Config, Pico, PicoError, generate, ops, train
from pico_tg.backend.runtime import write_into
from pico_tg.config import ROUTERS, TrainSettings
from pico_tg.costs import forward_flops
from pico_tg.data import SEQ_START
from pico_tg.decoder import Decoder
from pico_tg.model import inputs_and_targets, loss_fn
from pico_tg.routing import RULES
from pico_tg.training import TrainStep, most_uncertain

TINY = Config(
    dim=23,  # heads of 5 channels: one has no pair to rotate with
    next_tokens=3,
    att_q_heads=4,
    att_kv_heads=2,
    fb_num_blocks=1,
    fb_att_window_size=3,
    latent_capacity_factor=0.3,
    latent_num_blocks=1,
    latent_att_window_size=4,
)
VARIANTS = [
    dataclasses.replace(TINY, router=router, position=position)
    for router, position in (
        ("space", "rope"),
        ("learned", "rope"),
        ("all", "alibi"),
        ("none", "alibi"),
    )
]
SLOW = [pytest.param(config, marks=pytest.mark.slow) for config in VARIANTS]


@pytest.fixture(scope="module", params=SLOW, ids=lambda c: f"{c.router}-{c.position}")
def variant(request):
    """(config, model, weights)."""
    return request.param, *build(request.param)


def text(seed: int, count: int) -> np.ndarray:
    start = np.random.default_rng(seed).integers(len(TEXT))
    return np.frombuffer(TEXT * 3, np.uint8)[start : start + count]


def test_training(variant):
    config, model, weights = variant
    x = np.stack([text(0, 30), text(1, 30)])
    targets = np.random.default_rng(1).integers(0, 256, (*x.shape, config.next_tokens), np.uint8)
    state = nn.state.get_state_dict(model)
    with Tensor.train():
        logits, z, decisions = model(Tensor(x))
        losses = loss_fn(logits, z, decisions, Tensor(targets), config)
        gradients = losses[0].gradient(*state.values())
        Tensor.realize(logits, z, decisions, *losses, *gradients)
    chosen = decisions.numpy()
    expected = [oracle.decide(*r, config, False) for r in zip(z.numpy(), x, strict=True)]
    np.testing.assert_array_equal(chosen, expected)
    found = oracle.forward(weights, config, x, decisions=chosen)
    assert_close(logits.numpy(), found[0], 1e-4)
    assert_close(z.numpy(), found[1], 1e-4)
    expected, grads = oracle.loss_and_grads(weights, config, x, targets, chosen)
    np.testing.assert_allclose([t.item() for t in losses], expected, rtol=1e-5)
    for name, gradient in zip(state, gradients, strict=True):
        assert_close(gradient.numpy(), grads[name], 1e-4, name)


def test_decoding_is_the_causal_pass(variant):
    """The oracle byte by byte, ours in pieces with rejected drafts, and one causal pass."""
    config, model, weights = variant
    data = text(2, 30).tobytes()
    logits, z, decisions = (t.numpy() for t in model(Tensor([list(data)]), causal=True))
    np.testing.assert_array_equal(decisions[0], oracle.decide(z[0], data, config, True))
    expected = oracle.decode(weights, config, data)
    assert_close(logits[0], expected, 1e-4)
    decoder = Decoder(model)
    for attempt in range(2):  # the second one after a reset
        decoder.reset()
        found, chosen = [], []
        for start, end in itertools.pairwise([0, 1, 3, 7, 8, 9, 13, 16, 19, 21, 25, 28, 30]):
            if attempt and start:
                state = decoder.snapshot()
                decoder.forward(b"a ")
                decoder.restore(state)
                decoder.forward(b". x")
                decoder.rollback(3)
            # rejected drafts, of bytes that a rule looks at
            kept = end - start
            wrong = b" a"[: min(2, 4 - kept)] if attempt else b""
            found += list(decoder.forward(data[start:end] + wrong)[0][:kept])
            chosen += list(decoder.last_decisions[:kept])
            decoder.rollback(len(wrong))
        assert_close(np.array(found), expected, 1e-4)
        assert chosen == decisions[0].tolist()
        assert (decoder.position, decoder.selected) == (len(data), decisions.sum())


def test_generating_with_drafts_or_without(variant):
    config, model, _ = variant
    decoder = Decoder(model)
    options = {"max_bytes": 12, "seed": 3, "ignore_end": True, "decoder": decoder}
    records = list(generate(model, b"It is ", **options))
    plain = list(generate(model, b"It is ", speculative=False, **options))
    assert [(r.byte, r.router_decision) for r in records] == [
        (r.byte, r.router_decision) for r in plain
    ]
    fed = SEQ_START + b"It is " + bytes(r.byte for r in records)
    if config.router in RULES:
        rule = oracle.decide(np.zeros(len(fed)), fed, config, True)
        assert [r.router_decision for r in records] == rule[-12:].tolist()


def test_which_routing_is_which():
    """Top-k in training, the logits above 0 if causal."""
    z = Tensor([[0.5, -1.0, 0.1, 0.2, 2.0, -0.5, -2.0, -3.0, -4.0, -5.0]])
    model, _ = build(TINY)
    for causal, selected in ((False, [0, 3, 4]), (True, [0, 2, 3, 4])):
        assert np.flatnonzero(model.decide(z, z, causal).numpy()[0]).tolist() == selected


def test_most_uncertain():
    logits = np.random.default_rng(0).normal(0, 4, (2, 30, 3, 256)).astype(np.float32)
    p = oracle.softmax(logits[:, :, 0].astype(np.float64))
    entropy = -(p * np.log(p)).sum(axis=-1)
    assert_close(ops.entropy(Tensor(logits[:, :, 0])).numpy(), entropy, 1e-5)
    found = most_uncertain(Tensor(logits), TINY).numpy()
    for selected, row in zip(found, entropy, strict=True):
        assert {*np.flatnonzero(selected)} == {*np.argsort(row)[-9:]}


@pytest.mark.slow
def test_positions_beyond_a_million():
    """With rotary positions only distances matter: a text that begins far out reads the same."""
    model, _ = build(dataclasses.replace(TINY, router="all", position="rope"))
    data = text(4, 32).tobytes()
    near, far = Decoder(model), Decoder(model)
    slots = far.fb_in[0].slots
    far.position = far.selected = slots * (10**6 // slots)
    far.recent = b" "
    # far windows first hold zeros that no pass wrote: compare the last rows, which see none of them
    ends = [[one.forward(data[i : i + 8])[0] for i in range(0, 32, 8)][-1] for one in (near, far)]
    assert_close(ends[1], ends[0], 1e-4)


@pytest.mark.parametrize("router", ROUTERS)
def test_operations(router):
    config = dataclasses.replace(TINY, router=router)
    dense = dataclasses.replace(config, router="all")
    none = dataclasses.replace(config, router="none")
    found = [forward_flops(c, 100) for c in (none, config, dense)]
    if router == "all":
        assert found[1] == found[2]
    elif router == "none":
        assert found[1] == found[0]
    else:
        assert found[0] < found[1] < found[2]
        # 30 of 100 bytes, through 1 block: its matrices, the router, the pairs in a window of 4
        block = 23 * (8 + 4) * 5 + 3 * 23**2
        reads = 30 if router in RULES else 100
        pairs = 30 * 5 - (4 + 3 + 2 + 1)
        assert found[1] - found[0] == 2 * (block * 30 + 23 * reads) + 4 * 4 * 5 * pairs


@pytest.mark.slow
@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[-1]], ids=lambda c: c.router)
def test_training_steps(config, tmp_path):
    """With SOAP, over a refresh, and validated; weights that no byte reaches stay finite."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"<|endoftext|>".join([TEXT * 8] * 4))
    model = build(config)[0]
    options = {"context_len": 30, "batch_size": 2, "max_steps": 12, "validation_interval": 12}
    records = list(
        train(model, str(path), epochs=9, warmup_steps=2, seed=1, settings="published", **options)
    )
    assert records[-1]["loss"] < records[0]["loss"]
    low, high = {"none": [0, 0], "space": [0.1, 0.4]}[config.router]
    for key in ("router_rate", "validation_router_rate"):
        assert low - 0.02 <= records[-1][key] <= high + 0.02
    assert all(math.isfinite(t.numpy().sum()) for t in nn.state.get_parameters(model))
    assert records[-1]["aux_loss"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 40])
def test_router_warmup(warmup, tmp_path):
    """Random words: only the byte after a space is uncertain. The first weights avoid spaces."""
    rng = np.random.default_rng(0)
    words = np.pad(rng.integers(97, 123, (60, 4), np.uint8), ((0, 0), (0, 1)), constant_values=32)
    words = words[rng.integers(60, size=4000)]
    path = tmp_path / "words.txt"
    path.write_bytes(words.tobytes())
    config = dataclasses.replace(
        TINY, dim=32, next_tokens=1, fb_att_window_size=8, latent_capacity_factor=0.25
    )
    model = Pico(config, 0)
    space = model.embedding.weight.numpy()[32]
    write_into(model.latent.router.weight, -space[None] / (space @ space))
    options = {"context_len": 64, "batch_size": 8, "max_steps": 60, "warmup_steps": 5}
    options |= {"epochs": 9, "learning_rate": 0.01, "router_warmup_steps": warmup}
    list(train(model, path, settings="published", **options))
    x = words[:20].reshape(1, -1)
    selected = model(Tensor(x), causal=True)[2].numpy()
    assert 0.15 < selected.mean() < 0.3
    share = selected[x == 32].mean()
    # without warm-up, the loss confirms the first decisions
    assert (share > 0.9) if warmup else (share < 0.1)


def test_the_target_of_every_step():
    """Of the router: the replayed steps read whether they belong to the router warm-up."""
    settings = TrainSettings(batch_size=2, optimizer="adamw", router_warmup_steps=1)
    windows = np.random.default_rng(0).integers(0, 256, (1, 2, 30 + TINY.next_tokens), np.uint8)
    # a step without warm-up leaves another graph in the compile cache
    without = dataclasses.replace(settings, router_warmup_steps=0)
    TrainStep(build(TINY)[0], without)(windows, 0.0)
    step = TrainStep(build(TINY)[0], settings)
    aux = [step(windows, 0.0, router_warmup=k % 2 == 1)[1] for k in range(6)]
    x, _ = inputs_and_targets(Tensor(windows[0]), TINY.next_tokens)
    logits, z, decisions = step.model(x)
    for k, target in enumerate((decisions, most_uncertain(logits, TINY))):
        p = z.sigmoid().numpy()
        expected = -np.log(np.where(target.numpy(), p, 1 - p)).mean()
        assert aux[k::2] == pytest.approx([expected] * 3, rel=1e-4)


def test_router_warmup_is_for_learned(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT * 8)
    model = build(dataclasses.replace(TINY, router="space"))[0]
    options = {"context_len": 30, "batch_size": 2, "router_warmup_steps": 5}
    with pytest.raises(PicoError, match="not for space; leave it out"):
        train(model, tmp_path / "a.txt", tmp_path / "run", settings="published", **options)
    assert not (tmp_path / "run").exists()
