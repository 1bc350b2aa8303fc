"""Decoding: sliding KV caches of fixed size, one compiled pass for a few bytes at a time."""

import math
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from .attention import alibi_slopes, rotate
from .kv_cache import KVCache, PackedLinear, padded_width
from .model import RMS_EPS, Block, Pico
from .routing import next_decisions
from .runtime import jit_method, read, write_into

DECODE_ROWS = (
    1,
    4,
    8,
)  # rows of the compiled passes: a row costs little, a graph seconds


PREFILL_CHUNK = 64  # bytes of a long prompt that one pass takes in


MIN_PREFILL = 4096  # bytes of a prompt that are worth compiling that pass for


class CachedBlock:
    """One block as decoding runs it: its weights packed, the norms' scales inside, and its ring."""

    def __init__(self, block: Block, heads: int, kv_heads: int) -> None:
        attention = block.att
        self.dim = block.norm1.weight.shape[0]
        self.alibi = attention.position == "alibi"
        self.turned = heads + kv_heads, attention.head_dim
        slopes = alibi_slopes(heads, block.norm1.weight.device) * self.alibi
        self.ring = KVCache(
            heads, kv_heads, attention.head_dim, attention.window, PREFILL_CHUNK, slopes
        )
        self.qkv = PackedLinear(attention.fused_qkv.weight, block.norm1.weight)
        self.proj = PackedLinear(attention.proj.weight)
        self.fc1 = PackedLinear(block.glu.fc1.weight, block.norm2.weight)
        self.fc2 = PackedLinear(block.glu.fc2.weight)

    def __call__(self, h: Tensor, start: Tensor) -> Tensor:
        """Rows h [R, D…] at positions from `start` (int [1]) on; zeros beyond D stay zeros."""
        heads = self.ring.attend(self._rotate(self.qkv(h, rms_scale(h, self.dim)), start), start)
        h = self.proj(heads, residual=h)
        both = self.fc1(h, rms_scale(h, self.dim))
        value, gate = both[:, : self.dim], both[:, self.dim : 2 * self.dim]
        # at once: the next block's kernels are then the same ones, already scheduled
        return self.fc2((gate.silu() * value).contiguous(), residual=h).realize()

    def _rotate(self, qkv: Tensor, start: Tensor) -> Tensor:
        """Rows [R, queries | keys | …] with queries and keys turned by their positions, if so."""
        if self.alibi:
            return qkv
        R, width = qkv.shape[0], math.prod(self.turned)
        heads = qkv[:, :width].reshape(R, *self.turned).transpose(0, 1)  # (H + K, R, C)
        at = start + Tensor.arange(R, device=start.device)
        turned = rotate(heads, at).transpose(0, 1).reshape(R, width)
        return turned.cat(qkv[:, width:], dim=1).contiguous()


def rms_scale(h: Tensor, dim: int) -> Tensor:
    """What RMSNorm multiplies rows h [R, D…] by, its learned scale apart: [R, 1]."""
    mean = h.square().sum(axis=-1, keepdim=True) / dim
    return (mean + RMS_EPS).rsqrt().contiguous()


