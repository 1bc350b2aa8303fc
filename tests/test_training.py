"""Training: the schedule, the step against plain arithmetic, validation, what stops it."""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
from helpers import TINY as CONFIG
from helpers import WINDOWS, Watch
from oracle import forward
from tinygrad import Device, Tensor, TinyJit, nn
from tinygrad.helpers import Context
from tinygrad.uop.ops import Ops

from pico_tg.backend.precision import graph_context
from pico_tg.backend.runtime import jit_method
from pico_tg.config import TrainSettings
from pico_tg.data import SEQ_END, SEQ_START, DataSpec, load_data
from pico_tg.evaluation import Validation
from pico_tg.files import PicoError
from pico_tg.model import Pico, inputs_and_targets, loss_fn
from pico_tg.training import TrainStep, learning_rate, train

TWO = ("CPU", "CPU:1")
SLOW = pytest.mark.slow
EXTRA = 0.2  # weight of the extra heads
QUICK = WINDOWS | {"warmup_steps": 2, "learning_rate": 3e-3}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 60)
    return str(path)


def make(seed: int = 0) -> Pico:
    return Pico(CONFIG, seed)


def with_router(router: str, seed: int = 0) -> Pico:
    return Pico(dataclasses.replace(CONFIG, router=router), seed)


def weights(model: Pico) -> dict[str, np.ndarray]:
    return {name: t.numpy().copy() for name, t in nn.state.get_state_dict(model).items()}


