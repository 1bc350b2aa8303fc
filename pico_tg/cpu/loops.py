"""A builder of CPU kernels with explicit loops, vectors and threads."""

import contextlib
import functools
import itertools
from collections.abc import Iterator

from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import CPU_COUNT
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from . import codegen  # extends the renderers: a vector may be at any address

TILE_N = 16  # columns of a register tile; the renderer splits them into the CPU's vectors
VECTOR = dtypes.float32.vec(TILE_N)
# Addresses have 64 bits. tinygrad 0.13 multiplies those of 32 without `nsw`: where one depends on
# core_id, LLVM cannot exclude an overflow, extends each address by itself, and a matmul takes up to
# three times as long (test_cpu.test_addresses_of_shared_matmuls).
INDEX = dtypes.long


class LoopNest:
    """A kernel under construction; each Python `with` block is one loop of the kernel.

        nest = LoopNest((8 * TILE_N, 8 * TILE_N), threads=1)
        with nest.loop(8) as i:
            nest.store(i * TILE_N, nest.load(1, i * TILE_N))
        program = nest.program("copy")

    The result is ready for tinygrad's renderer. tinygrad's optimizer could derive the same loops
    from a plain sum, but takes 0.3 to 1 s for each shape.

    numels: the elements of each tensor. All are float32. Tensor 0 is the output. Addresses count
    elements from a tensor's start.
    """

    def __init__(self, numels: tuple[int, ...], threads: int) -> None:
        self.threads = threads
        self.buffers = [UOp(Ops.PARAM, dtypes.float32.ptr(n), arg=i) for i, n in enumerate(numels)]
        self.bytes = 4 * sum(numels)
        self.ids = itertools.count()  # one for each loop and each register file
        self.open_loops: list[UOp] = []
        self.stores: list[UOp] = []  # the last statements of the innermost open loop
        self.order: list[UOp] = []  # statements that must precede a read of this kernel's output

    def const(self, n: int) -> UOp:
        return UOp.const(INDEX, n)

    @contextlib.contextmanager
    def loop(self, iterations: UOp | int) -> Iterator[UOp]:
        """`with nest.loop(n) as i`: a loop after all previous statements; yields the counter."""
        n = iterations if isinstance(iterations, UOp) else self.const(iterations)
        source = n, *self.open_loops, *self.stores
        counter = UOp(Ops.RANGE, INDEX, source, (next(self.ids), AxisType.LOOP))
        self.open_loops.append(counter)
        self.stores, self.order = [], [*self.stores, counter]
        yield counter
        body = UOp.group(*self.stores).end(self.open_loops.pop())
        self.stores = self.order = [body]

    @contextlib.contextmanager
    def loops(self, sizes: tuple[UOp | int, ...], shared: int = -1) -> Iterator[list[UOp]]:
        """Nested loops, outermost first; if `shared` >= 0, threads share that loop.

        A size of 1 is no loop, and does not order statements before and after it.
        """
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(self._split(n) if i == shared else self._whole(n))
                for i, n in enumerate(sizes)
            ]

    @contextlib.contextmanager
    def _whole(self, n: UOp | int) -> Iterator[UOp]:
        if isinstance(n, int) and n == 1:
            yield self.const(0)
        else:
            with self.loop(n) as i:
                yield i

    @contextlib.contextmanager
    def _split(self, n: UOp | int) -> Iterator[UOp]:
        """The current thread's part of a loop of n iterations."""
        if self.threads == 1:
            with self._whole(n) as i:
                yield i
            return
        assert not isinstance(n, int) or n > 1, "every thread would execute the only iteration"
        core = UOp.variable("core_id", 0, self.threads - 1, dtypes.int).cast(INDEX)
        ends = ((core + i) * n for i in range(2))
        start, stop = (UOp(Ops.CDIV, INDEX, (end, self.const(self.threads))) for end in ends)
        with self.loop(stop - start) as i:
            yield i + start

    def _pointer(self, buffer: UOp, address: UOp, width: int) -> UOp:
        pointer = UOp(Ops.INDEX, buffer.dtype, (buffer, address))
        if width == 1:
            return pointer
        vector = dtypes.float32.vec(width)
        return pointer.cast(vector.ptr(buffer.dtype.size, buffer.dtype.addrspace))

    def load(self, tensor: int, address: UOp, width: int = TILE_N) -> UOp:
        """`width` elements of an input tensor."""
        pointer = self._pointer(self.buffers[tensor], address, width)
        return UOp(Ops.LOAD, dtypes.float32.vec(width), (pointer,))

    def load_output(self, address: UOp, width: int = TILE_N) -> UOp:
        """`width` elements of the output, which an earlier loop or iteration has stored."""
        pointer = self._pointer(self.buffers[0].after(*self.order), address, width)
        return UOp(Ops.LOAD, dtypes.float32.vec(width), (pointer,))

    def store(self, address: UOp, vector: UOp, width: int = TILE_N) -> None:
        """Store a vector of `width` elements; the innermost loop's stores have equal widths."""
        self._add(self._pointer(self.buffers[0], address, width).store(vector))

    def prefetch(self, tensor: int, address: UOp) -> None:
        """Begin to move the cache line of an element that will be loaded or, of the output, stored.

        The prefetch comes before the next access to registers.
        """
        pointer = self._pointer(self.buffers[tensor], address, 1)
        statement = codegen.PREFETCH["write" if tensor == 0 else "read"]
        self.order = [*self.order, UOp(Ops.CUSTOM, dtypes.void, (pointer,), statement)]

    def registers(self, vectors: int) -> UOp:
        """An array of vectors in registers, for values that are carried between iterations."""
        dtype = dtypes.float32.ptr(vectors * TILE_N, AddrSpace.REG)
        return UOp(Ops.DEFINE_REG, dtype, arg=next(self.ids))

    def _register(self, registers: UOp, i: int) -> UOp:
        return self._pointer(registers.after(*self.order), self.const(i * TILE_N), TILE_N)

    def load_reg(self, registers: UOp, i: int) -> UOp:
        return UOp(Ops.LOAD, VECTOR, (self._register(registers, i),))

    def store_reg(self, registers: UOp, i: int, vector: UOp) -> None:
        self._add(self._register(registers, i).store(vector))

    def _add(self, store: UOp) -> None:
        # a loop that has ended already precedes this store, which reads the loop's results
        self.stores = [s for s in self.stores if s.op is not Ops.END] + [store]

    def broadcast(self, x: UOp | float) -> UOp:
        """A vector with all elements equal to x."""
        x = x if isinstance(x, UOp) else UOp.const(dtypes.float32, x)
        return UOp(Ops.STACK, VECTOR, (x,) * TILE_N)

    def program(self, name: str, operations: int = 0) -> UOp:
        """The finished kernel; `operations`: additions and multiplications of one run."""
        # tinygrad 0.13 itself estimates 0: it takes the whole kernel for address arithmetic
        # (test_soap.test_operations_of_a_step)
        info = KernelInfo(name=name, estimates=Estimates(operations, mem=self.bytes))
        return UOp(Ops.PROGRAM, src=(UOp.sink(*self.stores, arg=info), UOp(Ops.DEVICE, arg="CPU")))


def choose_shared_loop(sizes: tuple[int, ...]) -> tuple[int, int]:
    """(index of the loop that threads share most evenly, the outer one in a tie, threads)."""

    def longest_share(i: int) -> float:
        return -(-sizes[i] // min(CPU_COUNT.value, sizes[i])) / sizes[i]

    best = min(range(len(sizes)), key=longest_share)
    return best, min(CPU_COUNT.value, sizes[best])


@functools.cache
def tile_m() -> int:
    """Rows of a register tile of TILE_N columns: 8 with AVX-512, else 6.

    Without AVX-512 there are 16 registers of 256 bits: 12 hold 6 rows of two vectors, and 4 hold
    the factors.
    """
    try:
        with open("/proc/cpuinfo") as file:
            return 8 if " avx512f " in file.read() else 6
    except OSError:
        return 6
