"""--precision: what bfloat16 rounds, what it does not, and where matrix units take it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_ops import FORMS, SHAPES, inputs, value_and_gradients
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.helpers import Context

from pico_tg import SOAP, ops, precision
from pico_tg.config import Config, TrainSettings
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.precision import choose_precision
from pico_tg.runs import read_description
from pico_tg.training import train

CONFIG = Config(
    dim=48,
    next_tokens=2,
    att_q_heads=4,
    att_kv_heads=2,
    fb_num_blocks=1,
    fb_att_window_size=8,
    latent_capacity_factor=0.25,
    latent_num_blocks=1,
    latent_att_window_size=16,
)
QUICK = {"context_len": 128, "batch_size": 4, "warmup_steps": 5, "learning_rate": 5e-3}


def rounded(x):
    """float32 to the nearest bfloat16, ties to even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def expected(form, a, b):
    """Products of rounded factors, also in the gradients of the weighted sum."""
    a, b = rounded(a), rounded(b)
    right = b if form == "matmul" else b.swapaxes(-1, -2)
    out = a @ right
    g = rounded(np.arange(out.size).reshape(out.shape) % 7 - 3)
    d_right = a.swapaxes(-1, -2) @ g
    if form == "linear":
        d_right = d_right.reshape(-1, *d_right.shape[-2:]).sum(0)
    d_b = d_right if form == "matmul" else d_right.swapaxes(-1, -2)
    return out, g @ right.swapaxes(-1, -2), d_b


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[1:6:2], ids=str)
@pytest.mark.parametrize("scheduled", [True, False])
def test_factors_are_rounded_and_nothing_else(form, shape, scheduled, monkeypatch):
    monkeypatch.setattr(ops, "SMALL", 0 if scheduled else 1 << 60)
    a, b = inputs(form, shape)
    with Context(PICO_BF16=1):
        found = value_and_gradients(form, *(Tensor(x).clone().realize() for x in (a, b)))
    for ours, theirs in zip(found, expected(form, a, b), strict=True):
        assert ours.dtype == Tensor.ones(1).dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_jitted():
    jitted = TinyJit(lambda a, b: value_and_gradients("linear", a, b))
    with Context(PICO_BF16=1):
        for seed in range(4):
            a, b = inputs("linear", SHAPES[1], seed)
            found = jitted(Tensor(a).clone().realize(), Tensor(b).clone().realize())
            for ours, theirs in zip(found, expected("linear", a, b), strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)


EMULATED = """
import sys
import numpy as np
import test_ops, test_precision
from pico_tg.ops import bmm
from test_ops import SHAPES, inputs, value_and_gradients
from tinygrad import Tensor
from tinygrad.helpers import Context
from tinygrad.runtime.ops_python import PythonProgram
from tinygrad.uop.ops import Ops

on_units = set()
before = PythonProgram.__init__

def watch(self, *args, **kwargs):
    before(self, *args, **kwargs)
    if any(uop[0] is Ops.WMMA for uop in self.uops):
        on_units.add(id(self))

PythonProgram.__init__ = watch
bf16 = sys.argv[1] == "bf16"
a, b = inputs("matmul_transposed", SHAPES[4])
with Context(PICO_BF16=int(bf16)):
    found = value_and_gradients("matmul_transposed", *(Tensor(x).realize() for x in (a, b)))
expected = (test_precision if bf16 else test_ops).expected("matmul_transposed", a, b)
for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
count = len(on_units)
a, b = a.reshape(6, 19, 13), b.reshape(6, 23, 13)  # the optimizer's products are of float32
ours, theirs = bmm(Tensor(a), Tensor(b).transpose(1, 2)).numpy(), a @ b.swapaxes(1, 2)
np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
print(count, len(on_units) - count)
"""


@pytest.mark.parametrize(
    ("unit", "precision", "optimizer"),
    [("sm_80", "bf16", 0), ("METAL", "bf16", 1), ("METAL", "fp32", 1)],
)
def test_matrix_units_take_all_three_products(unit, precision, optimizer):
    """tinygrad's emulators of CUDA's and Metal's: sizes that do not divide, and both gradients."""
    tests = os.path.dirname(__file__)
    env = os.environ | {"DEV": f"PYTHON::{unit}", "PYTHONPATH": tests}
    command = [sys.executable, "-c", EMULATED, precision]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 {optimizer}\n"


