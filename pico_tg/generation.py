"""Generation: a sampler, drafts, and a generator that yields one record per byte.

Decoding is self-speculative and exact. At each position head 0 predicts the next byte, and the
extra heads draft the bytes after it at no extra cost. A round is one pass of the model:

1. The pass reads the newest sampled byte, followed by some drafts (`DraftPolicy`).
2. The next byte is sampled from the distribution of head 0 at the newest byte, as without drafts.
3. If the next byte equals its draft, the draft is accepted. The pass has already read that draft,
   so step 2 repeats with the draft as the newest byte, without another pass.
4. Otherwise the decoder is rolled back to before the draft, and the next round begins with the
   byte that was sampled.

Every byte is sampled from head 0's distribution and consumes one random number. So drafts change
the number of passes, never the text, as long as a pass of several rows gives the same bits as
passes of one row. The kernels of cpu/ do for the presets (test_decoder); other backends and sizes
may round otherwise. There, in rare cases, a byte depends on the number of drafts, which follows
the clock; speculative=False excludes this.
"""

import dataclasses
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import UnionType
from typing import Any

import numpy as np

from .backend.runtime import tinygrad_lock
from .config import check_fields, setting, settings_class
from .data import SEQ_END, SEQ_START
from .decoder import DECODE_ROWS, SHORTEST, Decoder, check_decoder
from .files import PicoError
from .kv_cache import PREFILL_CHUNK
from .model import Pico
from .progress import Bar

# without max_bytes, the text ends at the first end of a sentence after ENOUGH_BYTES
ENOUGH_BYTES, MOST_BYTES = 800, 1024
LONG_PROMPT = SHORTEST[PREFILL_CHUNK]  # bytes of a prompt that is read with a bar
QUOTES = "\"')\u2019\u201d".encode()  # any of these bytes may follow the end of a sentence


@dataclass(frozen=True)
class GeneratedByte:
    """One byte of a sample.

    - byte: 0..255
    - router_weight: the sigmoid of the router's logit for this byte
    - router_decision: whether the byte was routed, through the deep blocks
    - logprob: natural log of its probability under the distribution that it was drawn from. At
      temperature 0 or top_k 1 that would always be 0: there it is the model's own, of temperature 1
    - drafted: whether it was accepted as a draft
    - sample: which of `num_samples`, from 0
    """

    byte: int
    router_weight: float
    router_decision: bool
    logprob: float
    drafted: bool = False
    sample: int = 0


@dataclass
class Stats:
    """Counts and times of one `generate`, updated with every byte.

    - bytes: generated so far, end tags and stops included
    - passes: through the model, without those of the prompt
    - routed: how many bytes were routed, through the deep blocks
    - drafts, accepted: drafts that a pass took in, and those of them that were accepted
    - first_byte_seconds, seconds: from the start to the first and to the newest byte
    """

    bytes: int = 0
    passes: int = 0
    routed: int = 0
    drafts: int = 0
    accepted: int = 0
    first_byte_seconds: float = 0.0
    seconds: float = 0.0


# A filter takes the probabilities, float64 [256], and the value of its field of `Sampler`. It sets
# the probabilities of the bytes that it excludes to 0; the sum of the result need not be 1.
# `generate` takes further filters, without a value.
Filter = Callable[[np.ndarray], np.ndarray]


def top_k_filter(p: np.ndarray, k: int) -> np.ndarray:
    """Keeps the k likeliest bytes; the smaller byte wins a tie."""
    if k >= len(p):
        return p
    kept = np.argsort(-p, kind="stable")[:k]
    filtered = np.zeros_like(p)
    filtered[kept] = p[kept]
    return filtered / filtered.sum()


def top_p_filter(p: np.ndarray, threshold: float) -> np.ndarray:
    """Keeps the fewest likeliest bytes that reach the total `threshold` (arXiv 1904.09751)."""
    order = np.argsort(-p, kind="stable")
    sum_before = np.cumsum(p[order]) - p[order]
    kept = order[sum_before < threshold]
    filtered = np.zeros_like(p)
    filtered[kept] = p[kept]
    return filtered


