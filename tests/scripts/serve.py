"""As a web server does: the main thread makes the model, each request has a thread of its own."""

import sys
import threading

from helpers import TINY

import pico_tg

if "enabled" in sys.argv:
    pico_tg.enable_compile_cache()
model = pico_tg.Pico(TINY, seed=0)
texts = []


def answer() -> None:
    records = pico_tg.generate(model, b"The ", max_bytes=8, temperature=0)
    texts.append(bytes(record.byte for record in records))


for _ in range(2):
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
answer()
assert len(texts) == 3
assert len({*texts}) == 1
print(texts[0])
