"""What tinygrad 0.13 lacks or hides; README.md lists its defects, each with a test.

The import chooses the device that computes.
"""

import os

from ..files import PicoError

try:
    import tinygrad  # noqa: F401
except RuntimeError as error:  # tinygrad 0.13 parses DEV on import
    raise PicoError(f"cannot compute with DEV={os.environ.get('DEV')}: {error}") from None

from .device import choose_backend

choose_backend()  # before any module creates a Tensor
