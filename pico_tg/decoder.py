"""Decoding: a model with KV caches of fixed size, and compiled passes over a few bytes each.

A pass reads R bytes and returns their logits. A pass runs three compiled graphs: the first blocks
and the router on all R rows; the deep blocks on the rows that the router selects, if any; the
last blocks and the heads on all rows. The first graph also makes the router's decisions, so that
the CPU's launcher can run all three in one call. On other devices a pass is one graph that always
runs the deep blocks, with a slot for every row: skipping them would make the host wait for the
router. Graphs are compiled for SIZES rows, each when it is first needed; other numbers of rows are
padded. Compiling takes longer than reading a short prompt byte by byte, so `Decoder.passes` chooses
the size by the length of the prompt.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from tinygrad import Context, Tensor, dtypes, nn

from .backend.runtime import (
    JIT,
    MethodJit,
    exclusive,
    from_host,
    in_host_memory,
    jit_method,
    link_graphs,
    read,
    write_into,
)
from .files import PicoError
from .kv_cache import PREFILL_CHUNK, KVCache, PackedLinear, padded_width
from .model import Attends, Block, Embedding, Pico, Router
from .routing import causal_decisions, slots

DECODE_ROWS = (1, 4)  # without and with drafts; few, since a size takes seconds to compile
SIZES = (*DECODE_ROWS, PREFILL_CHUNK)  # rows, or slots, of the compiled graphs
# bytes of the shortest prompt that is read in passes of so many rows
SHORTEST = {PREFILL_CHUNK: 4096, DECODE_ROWS[-1]: 512}
# lengths of a pass's int32 inputs: position of the first byte, position of the first slot, how many
# bytes may be routed, the byte before the pass and the bytes of the pass
INPUTS = (1, 1, 1, 1 + PREFILL_CHUNK)


def check_decoder(model: Pico, decoder: "Decoder | None") -> None:
    """Raise PicoError if the decoder is of another model."""
    if decoder is not None and decoder.model is not model:
        raise PicoError("the decoder is of another model; make one with Decoder(model)")


def pack(model: Pico) -> Pico:
    """A copy of the model for decoding: its Linears are PackedLinears.

    Embedding and router are padded to the rows of a PackedLinear. Later changes of the model do not
    change the copy.
    """
    device = model.norm.weight.device
    width = padded_width(model.config.dim, device)

    def padded(part: Embedding | Router) -> Embedding | Router:
        part = copy.copy(part)
        padding = (0, width - part.weight.shape[1])
        part.weight = from_host(np.pad(read(part.weight), ((0, 0), padding)), device)
        return part

    def packed(block: Block) -> Block:
        block, att, glu = copy.copy(block), copy.copy(block.att), copy.copy(block.glu)
        att.fused_qkv, att.proj = PackedLinear(att.fused_qkv, block.norm1), PackedLinear(att.proj)
        glu.fc1, glu.fc2 = PackedLinear(glu.fc1, block.norm2), PackedLinear(glu.fc2)
        block.att, block.glu = att, glu
        return block

    model, weights = object.__new__(Pico), vars(model)  # copy.copy would copy all weights
    vars(model).update(weights)
    model.embedding = padded(model.embedding)
    for name in ("fb_in", "latent", "fb_out"):
        stack = copy.copy(getattr(model, name))
        stack.blocks = [packed(block) for block in stack.blocks]
        setattr(model, name, stack)
    model.latent.router = padded(model.latent.router)
    model.unembedding = PackedLinear(model.unembedding, model.norm)
    return model


class Decoder:
    """A model with KV caches: feed bytes, get the logits after each of them.

    Memory and time of a pass do not depend on the number of bytes fed. The decoder copies the
    weights. `reset` copies them again if the model's last norm has changed since, as training
    changes it; after any other change, call `refresh`. All methods may be called
    from any thread, one at a time.

    - position: bytes fed; selected: how many of them were routed
    - last_decisions: bool [n], which bytes of the last pass were routed
    - use_latent: False skips the deep blocks
    - changes: number of state changes, by which a generator detects another user of the decoder
    """

    @exclusive
    def __init__(self, model: Pico, use_latent: bool = True) -> None:
        self.model, self.config, self.use_latent = model, model.config, use_latent
        self.changes = 0
        self.packed = pack(model)
        self.norm = read(model.norm.weight).tobytes()  # of the weights that are packed
        self.fb_in, self.latent, self.fb_out = (
            [KVCache(block.att) for block in part.blocks]
            for part in (model.fb_in, model.latent, model.fb_out)
        )
        device, rows = model.norm.weight.device, PREFILL_CHUNK
        dim = padded_width(model.config.dim, device)
        # The captured graphs refer to these buffers: as arguments they would cost 0.1 ms per pass.
        # The first graph writes, for the others, hidden states, router logits, index and slot (see
        # `routing.slots`).
        self.hidden = from_host(np.zeros((rows, dim), np.float32), device)
        self.router_logits = from_host(np.zeros(rows, np.float32), device)
        self.index, self.slot, self.inputs = (
            from_host(np.zeros(n, np.int32), device) for n in (rows, rows, sum(INPUTS))
        )
        self.tensors = nn.state.get_parameters(vars(self))  # all that the graphs read or write
        self.single_graph = not device.startswith("CPU")
        self.shared_inputs = in_host_memory(self.inputs)
        self.host_inputs = read(self.inputs)
        self.graphs: dict[tuple[str | int, ...], MethodJit] = {}
        # by number of rows and use_latent: a function that runs a pass and returns its outputs
        self.compiled: dict[tuple[int, bool], Callable[[], list[np.ndarray]]] = {}
        self.reset()

    def __reduce__(self) -> tuple:
        raise PicoError(
            "a Decoder cannot be copied or pickled: its compiled passes refer to its own buffers; "
            "make another one with Decoder(model)"
        )

    @exclusive
    def refresh(self) -> None:
        """Copy the model's present weights again and forget all bytes fed; nothing is compiled.

        The copies keep their buffers, which the captured graphs read.
        """
        kept, new = (nn.state.get_state_dict(model) for model in (self.packed, pack(self.model)))
        for name, tensor in kept.items():
            write_into(tensor, read(new[name]))
        self.norm = read(self.model.norm.weight).tobytes()
        self.reset()

    @exclusive
    def reset(self, use_latent: bool | None = None) -> None:
        """Forget all bytes fed; `use_latent`, if given, replaces the attribute."""
        if self.norm != read(self.model.norm.weight).tobytes():
            self.refresh()
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
        if len(data) <= DECODE_ROWS[-1]:
            return self._pass(data)
        _, logits, router_logits = zip(*self.passes(data), strict=True)
        return np.concatenate(logits), np.concatenate(router_logits)

    def passes(self, data: bytes) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
        """`forward` in pieces: (the bytes of a pass, their logits, their router logits) of each.

        Each pass runs when its piece is asked for, so that long data need no more memory.
        """
        rows = next((r for r, shortest in SHORTEST.items() if len(data) >= shortest), 1)
        for start in range(0, len(data), rows):
            piece = data[start : start + rows]
            yield piece, *self._pass(piece)

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
    def snapshot(self) -> tuple:
        """A copy of the state, for `restore`: the counters, the newest byte and all KV caches."""
        caches = [read(tensor).copy() for tensor in self.cache_tensors()]
        return self.position, self.selected, self.recent[-1:], caches

    @exclusive
    def restore(self, snapshot: tuple) -> None:
        """Go back to the state of a `snapshot` of this decoder."""
        self.changes += 1
        self.position, self.selected, self.recent, caches = snapshot
        self.last_decisions = np.zeros(0, bool)
        for tensor, saved in zip(self.cache_tensors(), caches, strict=True):
            write_into(tensor, saved)

    def cache_tensors(self) -> list[Tensor]:
        """The keys and values of all blocks."""
        caches = (*self.fb_in, *self.latent, *self.fb_out)
        return [tensor for cache in caches for tensor in (cache.keys, cache.values)]

    @exclusive
    def _pass(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        self.changes += 1
        n = len(data)
        self.recent = (self.recent[-1:] if self.position else b"\0") + data
        inputs = self.host_inputs
        inputs[:3] = self.position, self.selected, n if self.use_latent else 0
        inputs[3 : 4 + n] = np.frombuffer(self.recent, np.uint8)
        if not self.shared_inputs:
            write_into(self.inputs, inputs)
        key = next(size for size in SIZES if n <= size), self.use_latent
        if key not in self.compiled:
            with Tensor.train(False):  # also for a caller that trains
                self.compiled[key] = self._compile(*key)
        outputs = self.compiled[key]()  # the next pass overwrites them
        logits, router_logits, decisions = (output[:n].copy() for output in outputs)
        self.last_decisions = decisions > 0
        self.position += n
        self.selected += int(self.last_decisions.sum())
        return logits, router_logits

    def _compile(self, rows: int, use_latent: bool) -> Callable[[], list[np.ndarray]]:
        """A function that runs a pass -> logits [R, T, 256], router logits [R] and decisions [R].

        On a CPU the outputs are views of memory. Elsewhere a pass is one graph, one write of its
        inputs and one read of its outputs.
        """
        counts = self._slots(rows) if use_latent else []
        if self.single_graph:
            with Context(JIT_BATCH_SIZE=0):  # by default, tinygrad's first graph has 32 kernels
                whole = self._graph(self._whole_pass, rows, max(counts, default=0))
                whole()

            def run() -> list[np.ndarray]:
                results = whole()
                logits, rest = results[: -2 * rows], results[-2 * rows :]
                return [logits.reshape(rows, -1, 256), *rest.reshape(2, rows)]

            return run
        encode, predict = self._graph(self._encode, rows), self._graph(self._predict, rows)
        deepen = [self._graph(self._deepen, count) for count in counts]
        router_logits, decisions, _ = encode()
        for graph in deepen:  # only to compile it: the first pass overwrites what it computes
            graph()
        outputs = [predict(), router_logits, decisions]
        run_graphs = link_graphs(encode, deepen, predict)
        return lambda: run_graphs() or outputs

    def _slots(self, rows: int) -> list[int]:
        """The numbers of slots for which a pass of `rows` rows has a graph of the deep blocks."""
        return [] if self.config.router == "none" else list(SIZES[: SIZES.index(rows) + 1])

    def _graph(self, method: Callable[..., Tensor], *sizes: int) -> MethodJit:
        """method(*sizes), compiled at its first call.

        Raises PicoError if tinygrad's JIT=0 turns graphs off: the results would be of that call.
        """
        if not JIT:
            raise PicoError("decoding replays captured graphs, which JIT=0 turns off; unset it")
        key = (method.__name__, *sizes)
        if key not in self.graphs:
            graph = jit_method(method, *sizes, tensors=self.tensors, determined_by=self.config)
            self.graphs[key] = graph
        return self.graphs[key]

    def _whole_pass(self, rows: int, count: int) -> Tensor:
        """A pass with `count` slots for the deep blocks -> the outputs of a pass, flat.

        Unused slots write keys and values after those of the selected bytes. Like those of rejected
        drafts, they are overwritten before any query sees them (see `KVCache`).
        """
        router_logits, decisions, _ = self._encode(rows)
        if count:
            self._deepen(count)
        logits = self._predict(rows).flatten()
        return logits.cat(router_logits, decisions.float()).contiguous().realize()

    def _encode(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Write what the other graphs read -> (router logits [R], decisions [R], choice [1]).

        decisions: int32, 0 or 1. choice: int32, 0 if no byte is selected, else n if the deep
        blocks need `_slots(rows)[n - 1]` slots.
        """
        start, _, routable, data = self.inputs.split(INPUTS)
        start, x, before = start.contiguous(), data[1 : 1 + rows].contiguous(), data[:rows]
        h, router_logits = self.packed.encode(x, _attends(self.fb_in, start))
        row = Tensor.arange(rows, device=h.device)
        decisions = causal_decisions(self.config.router, x, before, router_logits)
        decisions = (decisions & (row < routable)).contiguous()
        index, slot = slots(decisions.unsqueeze(0), rows)  # (1, R), (1, R)
        total = decisions.sum(dtype=dtypes.int32)
        smaller = [0, *self._slots(rows)[:-1]]  # for each number of slots, the next smaller one
        choice = sum((total > size).cast(dtypes.int32) for size in smaller).reshape(1)
        decisions = decisions.cast(dtypes.int32).contiguous()
        self.hidden[:rows].assign(h)
        self.router_logits[:rows].assign(router_logits)
        self.index[:rows].assign(index.squeeze(0))
        self.slot[:rows].assign(slot.squeeze(0))
        written = self.hidden, self.router_logits, self.index, self.slot
        Tensor.realize(router_logits, decisions, choice, *written)
        return router_logits, decisions, choice

    def _deepen(self, count: int) -> Tensor:
        """Run the deep blocks on the selected rows, in `count` slots, and update `hidden`."""
        start, index = self.inputs[1:2].contiguous(), self.index[:count].contiguous()
        attends = _attends(self.latent, start)
        deep = self.packed.deepen(self.hidden, self.router_logits, index, self.slot, attends)
        return self.hidden.assign(deep).realize()

    def _predict(self, rows: int) -> Tensor:
        """The logits [R, T, 256] of `hidden`."""
        start, h = self.inputs[:1].contiguous(), self.hidden[:rows].contiguous()
        return self.packed.predict(h, _attends(self.fb_out, start)).realize()


def _attends(caches: list[KVCache], start: Tensor) -> Attends:
    """The attention of each block of a stack, for rows at positions start, start + 1, …"""
    return [partial(cache.attend, start=start) for cache in caches]
