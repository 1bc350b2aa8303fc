"""Sizes and costs against the model itself and counts by hand; defects of checkpoints."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY
from tinygrad import nn

from pico_tg.checkpoint import save_checkpoint
from pico_tg.config import TrainSettings
from pico_tg.costs import decoding_flops
from pico_tg.decoder import Decoder
from pico_tg.files import PicoError
from pico_tg.kv_cache import cache_bytes
from pico_tg.model import Pico
from pico_tg.runs import DESCRIBED
from pico_tg.tools.info import describe
from pico_tg.tools.report import describe_model

CONFIG = dataclasses.replace(TINY, dim=26, latent_num_blocks=2, latent_att_window_size=40)


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(CONFIG, fresh=False)


def test_parameters_by_part(model):
    counted = dict.fromkeys(CONFIG.parameters_by_part, 0)
    part = {
        "embedding": "embedding", "fb_in": "narrow_blocks", "fb_out": "narrow_blocks",
        "latent.router": "router", "latent.blocks": "deep_blocks",
        "norm": "heads", "unembedding": "heads",
    }  # fmt: skip
    for name, tensor in nn.state.get_state_dict(model).items():
        (key,) = {part[start] for start in part if name.startswith(start + ".")}
        counted[key] += tensor.numel()
    assert CONFIG.parameters_by_part == counted
    assert sum(counted.values()) == CONFIG.parameters


def test_memory_of_the_caches():
    assert cache_bytes(CONFIG) == sum(t.nbytes() for t in Decoder(Pico(CONFIG)).cache_tensors())


def test_operations_of_decoding():
    """A block of this model by hand: weights that a byte meets, and keys that it sees."""
    head_dim, kv, width = 6, 12, 24
    block = 26 * (width + 2 * kv) + width * 26 + 26 * 52 + 26 * 26
    assert head_dim == CONFIG.head_dim
    outside = 26 + 26 * 3 * 256  # router, heads

    def operations(byte_keys: float, latent_keys: float, rate: float) -> float:
        # two byte blocks, two latent ones; a key costs a score and a share of the sum
        byte = 2 * (block + 2 * width * byte_keys)
        latent = 2 * (block + 2 * width * latent_keys)
        return 2 * outside + 2 * byte + rate * 2 * latent

    assert decoding_flops(CONFIG, 0, 0.5) == operations(1, 1, 0.5)
    assert decoding_flops(CONFIG, 20, 0.5) == operations(7, 11, 0.5)
    assert decoding_flops(CONFIG, 1000, 0.25) == operations(7, 41, 0.25)
    assert decoding_flops(CONFIG, 1000, 0.0) == operations(7, 41, 0.0)


@pytest.mark.parametrize(("router", "expected"), [("learned", 0.3), ("space", 0.3), ("all", 1.0)])
def test_the_rate_of_decoding(router, expected, tmp_path):
    """What is known without a run, the capacity; else what a run measured."""
    config = dataclasses.replace(CONFIG, router=router, latent_capacity_factor=0.3)
    config.to_json(tmp_path / "model.json")
    operations = describe(tmp_path)["operations_a_byte"]
    assert operations["decoding_router_rate"] == expected
    length = operations["context_len"]
    assert operations["decoding"] == decoding_flops(config, length, expected)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        (tmp_path / "run" / f"{step:08d}.safetensors").touch()
    rows = ({"step": step, "router_rate": step / 10} for step in (1, 2, 3))
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    operations = describe(tmp_path, "run")["operations_a_byte"]
    assert operations["decoding_router_rate"] == 0.2
    assert operations["decoding"] == decoding_flops(config, length, 0.2)


def test_the_file_of_compiled_kernels_is_named(tmp_path):
    CONFIG.to_json(tmp_path / "model.json")
    facts = describe(tmp_path)
    assert Path(facts["kernel_cache"]["file"]).stat().st_size == facts["kernel_cache"]["bytes"] > 0
    assert facts["kernel_cache"]["file"] in describe_model(facts)


@pytest.mark.parametrize("truncated", ["00000002.safetensors", "00000002.state.safetensors"])
def test_a_truncated_checkpoint_is_named(truncated, tmp_path):
    CONFIG.to_json(tmp_path / "model.json")
    arrays = {"w": np.ones((4, 4), np.float32)}
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        save_checkpoint(arrays, arrays, {"step": step}, tmp_path / "run")
    assert not any("defect" in c for c in describe(tmp_path, "run")["run"]["checkpoints"])
    file = tmp_path / "run" / truncated
    file.write_bytes(file.read_bytes()[:-1])
    facts = describe(tmp_path, "run")
    first, second = facts["run"]["checkpoints"]
    assert "defect" not in first
    assert str(file) in second["defect"]
    assert "truncated" in second["defect"]
    assert second["defect"] in describe_model(facts)


def test_a_run(tmp_path):
    """Its steps, its data, and whether the model was edited since."""
    CONFIG.to_json(tmp_path / "model.json")
    settings = dataclasses.asdict(TrainSettings(context_len=40, batch_size=2, max_steps=7))
    (tmp_path / "run").mkdir()
    description = {key: {} for key in DESCRIBED} | {"settings": settings, "model": CONFIG.to_dict()}
    (tmp_path / "run" / "training.json").write_text(json.dumps(description))
    assert describe(tmp_path, "run")["run"]["planned_steps"] is None
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "steps": 5}\n')
    facts = describe(tmp_path, "run")
    assert (facts["run"]["steps"], facts["run"]["planned_steps"]) == (2, 5)
    assert facts["operations_a_byte"]["context_len"] == 40
    assert facts["run"]["edited"] == ""
    dataclasses.replace(CONFIG, router="space").to_json(tmp_path / "model.json")
    description["data"] = "training on this; validating on that"
    (tmp_path / "run" / "training.json").write_text(json.dumps(description))
    facts = describe(tmp_path, "run")
    assert "another model.json: router was learned, now space" in facts["run"]["edited"]
    for line in ("data", "edited"):
        assert facts["run"][line] in describe_model(facts)
    description["settings"] |= {"momentum": 0.9}
    (tmp_path / "run" / "training.json").write_text(json.dumps(description))
    with pytest.raises(PicoError, match=r"training\.json: unknown setting momentum"):
        describe(tmp_path, "run")
