"""The dataclasses of settings: what is refused, what is counted, what model.json holds."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest

from pico_tg import (
    Config,
    DataSpec,
    EvalSettings,
    PicoError,
    SampleSettings,
    TrainSettings,
    evaluate,
    generate,
)

PUBLISHED = {
    "dim": 128, "next_tokens": 8, "att_q_heads": 9, "att_kv_heads": 3, "fb_num_blocks": 2,
    "fb_att_window_size": 16, "latent_capacity_factor": 0.25, "latent_num_blocks": 12,
    "latent_att_window_size": 512,
}  # fmt: skip


def test_model_json(tmp_path):
    """Always all keys of the published implementation; others only if they differ."""
    assert list(Config().to_dict().items()) == list(PUBLISHED.items())
    more = {"router": "space", "position": "rope"}
    assert Config(**more).to_dict() == PUBLISHED | more
    config = Config(dim=372, latent_num_blocks=8, fb_att_window_size=32)
    assert config.parameters == 10_243_208
    config.to_json(tmp_path / "model.json")
    assert Config.from_json(tmp_path / "model.json") == config
    assert json.loads((tmp_path / "model.json").read_text()) == config.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        (json.dumps(PUBLISHED | {"depth": 3}), "unknown setting depth; there are: att_kv_heads, "),
        (json.dumps(PUBLISHED | {"dim": "wide"}), "dim must be a whole number of at least 1"),
        *(
            (json.dumps({k: v for k, v in PUBLISHED.items() if k != key}), f"'{key}' is missing")
            for key in PUBLISHED
        ),
    ],
)
def test_broken_files(content, words, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(PicoError, match=words) as caught:
        Config.from_json(path)
    assert str(path) in str(caught.value)


def test_capacity_rounds_down():
    config = Config(latent_capacity_factor=0.25)
    assert [config.capacity(n) for n in (3, 4, 7, 8, 1024)] == [0, 1, 1, 2, 256]


IMPOSSIBLE = {  # the field, the value, and what it must be
    Config: [
        ("dim", 0, "a whole number of at least 1, not 0"),
        ("dim", 12.5, "a whole number of at least 1, not 12.5"),
        ("dim", True, "a whole number"),
        ("latent_capacity_factor", 0, "a number above 0 and at most 1, not 0"),
        ("latent_capacity_factor", 1.01, "a number above 0 and at most 1, not 1.01"),
        ("latent_capacity_factor", math.nan, "a number above 0 and at most 1, not nan"),
        ("latent_capacity_factor", "0.5", "a number above 0 and at most 1, not '0.5'"),
        ("router", "random", "one of learned, space, all, none, not 'random'"),
    ],
    TrainSettings: [
        ("batch_size", None, "a whole number of at least 1, not None"),
        ("learning_rate", math.nan, "a number of at least 0, not nan"),
        ("learning_rate", math.inf, "finite, not inf"),
        ("optimizer", "sgd", "one of soap, adamw, not 'sgd'"),
        ("checkpoint_activations", 1, "True or False, not 1"),
        ("keep_checkpoints", -1, "a whole number of at least 0"),
    ],
    SampleSettings: [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", math.inf, "finite"),
        ("top_k", -1, "a whole number of at least 0"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.5, "a number above 0 and at most 1"),
        ("min_p", 2.0, "a number of at least 0 and at most 1"),
        ("seed", -1, "a whole number of at least 0"),
        ("max_bytes", -1, "a whole number of at least 0"),
        ("num_samples", 0, "a whole number of at least 1"),
        ("latent", 0, "True or False"),
    ],
    EvalSettings: [
        ("split", "test", "one of validation, train, all, not 'test'"),
        ("context_len", 0, "a whole number of at least 1"),
        ("max_bytes", 1, "a whole number of at least 2"),
        ("max_bytes", 5.0, "a whole number of at least 2"),
        ("precision", None, "one of auto, fp32, bf16"),
    ],
    DataSpec: [
        ("dataset", None, "a str or a path, not None"),
        ("column_name", 4, "a str or a path, not 4"),
        ("train_file", True, "a str or a path, not True"),
    ],
}


@pytest.mark.parametrize(
    ("cls", "name", "value", "words"),
    [(cls, *case) for cls, cases in IMPOSSIBLE.items() for case in cases],
)
def test_impossible_values(cls, name, value, words):
    with pytest.raises(PicoError) as caught:
        cls(**{name: value})
    assert str(caught.value).startswith(f"{name} must be {words}")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dim": 8}, r"dim \(8\) is smaller than att_q_heads \(9\)"),
        ({"att_kv_heads": 4}, "not a multiple"),
        ({"dim": 10**6}, "more than the limit of 100,000,000,000"),
    ],
)
def test_sizes_that_do_not_fit_together(sizes, words):
    with pytest.raises(PicoError, match=words):
        Config(**sizes)


def test_keywords():
    """Generation and evaluation take the fields as keywords, and name those that there are."""
    for call, known in ((generate, "top_k, top_p"), (evaluate, "precision, split")):
        with pytest.raises(PicoError, match=rf"unknown setting topk.*; there are: .*{known}"):
            call(None, topk=3)
        with pytest.raises(PicoError, match="max_bytes must be a whole number"):
            call(None, max_bytes=-1)


@pytest.mark.parametrize(
    ("cls", "name", "words"),
    [
        (Config, "dimm", "unknown setting dimm (did you mean dim?); there are: att_kv_heads, "),
        (TrainSettings, "foo", "unknown setting foo; there are: batch_size, "),
        (
            TrainSettings,
            "minutes",
            "unknown setting minutes (did you mean max_minutes?); there are: ",
        ),
        (SampleSettings, "topk", "unknown setting topk (did you mean top_k?); there are: "),
        (DataSpec, "valid_file", "unknown setting valid_file (did you mean validation_file?); "),
    ],
)
def test_an_unknown_field(cls, name, words):
    with pytest.raises(PicoError) as caught:
        cls(**{name: 3})
    assert str(caught.value).startswith(words)
    assert "keywords" not in inspect.signature(cls).parameters  # a notebook shows the fields


def test_presets():
    assert Config.preset("xs") == Config()
    published = Config.preset("published")
    assert published == Config(dim=372, latent_num_blocks=8, fb_att_window_size=32)
    assert published.parameters == 10_243_208
    assert Config.preset("minutes").parameters < Config.preset("xs").parameters
    assert Config.preset("published", dim=96) == dataclasses.replace(published, dim=96)
    with pytest.raises(PicoError, match="no preset 'large'; there are: minutes, published"):
        Config.preset("large")
    with pytest.raises(PicoError, match="did you mean dim"):
        Config.preset("minutes", dimm=96)


def test_values_become_what_json_holds():
    """NumPy's numbers and paths."""
    settings = TrainSettings(batch_size=np.int64(3), learning_rate=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["batch_size"] == 3
    assert type(Config(dim=np.int32(64)).dim) is int
    assert DataSpec(Path("a.txt")).dataset == "a.txt"
    assert SampleSettings(seed=None).seed is None


@pytest.mark.parametrize("cls", [Config, TrainSettings, SampleSettings, EvalSettings, DataSpec])
def test_the_docstring_shows_the_help_of_each_field(cls):
    for field in dataclasses.fields(cls):
        assert f"- {field.name}: {field.metadata['help']}" in cls.__doc__
