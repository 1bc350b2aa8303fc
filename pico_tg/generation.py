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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .data import SEQ_END, SEQ_START
from .decoder import DECODE_ROWS, Decoder, graph_size
from .files import PicoError
from .model import Pico


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
        sizes = [k for k in range(len(expected)) if k + 1 == graph_size(k + 1)]
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
