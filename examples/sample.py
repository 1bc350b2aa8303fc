"""Generate text with a trained model.

python examples/sample.py PATH RUN        (the PATH and RUN given to `train`)
"""

import sys

import pico_tg
from pico_tg.progress import visible

if len(sys.argv) != 3:
    sys.exit("usage: python examples/sample.py PATH RUN")
try:
    model = pico_tg.load(*sys.argv[1:])
except pico_tg.PicoError as error:
    sys.exit(visible(f"sample.py: {error}"))
text = b"The "
for record in pico_tg.generate(model, text, max_bytes=300, temperature=0.7, seed=1):
    text += bytes([record.byte])
print(visible(text.decode(errors="replace")))