def min_p_filter(p: np.ndarray, fraction: float) -> np.ndarray:
    """Keeps the bytes at least `fraction` times as likely as the likeliest (arXiv 2407.01082)."""
    return np.where(p < fraction * p.max(), 0, p)


@settings_class
@dataclass(frozen=True)
class Sampler:
    """How a byte is drawn from the logits of head 0. Raises PicoError on an impossible value.

    The filters apply in the order of their fields, each unless its field has the default value;
    the remaining probabilities are normalized. A new filter is a function and a field.
    """

    temperature: float = setting(
        "1 draws from the model's own distribution, a smaller one writes more predictable text, 0 "
        "always takes the likeliest byte",
        0.7, minimum=0, metavar="T",
    )  # fmt: skip
    top_k: int = setting(
        "only the K likeliest bytes; 0: all", 0, minimum=0, metavar="K", filter=top_k_filter
    )
    top_p: float = setting(
        "only the likeliest bytes that together reach the probability P",
        1.0, above=0, maximum=1, metavar="P", filter=top_p_filter,
    )  # fmt: skip
    min_p: float = setting(
        "only bytes at least P times as likely as the likeliest one",
        0.0, minimum=0, maximum=1, metavar="P", filter=min_p_filter,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)

    @cached_property
    def filters(self) -> list[tuple[Callable[[np.ndarray, float], np.ndarray], float]]:
        """The filters that are switched on and their values, in the order in which they apply."""
        pairs = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [
            (field.metadata["filter"], value)
            for field, value in pairs
            if "filter" in field.metadata and value != field.default
        ]

    def distribution(self, logits: np.ndarray, more: Sequence[Filter] = ()) -> np.ndarray:
        """Probabilities float64 [256] of the next byte, from logits [256].

        more: filters that apply after those of the fields.
        """
        if self.temperature == 0 and not more:
            return _certain(logits.argmax())
        scaled, temperature = logits.astype(np.float64), self.temperature or 1
        # exp(-800) is 0; without a bound, a tiny temperature would overflow
        p = np.exp(np.maximum(scaled - scaled.max(), -800 * temperature) / temperature)
        p /= p.sum()
        for keep, value in self.filters:
            p = keep(p, value)
        for keep in more:
            p = _checked(keep(p))
        return _certain(p.argmax()) if self.temperature == 0 else p / p.sum()

    def __call__(
        self, logits: np.ndarray, rng: np.random.Generator, more: Sequence[Filter] = ()
    ) -> tuple[int, float]:
        """A byte and the logprob of its `GeneratedByte`; takes one number from `rng`.

        Raises PicoError on logits that are not finite.
        """
        check_finite(logits)
        p = self.distribution(logits, more)
        total = p.cumsum()
        byte = int(total.searchsorted(rng.random() * total[-1], side="right"))
        if self.temperature == 0 or self.top_k == 1:
            return byte, float(log_softmax(logits)[byte])
        return byte, math.log(p[byte])


def _certain(byte: int) -> np.ndarray:
    """The distribution float64 [256] that always draws this byte."""
    p = np.zeros(256)
    p[byte] = 1
    return p


def check_finite(logits: np.ndarray) -> None:
    """Raise PicoError unless all logits are finite."""
    if not np.isfinite(logits).all():
        raise PicoError(
            "the model's logits are not finite: its weights are damaged or too large; use "
            "another checkpoint"
        )


def _checked(p: np.ndarray) -> np.ndarray:
    """What a filter of the caller returned, as float64 [256]."""
    p = np.asarray(p, np.float64)
    if p.shape != (256,) or not np.isfinite(p).all() or (p < 0).any() or not p.any():
        raise PicoError(
            "a filter must return 256 numbers of at least 0, not all of them 0: the probabilities "
            "of the next byte"
        )
    return p


