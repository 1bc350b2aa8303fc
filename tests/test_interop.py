"""Models of the published PyTorch implementation: as it leaves them, and through torch itself."""

import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tinygrad import Tensor

import pico_tg
from pico_tg.runs import read_description
from pico_tg.tools import cli

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder as the published implementation leaves it; its training.json is not ours."""
    folder = tmp_path / "published"
    (folder / "run").mkdir(parents=True)
    (folder / "model.json").write_text((GOLDEN / "small.json").read_text().strip())
    weights = safetensors.numpy.load_file(GOLDEN / "small.safetensors")
    safetensors.numpy.save_file(weights, folder / "run" / "00000500.safetensors")
    training = {"meta": {"context_len": 6144}, "dataset_path": "x", "checkpoints": [{"i": 500}]}
    (folder / "run" / "training.json").write_text(json.dumps(training))
    return folder


def loss(model: pico_tg.Pico, x: np.ndarray, targets: np.ndarray) -> float:
    return pico_tg.loss_fn(*model(Tensor(x)), Tensor(targets))[0].item()


def test_a_published_folder(published, tmp_path, monkeypatch, capsys):
    """Every command that has a use for it takes it; what its weights do is in test_golden.py."""
    assert cli.main(["info", str(published), "run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run"]["checkpoints"][0]["step"] == 500
    assert facts["run"]["settings"] == facts["run"]["dataset"] == {}
    assert cli.main(["info", str(published), "run"]) == 0
    assert "step 500" in capsys.readouterr().out

    (tmp_path / "text.txt").write_text("Once upon a time")
    taken = []

    def kept(model, *data, **options):
        taken.append(model)
        raise pico_tg.PicoError("far enough")

    monkeypatch.setattr(cli, "evaluate", kept)
    monkeypatch.setattr(cli, "generate", kept)
    assert cli.main(["eval", str(published), "run", str(tmp_path / "text.txt")]) == 2
    assert cli.main(["run", str(published), "run"]) == 2
    weights = safetensors.numpy.load_file(GOLDEN / "small.safetensors")["norm.weight"]
    assert [np.array_equal(model.norm.weight.numpy(), weights) for model in taken] == [True, True]
    capsys.readouterr()

    assert cli.main(["eval", str(published), "run"]) == 2
    assert "give a DATASET" in capsys.readouterr().err
    with pytest.raises(pico_tg.PicoError, match=r"no training\.json of pico_tg"):  # as --resume
        read_description(published / "run")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_of_torch_s_safetensors(metadata, tmp_path):
    """In its order, which is not ours, with its padding, and bfloat16 where training used it."""
    golden = safetensors.numpy.load_file(GOLDEN / "small.safetensors")
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, array in golden.items():
        half = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        ends = [len(data), len(data) + len(half)]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": ends}
        data += half
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    model = pico_tg.Pico(pico_tg.Config.from_json(GOLDEN / "small.json"), fresh=False)
    pico_tg.load_weights(model, tmp_path / "w.safetensors")
    expected = (golden["norm.weight"].view(np.uint32) >> 16 << 16).view(np.float32)
    assert np.array_equal(model.norm.weight.numpy(), expected)


def test_what_we_write_is_what_it_reads(published, tmp_path):
    """Its names and no others, float32; and its nine keys of model.json."""
    model = pico_tg.load(published, "run")
    pico_tg.save_weights(model, tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    given = safetensors.numpy.load_file(GOLDEN / "small.safetensors")
    assert back.keys() == given.keys()
    assert all(back[name].dtype == np.float32 for name in back)
    assert all(np.array_equal(back[name], given[name]) for name in back)
    model.config.to_json(tmp_path / "model.json")
    assert json.loads((tmp_path / "model.json").read_text()) == json.loads(
        (GOLDEN / "small.json").read_text()
    )


def test_a_file_of_torch_save_is_named_as_such(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as file:
        file.writestr("archive/data.pkl", b"")
    model = pico_tg.Pico(pico_tg.Config.from_json(GOLDEN / "small.json"), fresh=False)
    with pytest.raises(pico_tg.PicoError, match=r"weights\.pt is .*a file of torch\.save.*interop"):
        pico_tg.load_weights(model, tmp_path / "weights.pt")


def interop(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples" / "interop.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_through_torch(published, tmp_path):
    """A fresh PyTorch model to here; the golden weights from a .pt to here, and back to PyTorch.

    The loss is the same on both sides, and that of the golden weights is the golden one.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    peers, example = (
        imported(ROOT / name)
        for name in ("examples/studies/bench_torch_peer.py", "examples/interop.py")
    )
    golden = np.load(GOLDEN / "small.npz")
    x = golden["x"]
    peer = peers.Pico(pico_tg.Config.from_json(GOLDEN / "small.json"), x.shape[1])
    windows = np.concatenate([x, x[:, :4]], axis=1)
    targets = np.lib.stride_tricks.sliding_window_view(windows[:, 1:], 4, axis=1).copy()

    def torch_loss() -> float:
        return peer(torch.tensor(windows, dtype=torch.long)).item()

    fresh = example.from_torch(peer.state_dict(), str(published), "fresh")
    assert loss(fresh, x, targets) == pytest.approx(torch_loss(), rel=1e-5)

    shutil.rmtree(published / "run")
    weights = safetensors.numpy.load_file(GOLDEN / "small.safetensors")
    torch.save({name: torch.from_numpy(a) for name, a in weights.items()}, tmp_path / "a.pt")
    done = interop("from-torch", tmp_path / "a.pt", published, "run")
    assert done.returncode == 0, done.stderr
    model = pico_tg.load(published, "run")
    assert loss(model, x, golden["targets"]) == pytest.approx(golden["loss"], rel=1e-5)
    done = interop("to-torch", published, "run", tmp_path / "b.pt")
    assert done.returncode == 0, done.stderr
    peer.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert torch_loss() == pytest.approx(loss(model, x, targets), rel=1e-5)

    state = peer.state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "a.pt")
    done = interop("from-torch", tmp_path / "a.pt", published, "other")
    assert done.returncode == 1
    assert "norm.weight is missing" in done.stderr
    assert "Traceback" not in done.stderr
