"""Huge pages (of 2 MiB) for the buffers of a CPU device, on Linux.

The tables of pages of 4 KiB for a model's weights, moments and gradients do not fit the processor's
caches of addresses. tinygrad 0.13 maps each buffer as shared memory, for which Linux has no huge
pages by default. Here buffers are parts of large private mappings, for which a program may ask for
them.
"""

import contextlib
import dataclasses
import mmap

from tinygrad.device import BufferSpec
from tinygrad.helpers import mv_address, round_up
from tinygrad.runtime.ops_cpu import CPUAllocator
from tinygrad.runtime.support.hcq import HCQBuffer

HUGE = 1 << 21  # bytes of a page
MAPPING = 16 * HUGE  # buffers of up to half as many bytes share mappings of that size
LINE = 64  # bytes of a cache line, at which a buffer begins


class HugePages:
    """Cuts buffers off mappings, one after another. A mapping is freed with its last buffer.

    What a freed buffer leaves is not cut again, but tinygrad keeps freed buffers for others of the
    same size.
    """

    def __init__(self, allocator: CPUAllocator) -> None:
        self.allocate = allocator._alloc
        self.mapping, self.start, self.stop = None, 0, 0

    def __call__(self, size: int, options: BufferSpec) -> HCQBuffer:
        """In place of tinygrad's `_alloc`."""
        if options.external_ptr is not None:
            return self.allocate(size, options)
        length = round_up(size, LINE)
        if length > MAPPING // 2:
            mapping, start = _map(length)
        else:
            if length > self.stop - self.start:
                self.mapping, self.start = _map(MAPPING)
                self.stop = self.start + MAPPING
            mapping, start = self.mapping, self.start
            self.start += length
        buffer = self.allocate(size, dataclasses.replace(options, external_ptr=start))
        buffer.meta = mapping
        return buffer


def _map(size: int) -> tuple[mmap.mmap, int]:
    """A mapping that holds `size` bytes from an address on, at which a huge page may begin."""
    mapping = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, round_up(mv_address(mapping), HUGE)


def install(allocator: CPUAllocator) -> None:
    """Give the buffers that `allocator` creates from now on such memory."""
    if hasattr(mmap, "MADV_HUGEPAGE") and not isinstance(allocator._alloc, HugePages):
        allocator._alloc = HugePages(allocator)