@settings_class
@dataclass(frozen=True)
class SampleSettings(Sampler):
    """How `generate` continues a prompt. Raises PicoError on an impossible value.

    Without `raw_prompt`, the prompt follows `<pico:seq>`, the tag that begins a document. The same
    seed gives the same bytes on the same backend; None, other bytes every time.
    """

    seed: int | None = setting("the same seed writes the same text", None, minimum=0)
    max_bytes: int | None = setting(
        f"stop after N bytes (default: {MOST_BYTES}, or the first end of a sentence after "
        f"{ENOUGH_BYTES})", None, minimum=0,
    )  # fmt: skip
    raw_prompt: bool = setting(
        "feed the model the prompt alone; without this option, the tag that begins a document "
        "precedes the prompt",
        False,
    )
    ignore_end: bool = setting(
        "continue where the model would end the document; the end tag is part of the text", False
    )
    num_samples: int = setting(
        "continue the prompt N times; above 1, each sample follows a line --- sample 1 of N ---", 1
    )
    speculative: bool = setting(
        "let the model draft its next bytes, for fewer passes; the text is the same", True,
        off="one pass per byte, without the model's drafts of the next bytes; the text is the same",
    )  # fmt: skip
    latent: bool = setting(
        "run the deep blocks", True, off="skip the deep blocks", flag="--disable-latent"
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logs of the probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Mean:
    """The mean of all values so far, or, after MEMORY values, a moving average."""

    MEMORY = 64

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, self.MEMORY)
        self.value += (value - self.value) / self.count


class DraftPolicy:
    """Chooses how many drafts a pass reads: the number that gives the most bytes a second.

    - seconds: the mean time of a round, for each number of drafts
    - right[j]: how often draft j is right if all drafts before it are

    The first rounds have no drafts, so that a short text compiles no pass for them; then each
    number gets some tries. From then on, the best number is chosen every HOLD rounds, and every
    PERIOD rounds one round tries another.
    """

    FIRST, TRIES, HOLD, PERIOD, MARGIN = 64, 9, 8, 64, 1.1

    def __init__(self, numbers: Sequence[int]) -> None:
        """numbers: 0 and those to choose from, in ascending order."""
        self.seconds = {number: Mean() for number in numbers}
        self.right = [Mean() for _ in range(max(numbers))]
        self.plan = [number for number in numbers[1:] for _ in range(self.TRIES)]
        self.plan += [0] * self.FIRST  # taken from the end
        self.compiled: set[int] = set()
        self.tries = itertools.cycle(numbers)
        self.round = self.best = 0

    def number(self) -> int:
        """The number of drafts of the next round."""
        if self.plan:
            return self.plan.pop()
        if self.round % self.HOLD == 0:
            self.best = max(self.seconds, key=self.promise)
        self.round += 1
        return self.best if self.round % self.PERIOD else next(self.tries)

    def promise(self, number: int) -> float:
        """Expected bytes a second; more than that for no drafts, since estimates err."""
        right = itertools.accumulate((mean.value for mean in self.right[:number]), operator.mul)
        return (1 + sum(right) if number else self.MARGIN) / self.seconds[number].value

    def took(self, number: int, seconds: float) -> None:
        """Learn from the seconds of a round until its logits are there.

        The sampling after that takes the same time for each byte, whatever the number of drafts.
        """
        if number not in self.compiled:  # this round compiled the pass
            self.compiled.add(number)
            return
        mean = self.seconds[number]
        # a round that another process interrupts counts as at most four
        mean.add(min(seconds, 4 * mean.value) if mean.count else seconds)

    def read(self, drafts: int, accepted: int) -> None:
        """Learn from a round that read some drafts and accepted the first ones of them."""
        for j in range(min(accepted + 1, drafts)):
            self.right[j].add(j < accepted)


