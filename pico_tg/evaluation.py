"""Evaluation: bits per byte of a whole split, what each head knows, where the router fires.

The split is read as one stream of bytes, in overlapping windows of context_len + stride bytes. Each
window after the first scores its last `stride` positions, so that every position is scored once and
has at least context_len bytes before it, or all there are. Attention in the blocks may reach
further (their windows add up, and the latent ones count selected bytes), so more context can change
the figures a little; less would measure the cold start of each window.

All sums are made on the host in float64, in the order of the text: the figures are the same on
every run.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.helpers import Context

from .config import PRECISIONS, TrainSettings
from .data import MAX_BATCH_BYTES, Corpus, Data, DataSpec, load_data, load_whole
from .files import PicoError
from .generation import GeneratedByte
from .model import Pico, cross_entropy, inputs_and_targets
from .precision import choose_precision
from .progress import Progress
from .remat import graph_context
from .runs import Record
from .runtime import jit_method, on_devices

SPLITS = ("validation", "train", "all")
WHITESPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
CONTINUATION = (np.arange(256) & 0xC0) == 0x80  # UTF-8: a byte within a character
WORD = np.array([chr(b).isalnum() or b == ord("_") if b < 128 else True for b in range(256)])
PLACES = ("word_start", "word_inside", "whitespace", "punctuation", "continuation")
BATCH_POSITIONS = 1 << 14  # of the windows of one pass, where nobody says otherwise


@dataclass(frozen=True)
class Place:
    """One kind of byte: its share of all bytes and of the routed ones, and how many were routed."""

    share_of_bytes: float
    share_of_decisions: float
    rate: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Routed bytes taken for word boundaries: how many are, how many are found, and the F1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Only the documents' own text counts, never a wrapper tag.

    - bytes: of the text, each of them predicted once
    - context_len, stride: see the module
    - bits_per_byte: of head 0, routed causally; bits_per_byte_without_latent: the latent blocks
      left out
    - head_accuracy [T]: how often the likeliest byte of head k at position i is byte i + 1 + k
    - drafts_right_text, drafts_right_greedy [T - 1]: how often the first j drafts of a pass are all
      right. A draft is the likeliest byte of head j at position i. By the text it is right if it is
      byte i + 1 + j; greedily if it is the likeliest byte of head 0 at position i + j, given the
      text before it
    - accepted_text, accepted_greedy: accepted drafts a pass with T - 1 drafts in each, where the
      next pass begins behind the bytes that the last one made. The first is what decoding sees that
      writes this very text; the second estimates decoding at temperature 0 (which sees its own
      text, likelier than this one)
    - router_rate: share of the bytes that went through the latent blocks
    - places: by kind of byte. word_start is the first byte of a word (ASCII letters, digits, _ and
      all characters beyond ASCII), word_inside its other characters' first bytes, whitespace,
      punctuation (other ASCII), continuation (later bytes of a UTF-8 character): each byte is one
      of these; and, once more, after_whitespace
    - boundaries: routed bytes against after_whitespace, bytes of text whose predecessor in the
      document is whitespace while they are not; boundaries_random: the expectation of routing every
      byte with probability router_rate (the F1 is that of the expected precision and recall)
    - passage: of the first bytes of the text, for each document one list of records
    """

    bytes: int
    context_len: int
    stride: int
    bits_per_byte: float
    bits_per_byte_without_latent: float
    head_accuracy: list[float]
    drafts_right_text: list[float]
    drafts_right_greedy: list[float]
    accepted_text: float
    accepted_greedy: float
    router_rate: float
    places: dict[str, Place]
    boundaries: PrecisionRecall
    boundaries_random: PrecisionRecall
    passage: list[list[GeneratedByte]] = dataclasses.field(repr=False)

    def as_dict(self) -> dict:
        """All but the passage, as valid JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, passage=[]))
        del values["passage"]
        return values


def evaluate(
    model: Pico,
    dataset: str | DataSpec | Data | Corpus | None = None,
    *,
    split: str = "validation",
    context_len: int = 1024,
    stride: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    precision: str = "auto",
    passage: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure `model` on a split of a data set.

    - dataset: what `pico_tg.DataSpec` takes, or its `dataset` alone, or loaded data; None is
      `python-docs`. A corpus is measured as it is
    - split: validation (held out if the data set has none); train; or all, train together with
      what is held out of it
    - context_len: bytes that each byte has before it, or all there are; stride: new bytes a window
      (default: context_len, which takes in every byte twice)
    - batch_size: windows of one pass (default: as many as make 16,384 positions)
    - max_bytes: only the first so many bytes of the split, wrapper tags included
    - precision: see `pico_tg.TrainSettings`
    - passage: return records of the text among the first so many bytes
    - progress: show a bar on stderr

    Raises PicoError on a bad option, and on data with no byte to predict.
    """
    stride = context_len if stride is None else stride
    options = {"context_len": context_len, "stride": stride, "batch_size": batch_size}
    check_options(split=split, max_bytes=max_bytes, precision=precision, **options)
    spec = DataSpec(dataset) if isinstance(dataset, str) else dataset
    spec = DataSpec() if spec is None else spec
    if isinstance(spec, Corpus):
        corpus, split = spec, "all"
    elif split == "all":
        corpus = load_whole(spec.spec if isinstance(spec, Data) else spec, progress=progress)
    else:
        data = spec if isinstance(spec, Data) else load_data(spec, progress=progress)
        corpus = data.validation if split == "validation" else data.train
    total = min(len(corpus.bytes), max_bytes or len(corpus.bytes))

    length = min(context_len + stride, total)
    batch_size = batch_size or max(1, BATCH_POSITIONS // length)
    windows = list(_windows(total, length, min(stride, length)))
    batch_size = min(batch_size, len(windows))
    if batch_size * length > MAX_BATCH_BYTES:
        raise PicoError(
            f"{batch_size} windows of {length:,} bytes are more than the {MAX_BATCH_BYTES:,} bytes "
            "that are taken for a mistake; take a smaller context_len, stride or batch_size"
        )
    tally = Metrics(corpus, total, model.config.next_tokens, passage)
    if not tally.has_targets():
        part = "data" if split == "all" else f"{split} data"
        raise PicoError(
            f"the first {total:,} bytes of the {part} hold no byte to predict; take more of them, "
            "or other data"
        )
    measure = _Measure(model, length)
    bf16 = int(choose_precision(precision) == "bf16")
    with Progress(
        total=total, desc="evaluating", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            inputs = np.zeros((batch_size, length + 1), np.uint8)
            for row, (start, _, _) in enumerate(rows):
                piece = corpus.bytes[start : min(start + length + 1, total)]
                inputs[row, : len(piece)] = piece
            real = np.array([min(length, total - start) for start, _, _ in rows])
            with Context(PICO_BF16=bf16):
                results = measure(inputs, real)
            for row, (start, begin, end) in enumerate(rows):
                scored = slice(begin - start, end - start)
                tally.add(begin, *(result[row, scored] for result in results))
                bar.update(end - begin)
    return tally.result(context_len, stride)


def check_options(
    split: str = "validation",
    context_len: int = 1,
    stride: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    precision: str = "auto",
) -> None:
    """Raise PicoError unless `evaluate` could take these options."""
    for name, value, allowed in (
        ("split", split, SPLITS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in allowed:
            raise PicoError(f"{name} must be {' or '.join(allowed)}, not {value!r}")
    for name, value, least in (
        ("context_len", context_len, 1),
        ("stride", stride, 1),
        ("batch_size", batch_size, 1),
        ("max_bytes", max_bytes, 2),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise PicoError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(where a window starts, the first position that it scores, behind the last one)."""
    yield 0, 0, length
    for begin in range(length, total, stride):
        yield begin + stride - length, begin, min(begin + stride, total)


class _Measure:
    """One pass over a batch of windows: arrays of what the model says at each position."""

    def __init__(self, model: Pico, length: int) -> None:
        self.model, self.length = model, length
        # few slots make latent blocks cheap; where they do not suffice there is one for each byte
        self.slots = min(length, 2 * max(1, model.config.capacity(length)))
        self.some = jit_method(self._pass, self.slots)
        self.all = jit_method(self._pass, length)
        self.without = jit_method(self._without)

    def _pass(self, count: int, windows: Tensor) -> tuple[Tensor, ...]:
        x, targets = windows[:, :-1], windows[:, 1:]  # not contiguous: see inputs_and_targets
        logits, z, decisions = self.model(x, causal=True, count=count)
        guesses = logits.argmax(axis=-1).cast(dtypes.uint8)
        nats = cross_entropy(logits[:, :, 0], targets)
        results = tuple(t.contiguous() for t in (nats, guesses, z, decisions))
        Tensor.realize(*results)
        return results

    def _without(self, windows: Tensor) -> Tensor:
        x, targets = windows[:, :-1], windows[:, 1:]  # not contiguous: see inputs_and_targets
        logits, _, _ = self.model(x, causal=True, count=0)
        return cross_entropy(logits[:, :, 0], targets).contiguous().realize()

    def __call__(self, windows: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, ...]:
        """Bytes [B, L + 1], and how many of each row's L inputs are no padding -> arrays.

        Nats of head 0 [B, L], the same without latent blocks [B, L], the likeliest byte of each
        head [B, L, T], router logits [B, L], decisions [B, L].
        """
        x = Tensor(windows).realize()
        nats, guesses, z, decisions = (t.numpy() for t in self._graph()(x))
        most = max(int(row[:n].sum()) for row, n in zip(decisions, real, strict=False))
        if most > self.slots:  # from here on: text like this has more of them
            self.slots = self.length
            nats, guesses, z, decisions = (t.numpy() for t in self._graph()(x))
        return nats, self.without(x).numpy(), guesses, z, decisions

    def _graph(self):
        return self.all if self.slots == self.length else self.some


class Metrics:
    """The figures, summed over pieces of the text that come in order."""

    def __init__(self, corpus: Corpus, total: int, next_tokens: int, passage: int) -> None:
        self.corpus, self.total, self.heads = corpus, total, next_tokens
        self.nats = np.zeros(2)  # with the latent blocks, without
        self.right, self.asked = np.zeros(next_tokens, np.int64), np.zeros(next_tokens, np.int64)
        self.places = {name: np.zeros(2, np.int64) for name in (*PLACES, "after_whitespace")}
        self.counted = np.zeros(2, np.int64)  # bytes of text, routed ones
        self.drafts = [_Drafts(next_tokens - 1) for _ in range(2)]  # by the text, greedily
        # the newest positions wait for what head 0 says at those after them
        self.waiting, self.waiting_from = np.zeros((0, next_tokens), np.uint8), 0
        self.passage = np.zeros((min(passage, total), 4))  # nats, router logit, decision, drafted

    def has_targets(self) -> bool:
        """Whether any byte of text has a byte before it."""
        step = 1 << 20
        pieces = (self._text(first, first + step)[1] for first in range(1, self.total, step))
        return any(own.any() for own in pieces)

    def _text(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [start, stop), and which of them are a document's own text; zeros elsewhere."""
        data, own = np.zeros(stop - start, np.uint8), np.zeros(stop - start, bool)
        first, last = max(start, 0), min(stop, self.total)
        if first < last:
            inside = slice(first - start, last - start)
            data[inside] = self.corpus.bytes[first:last]
            own[inside] = ~self.corpus.wrapper_mask(first, last)
        return data, own

    def add(
        self,
        start: int,
        nats: np.ndarray,
        nats_without: np.ndarray,
        guesses: np.ndarray,
        z: np.ndarray,
        decisions: np.ndarray,
    ) -> None:
        """What was measured at the positions from `start` on: [n], guesses [n, T]."""
        n = len(nats)
        data, own = self._text(start - 1, start + n + self.heads)
        for which, values in enumerate((nats, nats_without)):
            self.nats[which] += values[own[2 : 2 + n]].sum(dtype=np.float64)
        for k in range(self.heads):
            target, asked = data[2 + k : 2 + k + n], own[2 + k : 2 + k + n]
            self.right[k] += int((asked & (guesses[:, k] == target)).sum())
            self.asked[k] += int(asked.sum())
        self._add_decisions(data[: n + 1], own[: n + 1], decisions.astype(bool))
        if start < len(self.passage):
            self._keep(start, nats, z, decisions)
        self.waiting = np.concatenate([self.waiting, guesses])
        self._settle(start + n == self.total)

    def _add_decisions(self, data: np.ndarray, own: np.ndarray, decisions: np.ndarray) -> None:
        """`data` and `own` begin one byte earlier than `decisions`."""
        before, byte, own_before, counts = data[:-1], data[1:], own[:-1], own[1:]
        inside = own_before & WORD[before]
        plain = ~WHITESPACE[byte] & ~CONTINUATION[byte]
        kinds = {
            "word_start": plain & WORD[byte] & ~inside,
            "word_inside": plain & WORD[byte] & inside,
            "whitespace": WHITESPACE[byte],
            "punctuation": plain & ~WORD[byte],
            "continuation": CONTINUATION[byte],
            "after_whitespace": ~WHITESPACE[byte] & own_before & WHITESPACE[before],
        }
        for name, kind in kinds.items():
            kind = kind & counts
            self.places[name] += (kind.sum(), (kind & decisions).sum())
        self.counted += (counts.sum(), (counts & decisions).sum())

    def _keep(self, start: int, nats: np.ndarray, z: np.ndarray, decisions: np.ndarray) -> None:
        kept = self.passage[start : start + len(z)]
        kept[:, 1], kept[:, 2] = z[: len(kept)], decisions[: len(kept)]
        later = self.passage[start + 1 : start + 1 + len(nats)]  # nats are of the next byte
        later[:, 0] = nats[: len(later)]

    def _settle(self, end: bool) -> None:
        """Count the drafts of positions behind which enough is known, or all at the end."""
        reach = self.heads - 1
        count = len(self.waiting) if end else max(0, len(self.waiting) - reach)
        if not count:
            return
        start = self.waiting_from
        data, own = self._text(start, start + count + 1 + reach)
        ahead = np.zeros((count + reach, self.heads), np.uint8)
        ahead[: min(len(self.waiting), count + reach)] = self.waiting[: count + reach]
        column = np.arange(1, reach + 1)
        at = np.arange(count)[:, None]
        drafts, counts = ahead[:count, 1:], own[at + 1 + column]
        by_text = counts & (drafts == data[at + 1 + column])
        greedy = counts & (drafts == ahead[at + column, 0])
        accepted = self.drafts[0].add(start, by_text, own[1 : count + 1])
        self.drafts[1].add(start, greedy, own[1 : count + 1])
        for first, number in accepted:
            self.passage[first : first + number, 3] = 1
        self.waiting, self.waiting_from = self.waiting[count:], start + count

    def result(self, context_len: int, stride: int) -> Evaluation:
        count, routed = (int(n) for n in self.counted)
        bits = self.nats / (count * math.log(2))
        if not np.isfinite(bits).all():
            raise PicoError("the model's loss on these data is not finite; try --precision fp32")
        rate = routed / count
        places = {
            name: Place(int(n) / count, _ratio(int(hits), routed), _ratio(int(hits), int(n)))
            for name, (n, hits) in self.places.items()
        }
        boundary = places["after_whitespace"]
        return Evaluation(
            bytes=count,
            context_len=context_len,
            stride=stride,
            bits_per_byte=float(bits[0]),
            bits_per_byte_without_latent=float(bits[1]),
            head_accuracy=[
                _ratio(int(right), int(asked))
                for right, asked in zip(self.right, self.asked, strict=True)
            ],
            drafts_right_text=self.drafts[0].shares(),
            drafts_right_greedy=self.drafts[1].shares(),
            accepted_text=self.drafts[0].a_pass(),
            accepted_greedy=self.drafts[1].a_pass(),
            router_rate=rate,
            places=places,
            boundaries=_match(boundary.share_of_decisions, boundary.rate),
            boundaries_random=_match(boundary.share_of_bytes if rate else 0.0, rate),
            passage=self._records(),
        )

    def _records(self) -> list[list[GeneratedByte]]:
        size = len(self.passage)
        data, own = self._text(0, size)
        documents = np.searchsorted(self.corpus.offsets, np.arange(size), "right") - 1
        weights = np.exp(-np.logaddexp(0, -self.passage[:, 1]))
        records: dict[int, list[GeneratedByte]] = {}
        for p in np.flatnonzero(own):
            nats, _, decision, drafted = self.passage[p]
            record = GeneratedByte(
                int(data[p]), float(weights[p]), bool(decision), -float(nats), bool(drafted)
            )
            records.setdefault(int(documents[p]), []).append(record)
        return list(records.values())


class _Drafts:
    """How many drafts of a pass are right, at every position and along the passes of a decoder."""

    def __init__(self, most: int) -> None:
        self.runs = np.zeros(most + 1, np.int64)  # positions with at least so many right drafts
        self.passes = self.accepted = 0
        self.next = 0  # the position at which the next pass gets its drafts

    def add(self, start: int, right: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
        """Positions from `start` on: right bool [n, T - 1]; counts [n]: the next byte is text.

        Returns where drafts were accepted: (the first such byte, how many).
        """
        runs = np.cumprod(right, axis=1, dtype=np.int64).sum(axis=1)
        for least in range(len(self.runs)):
            self.runs[least] += int((counts & (runs >= least)).sum())
        found = []
        while self.next < start + len(runs):
            run = int(runs[self.next - start])
            if counts[self.next - start]:
                self.passes += 1
                self.accepted += run
                found.append((self.next + 2, run))
                self.next += run
            self.next += 1
        return found

    def shares(self) -> list[float]:
        return [_ratio(int(n), int(self.runs[0])) for n in self.runs[1:]]

    def a_pass(self) -> float:
        return _ratio(self.accepted, self.passes)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _match(precision: float, recall: float) -> PrecisionRecall:
    return PrecisionRecall(precision, recall, _ratio(2 * precision * recall, precision + recall))


REAL, SCORED, WHOLE = 1, 2, 4  # flags of a byte: no padding, of a document's text, of a full window


class Validation:
    """Bits per byte on the same held-out windows every time, wrapper bytes left out.

    Measured the way the model is used (causal routing) and, beside it, with the routing of
    training, whose top-k may look ahead.
    """

    def __init__(
        self,
        model: Pico,
        corpus: Corpus,
        settings: TrainSettings,
        devices: tuple[str, ...] = (),
    ) -> None:
        self.model, self.settings, self.devices = model, settings, devices
        T = model.config.next_tokens
        self.limit = settings.validation_bytes
        held_out = corpus.bytes[: self.limit]
        # a byte is scored when it has a byte before it and stands in a document's own text
        scored = ~corpus.wrapper_mask(0, len(held_out))
        length = min(settings.context_len, max(1, len(held_out) - 1))
        count = math.ceil(max(1, len(held_out) - 1) / length)
        self.batch_size = min(settings.batch_size, count)
        if len(devices) > 1:  # each takes its share
            self.batch_size = math.ceil(self.batch_size / len(devices)) * len(devices)
        rounded = math.ceil(count / self.batch_size) * self.batch_size
        padded = np.zeros(rounded * length + T, np.uint8)
        padded[: len(held_out)] = held_out
        flags = np.zeros(rounded * length + 1, np.uint8)
        flags[: len(held_out)] = REAL + SCORED * scored
        starts = np.arange(rounded)[:, None] * length
        self.windows = padded[starts + np.arange(length + T)]  # (rounded, length + T)
        self.flags = flags[starts + 1 + np.arange(length)]  # (rounded, length): of bytes predicted
        # top-k routing looks at the whole window: where a part is padding, it means nothing
        whole = (self.flags & REAL > 0).all(axis=1, keepdims=True) & (self.flags & SCORED > 0)
        self.flags += (WHOLE * (whole if whole.any() else self.flags & SCORED > 0)).astype(np.uint8)
        self.scored = [int((self.flags & flag > 0).sum()) for flag in (SCORED, WHOLE)]
        if not self.scored[0]:
            raise PicoError(
                f"the validation data has {len(held_out)} bytes, too few to measure anything; "
                "hold out more with --dataset-validation-size"
            )
        least = int(model.config.router != "none")
        self.slots = min(length, 2 * max(least, model.config.capacity(length)))
        self.length = length
        self.measure = jit_method(self._measure)
        self.measure_all = jit_method(self._measure_all)

    def _measure(self, windows: Tensor, flags: Tensor) -> Tensor:
        return self._sums(windows, flags, self.slots)

    def _measure_all(self, windows: Tensor, flags: Tensor) -> Tensor:
        return self._sums(windows, flags, self.length)

    def _sums(self, windows: Tensor, flags: Tensor, count: int) -> Tensor:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        real, scored, whole = ((flags & flag).cast(dtypes.bool) for flag in (REAL, SCORED, WHOLE))
        causal, _, decisions = self.model(x, causal=True, count=count)
        training, _, _ = self.model(x)
        nats = [
            mask.where(cross_entropy(logits[:, :, 0], targets[:, :, 0]), 0).sum()
            for logits, mask in ((causal, scored), (training, whole))
        ]
        most = (decisions & real).sum(axis=1, dtype=dtypes.int32).max().cast(dtypes.float32)
        chosen = (decisions & scored).cast(dtypes.float32).sum()
        return Tensor.stack(*nats, chosen, most).realize()

    def __call__(self) -> Record:
        """Keys: validation_bits_per_byte, …_top_k, validation_router_rate, validation_seconds."""
        start = time.perf_counter()
        total = np.zeros(3, np.float64)
        for first in range(0, len(self.windows), self.batch_size):
            rows = slice(first, first + self.batch_size)
            arrays = (self.windows[rows].copy(), self.flags[rows].copy())
            inputs = [on_devices(array, self.devices, 0) for array in arrays]
            with graph_context(self.settings, self.devices):
                sums = self.measure(*inputs).numpy()
                if sums[3] > self.slots:  # more bytes than there were slots: one for each
                    sums = self.measure_all(*inputs).numpy()
            total += sums[:3]
        scored, whole = self.scored
        bits = total / np.array([scored * math.log(2), max(1, whole) * math.log(2), scored])
        return {
            "validation_bits_per_byte": float(bits[0]),
            "validation_bits_per_byte_top_k": float(bits[1]),
            "validation_router_rate": float(bits[2]),
            "validation_seconds": time.perf_counter() - start,
        }
