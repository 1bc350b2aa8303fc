"""Print how many graphs of steps and validations this process builds, and their results."""

import functools
import sys

import numpy as np

import pico_tg
from pico_tg import Config, Pico, TrainSettings
from pico_tg.backend import jit_cache
from pico_tg.evaluation import CausalPass
from pico_tg.training import TrainStep

made = []


def count(kind, name):
    method = getattr(kind, name)
    setattr(kind, name, functools.wraps(method)(lambda *args: made.append(name) or method(*args)))


count(TrainStep, "_whole_step")
count(CausalPass, "_graph")
pico_tg.enable_compile_cache()
jit_cache.command_line = "script" not in sys.argv
config = Config(dim=16, att_q_heads=2, att_kv_heads=1, fb_num_blocks=1, latent_num_blocks=1)
rng, numbers = np.random.default_rng(0), []
for weight_decay in (0.1, 0.5):
    model = Pico(config, seed=0)
    step = TrainStep(model, TrainSettings(weight_decay=weight_decay, router_warmup_steps=0))
    for _ in range(4):
        batches = rng.integers(0, 256, (1, 2, 24 + config.next_tokens), np.uint8)
        numbers += step(batches, 0.05).tolist()
measure = CausalPass(model, 24, TrainSettings(), ("nats",))
numbers.append(float(measure(batches[0, :, :25], np.full(2, 24))["nats"].sum()))
print(len(made), numbers)
