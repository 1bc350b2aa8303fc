"""CUDA, Metal and OpenCL without their devices: kernels are rendered for them, none too big.

tinygrad's NULL device schedules and renders, and runs nothing. NVIDIA's compiler (cuda_compiler.py)
and clang (metal_device.py) compile the kernels, where they are installed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import cuda_compiler
import metal_device
import pytest
from helpers import TESTS, TINY, run_script
from tinygrad import Device


def check_metal(sources: list[str]) -> None:
    """Valid for clang, and within Metal's limits."""
    if metal_device.find_clang() is None:
        pytest.skip(f"rendered, not compiled: {metal_device.NO_CLANG}")
    metal_device.compile_kernels(sources)


def check_cuda(*architectures: str) -> Callable[[list[str]], None]:
    def check(sources: list[str]) -> None:
        """No register is spilled, no thread uses the stack."""
        if cuda_compiler.find_nvrtc() is None:
            pytest.skip(f"rendered, not compiled: {cuda_compiler.NO_NVRTC}")
        for architecture in architectures:
            for name, usage in cuda_compiler.compile_kernels(sources, architecture).items():
                assert usage.spilled == usage.stack == 0, (architecture, name, usage)
                assert usage.registers <= 168, (architecture, name, usage)
                assert usage.shared <= 48 << 10, (architecture, name, usage)

    return check


@pytest.mark.slow(minutes=0.5)
@pytest.mark.parametrize(
    ("device", "precision", "tensor_cores", "share", "marks", "check"),
    [
        # without tensor cores for float32, and none for bfloat16: fp32 is the default
        ("CUDA:sm_75", "fp32", 0, 0, ("__global__",), check_cuda("sm_75")),
        ("CUDA:sm_80", "bf16", 12, 0.875, ("mma.sync",), check_cuda("sm_80", "sm_90")),
        # M1, and M3
        ("METAL:Apple7", "fp32", 12, 0.914, ("simdgroup_float8x8",), check_metal),
        ("METAL:Apple9", "bf16", 12, 0.875, ("simdgroup_bfloat8x8",), check_metal),
    ],
)
def test_kernels_of_a_step_and_a_pass_on(device, precision, tensor_cores, share, marks, check):
    # NULL has no limit of its own; on METAL tinygrad keeps to 31 by itself; JIT=2: no graphs
    limits = {"NULL_ALLOW_COPYOUT": "1", "MAX_KERNEL_BUFFERS": "31", "JIT": "2"}
    found = json.loads(
        run_script("gpu_kernels.py", precision, DEV=f"NULL:{device}", **limits).stdout
    )
    assert found["train"] > 100
    assert found["decode_without_latent"] > 20
    # nothing is computed, so the router selects nothing; the latent block runs all the same
    assert found["decode"] >= found["decode_without_latent"] + 10
    # four products of a block, forward and twice backward
    assert found["on_tensor_cores"] >= tensor_cores
    # of all operations, the optimizer's and the element-wise ones included
    assert found["share"] >= share
    assert 20 < found["buffers"] <= 31
    assert len(found["sources"]) > 200
    assert all(mark in found["sources"][0] for mark in marks)
    check(found["sources"])


@pytest.mark.slow
def test_a_pass_on_a_gpu_is_one_graph_and_one_wait():
    found = json.loads(run_script("count_launches.py", DEV="NULL", NULL_ALLOW_COPYOUT="1").stdout)
    once = {"graphs": 1, "reads": 1, "writes": 1}
    assert found == {"1": once, "4": once}


@pytest.mark.slow
def test_no_kernel_of_a_step_leaves_a_gpu_idle():
    """The table of kernels with few workgroups and long loops is empty, at 2304 bytes."""
    arguments = "2304", "1", "fp32", json.dumps(TINY.to_dict())
    script = "../../examples/studies/gpu_kernels.py"
    found = run_script(script, *arguments, DEV="NULL:METAL:Apple9").stdout
    assert found.rstrip().endswith("|---|---|---|---|---|---|---|---|")


def forward_and_backward(*steps: str, **environment: str) -> list[float]:
    """The loss and the size of each gradient; then the loss before each of `steps` steps."""
    return [float(x) for x in run_script("training_step.py", *steps, **environment).stdout.split()]


@pytest.fixture(scope="module")
def here() -> list[float]:
    return forward_and_backward()


@pytest.mark.slow
def test_tensor_cores_of_cuda_compute_what_the_default_device_does(here):
    """In tinygrad's emulator."""
    found = forward_and_backward(DEV="PYTHON::sm_80", PICO_BF16="1")
    assert found == pytest.approx(here, rel=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(metal_device.find_clang() is None, reason=metal_device.NO_CLANG)
def test_metal_in_bf16_computes_what_the_default_device_does(here):
    """In metal_device.py; test_drivers.py trains and decodes there in fp32."""
    script = str(TESTS / "scripts" / "training_step.py")
    done = run_script("../metal_device.py", script, DEV="METAL::Apple9", PICO_BF16="1")
    assert [float(x) for x in done.stdout.split()] == pytest.approx(here, rel=2e-2)


@pytest.fixture(scope="module")
def opencl() -> str:
    """The name of an OpenCL device; Debian's pocl-opencl-icd is one on any CPU."""
    name = "from tinygrad import Device; print(Device['CL'].device_name)"
    done = subprocess.run([sys.executable, "-c", name], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no OpenCL device here (apt-get install pocl-opencl-icd ocl-icd-libopencl1)")
    return done.stdout


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="DEV, or an accelerator, comes first")
def test_opencl_on_a_cpu_is_not_preferred(opencl):
    if not opencl.startswith(("pthread", "cpu")):
        pytest.skip(f"not pocl: {opencl}")
    env = {name: value for name, value in os.environ.items() if name != "DEV"}
    command = [sys.executable, "-c", "import pico_tg, tinygrad; print(tinygrad.Device.DEFAULT)"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "CPU\n", done.stderr


@pytest.mark.slow
def test_opencl_computes_what_the_default_device_does(opencl):
    *found, moved = forward_and_backward("3", DEV="CL")
    *expected, expected_moved = forward_and_backward("3")
    assert found == pytest.approx(expected, rel=1e-4)
    # by SOAP's first update, which also moves weights whose gradient is only rounding
    gain = expected[-1] - expected_moved
    assert gain > 0.03
    assert found[-1] - moved == pytest.approx(gain, rel=2e-2)
