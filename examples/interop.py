"""Convert weights from the published PyTorch implementation of Pico, and back.

The published implementation stores a model as pico_tg does: DIR/model.json beside
DIR/RUN/NNNNNNNN.safetensors, with the same names, shapes and layouts. `python -m pico_tg run DIR
RUN` therefore reads published checkpoints without conversion, and the published implementation
reads checkpoints of pico_tg that use the learned router and ALiBi. This script converts state_dicts
in memory or in a file of torch.save. To install its packages: pip install -e '.[bench]'.

python examples/interop.py from-torch WEIGHTS.pt DIR RUN
python examples/interop.py to-torch DIR RUN WEIGHTS.pt
"""

import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file, save_file

import pico_tg
from pico_tg.runs import find_checkpoint


def from_torch(state: dict[str, torch.Tensor], folder: str, run: str) -> pico_tg.Pico:
    """Write the state_dict of a PyTorch Pico as a new run of the model in `folder`, and load it."""
    checkpoint = Path(folder, run, "00000000.safetensors")
    checkpoint.parent.mkdir(parents=True)  # fails if the run exists: nothing is overwritten
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, checkpoint)
    return pico_tg.load(folder, run, 0)


def to_torch(folder: str, run: str) -> dict[str, torch.Tensor]:
    """Return the newest weights of `run`, for load_state_dict of a PyTorch Pico."""
    pico_tg.load(folder, run)  # raises PicoError if they are damaged or do not fit model.json
    return load_file(find_checkpoint(Path(folder, run)))


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["from-torch", weights, folder, run]:
                state = torch.load(weights, map_location="cpu", weights_only=True)
                from_torch(state, folder, run)
            case ["to-torch", folder, run, weights]:
                torch.save(to_torch(folder, run), weights)
            case _:
                sys.exit(__doc__)
    except (OSError, RuntimeError, UnpicklingError, AttributeError, pico_tg.PicoError) as error:
        sys.exit(f"interop.py: {error}")