class Decoder:
    """A model with caches: feed bytes, get the logits after each and the router's weights.

    Memory and time a pass do not depend on how much was fed. `position` counts the bytes fed,
    `selected` those that went through the latent blocks; set back to 0, both forget everything.
    Without `use_latent` those blocks are left out. The weights are copied: they are those of now.
    """

    def __init__(self, model: Pico, use_latent: bool = True) -> None:
        self.model, self.use_latent = model, use_latent
        self.position = self.selected = 0
        config = model.config
        self.before, self.latent, self.after = (
            [CachedBlock(b, config.att_q_heads, config.att_kv_heads) for b in part.blocks]
            for part in (model.fb_in, model.latent, model.fb_out)
        )
        self.width = padded_width(config.dim, model.norm.weight.device)
        padding = ((0, 0), (0, self.width - config.dim))
        self.embedding = model.embedding.weight.detach().pad(padding).contiguous().realize()
        self.router = model.latent.router.weight.detach().pad(padding).contiguous().realize()
        self.unembedding = PackedLinear(model.unembedding.weight, model.norm.weight)
        self.bias = model.unembedding.bias.detach().reshape(1, -1)
        self.last_decisions = np.zeros(0, bool)
        self.recent = b""  # the bytes of the last pass, and before them the one that it followed
        # one row more than a pass has: where slots that are not needed write
        hidden = Tensor.zeros(PREFILL_CHUNK + 1, self.width, device=self.router.device)
        self.hidden = hidden.contiguous().realize()
        self.jits: dict[tuple, TinyJit] = {}
        self.controls: dict[tuple, Tensor] = {}

    def forward(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Feed at least one byte -> (logits float32 [n, T, 256], router logits float32 [n])."""
        piece = PREFILL_CHUNK if len(data) >= MIN_PREFILL else DECODE_ROWS[-1]
        parts = [
            self._pass(np.frombuffer(data[start : start + piece], np.uint8))
            for start in range(0, len(data), piece)
        ]
        logits, router_logits = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(router_logits)

    def rollback(self, count: int) -> None:
        """Take back the newest `count` bytes fed, at most as many as the last pass took in."""
        kept = len(self.last_decisions) - count
        assert kept >= 0, "more than the last pass"
        self.position -= count
        self.selected -= int(self.last_decisions[kept:].sum())
        self.last_decisions = self.last_decisions[:kept]
        self.recent = self.recent[: len(self.recent) - count]

    def snapshot(self) -> tuple:
        """The state now, for `restore`."""
        rings = [read(ring).copy() for ring in self._rings()]
        return self.position, self.selected, self.recent[-1:], rings

    def restore(self, state: tuple) -> None:
        """Go back to what `save` returned."""
        self.position, self.selected, self.recent, rings = state
        self.last_decisions = np.zeros(0, bool)
        for ring, saved in zip(self._rings(), rings, strict=True):
            write_into(ring, saved)

    def _rings(self) -> list[Tensor]:
        rings = [block.ring for block in (*self.before, *self.latent, *self.after)]
        return [tensor for ring in rings for tensor in (ring.keys, ring.values)]

    def _pass(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(data)
        rows = graph_size(n)
        control = np.zeros(1 + rows, np.int32)  # start, bytes
        control[0], control[1 : 1 + n] = self.position, data
        write_into(self._control(rows), control)
        router_logits = read(self._run(self._encode, rows))[:n].copy()
        self.last_decisions = self._decide(data.tobytes(), router_logits) & self.use_latent
        chosen = np.flatnonzero(self.last_decisions)
        if len(chosen):
            count = graph_size(len(chosen))
            # the row that each slot reads, the row that it adds to (the spare one, if none), start
            deeper = np.repeat(
                np.array([0, PREFILL_CHUNK, self.selected], np.int32), [count, count, 1]
            )
            deeper[: len(chosen)] = deeper[count : count + len(chosen)] = chosen
            write_into(self._control(2 * count, "deeper"), deeper)
            self._run(self._deepen, count)
        logits = read(self._run(self._heads, rows))[:n].copy()
        self.position += n
        self.selected += len(chosen)
        return logits, router_logits

    def _decide(self, data: bytes, router_logits: np.ndarray) -> np.ndarray:
        """Which of the bytes from `position` on the router selects; there is no cap."""
        self.recent = (self.recent[-1:] if self.position else b"") + data
        router, stride = self.model.config.router, self.model.config.stride
        if router == "learned":
            return router_logits > 0
        return next_decisions(router, self.recent, self.position, stride)

    def _control(self, length: int, name: str = "rows") -> Tensor:
        """int32 [1 + length] that graphs read, one a name and length.

        What a graph holds costs nothing a call; what it is passed costs a tenth of a millisecond.
        """
        if (name, length) not in self.controls:
            new = Tensor.zeros(1 + length, dtype=dtypes.int32, device=self.router.device)
            self.controls[name, length] = new.contiguous().realize()
        return self.controls[name, length]

    def _run(self, function: Callable, size: int) -> Tensor:
        """A method of that size, compiled."""
        key = (function.__name__, size)
        if key not in self.jits:
            self.jits[key] = jit_method(function, size)
        return self.jits[key]()

    def _encode(self, rows: int) -> Tensor:
        control = self._control(rows)
        start, data = control[:1].contiguous(), control[1:]
        h = self.embedding[data].contiguous()
        for block in self.before:
            h = block(h, start)
        z = (h * self.router).sum(axis=-1).contiguous()
        self.hidden[:rows].assign(h)
        return z.realize(self.hidden)

    def _deepen(self, count: int) -> Tensor:
        control = self._control(2 * count, "deeper")
        source, target, start = (part.contiguous() for part in control.split([count, count, 1]))
        selected = deep = self.hidden[source].contiguous()
        weight = (selected * self.router).sum(axis=-1, keepdim=True).sigmoid().contiguous()
        for block in self.latent:
            deep = block(deep, start)
        added = ((deep - selected) * weight).contiguous()
        row = Tensor.arange(len(self.hidden), device=added.device).reshape(-1, 1, 1)
        here = target.reshape(1, -1, 1) == row  # (rows, slots, 1)
        return self.hidden.assign(self.hidden + here.where(added, 0).sum(axis=1)).realize()

    def _heads(self, rows: int) -> Tensor:
        start = self._control(rows)[:1].contiguous()
        h = self.hidden[:rows].contiguous()
        for block in self.after:
            h = block(h, start)
        bias = self.bias.expand(rows, -1)
        logits = self.unembedding(h, rms_scale(h, self.model.config.dim), bias)
        return logits.reshape(rows, -1, 256).realize()


def graph_size(rows: int) -> int:
    """Rows of the compiled pass that takes `rows` in: one of DECODE_ROWS, or a whole chunk."""
    return next((size for size in DECODE_ROWS if rows <= size), PREFILL_CHUNK)
