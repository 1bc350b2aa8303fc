"""CUDA, Metal and OpenCL without their devices: kernels are rendered for them, none too big.

tinygrad's NULL device schedules and renders, and runs nothing. Where NVIDIA's compiler is installed
(NVRTC_PATH; pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12), it compiles them as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

TESTS = Path(__file__).parent


def run_script(name: str, *args: str, **environment: str) -> str:
    """Standard output of one of tests/scripts."""
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"} | environment
    command = [sys.executable, TESTS / "scripts" / name, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision", "share", "marks"),
    [
        ("NULL:CUDA:sm_80", "bf16", 0.875, ("__global__", "mma.sync")),
        ("NULL:METAL:Apple9", "fp32", 0.914, ("kernel void", "simdgroup_float8x8")),
    ],
)
def test_kernels_of_a_step_and_a_pass_on(device, precision, share, marks):
    # NULL has no limit of its own; on METAL tinygrad keeps to 31 by itself; JIT=2: no graphs
    limits = {"NULL_ALLOW_COPYOUT": "1", "MAX_KERNEL_BUFFERS": "31", "JIT": "2"}
    found = json.loads(run_script("gpu_kernels.py", precision, DEV=device, **limits))
    assert found["train"] > 100
    assert found["decode_without_latent"] > 20
    # nothing is computed, so the router selects nothing; the latent block runs all the same
    assert found["decode"] >= found["decode_without_latent"] + 10
    # four products of a block, forward and twice backward
    assert found["on_tensor_cores"] >= 12
    # of all operations, the optimizer's and the element-wise ones included
    assert found["share"] >= share
    assert 20 < found["buffers"] <= 31
    (source,) = found["sources"]
    assert all(mark in source for mark in marks)


@pytest.mark.slow
def test_a_pass_on_a_gpu_is_one_graph_and_one_wait():
    found = json.loads(run_script("count_launches.py", DEV="NULL", NULL_ALLOW_COPYOUT="1"))
    once = {"graphs": 1, "reads": 1, "writes": 1}
    assert found == {"1": once, "8": once}


@pytest.mark.slow
def test_no_kernel_of_a_step_leaves_a_gpu_idle():
    """The table of kernels with few workgroups and long loops is empty, at 2304 bytes."""
    arguments = "2304", "1", "fp32", json.dumps(TINY.to_dict())
    script = "../../examples/studies/gpu_kernels.py"
    found = run_script(script, *arguments, DEV="NULL:METAL:Apple9")
    assert found.rstrip().endswith("|---|---|---|---|---|---|---|---|")


def forward_and_backward(*steps: str, **environment: str) -> list[float]:
    """The loss and the size of each gradient; then the loss before each of `steps` steps."""
    return [float(x) for x in run_script("training_step.py", *steps, **environment).split()]


@pytest.fixture(scope="module")
def here() -> list[float]:
    return forward_and_backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "bf16", "tolerance"), [("PYTHON::sm_80", "1", 2e-2), ("PYTHON::METAL", "0", 1e-4)]
)
def test_tensor_cores_compute_what_the_default_device_does(device, bf16, tolerance, here):
    """In tinygrad's emulators of CUDA's and Metal's tensor cores."""
    found = forward_and_backward(DEV=device, PICO_BF16=bf16)
    assert found == pytest.approx(here, rel=tolerance)


@pytest.mark.slow
def test_opencl_computes_what_the_default_device_does():
    """Needs an OpenCL device; Debian's pocl-opencl-icd is one on any CPU."""
    open_it = [sys.executable, "-c", "from tinygrad import Device; Device['CL']"]
    if subprocess.run(open_it, capture_output=True).returncode:
        pytest.skip("no OpenCL device here (apt-get install pocl-opencl-icd brings one)")
    *found, moved = forward_and_backward("3", DEV="CL")
    *expected, expected_moved = forward_and_backward("3")
    assert found == pytest.approx(expected, rel=1e-4)
    # by SOAP's first update, which also moves weights whose gradient is only rounding
    gain = expected[-1] - expected_moved
    assert gain > 0.03
    assert found[-1] - moved == pytest.approx(gain, rel=2e-2)
