"""Checkpoints: weights that fit the model, pairs of files of one moment, whatever interrupts."""

import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tinygrad import Tensor, nn

from pico_tg.checkpoint import (
    check,
    checkpoint_path,
    delete_older,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_weights,
    remove_leftovers,
    save_checkpoint,
    save_weights,
)
from pico_tg.config import Config
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "small.safetensors"
CONFIG = Config.from_json(GOLDEN.with_suffix(".json"))
ARRAYS = {"w": np.arange(40_000, dtype=np.float32)}
ENDS = (".safetensors", ".state.safetensors")


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(CONFIG)


def test_the_golden_weights_load_and_are_saved_the_same(model, tmp_path):
    load_weights(model, GOLDEN)
    save_weights(model, tmp_path / "again.safetensors")
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    golden = safetensors.numpy.load_file(GOLDEN)
    assert again.keys() == golden.keys()
    assert all(np.array_equal(again[name], golden[name]) for name in golden)


@pytest.mark.parametrize("kind", ["f2", "f8"])
def test_other_widths_become_the_model_s(kind, model, tmp_path):
    golden = safetensors.numpy.load_file(GOLDEN)
    write_safetensors(tmp_path / "a", {name: array.astype(kind) for name, array in golden.items()})
    load_weights(model, tmp_path / "a")
    for name, tensor in nn.state.get_state_dict(model).items():
        assert tensor.numpy().dtype == np.float32
        assert np.array_equal(tensor.numpy(), golden[name].astype(kind).astype(np.float32))


def test_loading_keeps_the_buffers(model):
    """Compiled graphs refer to them."""
    before = {n: t.uop.buffer for n, t in nn.state.get_state_dict(model).items()}
    load_weights(model, GOLDEN)
    assert all(t.uop.buffer is before[n] for n, t in nn.state.get_state_dict(model).items())


@pytest.mark.parametrize("defect", ["missing", "extra", "shape", "integers", "foreign"])
def test_weights_that_do_not_fit_change_nothing(defect, model, tmp_path):
    arrays = {n: np.zeros_like(a) for n, a in safetensors.numpy.load_file(GOLDEN).items()}
    if defect == "missing":
        del arrays["norm.weight"]
    elif defect == "extra":
        arrays["depth.weight"] = np.zeros(3, np.float32)
    elif defect == "shape":
        arrays["norm.weight"] = np.zeros(3, np.float32)
    elif defect == "integers":
        arrays["norm.weight"] = arrays["norm.weight"].astype(np.int32)
    else:
        arrays = {"other": np.zeros(3, np.float32)}
    write_safetensors(tmp_path / "bad", arrays)
    load_weights(model, GOLDEN)
    with pytest.raises(PicoError, match="bad does not fit the model"):
        load_weights(model, tmp_path / "bad")
    assert np.abs(model.embedding.weight.numpy()).max() > 0


class Array:
    """A model of one array."""

    def __init__(self) -> None:
        self.w = Tensor(ARRAYS["w"]).clone().realize()


def save(folder: Path, step: int) -> None:
    weights = {"w": ARRAYS["w"].copy()}
    weights["w"][0] = step
    save_checkpoint(weights, {"m": weights["w"]}, {"step": step}, folder)


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        save(tmp_path, step)
    return tmp_path


def break_weights(run: Path) -> None:
    path = checkpoint_path(run, 4)
    path.write_bytes(path.read_bytes()[:-5])


def break_state(run: Path) -> None:
    (run / "00000004.state.safetensors").unlink()


def mix(run: Path) -> None:
    checkpoint_path(run, 4).write_bytes(checkpoint_path(run, 2).read_bytes())


def alter_state(run: Path) -> None:
    """A number in the optimizer's state, of the same size."""
    path = run / "00000004.state.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def rename(run: Path) -> None:
    """The pair of step 2 under the name of step 4."""
    for end in ("safetensors", "state.safetensors"):
        (run / f"00000004.{end}").write_bytes((run / f"00000002.{end}").read_bytes())


@pytest.mark.parametrize("damage", [break_weights, break_state, mix, alter_state, rename])
def test_broken_checkpoints_are_passed_over(damage, run):
    damage(run)
    path, _, progress, refused = load_newest(Array(), run)
    assert path == checkpoint_path(run, 2)
    assert progress["step"] == 2
    assert "00000004" in refused[0]


