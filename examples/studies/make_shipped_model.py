"""Copy a trained model to OUTPUT, with weights in float16: the model that comes with the package.

python examples/studies/make_shipped_model.py PATH RUN OUTPUT        (OUTPUT: pico_tg/stories)
"""

import sys
from pathlib import Path

import numpy as np

import pico_tg
from pico_tg.runs import existing_run, find_checkpoint, load_config
from pico_tg.safetensors import read_safetensors, write_safetensors

NOTES = {
    "license": "Apache-2.0",
    "data": "12 MB of TinyStories (Eldan and Li, CDLA-Sharing-1.0)",
}

if len(sys.argv) != 4:
    sys.exit("usage: python examples/studies/make_shipped_model.py PATH RUN OUTPUT")
path, run, output = sys.argv[1:]
try:
    config = load_config(path)
    checkpoint = find_checkpoint(existing_run(path, run))
    weights, _ = read_safetensors(checkpoint)
    target = Path(output) / "first" / checkpoint.name
    target.parent.mkdir(parents=True, exist_ok=True)
    config.to_json(Path(output) / "model.json")
    write_safetensors(target, {name: w.astype(np.float16) for name, w in weights.items()}, NOTES)
except pico_tg.PicoError as error:
    sys.exit(f"make_shipped_model.py: {error}")
print(f"{target}: {target.stat().st_size:,} bytes")
