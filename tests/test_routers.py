"""Each router and position end to end: pass, loss, gradients and decoding against the oracle."""

import dataclasses
import itertools
import json
import math

import numpy as np
import oracle
import pytest
from references import TEXT, assert_close, build
from tinygrad import Tensor, nn

from pico_tg import Config, Pico, PicoError, generate, ops, train
from pico_tg.backend.runtime import write_into
from pico_tg.config import ROUTERS, RULES, TrainSettings
from pico_tg.costs import forward_flops
from pico_tg.data import SEQ_START
from pico_tg.decoder import Decoder
from pico_tg.model import inputs_and_targets, loss_fn
from pico_tg.routing import TOP_K_STEPS
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
        ("threshold", "alibi"),
        ("ratio", "rope"),
        ("stride", "alibi"),
        ("all", "alibi"),
        ("none", "alibi"),
    )
]
SLOW = [pytest.param(config, marks=pytest.mark.slow) for config in VARIANTS]


@pytest.fixture(scope="module", params=SLOW, ids=lambda c: f"{c.router}-{c.position}")
def variant(request):
    """(config, model, weights)."""
    config, model, weights = request.param, *build(request.param)
    if config.router == "threshold":  # past the first steps, which take the top-k
        set_cutoff(model, weights, 0.3, TOP_K_STEPS)
    return config, model, weights


def set_cutoff(model, weights, cutoff: float, steps: int) -> None:
    weights["latent.router.cutoff"] = np.array([cutoff, steps], np.float32)
    write_into(model.latent.router.cutoff, weights["latent.router.cutoff"])


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
        state = {name: tensor for name, tensor in state.items() if tensor.is_param}
        gradients = losses[0].gradient(*state.values())
        Tensor.realize(logits, z, decisions, *losses, *gradients)
    chosen = decisions.numpy()
    cutoff = oracle.cutoff_of(weights)
    expected = [oracle.decide(*r, config, False, cutoff) for r in zip(z.numpy(), x, strict=True)]
    np.testing.assert_array_equal(chosen, expected)
    if config.router == "threshold":
        assert 0 < chosen.sum() < chosen.size
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
    np.testing.assert_array_equal(
        decisions[0], oracle.decide(z[0], data, config, True, oracle.cutoff_of(weights))
    )
    expected = oracle.decode(weights, config, data)
    assert_close(logits[0], expected, 1e-4)
    decoder = Decoder(model)
    for attempt in range(2):  # the second one after a reset
        decoder.reset()
        found, chosen = [], []
        for start, end in itertools.pairwise([0, 1, 3, 7, 8, 9, 17, 24, 30]):
            if attempt and start:
                state = decoder.snapshot()
                decoder.forward(b"a ")
                decoder.restore(state)
                decoder.forward(b". x")
                decoder.rollback(3)
            # rejected drafts, of bytes that a rule looks at
            kept = end - start
            wrong = b" a"[: min(2, 8 - kept)] if attempt else b""
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
    """`causal`: None as in training, True as in decoding, False top-k."""
    z = Tensor([[0.5, -1.0, 0.1, 0.2, 2.0, -0.5, -2.0, -3.0, -4.0, -5.0]])
    top_k, positive, above = [0, 3, 4], [0, 2, 3, 4], [0, 4]
    expected = {
        ("learned", 0): [top_k, positive, top_k],
        ("ratio", 0): [positive, positive, top_k],
        ("threshold", TOP_K_STEPS - 1): [top_k, above, top_k],
        ("threshold", TOP_K_STEPS): [above, above, top_k],
    }
    for (router, steps), selected in expected.items():
        model, weights = build(dataclasses.replace(TINY, router=router))
        if router == "threshold":
            set_cutoff(model, weights, 0.3, steps)
        found = [model.decide(z, z, causal).numpy()[0] for causal in (None, True, False)]
        assert [np.flatnonzero(f).tolist() for f in found] == selected, (router, steps)


def test_the_ratio_loss():
    """It is 1 if the mean weight G is the capacity factor c, and more if F and G both exceed c."""
    config = dataclasses.replace(TINY, router="ratio", ratio_weight=0.5)
    z = Tensor.full((2, 10), math.log(0.3 / 0.7))
    logits, targets = Tensor.zeros(2, 10, 3, 256), Tensor.zeros(2, 10, 3, dtype="uint8")
    aux = {}
    for selected in (0, 3, 10):
        decisions = (Tensor.arange(10) < selected).expand(2, 10)
        loss, aux_loss, _ = (t.item() for t in loss_fn(logits, z, decisions, targets, config))
        assert loss == pytest.approx(math.log(256) + 0.5 * aux_loss, rel=1e-6)
        aux[selected] = aux_loss
    assert aux == pytest.approx({0: 1.0, 3: 1.0, 10: 1.0}, rel=1e-6)  # flat in F where G is c
    z = Tensor.full((2, 10), 0.0)  # G = 0.5, F = 1: 0.5 / 0.3
    found = loss_fn(logits, z, Tensor.full((2, 10), True), targets, config)[1].item()
    assert found == pytest.approx(0.5 / 0.3, rel=1e-6)