class _Session:
    """One generator's use of a decoder: `with session as decoder` around each access.

    The first access claims the decoder. A later access raises PicoError if anything else, usually
    another generator, used the decoder in between: the KV caches then hold another text.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.changes = decoder, None

    def __enter__(self) -> Decoder:
        tinygrad_lock.acquire()
        if self.changes not in (None, self.decoder.changes):
            tinygrad_lock.release()
            raise PicoError(
                "the decoder of this generator has been used for another text in the meantime; "
                "give each generator a decoder of its own: pico_tg.Decoder(model)"
            )
        return self.decoder

    def __exit__(self, *_: object) -> None:
        self.changes = self.decoder.changes
        tinygrad_lock.release()


def generate(
    model: Pico,
    prompt: str | bytes = b"",
    *,
    stop: str | bytes | Iterable[str | bytes] = (),
    filters: Filter | Iterable[Filter] = (),
    stats: Stats | None = None,
    decoder: Decoder | None = None,
    progress: bool = False,
    **settings: int | float | None,
) -> Iterator[GeneratedByte]:
    """Continue `prompt`, yielding one record for each byte, until `</pico:seq>` or `max_bytes`.

    - prompt: bytes, or a str, which means its UTF-8. If the prompt ends within `</pico:seq>`, a
      continuation that completes the tag ends the text
    - settings: the fields of `SampleSettings`, such as temperature=0.7, max_bytes=100, seed=1
    - stop: one or several texts; the continuation ends before the first of them, which is not
      yielded. A stop must lie within the continuation; ignore_end does not turn stops off
    - filters: one or several functions from the probabilities of the next byte, float64 [256], to
      those to draw from, of any sum; they apply after the filters of `SampleSettings`
    - stats: updated with every byte
    - decoder: a `Decoder(model)` to reuse, since making one takes seconds; no other model's. A
      decoder serves one generator at a time: once another generator uses the decoder, the earlier
      generator raises PicoError at its next byte
    - progress: show a bar on stderr while a long prompt is read

    May be called from any thread. Raises PicoError on a bad or unknown setting, on a prompt or stop
    that is no text, and on logits that are not finite.
    """
    chosen = SampleSettings(**settings)
    start = as_bytes(prompt, "the prompt")
    if chosen.raw_prompt and not start:
        raise PicoError("a raw prompt must hold at least one byte: there is nothing to continue")
    endings = dict.fromkeys(_stops(stop), b"")
    if not chosen.ignore_end:
        endings[SEQ_END] = start  # the prompt may begin the tag
    shows_bar = progress and len(start) >= LONG_PROMPT
    start = start if chosen.raw_prompt else SEQ_START + start
    more = _several(filters, Callable)
    if not all(map(callable, more)):
        raise PicoError("filters must be functions from probabilities to probabilities")
    check_decoder(model, decoder)
    sampler = partial(chosen, more=more)
    stats = Stats() if stats is None else stats
    # a pass reads the newest byte and its drafts; other numbers of rows would be padded
    limit = min(model.config.next_tokens, DECODE_ROWS[-1]) - 1 if chosen.speculative else 0
    policy = DraftPolicy([*(rows - 1 for rows in DECODE_ROWS if rows - 1 < limit), limit])
    max_bytes = MOST_BYTES if chosen.max_bytes is None else chosen.max_bytes

    def samples() -> Iterator[GeneratedByte]:
        began = time.perf_counter()
        session = _Session(decoder or Decoder(model))
        with session as claimed:
            claimed.reset(use_latent=chosen.latent)
            reading = Bar(
                "reading the prompt", total=len(start), unit="B", unit_scale=True, leave=False,
                disable=not shows_bar,
            )  # fmt: skip
            with reading:
                for piece, logits, _ in claimed.passes(start):  # all logits of a prompt are large
                    heads = logits[-1]
                    reading.update(len(piece))
            after_prompt = claimed.snapshot() if chosen.num_samples > 1 else None
        for sample in range(chosen.num_samples):
            if sample > 0:
                with session as claimed:
                    claimed.restore(after_prompt)
            rng = np.random.default_rng(None if chosen.seed is None else (chosen.seed, sample))
            records = _rounds(session, heads, sampler, rng, policy, max_bytes, sample, stats, began)
            text = _before(endings, records)
            yield from text if chosen.max_bytes is not None else to_sentence(text, ENOUGH_BYTES)

    return samples()


def _rounds(
    session: _Session,
    heads: np.ndarray,
    sampler: Callable[[np.ndarray, np.random.Generator], tuple[int, float]],
    rng: np.random.Generator,
    policy: DraftPolicy,
    max_bytes: int,
    sample: int,
    stats: Stats,
    began: float,
) -> Iterator[GeneratedByte]:
    """Generate `max_bytes` bytes; heads: logits [T, 256] at the last byte of the prompt."""
    generated = rejected = 0
    drafted = False
    byte, logprob = sampler(heads[0], rng)
    while generated < max_bytes:
        start, number = time.perf_counter(), policy.number()
        drafts = heads[1 : 1 + number].argmax(axis=1).tolist() if number else []
        drafts = drafts[: max_bytes - generated - 1]
        with session as decoder:
            decoder.rollback(rejected)
            logits, router_logits = decoder.forward(bytes([byte, *drafts]))
            decisions = decoder.last_decisions
        policy.took(number, time.perf_counter() - start)
        stats.passes += 1
        stats.drafts += len(drafts)
        for accepted in range(len(drafts) + 1):
            z, decision = float(router_logits[accepted]), bool(decisions[accepted])
            generated += 1
            stats.bytes += 1
            stats.routed += decision
            stats.seconds = time.perf_counter() - began
            stats.first_byte_seconds = stats.first_byte_seconds or stats.seconds
            yield GeneratedByte(byte, sigmoid(z), decision, logprob, drafted, sample)
            if generated == max_bytes:
                return
            byte, logprob = sampler(logits[accepted, 0], rng)
            drafted = accepted < len(drafts) and byte == drafts[accepted]
            if not drafted:
                break
            stats.accepted += 1
        policy.read(len(drafts), accepted)
        heads = logits[accepted]
        rejected = len(drafts) - accepted


def complete(
    model: Pico, prompt: str | bytes = "", *, num_samples: int = 1, **settings: Any
) -> str:
    """The continuation of `prompt`, without the prompt; bytes that are no UTF-8 become U+FFFD.

    settings: the keywords of `generate`, such as stop="\\n", temperature=0.7, seed=1. Raises
    PicoError as `generate` does, and if more than one sample is asked for.
    """
    if num_samples != 1:
        raise PicoError("complete returns one text: call it for each of several seeds")
    records = generate(model, prompt, **settings)
    return bytes(record.byte for record in records).decode(errors="replace")


def as_bytes(text: str | bytes, name: str) -> bytes:
    """A str as UTF-8, bytes as they are. Raises PicoError, which begins with `name`, otherwise."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise PicoError(f"{name} must be a str or bytes, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PicoError(f"{name} has no UTF-8 ({error}); give bytes") from None


