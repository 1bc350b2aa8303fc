"""Huge pages (of 2 MiB) for the buffers of a CPU device, on Linux.

A processor caches the addresses of a few thousand pages; a model's weights, moments and gradients
are many more pages of 4 KiB. tinygrad 0.13 maps each buffer as shared memory, for which Linux has
no huge pages by default. Here buffers are parts of private mappings, for which a program may ask
for them.
"""

import contextlib
import dataclasses
import mmap
import threading

from tinygrad.device import Allocator, BufferSpec
from tinygrad.helpers import LRU, mv_address, round_up
from tinygrad.runtime.support.hcq import HCQBuffer

HUGE = 1 << 21  # bytes of a page
SHARED = 16 * HUGE  # buffers of up to half as many bytes share mappings of that size


class HugePages:
    """Cuts buffers off mappings, one after another. A full mapping is freed with its last buffer.

    What a freed buffer leaves is not cut again: tinygrad keeps freed buffers for others of the same
    size.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.allocate = allocator._alloc
        self.lock = threading.Lock()
        self.mapping, self.first, self.used = None, 0, SHARED  # the first buffer finds it full

    def __call__(self, size: int, options: BufferSpec) -> HCQBuffer:
        """In place of tinygrad's `_alloc`."""
        if options.external_ptr is not None:
            return self.allocate(size, options)
        length = round_up(size, mmap.PAGESIZE)  # drivers of GPUs map whole pages
        if length > SHARED // 2:
            mapping, start = _map(length)
        else:
            with self.lock:
                if self.used + length > SHARED:
                    self.mapping, self.first = _map(SHARED)
                    self.used = 0
                mapping, start = self.mapping, self.first + self.used
                self.used += length
        # a buffer without memory of its own
        buffer = self.allocate(size, dataclasses.replace(options, external_ptr=start))
        buffer.meta = mapping
        return buffer


def _map(size: int) -> tuple[mmap.mmap, int]:
    """A mapping that holds `size` bytes from an address on, at which a huge page may begin."""
    mapping = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, round_up(mv_address(mapping), HUGE)


def install(allocator: Allocator) -> None:
    """Give the buffers that `allocator` creates from now on such memory.

    Not with tinygrad's LRU=0, where what freed buffers leave would be lost.
    """
    installed = isinstance(allocator._alloc, HugePages)
    if LRU and hasattr(mmap, "MADV_HUGEPAGE") and not installed:
        allocator._alloc = HugePages(allocator)