def test_auto_asks_the_hardware():
    assert choose_precision("auto", ("NULL",)) == "fp32"
    assert choose_precision("bf16", ("NULL",)) == "bf16"

    class Fake:
        def __init__(self, arch, renderer):
            self.renderer = renderer
            renderer.target = type("Target", (), {"arch": arch})

    def units(arch):
        """What tinygrad's own renderer of that architecture has."""
        from tinygrad.codegen.opt import tc

        cores = tc.metal if arch.startswith("Apple") else tc.get_cuda(arch)
        fake = {"D": Fake(arch, type("Renderer", (), {"tensor_cores": cores}))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "Device", fake)
            with Context(TC=1):  # off on a CPU
                assert precision.has_tensor_cores("D", dtypes.float32) == arch.startswith("Apple")
                return precision.has_bf16_tensor_cores("D")

    found = {arch: units(arch) for arch in ("sm_70", "sm_75", "sm_80", "sm_90")}
    assert found == {"sm_70": False, "sm_75": False, "sm_80": True, "sm_90": True}
    found = {arch: units(arch) for arch in ("Apple7", "Apple8", "Apple9", "Apple10")}
    assert found == {"Apple7": False, "Apple8": False, "Apple9": True, "Apple10": True}


@pytest.mark.slow
def test_losses_are_within_a_hundredth_over_100_steps():
    """Averages of 20 steps: single ones part further, since training amplifies any rounding."""
    curves = {}
    for kind in ("fp32", "bf16"):
        settings = QUICK | {"optimizer": "adamw", "precision": kind, "validation_bytes": 2000}
        records = train(Pico(CONFIG, seed=0), "python-docs", max_steps=100, **settings)
        curves[kind] = np.array([record["loss"] for record in records])
    fp32, bf16 = (curve.reshape(5, 20).mean(axis=1) for curve in curves.values())
    assert fp32[-1] < 0.75 * fp32[0]  # it learns
    assert not np.array_equal(fp32, bf16)
    assert np.abs(bf16 / fp32 - 1).max() < 0.01


def test_the_optimizer_stays_in_float32(monkeypatch):
    """Its products too, whatever the precision of the model's."""
    monkeypatch.setattr(ops, "SMALL", 0)
    rng = np.random.default_rng(0)
    found = []
    for bf16 in (0, 1):
        rng = np.random.default_rng(0)
        p = Tensor(rng.standard_normal((24, 40)).astype(np.float32)).clone().realize()
        optimizer = SOAP([p], lr=1e-2)
        with Tensor.train(), Context(PICO_BF16=bf16):
            for _ in range(12):
                p.grad = Tensor(rng.standard_normal((24, 40)).astype(np.float32))
                optimizer.step()
        found.append([p.numpy(), *(t.numpy() for t in optimizer.state_dict().values())])
    for fp32, bf16 in zip(*found, strict=True):
        np.testing.assert_array_equal(fp32, bf16)


def test_the_precision_is_recorded_and_kept(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 90)
    run = tmp_path / "run"
    train(Pico(CONFIG), str(path), run, **QUICK)  # nothing is trained until the first record
    here = "bf16" if precision.has_bf16_tensor_cores(Device.DEFAULT) else "fp32"
    assert read_description(run)["settings"]["precision"] == here
    other = {"fp32": "bf16", "bf16": "fp32"}[here]
    with pytest.raises(PicoError, match=f"precision was {here}, now {other}"):
        train(Pico(CONFIG), None, run, resume=True, precision=other)
    with pytest.raises(PicoError, match="no checkpoint to resume from"):  # and no difference
        train(Pico(CONFIG), None, run, resume=True, precision="auto")


def test_a_precision_that_is_none():
    with pytest.raises(PicoError, match="precision must be auto or fp32 or bf16"):
        TrainSettings(precision="fp16")