def test_learning_rate():
    settings = TrainSettings(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(step, settings, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)  # half way down the cosine
    assert rates[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(0, TrainSettings(learning_rate=1.0, warmup_steps=0), 1) == 1.0
    assert learning_rate(3.5, settings, 104) == 1.0  # with max_minutes, between two steps


def test_targets_are_the_next_bytes():
    windows = np.arange(2 * 13, dtype=np.uint8).reshape(2, 13)
    x, targets = inputs_and_targets(Tensor(windows), 3)
    assert np.array_equal(x.numpy(), windows[:, :10])
    for n in range(10):
        for k in range(3):
            assert np.array_equal(targets.numpy()[:, n, k], windows[:, n + 1 + k])


def adamw_reference(params, gradients, lr, decay, steps):
    """AdamW, betas (0.9, 0.999): decoupled decay, on matrices only; a list of gradients a step."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, steps + 1):
        g = gradients(params)
        for k, p in params.items():
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
            update = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            params[k] = p - lr * (update + (decay if p.ndim >= 2 else 0) * p)
    return params


def batch(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(97, 105, shape, dtype=np.uint8)


def gradients_of(model: Pico, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Unjitted gradients, by tinygrad (the model's tests compare those with the oracle's)."""
    x, targets = inputs_and_targets(Tensor(windows), CONFIG.next_tokens)
    named = nn.state.get_state_dict(model)
    loss = loss_fn(*model(x), targets, CONFIG, EXTRA)[0]
    return dict(zip(named, [g.numpy() for g in loss.gradient(*named.values())], strict=True))


@SLOW
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_is_adamw_on_the_mean_gradient(accumulation):
    """Four steps, so that the capturing and the replayed calls all take part."""
    rng = np.random.default_rng(0)
    batches = batch(rng, 4, accumulation, 2, 40 + CONFIG.next_tokens)
    model, other = make(), make()
    settings = TrainSettings(
        weight_decay=0.1,
        grad_accumulation_steps=accumulation,
        optimizer="adamw",
        extra_heads_weight=EXTRA,
    )
    step = TrainStep(model, settings)
    if accumulation > 1:  # a step that is interrupted leaves no trace
        assert step(batches[3], 1e-2, Watch(lambda: True)) is None
    for b in batches:
        losses = step(b, 1e-2)
        assert losses[-1] == 1

    named = nn.state.get_state_dict(other)
    calls = iter(batches)

    def mean_gradients(params):
        for name, tensor in named.items():
            tensor.assign(Tensor(params[name])).realize()
        parts = [gradients_of(other, windows) for windows in next(calls)]
        return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}

    expected = adamw_reference(weights(other), mean_gradients, 1e-2, 0.1, 4)
    for name, value in weights(model).items():
        # Adam's division amplifies rounding where a gradient is almost zero
        assert np.abs(value - expected[name]).max() < 2e-3, name
        assert np.abs(value - expected[name]).mean() < 2e-5, name


@SLOW
@pytest.mark.parametrize(("optimizer", "windows"), [("soap", 2), ("adamw", 1)])
def test_jitted_equals_unjitted(optimizer, windows):
    """Also with one window, of which a part may be a view of the graph's input."""
    rng = np.random.default_rng(1)
    batches = batch(rng, 4, 1, windows, 40 + CONFIG.next_tokens)
    results = []
    for jit in (1, 0):
        model = make()
        with Context(JIT=jit):
            step = TrainStep(model, TrainSettings(optimizer=optimizer))
            losses = [step(b, 1e-2) for b in batches]
        results.append((losses, weights(model)))
    (a, weights_a), (b, weights_b) = results
    assert np.abs(np.array(a) - np.array(b)).max() < 1e-5
    assert all(np.abs(weights_a[k] - weights_b[k]).max() < 1e-4 for k in weights_a)


@pytest.mark.parametrize("devices", [(), TWO])
@pytest.mark.parametrize("next_tokens", [1, 2])
def test_inputs_are_read_at_every_call(next_tokens, devices):
    class Split:
        def both(self, windows, ones):
            x, targets = inputs_and_targets(windows, next_tokens)
            return ((x + ones).realize(), (targets + ones).realize())

    split, ones = Split(), np.ones(1, np.uint8)
    for rows in [2] if devices else [1, 2]:
        graph = jit_method(split.both, devices=devices)
        for value in range(4):
            windows = np.arange(rows * (8 + next_tokens), dtype=np.uint8).reshape(rows, -1) + value
            x, targets = graph(windows, ones)
            assert (x == windows[:, :8] + 1).all()
            assert (targets[:, :, -1] == windows[:, next_tokens:] + 1).all()
        for wrong in (windows.T, windows.astype(np.int8), windows[:, 1:]):
            with pytest.raises(ValueError, match="in the first call they were"):
                graph(wrong, ones)


@SLOW
@pytest.mark.usefixtures("without_stored_graphs")
@pytest.mark.parametrize(("optimizer", "accumulation"), [("soap", 2), ("adamw", 1)])
def test_a_loss_that_is_not_finite_changes_nothing(optimizer, accumulation, monkeypatch):
    """Also where the gradients are."""
    module = sys.modules["pico_tg.training"]

    def infinite(*args):
        loss, aux_loss, next_byte_loss = loss_fn(*args)
        return loss, aux_loss, next_byte_loss + math.inf

    monkeypatch.setattr(module, "loss_fn", infinite)
    model = make()
    step = TrainStep(
        model, TrainSettings(optimizer=optimizer, grad_accumulation_steps=accumulation)
    )
    before = weights(model)
    windows = batch(np.random.default_rng(2), accumulation, 2, 40 + CONFIG.next_tokens)
    for _ in range(3):
        assert step(windows, 1e-2)[-1] == 0
    after = weights(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert not any(total.numpy().any() for total in step.sums)  # NaN would last


@pytest.mark.parametrize("optimizer", ["soap", pytest.param("adamw", marks=SLOW)])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer):
    model = make()
    step = TrainStep(model, TrainSettings(optimizer=optimizer))
    windows = batch(np.random.default_rng(2), 1, 2, 40 + CONFIG.next_tokens)
    for _ in range(3):
        step(windows, 1e-2)
    poisoned = model.norm.weight
    clean = poisoned.numpy().copy()
    poisoned.assign(Tensor(np.where(np.arange(CONFIG.dim) == 0, np.nan, clean))).realize()
    before = weights(model)
    losses = step(windows, 1e-2)
    assert losses[-1] == 0
    after = weights(model)
    assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)


@SLOW
@pytest.mark.parametrize("accumulation", [1, 2])
def test_overflow_of_a_rule(accumulation):
    """The share of the bytes that a rule selects beyond the capacity, 10 of 40."""
    settings = TrainSettings(optimizer="adamw", grad_accumulation_steps=accumulation)
    step = TrainStep(with_router("space"), settings)
    windows = np.zeros((accumulation, 2, 40 + CONFIG.next_tokens), np.uint8)
    windows[0, :, ::2] = 97  # each second byte follows a letter; none does in another micro-batch
    losses = step(windows, 1e-2)
    assert losses[3] == pytest.approx(20 / 40 / accumulation)
    assert losses[4] == pytest.approx((20 - 10) / 40 / accumulation)


