"""Pico: a byte-level language model without a tokenizer, on tinygrad.

The import chooses the device that computes. It sets tinygrad's variables DEV and TC and, for child
processes, DEV and LLVM_PATH in the environment (see backend/device.py). It changes nothing else of
tinygrad.
"""

import sys
from pathlib import Path

try:
    from .backend.device import enable_compile_cache
    from .checkpoint import load_weights, save_weights
    from .config import Config, TrainSettings
    from .data import DataSpec, load_data
    from .decoder import Decoder
    from .evaluation import EvalSettings, Evaluation, evaluate
    from .files import PicoError
    from .generation import GeneratedByte, Sampler, SampleSettings, Stats, complete, generate
    from .model import Pico, loss_fn
    from .optim.soap import SOAP
    from .runs import load
    from .scoring import Score, score
    from .training import Events, train
except (KeyboardInterrupt, ModuleNotFoundError) as error:
    # the command line ends without a traceback; it imports this file before its own __main__.py,
    # while sys.argv[0] of `python -m pico_tg` is still -m
    program = Path(*sys.argv[:1]).name
    if program != "pico_tg" and not (program == "-m" and "pico_tg" in sys.orig_argv):
        raise
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    way = "activate the environment (.venv/bin/activate), or: pip install -e '.[cpu]'"
    print(f"pico_tg: error: {error}; {way}", file=sys.stderr)
    sys.exit(2)

__all__ = [
    "SOAP",
    "Config",
    "DataSpec",
    "Decoder",
    "EvalSettings",
    "Evaluation",
    "Events",
    "GeneratedByte",
    "Pico",
    "PicoError",
    "SampleSettings",
    "Sampler",
    "Score",
    "Stats",
    "TrainSettings",
    "complete",
    "enable_compile_cache",
    "evaluate",
    "generate",
    "load",
    "load_data",
    "load_weights",
    "loss_fn",
    "save_weights",
    "score",
    "train",
]
