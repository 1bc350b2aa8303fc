"""Weights to and from the published PyTorch implementation: nothing is converted.

Both have the same names, shapes and layouts, so a file of one is a file of the other. Without
arguments this only prints the five lines for either direction; with a folder it does our half: it
reads DIR/model.json and the weights that PyTorch wrote, and writes them back.

python examples/interop.py DIR WEIGHTS.safetensors OUT.safetensors
"""

import sys

import pico_tg

PYTORCH = """
# in PyTorch, of a Pico `model` there; a checkpoint in a .pt file is the same dict of tensors
from safetensors.torch import load_file, save_file

save_file({name: t.contiguous() for name, t in model.state_dict().items()}, "weights.safetensors")
model.load_state_dict(load_file("back.safetensors"))
"""

if len(sys.argv) != 4:
    sys.exit(
        f"usage: python examples/interop.py DIR WEIGHTS.safetensors OUT.safetensors\n{PYTORCH}"
    )
folder, weights, out = sys.argv[1:]
try:
    model = pico_tg.Pico(pico_tg.Config.from_json(f"{folder}/model.json"))
    pico_tg.load_weights(model, weights)
    pico_tg.save_weights(model, out)
except pico_tg.PicoError as error:
    sys.exit(f"interop.py: {error}")