@SLOW
@pytest.mark.usefixtures("without_stored_graphs")  # so that `planned_memory` sees them
def test_steps_without_cpu_kernels(monkeypatch):
    """tinygrad's own schedules, as on a GPU, train as the CPU kernels do."""
    windows = batch(np.random.default_rng(2), 1, 2, 40 + CONFIG.next_tokens)
    losses = {}
    for kernels in ("1", "0"):
        monkeypatch.setenv("PICO_KERNELS", kernels)
        step = TrainStep(make(), TrainSettings())
        losses[kernels] = [step(windows, 1e-2)[0] for _ in range(4)]
    assert losses["1"][-1] < losses["1"][0] - 0.05
    np.testing.assert_allclose(losses["0"], losses["1"], rtol=0, atol=3e-3)


def test_training_stops_on_a_loss_that_is_not_finite(text, tmp_path):
    model = make()
    model.norm.weight.assign(Tensor(np.full(CONFIG.dim, np.inf, np.float32))).realize()
    with pytest.raises(PicoError, match=r"not finite at step 1 .*smaller --learning-rate"):
        list(train(model, text, tmp_path / "run", max_steps=3, settings="published", **QUICK))
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_records_and_learning(text, tmp_path):
    """A model this small learns a sentence by heart; the records say so, and are JSON."""
    settings = QUICK | {"learning_rate": 2e-2, "validation_interval": 20, "max_steps": 60}
    records = list(
        train(make(), text, tmp_path / "run", epochs=99, settings="published", **settings)
    )
    assert [r["step"] for r in records] == list(range(1, 61))
    assert records[0]["bits_per_byte"] > 7
    assert records[-1]["bits_per_byte"] < 2.5
    assert records[-1]["validation_bits_per_byte"] < 3
    assert [r["step"] for r in records if "validation_bits_per_byte" in r] == [20, 40, 60]
    assert records[-1]["bytes"] == 60 * 2 * 40
    assert records[-1]["epoch"] > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert records[-1]["lr"] == pytest.approx(learning_rate(59, TrainSettings(**settings), 60))


@SLOW
def test_validation_is_bits_per_byte_of_the_text(text):
    """Against the oracle, byte by byte: causal routing, wrapper bytes left out, padding too."""
    model = make()
    corpus = load_data(DataSpec(text), progress=False).validation
    settings = TrainSettings(context_len=35, batch_size=3)
    found = Validation(model, corpus, settings)(top_k=True)
    named = weights(model)
    total, count, chosen = 0.0, 0, 0
    total_top_k, count_top_k, total_whole = 0.0, 0, 0.0
    held_out = np.array(corpus.bytes)
    assert bytes(held_out).startswith(SEQ_START)
    assert bytes(held_out).endswith(SEQ_END)
    own_text = np.ones(len(held_out), bool)
    own_text[: len(SEQ_START)] = own_text[-len(SEQ_END) :] = False
    for first in range(0, len(held_out) - 1, 35):
        x = held_out[first : first + 35]
        logits, z, _ = forward(named, CONFIG, x[None], causal=True)
        # which bytes are the likeliest k depends on the whole window, so it must be whole
        whole = first + 35 < len(held_out)
        top_k = forward(named, CONFIG, x[None])[0]
        for n in range(len(x)):
            at = first + n + 1
            if at < len(held_out) and own_text[at]:
                row = logits[0, n, 0]
                nats = np.logaddexp.reduce(row) - row[held_out[at]]
                total += nats
                count += 1
                chosen += z[0, n] > 0
                row = top_k[0, n, 0]
                if whole:
                    total_top_k += np.logaddexp.reduce(row) - row[held_out[at]]
                    total_whole += nats
                    count_top_k += 1
    assert found["validation_bits_per_byte"] == pytest.approx(total / count / math.log(2), 1e-5)
    assert found["validation_router_rate"] == pytest.approx(chosen / count)
    assert 0 < count_top_k < count
    expected = total_top_k / count_top_k / math.log(2)
    assert found["validation_bits_per_byte_top_k"] == pytest.approx(expected, 1e-5)
    gap = (total_whole - total_top_k) / count_top_k / math.log(2)
    assert found["validation_routing_gap"] == pytest.approx(gap, abs=1e-5)
    again = Validation(model, corpus, settings)()
    assert again["validation_bits_per_byte"] == found["validation_bits_per_byte"]


