"""Print how many graphs of steps and validations this process builds, and their results.

With the argument "script": as a script whose functions may be replaced; only one kind of step.
"""

import functools
import sys
from pathlib import Path

import numpy as np

import pico_tg
from pico_tg import Config, Pico, TrainSettings
from pico_tg.evaluation import CausalPass
from pico_tg.training import TrainStep

made = []


def count(kind, name):
    method = getattr(kind, name)
    setattr(kind, name, functools.wraps(method)(lambda *args: made.append(name) or method(*args)))


for name in ("_whole_step", "_accumulate", "_update"):
    count(TrainStep, name)
count(CausalPass, "_graph")
pico_tg.enable_compile_cache("script" not in sys.argv)
config = Config(dim=16, att_q_heads=2, att_kv_heads=1, fb_num_blocks=1, latent_num_blocks=1)
rng, numbers = np.random.default_rng(0), []
kinds = [(1, "soap", 0.1), (1, "soap", 0.5), (2, "adamw", 0.1)]
for micro_batches, optimizer, weight_decay in kinds[:1] if "script" in sys.argv else kinds:
    model = Pico(config, seed=0)
    settings = {"optimizer": optimizer, "grad_accumulation_steps": micro_batches}
    step = TrainStep(model, TrainSettings(weight_decay=weight_decay, **settings))
    for number in range(4):
        batches = rng.integers(0, 256, (micro_batches, 2, 24 + config.next_tokens), np.uint8)
        numbers += step(batches, 0.05).tolist()
        if number == 1:  # as a resumed run does
            step.load_state(step.state(), Path())
measure = CausalPass(model, 24, TrainSettings(), ("nats",))
numbers.append(float(measure(batches[0, :, :25], np.full(2, 24))["nats"].sum()))
print(len(made), numbers)
