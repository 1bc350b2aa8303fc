"""Generate text with a trained model.

python examples/sample.py [PATH [RUN]]        (default: stories, the model that comes with pico_tg)
"""

import sys

import pico_tg
from pico_tg.progress import visible

try:
    model = pico_tg.load(*(sys.argv[1:3] or ["stories"]))
except pico_tg.PicoError as error:
    sys.exit(visible(f"sample.py: {error}"))
prompt = "The "
print(visible(prompt + pico_tg.complete(model, prompt, max_bytes=300, seed=1)))
