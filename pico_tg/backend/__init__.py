"""What tinygrad 0.13 lacks or hides; README.md lists its defects and their tests.

The import chooses the device that computes.
"""

import os

from ..files import PicoError

# tinygrad 0.13 reads these as numbers on import, other programs as words; a word ends the import
# (test_backend.test_words_in_the_environment)
WORDS = {
    name: value
    for name in ("NO_COLOR", "DEBUG", "PROFILE", "VIZ")
    if (value := os.environ.get(name)) is not None and not value.removeprefix("-").isdigit()
}
try:
    # https://no-color.org: set and not empty, whatever the value
    os.environ.update({name: str(int(name == "NO_COLOR" and v != "")) for name, v in WORDS.items()})
    import tinygrad  # noqa: F401
except RuntimeError as error:  # tinygrad 0.13 parses DEV on import
    raise PicoError(f"cannot compute with DEV={os.environ.get('DEV')}: {error}") from None
finally:
    os.environ.update(WORDS)

from .device import choose_backend  # noqa: E402

choose_backend()  # before any module creates a Tensor
