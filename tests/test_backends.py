"""CUDA, Metal and OpenCL without their devices: all kernels are made for them, none too big.

tinygrad's NULL device schedules and renders and runs nothing. Where NVIDIA's compiler is installed
(NVRTC_PATH; pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12), it compiles them as well.
"""

import json
import os
import subprocess
import sys

import pytest

MADE = """
import json, os, sys, types
import numpy as np
from tinygrad.device import Compiler
from tinygrad.runtime.support import compiler_cuda

# compilers that are not here: the source is enough
if "NVRTC_PATH" not in os.environ:
    compiler_cuda.NVRTCCompiler = lambda *args, **options: Compiler()
sys.modules["tinygrad.runtime.ops_metal"] = types.SimpleNamespace(MetalCompiler=Compiler)

from tinygrad import Tensor
from tinygrad.engine import realize
from tinygrad.uop.ops import Ops

from pico_tg import Config, Decoder, Pico, TrainSettings, generate
from pico_tg.soap import all_finite
from pico_tg.training import TrainStep
from test_cli import TINY

kernels, before = [], realize.estimate_uop

def watch(call):  # called for each kernel that is run
    estimate, program = before(call), call.src[0]
    if program.op is Ops.PROGRAM:
        on_units = any(uop.op is Ops.WMMA for uop in program.toposort())
        source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
        kernels.append((len(program.arg.globals), on_units, estimate.ops, source))
    return estimate

realize.estimate_uop = watch
# no side divides: dim 83, heads of 41, as odd as the README's 372 and 41
awkward = {"dim": 83, "att_q_heads": 2, "att_kv_heads": 1}
model = Pico(Config(**TINY | awkward), fresh=False)
kernels.clear()
settings = TrainSettings(context_len=1024, batch_size=8, precision=sys.argv[1])
TrainStep(model, settings)(np.zeros((1, 8, 1026), np.uint8), 1e-3)
train, kernels = kernels, []
# nothing is computed: all bytes would stay out of the latent blocks
sys.modules["pico_tg.decoder"].read = lambda x: np.ones(x.shape, np.float32)
decoder = Decoder(model)
decoder.forward(b"abc")
decode, kernels = kernels, []
Tensor.realize(all_finite([Tensor.empty(4, 4 + i) for i in range(90)]))  # of a deep model
print(json.dumps({
    "train": len(train), "decode": len(decode), "selected": decoder.selected,
    "on_units": sum(on for _, on, _, _ in train),
    "share": sum(work for _, on, work, _ in train if on) / sum(work for _, _, work, _ in train),
    "buffers": max(count for count, *_ in (*train, *decode, *kernels)),
    "sources": [source for _, on, _, source in train if on][:1],
}))
"""


@pytest.mark.parametrize(
    ("device", "precision", "share", "marks"),
    [
        ("NULL:CUDA:sm_80", "bf16", 0.876, ("__global__", "mma.sync")),
        ("NULL:METAL:Apple9", "fp32", 0.914, ("kernel void", "simdgroup_float8x8")),
    ],
)
def test_a_step_and_a_pass_are_made_for(device, precision, share, marks):
    env = os.environ | {"DEV": device, "PYTHONPATH": os.path.dirname(__file__)}
    # NULL has no limit of its own; on METAL tinygrad keeps to this one by itself; JIT=2: no graphs
    env |= {"NULL_ALLOW_COPYOUT": "1", "MAX_KERNEL_BUFFERS": "31", "JIT": "2"}
    command = [sys.executable, "-c", MADE, precision]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["train"] > 100
    assert found["decode"] > 20
    assert found["selected"] == 3  # the latent blocks' kernels are among them
    # each of a block's four products, forward and twice backward
    assert found["on_units"] >= 12
    # of all operations, the optimizer's and the element-wise ones included
    assert found["share"] >= share
    assert 20 < found["buffers"] <= 31
    (source,) = found["sources"]
    assert all(mark in source for mark in marks)


STEP = """
import sys
import numpy as np
from pico_tg import Config, Pico, TrainSettings
from pico_tg.model import loss_fn
from pico_tg.model import inputs_and_targets
from pico_tg.training import TrainStep
from test_cli import TINY
from tinygrad import Tensor, nn

rng = np.random.default_rng(0)
model = Pico(Config(**TINY | {"dim": 16}), fresh=False)
for _, weight in sorted(nn.state.get_state_dict(model).items()):
    weight.assign(Tensor((rng.standard_normal(weight.shape) * 0.3).astype(np.float32))).realize()
windows = Tensor(rng.integers(0, 256, (1, 32 + model.config.next_tokens), np.uint8)).realize()
x, targets = inputs_and_targets(windows, model.config.next_tokens)
loss = loss_fn(*model(x), targets)[0]
gradients = loss.gradient(*nn.state.get_parameters(model))
Tensor.realize(loss, *gradients)
print(loss.item(), *[float(np.abs(g.numpy()).sum()) for g in gradients])
if sys.argv[1:]:
    settings = TrainSettings(context_len=32, batch_size=1, precision="fp32")
    step, batches = TrainStep(model, settings), windows.numpy()[None]
    print(*[float(step(batches, 1e-2)[0]) for _ in range(int(sys.argv[1]))])
"""


def forward_and_backward(*steps: str, **environment: str) -> list[float]:
    """The loss, and how large each gradient is; then the loss before each of so many steps."""
    env = os.environ | {"PYTHONPATH": os.path.dirname(__file__)} | environment
    command = [sys.executable, "-c", STEP, *steps]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(x) for x in done.stdout.split()]


@pytest.fixture(scope="module")
def here() -> list[float]:
    return forward_and_backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "bf16", "tolerance"), [("PYTHON::sm_80", "1", 2e-2), ("PYTHON::METAL", "0", 1e-4)]
)
def test_matrix_units_compute_what_the_default_device_does(device, bf16, tolerance, here):
    """In tinygrad's emulators of them."""
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
    # SOAP's first update, which also moves where the gradient is but rounding
    gain = expected[-1] - expected_moved
    assert gain > 0.03
    assert found[-1] - moved == pytest.approx(gain, rel=2e-2)
