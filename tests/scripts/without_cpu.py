"""Print whether CPU kernels are used, and the logits of two bytes that a small model decodes."""

from helpers import TINY
from tinygrad import Device

from pico_tg import Decoder, Pico
from pico_tg.backend.runtime import has_cpu_kernels

logits, _ = Decoder(Pico(TINY, seed=0)).forward(b"ab")
print(has_cpu_kernels(Device.DEFAULT), *logits[-1, 0])