@SLOW
@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="compares two CPU devices")
@pytest.mark.parametrize("router", ["learned", "space"])
def test_two_devices_are_the_same_as_one(router):
    """With AdamW. SOAP is tested alone: it turns rounding into whole steps where a gradient is
    of low rank, as those of so few letters are."""
    rng = np.random.default_rng(4)
    batches = batch(rng, 4, 1, 2, 40 + CONFIG.next_tokens)
    warmup = 2 if router == "learned" else 0
    settings = TrainSettings(batch_size=2, optimizer="adamw", router_warmup_steps=warmup)
    one = TrainStep(with_router(router), settings)
    two = TrainStep(with_router(router), settings, TWO)
    assert {p.device for p in two.parameters} == {TWO}
    for number, windows in enumerate(batches):
        losses, shared = (step(windows, 1e-2, router_warmup=number < warmup) for step in (one, two))
        np.testing.assert_allclose(losses, shared, rtol=0, atol=2e-5)
    for name, value in weights(one.model).items():
        np.testing.assert_allclose(value, weights(two.model)[name], rtol=0, atol=1e-4, err_msg=name)


@SLOW
@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="compares two CPU devices")
def test_training_on_two_devices(text, tmp_path):
    """Validation and accumulation too; afterwards the model is on one device, and usable."""
    settings = QUICK | {"max_steps": 3, "batch_size": 2, "grad_accumulation_steps": 2}
    settings |= {"optimizer": "adamw", "warmup_steps": 0}
    model, other = make(), make()
    one = list(train(other, text, settings="published", **settings))
    two = list(train(model, text, tmp_path / "run", devices=TWO, settings="published", **settings))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    key = "validation_bits_per_byte"
    assert one[-1][key] == pytest.approx(two[-1][key], abs=1e-4)
    found = model(Tensor([[65, 66, 67, 68]]))[0].numpy()
    np.testing.assert_allclose(found, other(Tensor([[65, 66, 67, 68]]))[0].numpy(), atol=1e-3)
    resumed = make(1)
    settings |= {"max_steps": 4}
    records = list(train(resumed, None, tmp_path / "run", resume=True, devices=TWO, max_steps=4))
    assert [r["step"] for r in records] == [4]
    unfinished = make(1)
    records = train(unfinished, None, tmp_path / "run", resume=True, devices=TWO, max_steps=4)
    assert list(records) == []  # nothing was left to do
    assert {p.device for p in nn.state.get_parameters(unfinished)} == {TWO[0]}
    watch = Watch()
    train(make(), text, devices=TWO, events=watch, **settings).close()
    assert any("longer than estimated" in line for line in watch.said)


@SLOW
@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="compares two CPU devices")
def test_training_on_another_device(text):
    settings = QUICK | {"max_steps": 2, "settings": "published"}
    records = [list(train(make(), text, devices=names, **settings)) for names in ((), TWO[1:])]
    for key in ("loss", "validation_bits_per_byte"):
        one, other = (record[-1][key] for record in records)
        assert one == pytest.approx(other, abs=1e-4)


def test_a_batch_that_cannot_be_shared(text, tmp_path):
    with pytest.raises(PicoError, match="batch_size 3 cannot be shared by 2 devices"):
        train(make(), text, tmp_path / "run", devices=TWO, **(QUICK | {"batch_size": 3}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(minutes=1)
def test_blocks_as_functions():
    """The same loss and gradients, jitted or not; recomputed, in much less memory."""
    config = dataclasses.replace(CONFIG, latent_num_blocks=2, position="rope")
    model = Pico(config, seed=0)
    parameters = nn.state.get_parameters(model)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 256 + 3)).astype(np.uint8) for _ in range(2)]

    def gradients(windows):
        x, targets = inputs_and_targets(windows, config.next_tokens)
        loss = loss_fn(*model(x), targets)[0]
        found = [loss, *loss.gradient(*parameters)]
        Tensor.realize(*found)
        return found

    def results(call, checkpointing, training=True, batches=batches):
        settings = TrainSettings(precision="fp32", checkpoint_activations=checkpointing)
        with Tensor.train(training), graph_context(settings, ()):
            return [[x.numpy() for x in call(Tensor(b).clone().realize())] for b in batches]

    graphs = [TinyJit(gradients), TinyJit(gradients)]
    for graph in graphs:
        graph.cnt = 1  # captured by the first call
    plain = results(gradients, False, training=False)  # one graph, without functions
    for checkpointing, graph in enumerate(graphs):
        jitted = results(graph, bool(checkpointing))
        unjitted = results(gradients, bool(checkpointing), batches=batches[:1])
        pairs = zip(
            itertools.chain(*jitted, *unjitted), itertools.chain(*plain, plain[0]), strict=True
        )
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    def held(graph):  # bytes of all buffers
        nodes = graph.captured.linear.toposort()
        return sum(x.arg * x.dtype.itemsize for x in nodes if x.op is Ops.BUFFER)

    assert held(graphs[1]) < 0.6 * held(graphs[0])
