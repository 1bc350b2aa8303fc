"""What decoding keeps and reads: packed weights, and rings of keys and values."""

import math

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from .cpu.loops import round_up, tile_m
from .runtime import has_cpu_kernels


class PackedLinear:
    """A weight [O, I] as decoding reads it: x [R, I...] -> x @ weight.T [R, O...], no gradient.

    On a CPU the weight is copied into panels of PANEL outputs, so that a pass reads memory front to
    back, and rows are PANEL-padded: `x` may be wider than I, and the result is as wide as whole
    panels. Elsewhere it is the weight itself, and nothing is padded.
    """

    PANEL = 32

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """`scale` [I] multiplies x, once and for all."""
        self.outputs, self.inputs = weight.shape
        weight = weight.detach() if scale is None else weight.detach() * scale.detach()
        self.panels = has_cpu_kernels(weight.device)
        if self.panels:
            self.width = padded_width(self.outputs, weight.device)
            weight = weight.pad(((0, self.width - self.outputs), None))
            weight = weight.reshape(-1, self.PANEL, self.inputs).transpose(1, 2)
        else:
            self.width = self.outputs
        self.weight = weight.contiguous().realize()

    def __call__(
        self, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`scale` [R, 1] multiplies the rows of the result, then `residual` [R, O...] is added."""
        if not self.panels:
            out = x @ self.weight.T
            out = out if scale is None else out * scale
            return (out if residual is None else out + residual).contiguous()
        rows, panel = x.shape[0], self.PANEL
        tile = _rows_in_registers(rows)
        wide = panel // 16 if _rows_in_registers(rows, panel // 16) == tile else 1

        def kernel(out: UOp, x: UOp, weight: UOp, *more: UOp) -> UOp:
            (r, p, c), axis = _loops(rows, self.width // panel, panel)
            l = UOp.range(self.inputs, 3, AxisType.REDUCE)
            total = (x[r, l] * weight[p, l, c]).reduce(l, arg=Ops.ADD)
            if scale is not None:
                total = total * more[0][r, 0]
            if residual is not None:
                total = total + more[-1][r, p * panel + c]
            opts = [Opt(OptOps.UPCAST, axis[2], 16)]
            if wide > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], wide))
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[0], tile))
            elif self.inputs % 4 == 0:  # of one row there is too little to do in a turn
                opts.append(Opt(OptOps.UNROLL, 0, 4))
            info = KernelInfo(
                name=f"packed_{rows}_{self.outputs}_{self.inputs}_{len(more)}",
                opts_to_apply=tuple(opts),
            )
            return _end(out[r, p * panel + c].store(total), r, p, c).sink(arg=info)

        more = [t.contiguous() for t in (scale, residual) if t is not None]
        out = Tensor.empty(rows, self.width, device=x.device)
        return out.custom_kernel(x.contiguous(), self.weight, *more, fxn=kernel)[0]


def _loops(*sizes: int, first: int = 0) -> tuple[list[UOp | int], list[int]]:
    """Loops of these sizes, and the axis that each is for `Opt`. A loop of one turn is none."""
    loops = [UOp.range(n, first + i) if n > 1 else 0 for i, n in enumerate(sizes)]
    return loops, [sum(n > 1 for n in sizes[:i]) for i in range(len(sizes))]


def _rows_in_registers(rows: int, vectors: int = 1) -> int:
    """The most rows of a tile that divide `rows`, each of so many vectors of 16 numbers."""
    room = 16 if tile_m() > 6 else 6
    return next(n for n in (8, 4, 2, 1) if rows % n == 0 and n * vectors <= room)


def _end(store: UOp, *loops: UOp | int) -> UOp:
    return store.end(*[loop for loop in loops if isinstance(loop, UOp)])


def padded_width(width: int, device: str) -> int:
    """How wide a row of `width` numbers is in decoding."""
    return round_up(width, PackedLinear.PANEL) if has_cpu_kernels(device) else width


def cache_shape(head_dim: int, window: int, rows: int) -> tuple[int, int]:
    """(slots, columns) of a `KVCache`: keys are [K, C, slots], values [K, slots, columns]."""
    return round_up(window + rows, PackedLinear.PANEL), round_up(head_dim + 1, 16)


class KVCache:
    """Keys and values of one attention for the last positions: position p is in slot p % slots.

    A pass writes its rows at `start`, start + 1, …, and may then be taken back by starting the next
    one earlier: `slots` leaves room for `rows` beyond the window, so what it overwrote was out of
    every window already, and what it leaves lies ahead of every later query or is overwritten.

    H query heads, K key/value heads, G = H / K, C head_dim, S slots, R rows of a pass.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, window: int, rows: int, slopes: Tensor
    ) -> None:
        """`slopes` [H]: what ALiBi takes off a score a position of distance."""
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        # one column more, of ones: the sum of the weights is a value like any other
        self.slots, self.columns = cache_shape(head_dim, window, rows)
        self.slopes = slopes.contiguous().realize()
        self.has_cpu_kernels = has_cpu_kernels(self.slopes.device)
        zeros = np.zeros((kv_heads, head_dim, self.slots), np.float32)
        ones = np.zeros((kv_heads, self.slots, self.columns), np.float32)
        ones[:, :, head_dim] = 1
        device = self.slopes.device
        self.keys = Tensor(zeros, device=device).clone().realize()  # (K, C, S): lanes are slots
        self.values = Tensor(ones, device=device).clone().realize()  # (K, S, C + 1 …)

    def attend(self, qkv: Tensor, start: Tensor) -> Tensor:
        """Rows [R, H*C | K*C | K*C …] at positions from `start` (int [1]) on -> [R, H*C].

        Their keys and values are stored first; each row sees itself and `window` before it.
        """
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        if self.has_cpu_kernels:
            keys, values = self._store(qkv, start)
            return self._divide(self._weigh(self._exps(self._scores(qkv, keys, start)), values))
        keys, values = self._store_plainly(qkv, start)
        scores = self._scores_plainly(qkv, keys, start)  # (H*R, S)
        weights = (scores - scores.max(axis=-1, keepdim=True)).exp()
        sums = weights.reshape(K, -1, self.slots) @ values
        sums = sums.reshape(H, R, -1).transpose(0, 1)
        return (sums[:, :, :C] / sums[:, :, C : C + 1]).reshape(R, H * C).contiguous()

    def _distances(self, start: Tensor, rows: int) -> Tensor:
        """How far each slot is before each row, int [R, S]; negative: it lies ahead."""
        newest = start + rows - 1
        slot = Tensor.arange(self.slots, device=start.device)
        position = newest - (newest + self.slots - slot) % self.slots
        row = start + Tensor.arange(rows, device=start.device)
        # what was never written is as far as can be
        position = (position >= 0).where(position, -self.slots - 1)
        return row.reshape(-1, 1) - position.reshape(1, -1)

    def _store_plainly(self, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        new = qkv[:, H * C : (H + 2 * K) * C].reshape(R, 2, K, C)
        row = (Tensor.arange(self.slots, device=start.device) + self.slots - start) % self.slots
        here = row < R
        row = here.where(row, 0)
        keys, values = (new[:, i].contiguous()[row].permute(1, 0, 2) for i in range(2))  # (K, S, C)
        self.keys.assign(here.reshape(1, 1, -1).where(keys.transpose(1, 2), self.keys))
        values = values.pad((None, None, (0, self.columns - C)))
        column = Tensor.arange(self.columns, device=start.device) < C
        fresh = here.reshape(1, -1, 1) & column.reshape(1, 1, -1)
        self.values.assign(fresh.where(values, self.values))
        return self.keys, self.values

    def _scores_plainly(self, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        q = qkv[:, : H * C].reshape(R, K, H // K, C).permute(1, 2, 0, 3)  # (K, G, R, C)
        scores = (q.reshape(K, -1, C) @ keys).reshape(K, H // K, R, self.slots)
        distance = self._distances(start, R)
        slopes = self.slopes.reshape(K, H // K, 1, 1)
        visible = (distance >= 0) & (distance <= self.window)
        scores = visible.where(scores / math.sqrt(C) - slopes * distance, -math.inf)
        return scores.reshape(H * R, self.slots).contiguous()

    def _store(self, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        R, H, K, C, S = qkv.shape[0], self.heads, self.kv_heads, self.head_dim, self.slots

        def kernel(keys: UOp, values: UOp, qkv: UOp, start: UOp) -> UOp:
            stores = []
            for i in range(2):
                (r, k, c), _ = _loops(R, K, C, first=3 * i)
                slot = (start[0] + r) % S
                new = qkv[r, (H + i * K) * C + k * C + c]
                place = values[k, slot, c] if i else keys[k, c, slot]
                stores.append(_end(place.store(new), r, k, c))
            return UOp.sink(*stores, arg=KernelInfo(name=f"ring_{R}_{K}_{C}", opts_to_apply=()))

        return self.keys.custom_kernel(self.values, qkv, start, fxn=kernel)[:2]

    def _scores(self, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        """`_scores_plainly` in one kernel: [H*R, S]."""
        R, H, K, C, S = qkv.shape[0], self.heads, self.kv_heads, self.head_dim, self.slots
        G, scale, tile = H // K, 1 / math.sqrt(C), _rows_in_registers(R)

        def kernel(out: UOp, qkv: UOp, keys: UOp, slopes: UOp, start: UOp) -> UOp:
            (k, g, r, s), axis = _loops(K, G, R, S)
            c = UOp.range(C, 4, AxisType.REDUCE)
            total = (qkv[r, (k * G + g) * C + c] * keys[k, c, s]).reduce(c, arg=Ops.ADD)
            newest = start[0] + (R - 1)
            age = (newest + S - s) % S  # of what the slot holds, before the newest row
            distance = age + r - (R - 1)
            visible = (distance >= 0) & (distance <= self.window) & (age <= newest)
            biased = total * scale - slopes[k * G + g] * distance.cast(dtypes.float32)
            score = visible.where(biased, UOp.const(dtypes.float32, -math.inf))
            opts = [Opt(OptOps.UPCAST, axis[3], 16)]
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], tile))
            info = KernelInfo(name=f"scores_{R}_{H}_{K}_{C}_{S}", opts_to_apply=tuple(opts))
            row = (k * G + g) * R + r
            return _end(out[row, s].store(score), k, g, r, s).sink(arg=info)

        # rows are numbered, not shaped: 0.13 copies what is reshaped on its way to or from a kernel
        out = Tensor.empty(H * R, S, device=qkv.device)
        return out.custom_kernel(qkv, keys, self.slopes, start, fxn=kernel)[0]

    def _exps(self, scores: Tensor) -> Tensor:
        """exp(scores - the row's largest): [H*R, S]."""
        rows, S = scores.shape

        def kernel(out: UOp, scores: UOp) -> UOp:
            (row, s), axis = _loops(rows, S)
            other = UOp.range(S, 2, AxisType.REDUCE)
            top = scores[row, other].reduce(other, arg=Ops.MAX)
            exps = ((scores[row, s] - top) * (1 / math.log(2))).exp2()
            opts = (Opt(OptOps.UPCAST, axis[1], 16), Opt(OptOps.UNROLL, 0, 16))
            info = KernelInfo(name=f"exps_{rows}_{S}", opts_to_apply=opts)
            return _end(out[row, s].store(exps), row, s).sink(arg=info)

        out = Tensor.empty(rows, S, device=scores.device)
        return out.custom_kernel(scores, fxn=kernel)[0]

    def _divide(self, sums: Tensor) -> Tensor:
        """sums [R*H, P], whose column C is the weights' -> [R, H*C]."""
        H, C = self.heads, self.head_dim
        R = sums.shape[0] // H

        def kernel(out: UOp, sums: UOp) -> UOp:
            (r, h, c), _ = _loops(R, H, C)
            quotient = sums[r * H + h, c] * sums[r * H + h, C].reciprocal()
            info = KernelInfo(name=f"divide_{R}_{H}_{C}", opts_to_apply=())
            return _end(out[r, h * C + c].store(quotient), r, h, c).sink(arg=info)

        return Tensor.empty(R, H * C, device=sums.device).custom_kernel(sums, fxn=kernel)[0]

    def _weigh(self, weights: Tensor, values: Tensor) -> Tensor:
        """weights [K*G*R, S] @ values [K, S, P] -> [R*K*G, P]."""
        K, S, P = values.shape
        G, R = self.heads // K, weights.shape[0] // self.heads
        wide = P // 16 if P <= 64 else 1
        tile = _rows_in_registers(R, wide)

        def kernel(out: UOp, weights: UOp, values: UOp) -> UOp:
            (k, g, r, c), axis = _loops(K, G, R, P)
            s = UOp.range(S, 4, AxisType.REDUCE)
            weight = weights[(k * G + g) * R + r, s]
            total = (weight * values[k, s, c]).reduce(s, arg=Ops.ADD)
            opts = [Opt(OptOps.UPCAST, axis[3], 16)]
            if wide > 1:
                opts.append(Opt(OptOps.UPCAST, axis[3], wide))
            if tile > 1:
                opts.append(Opt(OptOps.UPCAST, axis[2], tile))
            else:
                opts.append(Opt(OptOps.UNROLL, 0, 4))
            info = KernelInfo(name=f"weigh_{K}_{G}_{R}_{S}_{P}", opts_to_apply=tuple(opts))
            return _end(out[(r * K + k) * G + g, c].store(total), k, g, r, c).sink(arg=info)

        out = Tensor.empty(R * K * G, P, device=weights.device)
        return out.custom_kernel(weights, values, fxn=kernel)[0]
