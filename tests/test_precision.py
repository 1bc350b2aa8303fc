"""--precision: what bfloat16 rounds, what it does not, and which devices choose it."""

import numpy as np
import pytest
from helpers import TINY as CONFIG
from helpers import WINDOWS, run_script
from references import (
    FORMS,
    PRODUCTS,
    check_product,
    expected_product,
    factors,
    product_and_gradients,
    round_to_bf16,
)
from tinygrad import Context, Device, Tensor, TinyJit, dtypes

from pico_tg import SOAP, matmul
from pico_tg.backend import machine, precision
from pico_tg.backend.precision import choose_precision
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.runs import read_description
from pico_tg.training import train

QUICK = WINDOWS | {"warmup_steps": 5, "learning_rate": 5e-3}


@pytest.mark.parametrize("kernels", "10")
def test_factors_are_rounded_and_nothing_else(kernels, monkeypatch):
    """Sums are float32, and gradients are matmuls of rounded factors as well."""
    monkeypatch.setenv("PICO_KERNELS", kernels)
    monkeypatch.setattr(matmul, "SMALL", 0)
    with Context(PICO_BF16=1):
        for form in FORMS if kernels == "0" else ["linear"]:
            check_product(form, PRODUCTS[3], round_to_bf16, tolerance=2e-6)


def test_jitted():
    jitted = TinyJit(lambda a, b: product_and_gradients("linear", a, b))
    with Context(PICO_BF16=1):
        for seed in range(4):
            a, b = factors("linear", PRODUCTS[1], seed)
            found = jitted(Tensor(a).clone().realize(), Tensor(b).clone().realize())
            expected = expected_product("linear", a, b, round_to_bf16)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("core", "precision", "optimizer"),
    [("sm_80", "bf16", 0), ("METAL", "bf16", 1), ("METAL", "fp32", 1)],
)
def test_tensor_cores_compute_all_three_products(core, precision, optimizer):
    """Forward and both gradients in tinygrad's emulators of CUDA's and Metal's, with odd sizes."""
    done = run_script("tensor_cores.py", precision, DEV=f"PYTHON::{core}")
    assert done.stdout == f"3 {optimizer}\n"


def test_auto_asks_the_hardware():
    assert choose_precision("auto", ("NULL",)) == "fp32"
    assert choose_precision("bf16", ("NULL",)) == "bf16"

    class Fake:
        def __init__(self, arch, renderer):
            self.renderer = renderer
            renderer.target = type("Target", (), {"arch": arch})

    def has_bf16(arch):
        """Asks with the tensor cores of tinygrad's own renderer of that architecture."""
        from tinygrad.codegen.opt import tc

        cores = tc.metal if arch.startswith("Apple") else tc.get_cuda(arch)
        fake = {"D": Fake(arch, type("Renderer", (), {"tensor_cores": cores}))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "Device", fake)
            with Context(TC=1):  # off on a CPU
                assert precision.has_tensor_cores("D", dtypes.float32) == arch.startswith("Apple")
                return precision.has_tensor_cores("D", dtypes.bfloat16)

    found = {arch: has_bf16(arch) for arch in ("sm_70", "sm_75", "sm_80", "sm_90")}
    assert found == {"sm_70": False, "sm_75": False, "sm_80": True, "sm_90": True}
    found = {arch: has_bf16(arch) for arch in ("Apple7", "Apple8", "Apple9", "Apple10")}
    assert found == {"Apple7": False, "Apple8": False, "Apple9": True, "Apple10": True}


@pytest.mark.slow(minutes=1)
def test_losses_are_within_a_hundredth_over_80_steps():
    """Of 20-step averages: single steps differ more, since training amplifies any rounding."""
    curves = {}
    for kind in ("fp32", "bf16"):
        settings = QUICK | {"optimizer": "adamw", "precision": kind, "validation_bytes": 2000}
        records = train(
            Pico(CONFIG, seed=0), "python-docs", max_steps=80, settings="published", **settings
        )
        curves[kind] = np.array([record["loss"] for record in records])
    fp32, bf16 = (curve.reshape(4, 20).mean(axis=1) for curve in curves.values())
    assert fp32[-1] < 0.75 * fp32[0]  # it learns
    assert not np.array_equal(fp32, bf16)
    assert np.abs(bf16 / fp32 - 1).max() < 0.01


@pytest.mark.slow
def test_the_optimizer_stays_in_float32(monkeypatch):
    """SOAP's matmuls too, whatever the precision of the model's matmuls."""
    monkeypatch.setattr(matmul, "SMALL", 0)
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
    train(
        Pico(CONFIG), str(path), run, settings="published", **QUICK
    )  # nothing is trained until the first record
    here = "bf16" if precision.has_tensor_cores(Device.DEFAULT, dtypes.bfloat16) else "fp32"
    assert read_description(run)["settings"]["precision"] == here
    other = {"fp32": "bf16", "bf16": "fp32"}[here]
    with pytest.raises(PicoError, match=f"precision was {here}, now {other}"):
        train(Pico(CONFIG), None, run, resume=True, precision=other)
    train(Pico(CONFIG), None, run, resume=True, precision="auto")  # no difference
    assert read_description(run)["settings"]["precision"] == here


def test_asked_inside_a_tinygrad_function():
    """tinygrad 0.13 lets no device be opened there; a matmul may be the first to ask."""
    with Context(ALLOW_DEVICE_USAGE=0):
        assert precision.has_tensor_cores("NULL", dtypes.float32) is False
