"""How many operations and kernels a training step of the README's model takes, without any run."""

import json
import os
import subprocess
import sys

import pytest

from pico_tg import Config
from pico_tg.flops import training_operations

CONFIG = Config.preset("xs", dim=372, latent_num_blocks=8, fb_att_window_size=32)
LENGTHS = (1024, 2048, 6144)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("operations")]
# schedules a forward and backward pass, and counts what its kernels would do; nothing is compiled
COUNT = """
import json, sys
import pico_tg
from pico_tg import Config, Pico
from pico_tg.kernels import by_hand
from pico_tg.model import loss_fn
from tinygrad import Device, Tensor, nn
from tinygrad.engine.realize import compile_linear, estimate_uop
from tinygrad.uop.ops import Ops

config = Config.preset("xs", dim=372, latent_num_blocks=8, fb_att_window_size=32)
Tensor.uniform = Tensor.randn = staticmethod(lambda *shape, **_: Tensor.empty(*shape))
model = Pico(config)
parameters = nn.state.get_parameters(model)
Device[Device.DEFAULT].renderer.compiler.compile_cached = lambda source: b""
found = {"by_hand": by_hand(Device.DEFAULT)}
if not found["by_hand"]:
    sys.argv = sys.argv[:1]
for length in map(int, sys.argv[1:]):
    x = Tensor.empty(1, length, dtype="uint8")
    targets = Tensor.empty(1, length, config.next_tokens, dtype="uint8")
    loss = loss_fn(*model(x), targets)[0]
    linear, _ = Tensor.linear_with_vars(loss, *loss.gradient(*parameters))
    calls = [c for c in compile_linear(linear).src if c.src[0].op is Ops.PROGRAM]
    found[length] = sum(estimate_uop(c).ops for c in calls), len(calls)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted():
    """{length: (operations, kernels)}."""
    command = [sys.executable, "-c", COUNT, *map(str, LENGTHS)]
    environment = os.environ | {"CACHELEVEL": "0"}  # what is not compiled must not be kept
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if not found.pop("by_hand"):
        pytest.skip("no kernels by hand here")
    return {int(length): tuple(pair) for length, pair in found.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_next_to_the_fewest_operations(counted, length):
    assert 1 < counted[length][0] / training_operations(CONFIG, length) <= 1.15


def test_cost_grows_as_the_mathematics_does(counted):
    """6.46 times from 1024 to 6144 bytes, more than 6: windows are not yet full at the shorter."""
    least = training_operations(CONFIG, 6144) / training_operations(CONFIG, 1024)
    assert counted[6144][0] / counted[1024][0] <= 1.02 * least


def test_kernels_of_a_step(counted):
    assert all(kernels <= 1100 for _, kernels in counted.values()), counted
