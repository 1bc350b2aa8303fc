"""How many operations and kernels a training step takes, counted without running it."""

import json

import pytest
from helpers import run_script

from pico_tg import Config
from pico_tg.costs import training_flops

# the README's model
SIZES = {"dim": 372, "fb_att_window_size": 32, "latent_num_blocks": 8}
LENGTHS = (1024, 6144)


@pytest.mark.slow(minutes=1)
def test_operations_are_close_to_the_model_flops():
    """Within 1.15 of the model FLOPs of `pico_tg.costs`; one test, since counting takes long."""
    arguments = json.dumps([SIZES, LENGTHS])
    # nothing is compiled: keep nothing
    done = run_script("count_operations.py", arguments, CACHELEVEL="0")
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
    # (and the deep blocks' bytes are one block, of which only the visible half is computed)
    assert growth <= 1.03 * least[6144] / least[1024], growth
    assert all(kernels <= 821 for _, kernels in counted.values()), counted
