"""Pico: a byte-level language model without a tokenizer, on tinygrad."""

from .interrupts import quiet_at_start

quiet_at_start()  # before the rest, which takes its time

from . import jit_cache  # noqa: E402
from .backend import choose_backend  # noqa: E402

choose_backend()  # before any module can make a Tensor
jit_cache.install()

from .checkpoint import load_weights, save_weights  # noqa: E402
from .config import Config, TrainSettings  # noqa: E402
from .data import DataSpec, load_data  # noqa: E402
from .decoder import Decoder  # noqa: E402
from .evaluation import Evaluation, evaluate  # noqa: E402
from .files import PicoError  # noqa: E402
from .generation import GeneratedByte, Stats, generate  # noqa: E402
from .model import Pico, loss_fn  # noqa: E402
from .runs import load  # noqa: E402
from .soap import SOAP  # noqa: E402
from .tools.info import describe  # noqa: E402
from .training import train  # noqa: E402

__all__ = [
    "SOAP",
    "Config",
    "DataSpec",
    "Decoder",
    "Evaluation",
    "GeneratedByte",
    "Pico",
    "PicoError",
    "Stats",
    "TrainSettings",
    "describe",
    "evaluate",
    "generate",
    "load",
    "load_data",
    "load_weights",
    "loss_fn",
    "save_weights",
    "train",
]