def test_checking_reads_only_the_headers(run):
    check(checkpoint_path(run, 2))
    write_safetensors(checkpoint_path(run, 3), ARRAYS)  # from elsewhere: there is no state
    check(checkpoint_path(run, 3))
    break_weights(run)
    with pytest.raises(PicoError, match=r"00000004\.safetensors is broken.*truncated"):
        check(checkpoint_path(run, 4))
    (run / "00000002.state.safetensors").unlink()
    check(checkpoint_path(run, 2))  # as an older one


def test_deleting_older_ones(tmp_path):
    """A later, broken one does not count; the spared one neither."""
    checkpoint_path(tmp_path, 9).write_bytes(b"broken")
    for step in (1, 2, 3):
        save(tmp_path, step)
        delete_older(tmp_path, step, keep=1, spared=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 3, 9]
    assert len(list(tmp_path.glob("*.state.safetensors"))) == 2


def test_older_ones_keep_their_weights_only(tmp_path):
    """So the newest but one can still be resumed from if the newest is damaged."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
        delete_older(tmp_path, step, keep=0)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [1, 2, 3, 4]
    states = sorted(path.name for path in tmp_path.glob("*.state.safetensors"))
    assert states == ["00000003.state.safetensors", "00000004.state.safetensors"]
    checkpoint_path(tmp_path, 4).write_bytes(b"damaged")
    assert load_newest(Array(), tmp_path)[0] == checkpoint_path(tmp_path, 3)
    checkpoint_path(tmp_path, 3).write_bytes(b"damaged")
    with pytest.raises(PicoError, match="no checkpoint to resume from"):
        load_newest(Array(), tmp_path)


def valid_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, each of which must load, into a model of one array."""
    found = []
    for step, path in list_checkpoints(folder):
        model = Array()
        state, progress = load_checkpoint(model, path)
        assert progress["step"] == step
        assert model.w.numpy()[0] == state["m"][0] == step
        found.append(step)
    return found


def save_for_ever(folder: Path, step: int, report) -> None:
    while True:
        step += 1
        save(folder, step)
        os.write(report, step.to_bytes(4, "little"))
        delete_older(folder, step, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path):
    """SIGKILL at random moments: what was reported as saved is there, and nothing is half there."""
    moments = random.Random(0)
    reached = 0
    for _ in range(15):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                save_for_ever(tmp_path, reached, writing)
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 4)  # at least one was saved
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = os.read(reading, 1 << 16)
        os.close(reading)
        confirmed = int.from_bytes(said[-4:], "little") if said else reached + 1
        remove_leftovers(tmp_path)  # as a resumed run does
        whole = {f"{step:08d}{end}" for step, _ in list_checkpoints(tmp_path) for end in ENDS}
        assert {path.name for path in tmp_path.iterdir()} == whole
        steps = valid_steps(tmp_path)  # asserts that each is whole
        assert steps[-1] >= confirmed > reached
        reached = steps[-1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        weights = {"w": np.ones(1 << 17, np.float32)}  # 0.5 MB, twice
        save_checkpoint(weights, weights, {"step": 1}, disk)
        with pytest.raises(PicoError, match=r"cannot write .*00000002.*No space left"):
            save_checkpoint(weights, weights, {"step": 2}, disk)
        assert [step for step, _ in list_checkpoints(disk)] == [1]
        np.testing.assert_array_equal(
            read_safetensors(checkpoint_path(disk, 1))[0]["w"], weights["w"]
        )
        assert {path.name for path in disk.iterdir()} == {f"00000001{end}" for end in ENDS}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_became_read_only(tmp_path):
    """As nobody, since root may write anywhere; once it may, then it may not."""
    with tempfile.TemporaryDirectory() as name:  # whose parents anybody may enter
        folder = Path(name)
        for step, mode, status in ((1, 0o777, 0), (2, 0o555, 3)):
            folder.chmod(mode)
            child = os.fork()
            if child == 0:
                try:
                    if os.geteuid() == 0:
                        os.setuid(65534)
                    save_checkpoint(ARRAYS, {}, {"step": step}, folder)
                    os._exit(0)
                except PicoError as error:
                    os._exit(3 if "Permission denied" in str(error) else 4)
                finally:
                    os._exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
            folder.chmod(0o777)
        assert [step for step, _ in list_checkpoints(folder)] == [1]
        assert len(list(folder.iterdir())) == 2
