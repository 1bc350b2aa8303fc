"""How many operations and kernels a training step takes, counted without running it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pico_tg import Config
from pico_tg.costs import training_flops

# the README's model
SIZES = {"dim": 372, "fb_att_window_size": 32, "latent_num_blocks": 8}
LENGTHS = (1024, 6144)
SCRIPT = Path(__file__).parent / "scripts" / "count_operations.py"


@pytest.mark.slow(minutes=1)
def test_operations_are_close_to_the_model_flops():
    """Within 1.15 of the model FLOPs of `pico_tg.costs`; one test, since counting takes long."""
    command = [sys.executable, SCRIPT, json.dumps([SIZES, LENGTHS])]
    environment = os.environ | {"CACHELEVEL": "0"}  # nothing is compiled: keep nothing
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    counted = {int(length): pair for length, pair in json.loads(done.stdout).items()}
    if not counted:
        pytest.skip("no CPU kernels here")
    config = Config(**SIZES)
    least = {length: training_flops(config, length) for length in LENGTHS}
    ratios = {length: counted[length][0] / least[length] for length in LENGTHS}
    print(ratios, counted)
    assert all(1 < ratio <= 1.15 for ratio in ratios.values()), ratios
    # as the model FLOPs: more than 6 times, since at 1024 bytes the windows are not yet full
    growth = counted[6144][0] / counted[1024][0]
    assert growth <= 1.02 * least[6144] / least[1024], growth
    assert all(kernels <= 1180 for _, kernels in counted.values()), counted
