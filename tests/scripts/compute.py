"""Compute on the device that `import pico_tg` chooses; with the argument "no LLVM", without it."""

import ctypes
import sys


class RefusingLLVM(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if "LLVM" in str(name):
            raise OSError(name)
        super().__init__(name, *rest, **options)


if "no LLVM" in sys.argv:
    ctypes.CDLL = RefusingLLVM

from tinygrad import Tensor  # noqa: E402
from tinygrad.helpers import DEV  # noqa: E402

from pico_tg.backend.device import describe_backend  # noqa: E402

print(DEV.renderer, describe_backend(), (Tensor.arange(5).float() * 2).sum().item(), sep="|")
