"""A run continued on another device, against the CPU.

WebGPU is a real driver: Dawn (the extra `webgpu`) on Vulkan. It needs no GPU: Mesa's lavapipe is a
Vulkan driver for any CPU (Debian: mesa-vulkan-drivers and libvulkan1). METAL is metal_device.py,
which needs clang (the extra `clang`). test_backends.py has a test of OpenCL: here, pocl would
compile for two minutes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import metal_device
import pytest
from helpers import FOX, TINY, WINDOWS, Watch

import pico_tg

TESTS = Path(__file__).parent
STEPS, BEFORE = 70, 50  # steps of the run; steps before the devices continue it
SETTINGS = WINDOWS | {"max_steps": STEPS, "warmup_steps": 5, "learning_rate": 0.01, "epochs": 99}
SETTINGS |= {"checkpoint_interval": 10}


def on_device(device: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python command with DEV=`device`."""
    paths = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "DEV": device}
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def check_webgpu() -> None:
    """Skip the test if WebGPU cannot compute here."""
    check = "from pico_tg.backend.device import check_backend; check_backend()"
    if (done := on_device("WEBGPU", "-c", check)).returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])


def check_metal() -> None:
    """Skip the test without clang."""
    if metal_device.find_clang() is None:
        pytest.skip(metal_device.NO_CLANG)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, str]:
    """A model folder whose run `first` stopped after `BEFORE` steps, and its text."""
    folder, losses = tmp_path_factory.mktemp("model"), []
    (folder / "model.json").write_text(json.dumps(TINY.to_dict()))
    text = folder / "text.txt"
    text.write_text(FOX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(folder / "cache"))
        run = pico_tg.train(
            pico_tg.Pico(TINY, seed=0), str(text), folder / "first",
            events=Watch(lambda: len(losses) == BEFORE - 1), settings="published", **SETTINGS,
        )  # fmt: skip
        for record in run:
            losses.append(record["loss"])
    assert len(losses) == BEFORE
    return folder, str(text)


def measure(device: str, runner: list[str], stopped: tuple[Path, str], folder: Path) -> dict:
    """What tests/scripts/continue_run.py prints on `device`, run by the script `runner`, if any."""
    shutil.copytree(stopped[0], folder)
    script = TESTS / "scripts" / "continue_run.py"
    done = on_device(device, *runner, str(script), str(folder), "first", stopped[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def on_cpu(stopped, tmp_path_factory) -> dict:
    return measure("CPU", [], stopped, tmp_path_factory.mktemp("continued") / "CPU")


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize(
    ("device", "runner", "check", "backend"),
    [
        ("WEBGPU", [], check_webgpu, "backend WEBGPU"),
        ("METAL::Apple7", [metal_device.__file__], check_metal, "backend METAL"),
    ],
)
def test_training_and_decoding(device, runner, check, backend, request, tmp_path):
    """Train, resume, validate, decode."""
    check()
    on_cpu = request.getfixturevalue("on_cpu")  # not before it is known that the device is here
    stopped = request.getfixturevalue("stopped")
    found = measure(device, runner, stopped, tmp_path / "copy")
    assert found["backend"].startswith(backend)
    assert found["bits_per_byte"] == pytest.approx(on_cpu["bits_per_byte"], rel=1e-4)
    assert len(found["losses"]) == STEPS - BEFORE
    assert found["losses"] == pytest.approx(on_cpu["losses"], rel=1e-4)
    assert found["losses"][-1] < found["losses"][0]
    assert bytes.fromhex(found["text"]).startswith(b"quick brown fo")
    assert found["text"] == on_cpu["text"]
    # the steps from the last checkpoint but one, done again
    assert found["steps_again"] == 10
    assert found["same"]


@pytest.mark.skipif(sys.platform != "linux", reason="Dawn has another driver than Vulkan")
@pytest.mark.skipif(importlib.util.find_spec("pydawn") is None, reason="needs the extra webgpu")
def test_webgpu_without_a_driver_is_an_error():
    """Dawn then launches kernels that compute nothing."""
    done = on_device("WEBGPU", "-m", "pico_tg", "info", "nowhere", VK_ICD_FILENAMES="/nowhere")
    assert done.returncode == 2
    assert "no GPU; install its driver" in done.stderr.splitlines()[-1]
