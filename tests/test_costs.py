"""The settings chosen for a newcomer, and what training is said to cost."""

import dataclasses

import pytest
from tinygrad import nn

from pico_tg import train
from pico_tg.backend import machine
from pico_tg.config import Config, TrainSettings
from pico_tg.costs import (
    CHOSEN,
    MAX_EPOCHS,
    _matrices,
    check_memory,
    choose,
    describe_cost,
    memory_bytes,
    step_seconds,
)
from pico_tg.files import PicoError
from pico_tg.model import Pico

XS = Config()
ORIGINAL = Config(dim=372, latent_num_blocks=8, fb_att_window_size=32)
SHAKESPEARE = 1_059_645  # bytes to train on


def minutes(values: dict, gflops: float) -> float:
    return values["max_steps"] * step_seconds(XS, TrainSettings(**values), "CPU", gflops) / 60


def test_a_small_file_on_two_cores_takes_a_few_minutes():
    values = choose(XS, SHAKESPEARE, "CPU", 150, {})
    assert values.keys() == {*CHOSEN}
    assert (values["context_len"], values["batch_size"]) == (512, 4)
    assert minutes(values, 150) == pytest.approx(4, rel=0.02)
    assert values["warmup_steps"] == round(0.1 * values["max_steps"])
    assert 0.005 < values["learning_rate"] <= 0.012
    slower = choose(XS, SHAKESPEARE, "CPU", 30, {})
    assert slower["max_steps"] == 300 < values["max_steps"]  # fewer steps would teach too little


def test_a_gpu_with_much_data_gets_the_published_settings():
    values = choose(XS, 700_000_000, "CUDA", 50_000, {})
    published = TrainSettings()
    for name in ("context_len", "batch_size", "max_steps", "learning_rate"):
        assert values[name] == getattr(published, name)


@pytest.mark.parametrize("train_bytes", [200, 2000, 20_000, 200_000])
@pytest.mark.parametrize("device", ["CPU", "CUDA:0"])
def test_small_data_make_small_windows(train_bytes, device):
    values = choose(XS, train_bytes, device, 1000, {})
    settings = TrainSettings(**values)
    assert XS.capacity(settings.context_len) >= 1
    assert settings.context_len + XS.next_tokens <= train_bytes
    windows = (train_bytes - XS.next_tokens) // settings.context_len
    assert settings.max_steps * settings.batch_size <= (MAX_EPOCHS + 1) * windows
    assert settings.epochs * windows >= settings.max_steps * settings.batch_size  # none is cut


def test_what_is_given_stays_and_counts():
    given = {"context_len": 128, "max_steps": 40, "optimizer": "adamw"}
    values = choose(XS, SHAKESPEARE, "CPU", 150, given)
    assert values.keys() == {*CHOSEN} - {*given}
    assert (values["warmup_steps"], values["router_warmup_steps"]) == (4, 8)
    rule = choose(dataclasses.replace(XS, router="space"), SHAKESPEARE, "CPU", 150, given)
    assert "router_warmup_steps" not in rule
    assert values["learning_rate"] == 0.003
    timed = choose(XS, SHAKESPEARE, "CPU", 150, {"max_minutes": 30.0})
    assert minutes(timed, 150) > 100  # the time ends training, not the steps
    warmup = timed["router_warmup_steps"] / timed["max_steps"]
    assert warmup == pytest.approx(0.05, rel=0.01)  # a fifth of the steps that fit in the time
    assert 0.001 <= timed["learning_rate"] < 0.012


def test_memory_is_that_of_the_parameters_and_what_was_measured():
    shapes = [t.shape for t in nn.state.get_state_dict(Pico(XS)).values()]
    ours = sorted([*_matrices(XS), (1, XS.dim)])  # and the router
    assert ours == sorted(shape for shape in shapes if len(shape) == 2)
    # measured: eight windows of 6144 bytes hold 9.1 GB, 2.2 GB with checkpoint_activations
    for checkpointing, measured in ((False, 9.1e9), (True, 2.2e9)):
        settings = TrainSettings(batch_size=8, checkpoint_activations=checkpointing)
        found = memory_bytes(ORIGINAL, settings)["activations"]
        assert found == pytest.approx(measured, rel=0.1)


def test_an_impossible_amount_of_memory_is_an_error(monkeypatch, tmp_path):
    settings = TrainSettings(context_len=512)
    needed = sum(memory_bytes(XS, settings).values())
    monkeypatch.setattr(machine, "available_memory", lambda: needed / 2 + 1)
    check_memory(XS, settings, "CPU")
    monkeypatch.setattr(machine, "available_memory", lambda: needed / 2 - 1)
    with pytest.raises(PicoError, match="take a smaller context_len, batch_size or model"):
        check_memory(XS, settings, "CPU")
    check_memory(XS, settings, "CUDA")  # its memory is not known
    text = tmp_path / "text.txt"
    text.write_text("words " * 1000)
    with pytest.raises(PicoError, match="take a smaller context_len"):
        next(train(Pico(XS, fresh=False), str(text), context_len=512))


def test_the_cost_is_one_line():
    settings = TrainSettings(**choose(XS, SHAKESPEARE, "CPU", 150, {}))
    line = describe_cost(XS, settings, SHAKESPEARE, "CPU", 150)
    assert "about 4 minutes" in line
    assert "MB of memory (parameters 14, optimizer 75, activations 182)" in line
    assert "\n" not in line
    timed = TrainSettings(max_steps=10**6, epochs=10**6, max_minutes=1200)
    assert "about 1,200 minutes" in describe_cost(XS, timed, SHAKESPEARE, "CPU", 150)
    few = TrainSettings(max_steps=3, context_len=64, batch_size=1)
    assert "about 1 s after" in describe_cost(XS, few, SHAKESPEARE, "CPU", 150)
