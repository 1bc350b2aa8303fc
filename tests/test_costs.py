"""The settings chosen for a newcomer, and what training is said to cost."""

import dataclasses
import re

import pytest
from tinygrad import dtypes, nn

from pico_tg import costs, train
from pico_tg.backend import machine
from pico_tg.config import Config, TrainSettings
from pico_tg.costs import (
    _matrices,
    check_memory,
    choose,
    describe_cost,
    expected_steps,
    memory_bytes,
    most_passes,
    plan,
    step_seconds,
    total_steps,
    validation_steps,
    validations_left,
)
from pico_tg.files import PicoError
from pico_tg.model import Pico

XS = Config()
ORIGINAL = Config(dim=372, latent_num_blocks=8, fb_att_window_size=32)
SHAKESPEARE = 1_059_645  # bytes to train on


def minutes(settings: TrainSettings, gflops: float) -> float:
    return settings.max_steps * step_seconds(XS, settings, "CPU", gflops) / 60


def test_a_small_file_on_two_cores_takes_a_few_minutes():
    chosen = choose(XS, SHAKESPEARE, "CPU", 150, {})
    assert (chosen.context_len, chosen.batch_size) == (512, 4)
    assert minutes(chosen, 150) == pytest.approx(4, rel=0.02)
    assert chosen.warmup_steps == round(0.1 * chosen.max_steps)
    assert chosen.router_warmup_steps == round(0.2 * chosen.max_steps)
    assert 0.006 <= chosen.learning_rate <= 0.012
    slower = choose(XS, SHAKESPEARE, "CPU", 30, {})
    assert slower.max_steps == 300 < chosen.max_steps  # fewer steps would teach too little


def test_trained_weights_learn_slower():
    for given in ({}, {"optimizer": "adamw"}, {"max_minutes": 2}):
        fresh = choose(XS, SHAKESPEARE, "CPU", 150, given)
        trained = choose(XS, SHAKESPEARE, "CPU", 150, given, trained=True)
        assert trained.learning_rate == pytest.approx(fresh.learning_rate / 4, rel=0.05)
        assert fresh.router_warmup_steps > trained.router_warmup_steps == 0
    given = {"learning_rate": 0.5, "router_warmup_steps": 7}
    kept = choose(XS, SHAKESPEARE, "CPU", 150, given, trained=True)
    assert (kept.learning_rate, kept.router_warmup_steps) == (0.5, 7)


def test_a_gpu_with_much_data_gets_the_published_settings():
    chosen, published = choose(XS, 700_000_000, "CUDA", 50_000, {}), TrainSettings()
    for name in ("context_len", "batch_size", "max_steps", "learning_rate"):
        assert getattr(chosen, name) == getattr(published, name)


