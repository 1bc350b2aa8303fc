"""A captured graph is replayed in a forked child while the parent's helper threads wait."""

import os

import numpy as np
from tinygrad import Tensor

import pico_tg
from pico_tg.backend.runtime import read
from pico_tg.decoder import Decoder

config = pico_tg.Config(dim=48, att_q_heads=4, att_kv_heads=2, latent_num_blocks=1, next_tokens=2)
decoder = Decoder(pico_tg.Pico(config, seed=0))


def logits():
    decoder.reset()
    for byte in b"abcdef":
        found = decoder.forward(bytes([byte]))[0]
    return found


expected = logits()
assert all(graph.replay is not None for graph in decoder.graphs.values())
assert read(Tensor([1.0]).realize())[0] == 1


def check(name):
    same = all(np.array_equal(logits(), expected) for _ in range(50))
    print(name, "same" if same else "different", flush=True)


child = os.fork()
if child == 0:
    check("child")
    os._exit(0)
os.waitpid(child, 0)
check("parent")
