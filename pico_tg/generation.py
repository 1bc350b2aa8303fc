"""Decoding: sliding KV caches of fixed size, and a generator that yields one record a byte.

Self-speculative and exact. Head 0 at a position gives the distribution of the next byte, heads 1,
2, … at the same position guess those after it. A round feeds the byte just sampled and some
guesses (drafts) in one pass; then head 0 at each of them says how the *next* byte is distributed.
It is sampled from that; if it is the byte that was fed as the next draft, the pass has the
following distribution as well, and so on. No sample is ever thrown away, so drafts change how many
passes a text takes and nothing else.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from .attention import alibi_slopes, rotate
from .data import SEQ_END, SEQ_START
from .files import PicoError
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
        rows = _graph_size(n)
        control = np.zeros(1 + rows, np.int32)  # start, bytes
        control[0], control[1 : 1 + n] = self.position, data
        write_into(self._control(rows), control)
        router_logits = read(self._run(self._encode, rows))[:n].copy()
        self.last_decisions = self._decide(data.tobytes(), router_logits) & self.use_latent
        chosen = np.flatnonzero(self.last_decisions)
        if len(chosen):
            count = _graph_size(len(chosen))
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


def _graph_size(rows: int) -> int:
    """Rows of the compiled pass that takes `rows` in: one of DECODE_ROWS, or a whole chunk."""
    return next((size for size in DECODE_ROWS if rows <= size), PREFILL_CHUNK)


@dataclass(frozen=True)
class GeneratedByte:
    """One byte of a sample.

    byte: 0..255; router_weight: the router's sigmoid for it; router_decision: whether it went
    through the latent blocks (weight > 0.5, or a rule); logprob: natural log of its probability
    under the distribution it was drawn from; drafted: whether a pass took it in before it was
    known, as a draft that proved right; sample: which of several, from 0.
    """

    byte: int
    router_weight: float
    router_decision: bool
    logprob: float
    drafted: bool = False
    sample: int = 0


@dataclass
class Stats:
    """What generating took, kept up to date by `generate`.

    bytes: made so far, end tags included; passes: through the model, the prompt's left out;
    routed: how many bytes went through the latent blocks; drafts, accepted: guesses fed, and those
    that were right; first_byte_seconds: from the start to the first byte; seconds: all of it.
    """

    bytes: int = 0
    passes: int = 0
    routed: int = 0
    drafts: int = 0
    accepted: int = 0
    first_byte_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Sampler:
    """How a byte is drawn from the logits of head 0. Raises PicoError on an impossible option.

    - temperature: divides the logits; 0 always takes the likeliest byte
    - top_k: only the k likeliest bytes; 0 is all
    - top_p: only the likeliest bytes that together reach this probability; 1 is all
    - min_p: only bytes at least this likely, as a fraction of the likeliest one; 0 is all

    They apply in this order; what is left is scaled to a sum of 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise PicoError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise PicoError(f"top_k must be at least 0 (all bytes), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise PicoError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise PicoError(f"min_p must be from 0 to 1, not {self.min_p}")

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 [256] of the next byte, from logits [256]."""
        if self.temperature == 0:
            return np.eye(256)[np.argmax(logits)]
        scaled = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # to -inf, as it should be
            scaled = (scaled - scaled.max()) / self.temperature
        p = np.exp(scaled)
        p /= p.sum()
        if 0 < self.top_k < 256 or self.top_p < 1:
            order = np.argsort(-p, kind="stable")  # ties to the smaller byte
            if 0 < self.top_k < 256:
                p[order[self.top_k :]] = 0
                p /= p.sum()
            if self.top_p < 1:
                reached = np.cumsum(p[order]) - p[order]  # before each
                p[order[reached >= self.top_p]] = 0
        p[p < self.min_p * p.max()] = 0
        return p / p.sum()

    def __call__(self, logits: np.ndarray, rng: np.random.Generator) -> tuple[int, float]:
        """A byte and the natural log of its probability; takes one number from `rng`."""
        p = self.distribution(logits)
        total = np.cumsum(p)
        byte = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        return byte, math.log(p[byte])


class DraftPolicy:
    """How many drafts a pass should carry, from how often they were right lately.

    `right[j]`: how often draft j was, given that those before it were; a running average, which
    also counts the guesses that no pass took in. The choice is that of the most bytes for the
    time, if a row more costs ROW_COST of a pass of one row: little by itself, but the latent blocks
    run as soon as one row needs them. It depends on the text alone.
    """

    ROW_COST = 0.25
    WEIGHT = 0.05

    def __init__(self, most: int) -> None:
        self.right = [0.5] * most
        self.guesses: list[int] = []  # the oldest ones that are still undecided
        self.matched = 0

    def choose(self) -> int:
        expected, bytes_a_pass = [1.0], 1.0
        for chance in self.right:
            bytes_a_pass *= chance
            expected.append(expected[-1] + bytes_a_pass)
        sizes = [k for k in range(len(expected)) if k + 1 == _graph_size(k + 1)]
        sizes += [len(self.right)]
        return max(sizes, key=lambda k: expected[k] / (1 + self.ROW_COST * k))

    def guess(self, guesses: list[int]) -> None:
        """All that the heads guess now, about the bytes after the one just sampled."""
        if not self.guesses:
            self.guesses, self.matched = guesses, 0

    def see(self, byte: int) -> None:
        """The byte that really came."""
        if not self.guesses:
            return
        hit = self.guesses[self.matched] == byte
        self.right[self.matched] += self.WEIGHT * (hit - self.right[self.matched])
        self.matched += 1
        if not hit or self.matched == len(self.guesses):
            self.guesses = []


def generate(
    model: Pico,
    prompt: bytes = b"",
    *,
    max_bytes: int = 1024,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    num_samples: int = 1,
    speculative: bool = True,
    ignore_end: bool = False,
    raw_prompt: bool = False,
    latent: bool = True,
    stats: Stats | None = None,
    decoder: Decoder | None = None,
) -> Iterator[GeneratedByte]:
    """Continue `prompt`, yielding one record a byte until `</pico:seq>` or `max_bytes`.

    - temperature, top_k, top_p, min_p: see `Sampler`; temperature 0 is greedy
    - seed: the same one gives the same bytes on the same backend
    - num_samples: so many continuations, one after another; the prompt is read once
    - speculative: let a pass take in guesses of the next bytes; the distribution is the same
    - ignore_end: go on after `</pico:seq>`, which is then part of the text
    - raw_prompt: the prompt is all that the model sees; otherwise it is put after `<pico:seq>`, the
      start of a document
    - latent: False leaves the latent blocks out
    - stats: filled in while bytes are made
    - decoder: `Decoder(model)`, to be used again and again: making one takes seconds

    Raises PicoError on a bad option.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p)
    for name, value, least in (("max_bytes", max_bytes, 0), ("num_samples", num_samples, 1)):
        if value < least:
            raise PicoError(f"{name} must be at least {least}, not {value}")
    if seed is not None and seed < 0:
        raise PicoError(f"seed must be at least 0, not {seed}")
    if raw_prompt and not prompt:
        raise PicoError("a raw prompt must hold at least one byte: there is nothing to continue")
    start = prompt if raw_prompt else SEQ_START + prompt
    stats = Stats() if stats is None else stats

    def samples() -> Iterator[GeneratedByte]:
        began = time.perf_counter()
        own = decoder or Decoder(model)
        own.use_latent = latent
        own.position = own.selected = 0
        heads = own.forward(start)[0][-1]
        after_prompt = own.snapshot() if num_samples > 1 else None
        for number in range(num_samples):
            if number > 0:
                own.restore(after_prompt)
            rng = np.random.default_rng(None if seed is None else (seed, number))
            most = model.config.next_tokens - 1 if speculative else 0
            bytes_ = _decode(own, heads, sampler, rng, most, max_bytes, number, stats, began)
            yield from bytes_ if ignore_end else _until_the_end_tag(bytes_)

    return samples()


