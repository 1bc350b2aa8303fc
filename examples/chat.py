"""Continue each line that is typed, byte by byte; end with Ctrl-D or Ctrl-C.

python examples/chat.py PATH RUN
"""

import contextlib
import sys

import pico_tg
from pico_tg.progress import visible
from pico_tg.tools.terminal import decode_text

if len(sys.argv) != 3:
    sys.exit("usage: python examples/chat.py PATH RUN")
try:
    model = pico_tg.load(*sys.argv[1:])
except pico_tg.PicoError as error:
    sys.exit(visible(f"chat.py: {error}"))
decoder = pico_tg.Decoder(model)  # one for all lines: its compiled graphs are reused
with contextlib.suppress(KeyboardInterrupt):
    print("> ", end="", flush=True)
    for line in sys.stdin.buffer:
        records = pico_tg.generate(
            model, line.rstrip(b"\r\n"), max_bytes=300, temperature=0.7, decoder=decoder
        )
        for text in decode_text(records):
            print(visible(text), end="", flush=True)
        print("\n> ", end="", flush=True)
print()
