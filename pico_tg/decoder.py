"""Decoding: a model with KV caches of fixed size, and compiled passes over a few bytes each.

A pass reads R bytes and returns their logits. A pass runs three compiled graphs: the first blocks
and the router on all R rows; the latent blocks on the rows that the router selects, if any; the
last blocks and the heads on all rows. The first graph also makes the router's decisions, so that
the CPU's launcher can run all three in one call. On other devices a pass is one graph, in which the
latent blocks always run, with a slot for every row: to skip them, the host would have to wait for
the router. Each graph is compiled for a few numbers of rows only; other numbers are padded to the
next compiled one:

- decode: 1, 4 or 8 rows, for the newest byte and its drafts, or a short prompt in pieces of 8
- prefill: PREFILL_CHUNK rows, for prompts of MIN_PREFILL bytes, which justify another compilation
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tinygrad import Context, Tensor, dtypes

from .attention import alibi_slopes, rotate
from .backend.runtime import (
    MethodJit,
    exclusive,
    in_host_memory,
    jit_method,
    link_graphs,
    read,
    write_into,
)
from .config import RULES
from .kv_cache import PREFILL_CHUNK, KVCache, PackedLinear, padded_width
from .model import RMS_EPS, Block, Pico
from .routing import rule_decisions, slots

DECODE_ROWS = (1, 4, 8)  # few: a padded row costs little time, another size seconds of compiling
SIZES = (*DECODE_ROWS, PREFILL_CHUNK)  # rows, or slots, of the compiled graphs
# lengths of a pass's int32 inputs: position of the first byte, position of the first slot, bytes,
# and what `_rules` returns for them
INPUTS = (1, 1, PREFILL_CHUNK, PREFILL_CHUNK)
MIN_PREFILL = 4096  # bytes of the shortest prompt for which prefill passes are compiled


def graph_size(rows: int) -> int:
    """Rows of the smallest compiled pass that holds `rows` rows."""
    return next(size for size in SIZES if rows <= size)


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
        # The captured graphs refer to these buffers: as arguments they would cost 0.1 ms per pass.
        # hidden: the hidden states of a pass; index and slot: see `routing.slots`
        self.hidden = Tensor.zeros(PREFILL_CHUNK, width, device=device).contiguous().realize()
        self.index, self.slot, self.inputs = (
            Tensor.zeros(n, dtype=dtypes.int32, device=device).contiguous().realize()
            for n in (PREFILL_CHUNK, PREFILL_CHUNK, sum(INPUTS))
        )
        self.single_graph = not device.startswith("CPU")
        self.shared_inputs = in_host_memory(self.inputs)
        self.host_inputs = read(self.inputs)
        self.graphs: dict[tuple[str | int, ...], MethodJit] = {}
        # by number of rows: a pass in one call, and the buffers of its outputs
        self.linked: dict[int, tuple[Callable[[], bool], tuple[np.ndarray, np.ndarray]]] = {}
        self.reset()

    def _copies(self, width: int) -> list[Tensor]:
        """Copies of the weights without a PackedLinear: embedding and router [*, width], bias."""
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
        kept = self.embedding, self.router, self.bias
        for tensor, copy in zip(kept, copies, strict=True):
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
        if len(data) <= rows:
            return self._pass(data)
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
        rules = self._rules(data)
        inputs = self.host_inputs
        inputs[:2] = self.position, self.selected
        inputs[2 : 2 + n] = np.frombuffer(data, np.uint8)
        inputs[-PREFILL_CHUNK:] = -1  # padding is not routed
        inputs[-PREFILL_CHUNK:][:n] = rules
        if not self.shared_inputs:
            write_into(self.inputs, inputs)
        logits, router_logits = (output[:n].copy() for output in self._outputs(rows))
        self.last_decisions = rules + (router_logits > 0) > 0
        self.position += n
        self.selected += int(self.last_decisions.sum())
        return logits, router_logits

    def _rules(self, data: bytes) -> np.ndarray:
        """How the bytes, from `position` on, are routed, without a capacity limit: int [n].

        1: through the latent blocks; -1: past them; 0: as the sign of the router's logit decides.
        """
        self.recent = (self.recent[-1:] if self.position else b"\0") + data
        router, stride = self.config.router, self.config.stride
        if not self.use_latent or router not in RULES:
            return np.full(len(data), 0 if self.use_latent else -1)
        recent = np.frombuffer(self.recent, np.uint8).astype(np.int32)
        position = self.position + np.arange(len(data))
        return np.where(rule_decisions(router, recent[1:], recent[:-1], position, stride), 1, -1)

    def _outputs(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Run a pass -> (logits [R, T, 256], router logits [R]); the next pass overwrites them.

        On a CPU, the graphs run one by one until `link_graphs` has joined those that the pass
        needs. Elsewhere a pass is one graph, one write of its inputs and one read of its results.
        """
        if self.single_graph:
            slots = rows if self.use_latent and self.config.router != "none" else 0
            with Context(JIT_BATCH_SIZE=0):  # by default, tinygrad's first graph has 32 kernels
                results = read(self._run(self._whole_pass, rows, slots))
            return results[:-rows].reshape(rows, -1, 256), results[-rows:]
        if rows in self.linked:
            run, outputs = self.linked[rows]
            if run():
                return outputs
        router_logits, choice = self._run(self._encode, rows)
        if number := read(choice)[0]:
            self._run(self._add_latent, SIZES[number - 1])
        logits = self._run(self._heads, rows)
        outputs = read(logits), read(router_logits)
        encode, heads = (self.graphs[name, rows] for name in ("_encode", "_heads"))
        latent = [self.graphs.get(("_add_latent", size)) for size in SIZES]
        if run := link_graphs(encode, choice, latent, heads):
            self.linked[rows] = run, outputs
        return outputs

    def _run(self, method: Callable[..., Tensor], *sizes: int) -> Tensor:
        """method(*sizes), compiled at its first call with these sizes."""
        key = (method.__name__, *sizes)
        if key not in self.graphs:
            self.graphs[key] = jit_method(method, *sizes)
        return self.graphs[key]()

    def _whole_pass(self, rows: int, slots: int) -> Tensor:
        """A pass with `slots` slots for the latent blocks -> logits, then router logits, flat.

        Unused slots write keys and values after those of the selected bytes. Like those of rejected
        drafts, they are overwritten before any query sees them (see `KVCache`).
        """
        router_logits, _ = self._encode(rows)
        if slots:
            self._add_latent(slots)
        return self._heads(rows).flatten().cat(router_logits).contiguous().realize()

    def _encode(self, rows: int) -> tuple[Tensor, Tensor]:
        """Write `hidden`, `index` and `slot` -> (router logits [R], choice [1]).

        choice: int32, n if the latent blocks need SIZES[n - 1] slots, 0 if no byte is selected.
        """
        start, _, data, rules = self.inputs.split(INPUTS)
        start = start.contiguous()
        h = self.embedding[data[:rows]].contiguous()  # (R, D padded)
        for block in self.fb_in:
            h = block(h, start)
        router_logits = (h * self.router).sum(axis=-1).contiguous()
        above = (router_logits > 0).cast(dtypes.int32)
        selected = (above + rules[:rows] > 0).reshape(1, rows)
        index, slot = slots(selected.contiguous(), rows)  # (1, R), (1, R)
        total = selected.sum(dtype=dtypes.int32)
        smaller = (0, *SIZES[: SIZES.index(rows)])  # for each size, the next smaller one
        choice = sum((total > size).cast(dtypes.int32) for size in smaller).reshape(1)
        self.hidden[:rows].assign(h)
        self.index[:rows].assign(index.reshape(rows))
        self.slot[:rows].assign(slot.reshape(rows))
        Tensor.realize(router_logits, choice, self.hidden, self.index, self.slot)
        return router_logits, choice

    def _add_latent(self, count: int) -> Tensor:
        """Run the latent blocks on the selected rows, in `count` slots, and update `hidden`."""
        start, index = self.inputs[1:2].contiguous(), self.index[:count].contiguous()
        selected = deep = self.hidden[index].contiguous()  # (slots, D padded)
        weight = (selected * self.router).sum(axis=-1, keepdim=True).sigmoid().contiguous()
        for block in self.latent:
            deep = block(deep, start)
        added = ((deep - selected) * weight).contiguous()
        number = Tensor.arange(count, device=added.device).reshape(1, -1, 1)
        hit = self.slot.reshape(-1, 1, 1) == number  # (rows, slots, 1)
        return self.hidden.assign(self.hidden + hit.where(added, 0).sum(axis=1)).realize()

    def _heads(self, rows: int) -> Tensor:
        """The logits [R, T, 256] of `hidden`."""
        start = self.inputs[:1].contiguous()
        h = self.hidden[:rows].contiguous()
        for block in self.fb_out:
            h = block(h, start)
        bias = self.bias.expand(rows, -1)
        logits = self.unembedding(h, rms_scale(h, self.config.dim), bias)
        return logits.reshape(rows, -1, 256).realize()