@pytest.mark.parametrize(
    ("train_bytes", "fresh", "trained"), [(30_000, 3, 2), (300_000, 5, 2), (12_000_000, 10, 5)]
)
def test_a_short_text_is_read_a_few_times(train_bytes, fresh, trained, monkeypatch):
    """Also if minutes are given; if epochs or steps are given, a warning says what that costs."""
    monkeypatch.setattr(costs, "gemm_rate", lambda *_: 150)
    config = Config.preset("minutes")
    assert most_passes(config, train_bytes, False) == fresh
    assert most_passes(config, train_bytes, True) == trained

    def planned(is_trained: bool = False, **given: int) -> tuple[TrainSettings, str]:
        chosen, lines = plan(config, train_bytes, "CPU", given, trained=is_trained)
        return chosen, "\n".join(lines)

    for is_trained, most in ((False, fresh), (True, trained)):
        for given in ({"max_minutes": 6000}, {"max_steps": 10**6, "epochs": most}):
            chosen, lines = planned(is_trained, **given)
            assert chosen.epochs == most
            steps = most * (train_bytes // 512) / chosen.batch_size
            assert total_steps(config, chosen, train_bytes) == pytest.approx(steps, abs=1)
            assert ("with more passes over so short a text" in lines) == (chosen.max_minutes > 0)
            assert "the run reads the text" not in lines
    for given in ({"max_steps": 10**6}, {"epochs": fresh + 1, "max_minutes": 10**5}):
        lines = planned(**given)[1]
        assert f"times; after {fresh} times other text is usually predicted worse" in lines


def test_batches_of_a_short_text():
    """So small that as many steps as possible are made, up to 300."""
    config, size = Config.preset("minutes"), 300_000
    for given in ({}, {"epochs": 2}, {"grad_accumulation_steps": 4}):
        chosen = choose(config, size, "CPU", 150, given)
        windows = chosen.epochs * (size // 512)
        more = windows / (chosen.batch_size + 1) / chosen.grad_accumulation_steps
        assert more < 300 or chosen.batch_size == 4
        most = windows / chosen.batch_size / chosen.grad_accumulation_steps
        assert most > 300 or chosen.batch_size == 1


def test_given_epochs_alone_end_the_run():
    """However long they take; then --resume --epochs is enough to go on."""
    config, size = Config.preset("minutes"), 12_000_000
    chosen = choose(config, size, "CPU", 150, {"epochs": 3})
    steps = total_steps(config, chosen, size)
    assert steps * chosen.batch_size * 512 == pytest.approx(3 * size, rel=1e-3)
    assert chosen.max_steps > 3 * steps
    assert chosen.warmup_steps == round(steps / 10)


@pytest.mark.parametrize("train_bytes", [200, 2000, 20_000, 200_000])
@pytest.mark.parametrize("device", ["CPU", "CUDA:0"])
def test_small_data_make_small_windows(train_bytes, device):
    chosen = choose(XS, train_bytes, device, 1000, {})
    assert XS.capacity(chosen.context_len) >= 1
    assert chosen.context_len + XS.next_tokens <= train_bytes
    windows = (train_bytes - XS.next_tokens) // chosen.context_len
    passes = most_passes(XS, train_bytes, False)
    assert chosen.epochs <= passes
    assert (total_steps(XS, chosen, train_bytes) - 1) * chosen.batch_size < passes * windows


def test_what_is_given_stays_and_counts():
    given = {"context_len": 128, "max_steps": 40, "optimizer": "adamw"}
    chosen = choose(XS, SHAKESPEARE, "CPU", 150, given)
    assert given.items() <= dataclasses.asdict(chosen).items()
    assert (chosen.warmup_steps, chosen.router_warmup_steps) == (4, 8)
    rule = choose(dataclasses.replace(XS, router="space"), SHAKESPEARE, "CPU", 150, given)
    assert rule.router_warmup_steps == 0
    assert chosen.learning_rate == 0.003
    timed = choose(XS, 10**8, "CPU", 150, {"max_minutes": 30.0})
    assert minutes(timed, 150) > 100  # the time ends training, not the steps
    warmup = timed.router_warmup_steps / timed.max_steps
    assert warmup == pytest.approx(0.05, rel=0.01)  # a fifth of the steps that fit in the time
    assert timed.learning_rate == 0.006


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_of_the_gemm_rate(precision, fast, monkeypatch):
    """That of training on the device, also if it is not named."""
    factors = set()

    def uncompiled(matmul):
        return lambda a, b: factors.update((a.dtype, b.dtype))

    monkeypatch.setattr(costs, "TinyJit", uncompiled)
    monkeypatch.setattr("pico_tg.backend.precision.has_tensor_cores", lambda *_: fast)
    costs.gemm_rate(precision, "NULL")
    bf16 = precision == "bf16" or (precision == "auto" and fast)
    assert factors == {dtypes.bfloat16 if bf16 else dtypes.float32}


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
        next(train(Pico(XS, fresh=False), str(text), settings="published", context_len=512))


HELD_OUT = 1 << 20


def validations(settings: TrainSettings, config: Config = XS) -> tuple[int, float]:
    """How many there are if the estimate is right, and their share of the training time."""
    steps = expected_steps(config, settings, SHAKESPEARE, "CPU", 150)
    count = validations_left(settings, 0, steps)
    return count, count * validation_steps(settings, HELD_OUT) / steps


@pytest.mark.parametrize("given", [{}, {"max_minutes": 2}, {"max_minutes": 60}, {"max_steps": 400}])
@pytest.mark.parametrize("config", [XS, ORIGINAL, Config(dim=64, latent_num_blocks=2)])
def test_validations_take_a_tenth_of_the_time_at_most(given, config):
    """About ten, fewer in a short run; a checkpoint with each; what is given stays."""
    chosen = choose(config, SHAKESPEARE, "CPU", 150, given, held_out=HELD_OUT)
    count, share = validations(chosen, config)
    assert count <= 10
    assert share <= 0.1 or count == 1
    assert chosen.checkpoint_interval == chosen.validation_interval
    if given.get("max_minutes") == 60 and config == XS:
        assert count == 10
    asked = {"validation_interval": 7, "validation_bytes": 9, "checkpoint_interval": 11}
    kept = choose(config, SHAKESPEARE, "CPU", 150, given | asked, held_out=HELD_OUT)
    assert asked.items() <= dataclasses.asdict(kept).items()


def test_a_small_held_out_part_is_measured_ten_times():
    chosen = choose(XS, SHAKESPEARE, "CPU", 150, {}, held_out=3000)
    assert validations_left(chosen, 0, chosen.max_steps) == 10


def test_the_cost_is_told():
    settings = choose(XS, SHAKESPEARE, "CPU", 150, {}, held_out=HELD_OUT)
    steps = settings.max_steps
    time, memory = describe_cost(XS, settings, steps, "CPU", 150, HELD_OUT)
    count, share = validations(settings)
    seconds = 240 * (1 + share * (count + 1) / count)  # the last one measures top-k, too
    told = re.match(r"training will take about 4:(\d\d), plus compiling the first time: ", time)
    assert int(told[1]) == pytest.approx(seconds - 240, abs=1)
    assert f": {steps:,} steps of 0.28 s, " in time
    assert f" s, {count} validations of " in time
    assert memory == "memory: about 272 MB (parameters 14, optimizer 75, activations 182)"
    timed = dataclasses.replace(settings, max_minutes=1200, max_steps=10**7, epochs=10**6)
    steps = expected_steps(XS, timed, SHAKESPEARE, "CPU", 150)
    assert re.search(r"about 2\dh", describe_cost(XS, timed, steps, "CPU", 150, HELD_OUT)[0])


@pytest.mark.parametrize("minutes", [5.0, 60.0])
def test_the_lines_of_a_choice(minutes, monkeypatch):
    """Short ones; a warning if the time is too short for so many parameters."""
    monkeypatch.setattr(costs, "gemm_rate", lambda precision, device: 150)
    chosen, lines = plan(XS, 10**8, "CPU", {"max_minutes": minutes, "warmup_steps": 3})
    steps = expected_steps(XS, chosen, 10**8, "CPU", 150)
    assert lines[:5] == [
        f"chosen windows: context_len {chosen.context_len}, batch_size {chosen.batch_size}",
        f"chosen learning: learning_rate {chosen.learning_rate}, "
        f"router_warmup_steps {chosen.router_warmup_steps}",
        f"chosen measuring: validation_interval {chosen.validation_interval}, "
        f"validation_bytes {chosen.validation_bytes}, "
        f"checkpoint_interval {chosen.checkpoint_interval}",
        *describe_cost(XS, chosen, steps, "CPU", 150, TrainSettings.validation_bytes),
    ]
    if minutes == 60:
        assert len(lines) == 5
    else:
        (warning,) = lines[5:]
        assert warning.startswith(
            "warning: the run trains on 1.2 bytes per parameter (2,164,736 bytes, 1,775,872 parame"
        )
        assert "; train longer, choose smaller sizes (init PATH --preset minutes), or" in warning
        given = {"max_minutes": minutes}
        assert "warning" not in "".join(plan(XS, 10**8, "CPU", given, trained=True)[1])
    assert plan(XS, 10**8, "CPU", {})[1][1].startswith("chosen length: epochs ")
    assert "; take more text, choose smaller sizes (" in plan(XS, 10**5, "CPU", {})[1][-1]
    few = plan(XS, 1000, "CPU", {"epochs": 1})[1][-1]
    assert few.startswith("warning: the run trains on 0.00056 bytes per parameter (992 bytes,")


def test_rotary_positions_that_training_does_not_show(monkeypatch):
    """A warning: the deep blocks' window is longer than what a training window routes."""
    monkeypatch.setattr(costs, "gemm_rate", lambda *_: 1e6)
    config = Config.preset("minutes")
    for changes, length, warned in [
        ({}, 512, False),
        ({}, 508, True),
        ({"latent_att_window_size": 512}, 1024, True),
        ({"latent_att_window_size": 512, "position": "alibi"}, 1024, False),
    ]:
        changed = dataclasses.replace(config, **changes)
        lines = plan(changed, 10**8, "CPU", {"context_len": length})[1]
        assert any("take more context" in line for line in lines) == warned