def _several(values: Any, one: type | UnionType) -> list:
    """The values of an argument that takes one value, of type `one`, or several."""
    if isinstance(values, one) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _stops(stop: str | bytes | Iterable[str | bytes]) -> list[bytes]:
    """The texts of generate's `stop`. Raises PicoError if one is empty or no text."""
    stops = [as_bytes(text, "stop") for text in _several(stop, str | bytes | bytearray)]
    if b"" in stops:
        raise PicoError("stop is empty: every text would end before its first byte")
    return stops


def _before(
    endings: dict[bytes, bytes], records: Iterator[GeneratedByte]
) -> Iterator[GeneratedByte]:
    """The records before the first ending; bytes that may begin one are held back until known.

    endings: for each ending, the text before the records; the ending may begin in that text. Of
    several that end at the same byte, the longest counts.
    """
    begun = {ending: _begun(ending, before) for ending, before in endings.items()}
    held: list[GeneratedByte] = []
    for record in records:
        held.append(record)
        for ending, part in begun.items():
            begun[ending] = _begun(ending, part + bytes([record.byte]))
        if ended := [len(ending) for ending, part in begun.items() if part == ending]:
            yield from held[: max(0, len(held) - max(ended))]
            return
        unknown = max(map(len, begun.values()), default=0)
        while len(held) > unknown:
            yield held.pop(0)
    yield from held


def to_sentence(records: Iterator[GeneratedByte], enough: int) -> Iterator[GeneratedByte]:
    """The records before the whitespace after the first sentence that ends after `enough` bytes."""
    text = b""
    for record in records:
        ended = text.rstrip(QUOTES).endswith((b".", b"!", b"?"))
        if len(text) >= enough and ended and bytes([record.byte]).isspace():
            return
        text += bytes([record.byte])
        yield record


def _begun(ending: bytes, text: bytes) -> bytes:
    """The longest part of `ending`, from its first byte on, with which `text` ends."""
    tail = text[-len(ending) :]
    while not ending.startswith(tail):
        tail = tail[1:]
    return tail


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0