def _decode(
    decoder: Decoder,
    heads: np.ndarray,
    sampler: Sampler,
    rng: np.random.Generator,
    most_drafts: int,
    max_bytes: int,
    number: int,
    stats: Stats,
    began: float,
) -> Iterator[GeneratedByte]:
    """Rounds, given the logits [T, 256] of all heads at the last byte of the prompt."""
    most_drafts = min(most_drafts, DECODE_ROWS[-1] - 1)  # a round is one pass
    policy = DraftPolicy(most_drafts)
    made, drafted = 0, False
    byte, logprob = sampler(heads[0], rng)
    while made < max_bytes:
        guesses = np.argmax(heads[1 : 1 + most_drafts], axis=1).tolist()
        policy.guess(guesses)
        drafts = guesses[: min(policy.choose(), max_bytes - made - 1)]
        logits, router_logits = decoder.forward(bytes([byte, *drafts]))
        stats.passes += 1
        stats.drafts += len(drafts)
        accepted = 0
        while True:
            z, decision = float(router_logits[accepted]), bool(decoder.last_decisions[accepted])
            made += 1
            stats.bytes += 1
            stats.routed += decision
            stats.seconds = time.perf_counter() - began
            stats.first_byte_seconds = stats.first_byte_seconds or stats.seconds
            yield GeneratedByte(byte, _sigmoid(z), decision, logprob, drafted, number)
            if made == max_bytes:
                break
            byte, logprob = sampler(logits[accepted, 0], rng)
            policy.see(byte)
            drafted = accepted < len(drafts) and byte == drafts[accepted]
            if not drafted:
                break
            accepted += 1
            stats.accepted += 1
        heads = logits[accepted]
        decoder.rollback(len(drafts) - accepted)


def _until_the_end_tag(records: Iterator[GeneratedByte]) -> Iterator[GeneratedByte]:
    """The records up to `</pico:seq>`; bytes that may turn out to be it are held back."""
    held: list[GeneratedByte] = []
    for record in records:
        held.append(record)
        if bytes(r.byte for r in held) == SEQ_END:
            return
        while held and not SEQ_END.startswith(bytes(r.byte for r in held)):
            yield held.pop(0)
    yield from held


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0
