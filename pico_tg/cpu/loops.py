"""Kernels written as the loops and vectors that are to run."""

import functools
import itertools
from collections.abc import Sequence

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import CPU_COUNT
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

TILE_N = 16  # of a tile in registers: a vector, or several
INT = 1 << 31  # addresses from here on take 64 bits
VECTOR = dtypes.float32.vec(TILE_N)


class LoopNest:
    """A kernel as the loops and vectors that are to run: tinygrad's renderer only writes it down.

    From the sums alone tinygrad would make the same, in 0.3 to 1 s for each size. All tensors are
    float32, the first one is written, and places are counted in numbers from a tensor's start.
    """

    def __init__(self, *tensors: Tensor, threads: int) -> None:
        self.threads = threads
        assert all(tensor.dtype == dtypes.float32 for tensor in tensors)
        sizes = [tensor.numel() for tensor in tensors]
        self.index = dtypes.int if max(sizes) < INT else dtypes.long
        self.buffers = [UOp(Ops.PARAM, dtypes.float32.ptr(n), arg=i) for i, n in enumerate(sizes)]
        self.device, self.bytes = tensors[0].device.split(":")[0], 4 * sum(sizes)
        self.numbers = itertools.count()
        self.open: list[UOp] = []  # the loops that what comes next is in
        self.done: list[UOp] = []  # what has ended, and comes before them

    def number(self, n: int) -> UOp:
        return UOp.const(self.index, n)

    def loop(self, turns: UOp | int, after: Sequence[UOp] = ()) -> UOp:
        """A loop inside those that are open; itself open until `end`."""
        turns = turns if isinstance(turns, UOp) else self.number(turns)
        before = turns, *(self.open or self.done), *after
        loop = UOp(Ops.RANGE, self.index, before, (next(self.numbers), AxisType.LOOP))
        self.open.append(loop)
        return loop

    def loops(self, sizes: tuple[int, ...], shared: int) -> list[UOp]:
        """One inside the other; threads share out the one numbered `shared`."""
        return [self._turns(n, i == shared) for i, n in enumerate(sizes)]

    def _turns(self, n: int, shared: bool) -> UOp:
        if n == 1:
            assert not shared or self.threads == 1, "every thread would do the same, at once"
            return self.number(0)
        if not shared or self.threads == 1:
            return self.loop(n)
        core = UOp.variable("core_id", 0, self.threads - 1, dtypes.int).cast(self.index)
        ends = ((core + i) * n for i in range(2))
        start, stop = (UOp(Ops.CDIV, self.index, (x, self.number(self.threads))) for x in ends)
        return self.loop(stop - start) + start

    def end(self, *stores: UOp, leave: int = 0) -> UOp:
        """All open loops but so many end; if all do, the next ones come after them."""
        body = UOp.group(*stores)
        while len(self.open) > leave:
            body = body.end(self.open.pop())
        if not leave:
            self.done.append(body)
        return body

    def _at(self, buffer: UOp, place: UOp, wide: int) -> UOp:
        where = UOp(Ops.INDEX, buffer.dtype, (buffer, place))
        if wide == 1:
            return where
        vector = dtypes.float32.vec(wide)
        return where.cast(vector.ptr(buffer.dtype.size, buffer.dtype.addrspace))

    def load(self, tensor: int, place: UOp, wide: int = TILE_N) -> UOp:
        where = self._at(self.buffers[tensor], place, wide)
        return UOp(Ops.LOAD, dtypes.float32.vec(wide), (where,))

    def load_so_far(self, place: UOp) -> UOp:
        """What the last turn of the loops that are open has materialize."""
        return UOp(Ops.LOAD, VECTOR, (self._at(self.buffers[0].after(*self.open), place, TILE_N),))

    def store(self, place: UOp, vector: UOp) -> UOp:
        return self._at(self.buffers[0], place, TILE_N).store(vector)

    def registers(self, vectors: int) -> UOp:
        size = dtypes.float32.ptr(vectors * TILE_N, AddrSpace.REG)
        return UOp(Ops.DEFINE_REG, size, arg=next(self.numbers))

    def get(self, registers: UOp, i: int) -> UOp:
        return UOp(Ops.LOAD, VECTOR, (self._at(registers, self.number(i * TILE_N), TILE_N),))

    def put(self, registers: UOp, i: int, vector: UOp) -> UOp:
        return self._at(registers, self.number(i * TILE_N), TILE_N).store(vector)

    def broadcast(self, x: UOp | float) -> UOp:
        x = x if isinstance(x, UOp) else UOp.const(dtypes.float32, x)
        return UOp(Ops.STACK, VECTOR, (x,) * TILE_N)

    def program(self, name: str, operations: int = 0) -> UOp:
        # tinygrad counts nothing here: it takes all that precedes an address for part of it
        info = KernelInfo(name=name, estimates=Estimates(operations, mem=self.bytes))
        target = UOp(Ops.DEVICE, arg=self.device)
        return UOp(Ops.PROGRAM, src=(UOp.sink(*self.done, arg=info), target))


def share_threads(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Which of these loops threads share out most evenly, the outermost first; how many threads."""

    def longest(i: int) -> float:
        return -(-sizes[i] // min(CPU_COUNT.value, sizes[i])) / sizes[i]

    best = min(range(len(sizes)), key=longest)
    return best, min(CPU_COUNT.value, sizes[best])


@functools.cache
def tile_m() -> int:
    """Rows of a tile: 8 vectors of 512 bits; else 6, which 16 registers of 256 bits can hold."""
    try:
        with open("/proc/cpuinfo") as file:
            return 8 if " avx512f " in file.read() else 6
    except OSError:
        return 6


def even_threads(outer: int) -> int:
    """The most threads, up to the cores, that share the outermost axis evenly."""
    return next(t for t in range(CPU_COUNT.value, 0, -1) if outer % t == 0)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