def test_most_uncertain():
    logits = np.random.default_rng(0).normal(0, 4, (2, 30, 3, 256)).astype(np.float32)
    p = oracle.softmax(logits[:, :, 0].astype(np.float64))
    entropy = -(p * np.log(p)).sum(axis=-1)
    assert_close(ops.entropy(Tensor(logits[:, :, 0])).numpy(), entropy, 1e-5)
    found = most_uncertain(Tensor(logits), TINY).numpy()
    for selected, row in zip(found, entropy, strict=True):
        assert {*np.flatnonzero(selected)} == {*np.argsort(row)[-9:]}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"router": "ratio", "latent_capacity_factor": 1.0}, "below 1 for the router ratio"),
        ({"router": "threshold", "ratio_weight": 0.1}, "not for threshold; leave it out"),
        ({"router": "ratio", "ratio_weight": -1.0}, "ratio_weight must be a number of at least 0"),
    ],
)
def test_settings_of_the_ratio_loss(changes, error):
    with pytest.raises(PicoError, match=error):
        dataclasses.replace(TINY, **changes)


def test_slots_are_bounded():
    for router, slots in (("learned", 30), ("space", 30), ("threshold", 45), ("ratio", 45)):
        assert dataclasses.replace(TINY, router=router).slots(100) == slots
    wide = dataclasses.replace(TINY, router="ratio", latent_capacity_factor=0.9)
    assert wide.slots(100) == 100


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 3, 0.3, 0.1, 0.013])
def test_a_stride_fits_the_capacity(factor):
    config = dataclasses.replace(TINY, router="stride", latent_capacity_factor=factor)
    for length in (1, 49, 512, 6144):
        assert length // config.stride <= config.capacity(length)
    assert config.stride - 1 < 1 / factor + 1e-6


@pytest.mark.slow
def test_positions_beyond_a_million():
    """With rotary positions only distances matter: a text that begins far out reads the same."""
    model, _ = build(dataclasses.replace(TINY, router="all", position="rope"))
    data = text(4, 32).tobytes()
    near, far = Decoder(model), Decoder(model)
    slots = far.fb_in[0].cache.slots
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


def test_only_what_differs_is_written(tmp_path):
    TINY.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()).keys() == {
        f.name for f in dataclasses.fields(Config)
    } - {"router", "position", "ratio_weight"}
    for config in VARIANTS:
        config.to_json(tmp_path / "b.json")
        assert Config.from_json(tmp_path / "b.json") == config
        written = json.loads((tmp_path / "b.json").read_text())
        assert ("ratio_weight" in written) == (config.router == "ratio")
    for name in ("router", "position"):
        with pytest.raises(PicoError, match=name):
            dataclasses.replace(TINY, **{name: "best"})


@pytest.mark.slow
@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[5]], ids=lambda c: c.router)
def test_training_steps(config, tmp_path):
    """With SOAP, over a refresh, and validated; weights that no byte reaches stay finite."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"<|endoftext|>".join([TEXT * 8] * 4))
    model = build(config)[0]
    options = {"context_len": 30, "batch_size": 2, "max_steps": 12, "validation_interval": 12}
    records = list(train(model, str(path), epochs=9, warmup_steps=2, seed=1, **options))
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
    list(train(model, path, **options))
    x = words[:20].reshape(1, -1)
    selected = model(Tensor(x), causal=True)[2].numpy()
    assert 0.15 < selected.mean() < 0.3
    share = selected[x == 32].mean()
    # without warm-up, the loss confirms the first decisions
    assert (share > 0.9) if warmup else (share < 0.1)


def test_the_target_of_every_step():
    """Of the router: the replayed steps read whether they belong to the router warm-up."""
    settings = TrainSettings(batch_size=2, optimizer="adamw", router_warmup_steps=1)
    step = TrainStep(build(TINY)[0], settings)
    windows = np.random.default_rng(0).integers(0, 256, (1, 2, 30 + TINY.next_tokens), np.uint8)
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
        train(model, tmp_path / "a.txt", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
