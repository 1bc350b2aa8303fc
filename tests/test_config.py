"""Config and TrainSettings: what is refused, what is counted, where the help stands."""

import dataclasses
import json
import math

import numpy as np
import pytest

from pico_tg.config import PRESETS, Config, TrainSettings, field_help
from pico_tg.files import PicoError


def test_preset_and_file(tmp_path):
    config = Config.preset("xs", dim=372, latent_num_blocks=8, fb_att_window_size=32)
    assert config.parameters == 10_243_208
    config.to_json(tmp_path / "model.json")
    assert Config.from_json(tmp_path / "model.json") == config
    assert json.loads((tmp_path / "model.json").read_text()) == config.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 8}, "att_q_heads"),
        ({"dim": 0}, "dim"),
        ({"dim": 12.5}, "dim"),
        ({"dim": True}, "dim"),
        ({"att_kv_heads": 4}, "multiple"),
        ({"latent_capacity_factor": 0}, "latent_capacity_factor"),
        ({"latent_capacity_factor": 1.01}, "latent_capacity_factor"),
        ({"latent_capacity_factor": float("nan")}, "latent_capacity_factor"),
        ({"latent_capacity_factor": "0.5"}, "latent_capacity_factor"),
        ({"latent_num_blocks": -1}, "latent_num_blocks"),
        ({"router": "random"}, "router must be one of learned, space"),
        ({"depth": 3}, "depth"),
    ],
    ids=str,
)
def test_impossible_sizes(changes, words):
    with pytest.raises(PicoError, match=words):
        Config.preset("xs", **changes)


def test_unknown_preset():
    with pytest.raises(PicoError, match="xs"):
        Config.preset("xl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        (json.dumps(PRESETS["xs"] | {"depth": 3}), "unknown key 'depth'"),
        (json.dumps({k: v for k, v in PRESETS["xs"].items() if k != "dim"}), "'dim' is missing"),
    ],
)
def test_broken_files(content, words, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(PicoError, match=words) as caught:
        Config.from_json(path)
    assert str(path) in str(caught.value)


def test_capacity_rounds_down():
    config = Config.preset("xs", latent_capacity_factor=0.25)
    assert [config.capacity(n) for n in (3, 4, 7, 8, 1024)] == [0, 1, 1, 2, 256]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"learning_rate": math.nan}, "learning_rate must be a number of at least 0, not nan"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number"),
        ({"optimizer": "sgd"}, "optimizer must be one of soap, adamw, not 'sgd'"),
        ({"checkpoint_activations": 1}, "checkpoint_activations must be True or False, not 1"),
    ],
    ids=str,
)
def test_impossible_settings(changes, words):
    with pytest.raises(PicoError, match=words):
        TrainSettings(**changes)


def test_numbers_of_numpy_become_python_s():
    settings = TrainSettings(batch_size=np.int64(3), learning_rate=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["batch_size"] == 3
    assert isinstance(Config.preset("xs", dim=np.int32(64)).to_dict()["dim"], int)


@pytest.mark.parametrize("cls", [Config, TrainSettings])
def test_each_field_has_a_help_that_the_docstring_shows(cls):
    helps = field_help(cls)
    assert helps.keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(f"- {name}: {text}" in cls.__doc__ for name, text in helps.items())
