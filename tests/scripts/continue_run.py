"""Decode with the weights of an interrupted run, finish the run, and repeat its last steps.

Arguments: PATH, RUN and the text that the run is trained on. The repeated steps are those after the
last checkpoint but one. Prints JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np

import pico_tg
from pico_tg.backend.device import describe_backend
from pico_tg.checkpoint import list_checkpoints
from pico_tg.safetensors import read_safetensors

pico_tg.enable_compile_cache(training_graphs=True)
path, run, text = sys.argv[1:]
folder = Path(path, run)


def steps() -> tuple[list[dict], dict[str, np.ndarray]]:
    """The records of the run's missing steps, and the weights after them."""
    records = list(pico_tg.train(pico_tg.load(path, run), text, folder, resume=True))
    return records, read_safetensors(list_checkpoints(folder)[-1][1])[0]


# raw_prompt: a short prompt, since each number of rows compiles graphs of its own
options = {"max_bytes": 60, "temperature": 0, "raw_prompt": True, "ignore_end": True}
greedy = bytes(r.byte for r in pico_tg.generate(pico_tg.load(path, run), b"The ", **options))
records, weights = steps()
checkpoint = list_checkpoints(folder)[-1][1]
checkpoint.unlink()
again, weights_again = steps()
losses = [record["loss"] for record in records]
same = losses[-len(again) :] == [record["loss"] for record in again]
found = {
    "backend": describe_backend(),
    "text": greedy.hex(),
    "losses": losses,
    "bits_per_byte": records[-1]["validation_bits_per_byte"],
    "steps_again": len(again),
    "same": same and all((weights[name] == weights_again[name]).all() for name in weights),
}
print(json.dumps(found))
