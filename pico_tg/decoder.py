"""Decoding: a model with KV caches of fixed size, and compiled passes over a few bytes each.

A pass reads R bytes and returns their logits. A pass runs three compiled graphs: the first blocks
and the router on all R rows; the latent blocks on the rows that the router selects, if any; the
last blocks and the heads on all rows. Each graph is compiled for a few numbers of rows only; other
numbers are padded to the next compiled one:

- decode: 1, 4 or 8 rows, for the newest byte and its drafts, or a short prompt in pieces of 8
- prefill: PREFILL_CHUNK rows, for prompts of MIN_PREFILL bytes, which justify another compilation
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from .attention import alibi_slopes, rotate
from .kv_cache import KVCache, PackedLinear, padded_width
from .model import RMS_EPS, Block, Pico
from .routing import next_decisions
from .runtime import exclusive, jit_method, read, write_into

DECODE_ROWS = (1, 4, 8)  # few: a padded row costs little time, another size seconds of compiling
PREFILL_CHUNK = 64  # rows of a prefill pass
MIN_PREFILL = 4096  # bytes of the shortest prompt for which prefill passes are compiled


def graph_size(rows: int) -> int:
    """Rows of the smallest compiled pass that holds `rows` rows."""
    return next((size for size in DECODE_ROWS if rows <= size), PREFILL_CHUNK)


class CachedBlock:
    """A `Block` for decoding: packed weights with the norms' scales folded in, and a KV cache."""

    def __init__(self, block: Block) -> None:
        attention = block.att
        heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.dim = block.norm1.weight.shape[0]
        self.alibi = attention.position == "alibi"
        self.rotated = heads + kv_heads, head_dim  # shape of the queries and keys in qkv
        slopes = alibi_slopes(heads, block.norm1.weight.device) * self.alibi
        self.cache = KVCache(heads, kv_heads, head_dim, attention.window, PREFILL_CHUNK, slopes)
        self.qkv = PackedLinear(attention.fused_qkv.weight, block.norm1.weight)
        self.proj = PackedLinear(attention.proj.weight)
        self.fc1 = PackedLinear(block.glu.fc1.weight, block.norm2.weight)
        self.fc2 = PackedLinear(block.glu.fc2.weight)

    def refresh(self) -> None:
        """Copy the present weights of the block again."""
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            linear.refresh()

    def __call__(self, h: Tensor, start: Tensor) -> Tensor:
        """Rows h [R, D padded] at positions start, start + 1, … -> [R, D padded].

        start: int32 [1]. The padding is zeros and stays zeros.
        """
        qkv = self._rotate(self.qkv(h, rms_scale(h, self.dim)), start)
        h = self.proj(self.cache.attend(qkv, start), residual=h)
        both = self.fc1(h, rms_scale(h, self.dim))
        value, gate = both[:, : self.dim], both[:, self.dim : 2 * self.dim]
        # realize each block separately: all blocks then have equal graphs, which are scheduled once
        return self.fc2((gate.silu() * value).contiguous(), residual=h).realize()

    def _rotate(self, qkv: Tensor, start: Tensor) -> Tensor:
        """qkv [R, H*C | K*C | …], with rotary embeddings of the queries and keys unless ALiBi."""
        if self.alibi:
            return qkv
        R, width = qkv.shape[0], math.prod(self.rotated)
        heads = qkv[:, :width].reshape(R, *self.rotated).transpose(0, 1)  # (H + K, R, C)
        positions = start + Tensor.arange(R, device=start.device)
        rotated = rotate(heads, positions).transpose(0, 1).reshape(R, width)
        return rotated.cat(qkv[:, width:], dim=1).contiguous()


def rms_scale(h: Tensor, dim: int) -> Tensor:
    """1 / RMS of rows h [R, D padded] with `dim` channels each: [R, 1]."""
    mean = h.square().sum(axis=-1, keepdim=True) / dim
    return (mean + RMS_EPS).rsqrt().contiguous()


class Snapshot(NamedTuple):
    """What `Decoder.restore` needs: the counters, the newest byte and copies of all KV caches."""

    position: int
    selected: int
    newest_byte: bytes
    caches: list[np.ndarray]


