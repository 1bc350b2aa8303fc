"""What tinygrad 0.13 lacks or hides; README.md lists its defects and their tests.

The import chooses the device that computes.
"""

import os

# tinygrad 0.13 reads these as numbers on import, other programs as words; a word ends the import
# (test_backend.test_words_in_the_environment)
WORDS = {
    name: value
    for name in ("NO_COLOR", "DEBUG", "PROFILE", "VIZ", "IMAGE", "CCACHE")
    if (value := os.environ.get(name)) is not None and not value.removeprefix("-").isdigit()
}
try:
    # https://no-color.org: set and not empty, whatever the value
    os.environ.update({name: str(int(name == "NO_COLOR" and v != "")) for name, v in WORDS.items()})
    import tinygrad
except RuntimeError:  # tinygrad 0.13 parses DEV on import; `check_backend` names the mistake
    WORDS["DEV"] = os.environ.pop("DEV")
    import tinygrad  # noqa: F401
finally:
    os.environ.update(WORDS)

from .device import choose_backend  # noqa: E402

choose_backend()  # before any module creates a Tensor
