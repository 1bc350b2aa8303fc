"""Huge pages (of 2 MiB) for the large buffers of a CPU device, on Linux.

The tables of pages of 4 KiB for a model's weights, moments and gradients do not fit the processor's
caches of addresses. tinygrad 0.13 maps its buffers as shared memory, for which Linux has no huge
pages by default; here a large buffer is private memory, for which a program may ask for them.
"""

import contextlib
import dataclasses
import mmap

from tinygrad.device import BufferSpec
from tinygrad.helpers import mv_address, round_up
from tinygrad.runtime.ops_cpu import CPUAllocator
from tinygrad.runtime.support.hcq import HCQBuffer

HUGE = 1 << 21  # bytes


def install(allocator: CPUAllocator) -> None:
    """Make all buffers of at least HUGE bytes that `allocator` creates from now on such memory."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        allocator._alloc = lambda size, options: _allocate(allocator, size, options)


def _allocate(allocator: CPUAllocator, size: int, options: BufferSpec) -> HCQBuffer:
    allocate = type(allocator)._alloc
    if size < HUGE or options.external_ptr is not None:
        return allocate(allocator, size, options)
    memory = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = round_up(mv_address(memory), HUGE)  # a huge page begins at a multiple of its size
    buffer = allocate(allocator, size, dataclasses.replace(options, external_ptr=start))
    buffer.meta = memory  # unmapped with the buffer
    return buffer
