"""Count what decoding passes of 1 and of 8 bytes do on a NULL device; print the counts as JSON.

Counted are: graphs launched, kernels launched outside a graph, reads of the device's memory (each
waits for the device) and writes.
"""

import collections
import json

from helpers import TINY
from tinygrad.runtime.ops_null import NullAllocator, NullGraph, NullProgram

from pico_tg import Decoder, Pico

counts = collections.Counter()


def count(kind: type, method: str, name: str) -> None:
    original = getattr(kind, method)

    def counting(*args, **options):
        counts[name] += 1
        return original(*args, **options)

    setattr(kind, method, counting)


count(NullGraph, "__call__", "graphs")
count(NullProgram, "__call__", "kernels")
count(NullAllocator, "_copyout", "reads")
count(NullAllocator, "_copyin", "writes")
decoder, found = Decoder(Pico(TINY)), {}
for size in (1, 4):
    decoder.forward(bytes(size))
    counts.clear()
    decoder.forward(bytes(size))
    found[size] = dict(counts)
print(json.dumps(found))