class Decoder:
    """A model with KV caches: feed bytes, get the logits after each of them.

    Memory and time of a pass do not depend on the number of bytes fed. The decoder copies the
    weights, so later changes of the model have no effect until `refresh`. All methods may be called
    from any thread, one at a time.

    - position: bytes fed; selected: how many of them went through the latent blocks
    - last_decisions: bool [n], which bytes of the last pass went through the latent blocks
    - use_latent: False skips the latent blocks
    - changes: number of state changes, by which a generator detects another user of the decoder
    """

    @exclusive
    def __init__(self, model: Pico, use_latent: bool = True) -> None:
        self.model, self.config, self.use_latent = model, model.config, use_latent
        self.changes = 0
        self.fb_in, self.latent, self.fb_out = (
            [CachedBlock(block) for block in part.blocks]
            for part in (model.fb_in, model.latent, model.fb_out)
        )
        device, dim = model.norm.weight.device, self.config.dim
        width = padded_width(dim, device)
        self.embedding, self.router, self.bias = self._copies(width)
        self.unembedding = PackedLinear(model.unembedding.weight, model.norm.weight)
        # the hidden states of a pass, and a spare last row that unused slots add to
        hidden = Tensor.zeros(PREFILL_CHUNK + 1, width, device=device)
        self.hidden = hidden.contiguous().realize()
        self.graphs: dict[tuple[str, int], TinyJit] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.reset()

    def _copies(self, width: int) -> list[Tensor]:
        """Copies of the weights without a PackedLinear: embedding, router [*, width], bias."""
        model, padding = self.model, ((0, 0), (0, width - self.config.dim))
        rows = model.embedding.weight, model.latent.router.weight
        copies = [weight.detach().pad(padding).clone().realize() for weight in rows]
        return [*copies, model.unembedding.bias.detach().reshape(1, -1).clone().realize()]

    @exclusive
    def refresh(self) -> None:
        """Copy the model's present weights again and forget all bytes fed; nothing is compiled.

        The copies keep their buffers, which the captured graphs read.
        """
        copies = self._copies(self.hidden.shape[1])
        for tensor, copy in zip((self.embedding, self.router, self.bias), copies, strict=True):
            write_into(tensor, read(copy))
        for part in (*self.fb_in, *self.latent, *self.fb_out, self.unembedding):
            part.refresh()
        self.reset()

    def reset(self, use_latent: bool | None = None) -> None:
        """Forget all bytes fed; `use_latent`, if given, replaces the attribute."""
        self.changes += 1
        self.position = self.selected = 0
        self.recent = b""  # the bytes of the last pass, preceded by the byte before that pass
        self.last_decisions = np.zeros(0, bool)
        if use_latent is not None:
            self.use_latent = use_latent

    @exclusive
    def forward(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Feed at least one byte -> (logits float32 [n, T, 256], router logits float32 [n]).

        Row i is computed from the bytes up to byte i: head 0 predicts the next byte, head k the
        byte k positions after that.
        """
        self.changes += 1
        rows = PREFILL_CHUNK if len(data) >= MIN_PREFILL else DECODE_ROWS[-1]
        passes = [self._pass(data[i : i + rows]) for i in range(0, len(data), rows)]
        logits, router_logits = zip(*passes, strict=True)
        return np.concatenate(logits), np.concatenate(router_logits)

    def rollback(self, count: int) -> None:
        """Forget the newest `count` bytes, all of which the last pass must have read."""
        kept = len(self.last_decisions) - count
        assert kept >= 0, "more bytes than the last pass took in"
        self.changes += 1
        self.position -= count
        self.selected -= int(self.last_decisions[kept:].sum())
        self.last_decisions = self.last_decisions[:kept]
        self.recent = self.recent[: len(self.recent) - count]

    @exclusive
    def snapshot(self) -> Snapshot:
        """A copy of the state, for `restore`."""
        caches = [read(tensor).copy() for tensor in self.cache_tensors()]
        return Snapshot(self.position, self.selected, self.recent[-1:], caches)

    @exclusive
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to the state of a `snapshot` of this decoder."""
        self.changes += 1
        self.position, self.selected, self.recent, caches = snapshot
        self.last_decisions = np.zeros(0, bool)
        for tensor, saved in zip(self.cache_tensors(), caches, strict=True):
            write_into(tensor, saved)

    def cache_tensors(self) -> list[Tensor]:
        """The keys and values of all blocks."""
        caches = [block.cache for block in (*self.fb_in, *self.latent, *self.fb_out)]
        return [tensor for cache in caches for tensor in (cache.keys, cache.values)]

    def _pass(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        n = len(data)
        rows = graph_size(n)
        inputs = np.zeros(1 + rows, np.int32)
        inputs[0], inputs[1 : 1 + n] = self.position, np.frombuffer(data, np.uint8)
        write_into(self._input("rows", 1 + rows), inputs)
        router_logits = read(self._run(self._encode, rows))[:n].copy()
        self.last_decisions = self._decide(data, router_logits) & self.use_latent
        selected = np.flatnonzero(self.last_decisions)
        if len(selected):
            count = graph_size(len(selected))
            source = np.zeros(count, np.int32)  # the row that each slot reads
            target = np.full(count, PREFILL_CHUNK, np.int32)  # the row that each slot adds to
            source[: len(selected)] = target[: len(selected)] = selected
            start = np.array([self.selected], np.int32)  # the position of the first slot
            write_into(self._input("slots", 2 * count + 1), np.concatenate([source, target, start]))
            self._run(self._add_latent, count)
        logits = read(self._run(self._heads, rows))[:n].copy()
        self.position += n
        self.selected += len(selected)
        return logits, router_logits

    def _decide(self, data: bytes, router_logits: np.ndarray) -> np.ndarray:
        """Which bytes, from `position` on, are selected, without a capacity limit: bool [n]."""
        self.recent = (self.recent[-1:] if self.position else b"") + data
        if self.config.router == "learned":
            return router_logits > 0
        return next_decisions(self.config.router, self.recent, self.position, self.config.stride)

    def _input(self, name: str, length: int) -> Tensor:
        """The int32 buffer [length] through which a pass receives its integers.

        The captured graphs refer to this buffer: as an argument it would cost 0.1 ms per pass.
        """
        if (name, length) not in self.inputs:
            zeros = Tensor.zeros(length, dtype=dtypes.int32, device=self.router.device)
            self.inputs[name, length] = zeros.contiguous().realize()
        return self.inputs[name, length]

    def _run(self, method: Callable[[int], Tensor], size: int) -> Tensor:
        """method(size), compiled at its first call with that size."""
        key = (method.__name__, size)
        if key not in self.graphs:
            self.graphs[key] = jit_method(method, size)
        return self.graphs[key]()

    def _encode(self, rows: int) -> Tensor:
        """Write the hidden states before the latent blocks to `hidden` -> router logits [R]."""
        inputs = self._input("rows", 1 + rows)
        start, data = inputs[:1].contiguous(), inputs[1:]
        h = self.embedding[data].contiguous()  # (R, D padded)
        for block in self.fb_in:
            h = block(h, start)
        router_logits = (h * self.router).sum(axis=-1).contiguous()
        self.hidden[:rows].assign(h)
        return router_logits.realize(self.hidden)

    def _add_latent(self, count: int) -> Tensor:
        """Run the latent blocks on the selected rows, in `count` slots, and update `hidden`."""
        inputs = self._input("slots", 2 * count + 1)
        source, target, start = (part.contiguous() for part in inputs.split([count, count, 1]))
        selected = deep = self.hidden[source].contiguous()  # (slots, D padded)
        weight = (selected * self.router).sum(axis=-1, keepdim=True).sigmoid().contiguous()
        for block in self.latent:
            deep = block(deep, start)
        added = ((deep - selected) * weight).contiguous()
        row = Tensor.arange(len(self.hidden), device=added.device).reshape(-1, 1, 1)
        hit = target.reshape(1, -1, 1) == row  # (rows, slots, 1)
        return self.hidden.assign(self.hidden + hit.where(added, 0).sum(axis=1)).realize()

    def _heads(self, rows: int) -> Tensor:
        """The logits [R, T, 256] of `hidden`."""
        start = self._input("rows", 1 + rows)[:1].contiguous()
        h = self.hidden[:rows].contiguous()
        for block in self.fb_out:
            h = block(h, start)
        bias = self.bias.expand(rows, -1)
        logits = self.unembedding(h, rms_scale(h, self.config.dim), bias)
        return logits.reshape(rows, -1, 256).realize()
