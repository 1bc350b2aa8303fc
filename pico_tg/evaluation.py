"""Evaluation: bits per byte of a text, accuracy of each head, kinds of bytes that are routed.

`Validation` (during training) and `evaluate` (a report) run the same pass, `CausalPass`: the model
with the routing of decoding, over windows of the text, so that every byte is predicted once.

- `Validation` cuts the text into windows that do not overlap, as training does.
- `evaluate` takes overlapping windows of context_len + stride bytes. Each window after the first
  scores its last `stride` positions, so that every position has at least context_len bytes before
  it, or the whole text before it. The receptive field grows with every block, and latent windows
  count selected bytes, so more context can still change the figures a little; less context would
  measure the cold start of each window.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes

from .backend.precision import graph_context
from .backend.runtime import exclusive, jit_method, on_devices
from .config import PRECISIONS, RULES, TrainSettings
from .data import MAX_BATCH_BYTES, Corpus, Data, DataSpec, load_data, load_whole
from .files import PicoError
from .generation import GeneratedByte
from .model import Pico, inputs_and_targets
from .ops import cross_entropy
from .progress import Bar

SPLITS = ("validation", "train", "all")
WHITESPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
CONTINUATION = (np.arange(256) & 0xC0) == 0x80  # bytes 2 to 4 of a UTF-8 character
WORD = np.array([chr(b).isalnum() or b == ord("_") if b < 128 else True for b in range(256)])
# of the bootstrap, see `_interval`
BLOCKS, MIN_BLOCKS, MIN_BLOCK, RESAMPLES = 100, 20, 64, 1000
BATCH_POSITIONS = 1 << 14  # positions of one pass of `evaluate` unless batch_size is given

# flags of a position, about the byte that it predicts
REAL = 1  # within the data, not padding
SCORED = 2  # text of a document, not a wrapper tag
WHOLE = 4  # scored, in a window without padding


class CausalPass:
    """One compiled pass over a batch of windows, with causal routing.

    The latent blocks have slots for twice the capacity, which keeps them cheap. If a window routes
    more bytes than that, its batch is computed again with one slot for each byte.
    """

    def __init__(
        self, model: Pico, length: int, settings: TrainSettings, devices: tuple[str, ...] = ()
    ) -> None:
        self.model, self.length, self.settings, self.devices = model, length, settings, devices
        self.slots = min(length, 2 * max(1, model.config.capacity(length)))
        self.few_slots = jit_method(self._graph, self.slots)
        self.all_slots = jit_method(self._graph, length)

    def _graph(self, count: int, windows: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
        x, targets = inputs_and_targets(windows, 1)
        logits, router_logits, decisions = self.model(x, causal=True, count=count)
        figures = self.figures(x, targets[:, :, 0], flags, logits, router_logits, decisions)
        routed = (decisions & _has(flags, REAL)).sum(axis=1, dtype=dtypes.int32).max()
        results = tuple(t.contiguous() for t in (*figures, routed))
        Tensor.realize(*results)
        return results

    def figures(
        self,
        x: Tensor,
        targets: Tensor,
        flags: Tensor,
        logits: Tensor,
        router_logits: Tensor,
        decisions: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the pass returns, from the outputs of `Pico` for x [B, N]; flags uint8 [B, N]."""
        raise NotImplementedError

    @exclusive
    def run(self, windows: np.ndarray, flags: np.ndarray) -> list[np.ndarray]:
        """The figures of windows uint8 [B, N + 1], with flags uint8 [B, N] of their positions."""
        inputs = [on_devices(array, self.devices, 0) for array in (windows, flags)]
        with graph_context(self.settings, self.devices):
            *figures, routed = self.few_slots(*inputs)
            if routed.item() > self.slots:
                *figures, routed = self.all_slots(*inputs)
            return [figure.numpy() for figure in figures]


class Validation(CausalPass):
    """Bits per byte of the same held-out windows every time, wrapper bytes left out.

    Measured with causal routing, as decoding routes, and, unless a rule routes, with top-k
    routing, which looks ahead over the whole window. Raises PicoError if the corpus holds no byte
    to predict.
    """

    def __init__(
        self,
        model: Pico,
        corpus: Corpus,
        settings: TrainSettings,
        devices: tuple[str, ...] = (),
    ) -> None:
        data = corpus.bytes[: settings.validation_bytes]
        total = max(1, len(data) - 1)  # positions that have a next byte
        length = min(settings.context_len, total)
        super().__init__(model, length, settings, devices)
        self.has_top_k = model.config.router not in RULES
        count = math.ceil(total / length)
        multiple = max(1, len(devices))  # all devices take equally many windows
        self.batch_size = math.ceil(min(settings.batch_size, count) / multiple) * multiple
        count = math.ceil(count / self.batch_size) * self.batch_size
        starts = np.arange(count) * length
        self.windows = _windows_at(data, starts, length)
        real = _windows_at(np.ones(len(data), bool), starts, length)[:, 1:]
        scored = _windows_at(~corpus.wrapper_mask(0, len(data)), starts, length)[:, 1:]
        # which bytes top-k selects depends on the whole window, so padding would change the figure
        whole = scored & real.all(axis=1, keepdims=True)
        whole = whole if whole.any() else scored
        self.flags = (REAL * real + SCORED * scored + WHOLE * whole).astype(np.uint8)
        self.scored, self.whole = int(scored.sum()), int(whole.sum())
        if not self.scored:
            raise PicoError(
                f"the validation data has {len(data)} bytes, too few to measure anything; "
                "hold out more with --dataset-validation-size"
            )

    def figures(self, x, targets, flags, logits, router_logits, decisions) -> tuple[Tensor]:
        """float32 [4]: nats of scored bytes; of whole ones, causal, top-k; scored bytes routed."""
        scored, whole = _has(flags, SCORED), _has(flags, WHOLE)
        nats = nats_top_k = cross_entropy(logits[:, :, 0], targets)
        if self.has_top_k:
            nats_top_k = cross_entropy(self.model(x, causal=False)[0][:, :, 0], targets)
        parts = scored.where(nats, 0), whole.where(nats, 0), whole.where(nats_top_k, 0)
        routed = (decisions & scored).cast(dtypes.float32)
        return (Tensor.stack(*(part.sum() for part in (*parts, routed))),)

    def __call__(self) -> dict[str, float]:
        """Measure -> a dict of these keys, each preceded by `validation_`:

        - bits_per_byte, router_rate: of all windows, with causal routing
        - bits_per_byte_top_k: of the windows without padding, with top-k routing
        - routing_gap: bits per byte of causal routing minus that of top-k, over the same windows
        - seconds

        A rule has no top-k: under it, bits_per_byte_top_k and routing_gap are missing.
        """
        start = time.perf_counter()
        sums = np.zeros(4, np.float64)
        for first in range(0, len(self.windows), self.batch_size):
            rows = slice(first, first + self.batch_size)
            sums += self.run(self.windows[rows], self.flags[rows])[0]
        nats, nats_whole, nats_top_k, routed = sums.tolist()
        top_k = {
            "validation_bits_per_byte_top_k": nats_top_k / (self.whole * math.log(2)),
            "validation_routing_gap": (nats_whole - nats_top_k) / (self.whole * math.log(2)),
        }
        return {
            "validation_bits_per_byte": nats / (self.scored * math.log(2)),
            **(top_k if self.has_top_k else {}),
            "validation_router_rate": routed / self.scored,
            "validation_seconds": time.perf_counter() - start,
        }


@dataclass(frozen=True)
class ByteKind:
    """Router decisions for one kind of byte.

    - share_of_bytes: the share of all bytes that are of this kind
    - share_of_decisions: the share of all routed bytes that are of this kind
    - interval: 95 % confidence interval of share_of_decisions, see `_interval`
    - rate: the share of the bytes of this kind that are routed
    """

    share_of_bytes: float
    share_of_decisions: float
    interval: list[float] | None
    rate: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Routed bytes as predictions of word boundaries: precision, recall, and their F1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Boundary:
    """The router as a detector of boundaries, and the expectation of random routing at its rate.

    f1 of `random` is that of the expected precision and recall.
    """

    router: PrecisionRecall
    random: PrecisionRecall


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Only the text of the documents counts, never a wrapper tag.

    - bytes: number of bytes of the text, each predicted once
    - context_len, stride: of the windows, see `pico_tg.evaluation`
    - bits_per_byte: of head 0, with causal routing; bits_per_byte_without_latent: the same without
      the latent blocks
    - head_accuracy [T]: how often the likeliest byte of head k at position i is byte i + 1 + k
    - drafts_right_text, drafts_right_greedy [T - 1]: how often the first j drafts of a pass are all
      accepted. Draft j at position i is the likeliest byte of head j. Against the text it is
      accepted if it equals byte i + 1 + j; greedily, if it equals the likeliest byte of head 0 at
      position i + j, given the text up to there
    - accepted_text, accepted_greedy: mean number of accepted drafts of a pass with T - 1 drafts,
      where each pass begins after the bytes that the previous pass produced. accepted_text is that
      of a decoder that writes exactly this text; accepted_greedy estimates decoding at temperature
      0, whose own text would be likelier than this one. Both are of the heads alone:
      `generation.Transitions` corrects the drafts, so that `generate` accepts more
    - router_rate: share of the bytes that went through the latent blocks
    - routing_gap: bits per byte of causal routing minus that of top-k, which looks ahead; over
      windows of context_len bytes, as in `Validation`; None under a rule
    - surprisal_ratio: mean cross-entropy of the byte after a routed byte, divided by that of all
      bytes; above 1 the router selects where the text is hard to predict; None if no byte is
      routed. surprisal_interval: its 95 % confidence interval, see `_interval`
    - places: router decisions by kind of byte. The kinds are: word_start, the first byte of a
      word (ASCII letters, digits, _ and all characters beyond ASCII); word_inside, the first byte
      of a later character of a word; whitespace; punctuation (other ASCII); continuation (byte 2 to
      4 of a UTF-8 character). space (0x20 alone), after_newline and after_whitespace (not
      whitespace itself) overlap these kinds
    - boundaries: routed bytes as predictions of word_end, the last byte of a word; space, the last
      byte of a run of whitespace; word_start, the first byte of a word; and near, within one byte
      of a boundary. A boundary is a run of bytes between words; it is found if one of its bytes, or
      the byte before or after them, is routed
    - passage: records of the first bytes, one list for each document
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
    routing_gap: float | None
    surprisal_ratio: float | None
    surprisal_interval: list[float] | None
    places: dict[str, ByteKind]
    boundaries: dict[str, Boundary]
    passage: list[list[GeneratedByte]] = dataclasses.field(repr=False)

    def as_dict(self) -> dict:
        """All but the passage, as valid JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, passage=[]))
        del values["passage"]
        return values


def evaluate(
    model: Pico,
    dataset: str | os.PathLike | DataSpec | Data | Corpus | None = None,
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
    """Measure `model` on a split of a data set. The result is the same on every run.

    - dataset: `pico_tg.DataSpec`, its `dataset` alone, or loaded data; None is `python-docs`. A
      corpus is measured whole
    - split: validation (held out of train if the data set has none), train, or all (train together
      with the part that is held out of train)
    - context_len: bytes before each predicted byte, where the text has them; stride: new bytes of a
      window (default: context_len, so that every byte is computed twice)
    - batch_size: windows of one pass (default: as many as make 16,384 positions)
    - max_bytes: only the first max_bytes bytes of the split, wrapper tags included
    - precision: see `pico_tg.TrainSettings`
    - passage: return records of the first `passage` bytes
    - progress: show a bar on stderr

    Memory: about 25 + T bytes for each byte of the split. Raises PicoError on a bad option, and on
    data with no byte to predict.
    """
    stride = context_len if stride is None else stride
    options = {"context_len": context_len, "stride": stride, "batch_size": batch_size}
    check_options(split=split, max_bytes=max_bytes, precision=precision, **options)
    spec = DataSpec(dataset) if isinstance(dataset, str | os.PathLike) else dataset
    spec = DataSpec() if spec is None else spec
    if isinstance(spec, Corpus):
        corpus, split = spec, "all"
    elif split == "all":
        corpus = load_whole(spec.spec if isinstance(spec, Data) else spec, progress=progress)
    else:
        data = spec if isinstance(spec, Data) else load_data(spec, progress=progress)
        corpus = data.validation if split == "validation" else data.train
    total = min(len(corpus.bytes), max_bytes or len(corpus.bytes))
    text = ~corpus.wrapper_mask(0, total)
    if not text[1:].any():
        part = "data" if split == "all" else f"{split} data"
        raise PicoError(
            f"the first {total:,} bytes of the {part} hold no byte to predict; take more of them, "
            "or other data"
        )
    length = min(context_len + stride, total)
    windows = list(_windows(total, length, min(stride, length)))
    batch_size = min(batch_size or max(1, BATCH_POSITIONS // length), len(windows))
    if batch_size * length > MAX_BATCH_BYTES:
        raise PicoError(
            f"{batch_size} windows of {length:,} bytes are more than the {MAX_BATCH_BYTES:,} bytes "
            "that are taken for a mistake; take a smaller context_len, stride or batch_size"
        )
    measured = _Measured(corpus, text, model.config.next_tokens)
    settings = TrainSettings(
        context_len=context_len,
        batch_size=batch_size,
        validation_bytes=total,
        precision=precision,
    )
    validation = Validation(model, corpus, settings)
    gap = validation()["validation_routing_gap"] if validation.has_top_k else None
    run = _TextPass(model, length, settings).run
    bar = Bar(total=total, desc="evaluating", unit="B", unit_scale=True, disable=not progress)
    with bar:
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            # pad the last batch with windows that start after the end of the text
            starts = np.array([start for start, _, _ in rows] + [total] * (batch_size - len(rows)))
            real = starts[:, None] + np.arange(1, length + 1) < total
            figures = run(_windows_at(measured.data, starts, length), real.astype(np.uint8))
            for row, (start, begin, end) in enumerate(rows):
                for array, figure in zip(measured.arrays, figures, strict=True):
                    array[begin:end] = figure[row, begin - start : end - start]
                bar.update(end - begin)
    return measured.evaluation(context_len, stride, gap, passage)


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
    for name, value, minimum in (
        ("context_len", context_len, 1),
        ("stride", stride, 1),
        ("batch_size", batch_size, 1),
        ("max_bytes", max_bytes, 2),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= minimum):
            raise PicoError(f"{name} must be a whole number of at least {minimum}, not {value!r}")


def _windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each window: (start, first scored position, end of the scored positions)."""
    yield 0, 0, length
    for begin in range(length, total, stride):
        yield begin + stride - length, begin, min(begin + stride, total)


def _windows_at(values: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """values [N] from each of starts [B] on: [B, length + 1], padded with 0 after the end."""
    at = starts[:, None] + np.arange(length + 1)  # (B, length + 1)
    return np.where(at < len(values), values[np.minimum(at, len(values) - 1)], values.dtype.type(0))


def _has(flags: Tensor, flag: int) -> Tensor:
    return (flags & flag).cast(dtypes.bool)


class _TextPass(CausalPass):
    def figures(self, x, targets, flags, logits, router_logits, decisions) -> tuple[Tensor, ...]:
        """The arrays of `_Measured`, of each position [B, N, …]."""
        without, _, _ = self.model(x, causal=True, count=0)
        nats, nats_without = (cross_entropy(y[:, :, 0], targets) for y in (logits, without))
        guesses = logits.argmax(axis=-1).cast(dtypes.uint8)
        return nats, nats_without, guesses, router_logits, decisions


class _Measured:
    """A text of N bytes, the outputs of the model at each position, and figures from both."""

    def __init__(self, corpus: Corpus, text: np.ndarray, next_tokens: int) -> None:
        N = len(text)
        self.corpus, self.data = corpus, corpus.bytes[:N]
        self.text = text  # bool [N]: not of a wrapper tag
        self.nats = np.zeros(N, np.float32)  # cross-entropy of head 0: at position i, of byte i + 1
        self.nats_without = np.zeros(N, np.float32)  # the same without the latent blocks
        self.guesses = np.zeros((N, next_tokens), np.uint8)  # the likeliest byte of each head
        self.router_logits = np.zeros(N, np.float32)
        self.decisions = np.zeros(N, bool)
        self.arrays = (
            self.nats, self.nats_without, self.guesses, self.router_logits, self.decisions,
        )  # fmt: skip

    def evaluation(
        self, context_len: int, stride: int, gap: float | None, passage: int
    ) -> Evaluation:
        count, routed = int(self.text.sum()), int((self.text & self.decisions).sum())
        bits, bits_without = (
            nats[:-1][self.text[1:]].sum(dtype=np.float64) / (count * math.log(2))
            for nats in (self.nats, self.nats_without)
        )
        if not np.isfinite([bits, bits_without]).all():
            raise PicoError("the model's loss on these data is not finite; try --precision fp32")
        rate = routed / count
        places = {}
        for name, kind in self._kinds():
            size, hits = int(kind.sum()), int((kind & self.decisions).sum())
            interval = _interval(np.divide, kind & self.decisions, self.text & self.decisions)
            share = _ratio(hits, routed)
            places[name] = ByteKind(size / count, share, interval, _ratio(hits, size))
        surprisal, surprisal_interval = self._surprisal()
        right_text, accepted_text, drafted = self._drafts(self.data)
        # the likeliest byte of head 0 at position i - 1, which predicts byte i
        greedy = np.concatenate([self.data[:1], self.guesses[:-1, 0]])
        right_greedy, accepted_greedy, _ = self._drafts(greedy)
        return Evaluation(
            bytes=count,
            context_len=context_len,
            stride=stride,
            bits_per_byte=float(bits),
            bits_per_byte_without_latent=float(bits_without),
            head_accuracy=self._head_accuracy(),
            drafts_right_text=right_text,
            drafts_right_greedy=right_greedy,
            accepted_text=accepted_text,
            accepted_greedy=accepted_greedy,
            router_rate=rate,
            routing_gap=gap,
            surprisal_ratio=surprisal,
            surprisal_interval=surprisal_interval,
            places=places,
            boundaries=dict(self._boundaries(rate)),
            passage=self._records(passage, drafted),
        )

    def _head_accuracy(self) -> list[float]:
        accuracy = []
        for k in range(self.guesses.shape[1]):
            text = self.text[1 + k :]
            right = text & (self.guesses[: len(text), k] == self.data[1 + k :])
            accuracy.append(_ratio(int(right.sum()), int(text.sum())))
        return accuracy

    def _drafts(self, truth: np.ndarray) -> tuple[list[float], float, np.ndarray]:
        """Drafts compared with the bytes `truth` [N].

        Returns how often the first j drafts are all accepted [T - 1], the mean number of accepted
        drafts of a pass, and which bytes are accepted drafts, bool [N].
        """
        N, T = self.guesses.shape
        starts = np.append(self.text[1:], False)  # positions at which a pass may begin
        right, accepted, shares = starts.copy(), np.zeros(N, np.uint32), []
        for j in range(1, T):
            later = slice(min(1 + j, N), None)  # the byte that draft j of each position predicts
            rest = N - later.start
            right[:rest] &= self.text[later] & (self.guesses[:rest, j] == truth[later])
            right[rest:] = False
            accepted += right
            shares.append(_ratio(int(right.sum()), int(starts.sum())))
        # a pass at position i produces byte i + 1 and the accepted drafts after it
        drafted, passes = np.zeros(N, bool), 0
        for position in _visited(1 + accepted):
            if starts[position]:
                passes += 1
                drafted[position + 2 : position + 2 + accepted[position]] = True
        return shares, _ratio(int(drafted.sum()), passes), drafted

    def _kinds(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each kind of byte: its name, and which bytes of the text are of that kind, bool [N]."""
        before = np.zeros(len(self.data), np.uint8)
        before[1:] = self.data[:-1]
        follows = np.append(False, self.text[:-1])  # the byte before is text as well
        space, later, word = (table[self.data] for table in (WHITESPACE, CONTINUATION, WORD))
        first = self.text & ~space & ~later
        in_word = follows & WORD[before]
        yield "word_start", first & word & ~in_word
        yield "word_inside", first & word & in_word
        yield "whitespace", self.text & space
        yield "punctuation", first & ~word
        yield "continuation", self.text & later
        yield "space", self.text & (self.data == ord(" "))
        yield "after_newline", self.text & follows & (before == ord("\n"))
        yield "after_whitespace", self.text & ~space & follows & WHITESPACE[before]

    def _surprisal(self) -> tuple[float | None, list[float] | None]:
        """Evaluation.surprisal_ratio and surprisal_interval."""
        measured = self.text & np.append(self.text[1:], False)  # the next byte is text as well
        routed = measured & self.decisions
        arrays = self.nats * routed, routed, self.nats * measured, measured
        if not routed.any():
            return None, None
        ratio = _ratio_of_means(*(array.sum(dtype=np.float64) for array in arrays))
        return float(ratio), _interval(_ratio_of_means, *arrays)

    def _boundaries(self, rate: float) -> Iterator[tuple[str, Boundary]]:
        """Each place of a boundary: its name, and how well the routed bytes find it."""
        text, routed = self.text, self.text & self.decisions
        word, space = text & WORD[self.data], text & WHITESPACE[self.data]
        between = text & ~word  # bytes between words
        before, after = (lambda x: np.append(False, x[:-1])), (lambda x: np.append(x[1:], False))
        selected, count = int(routed.sum()), int(text.sum())

        def boundary(near: np.ndarray, found: float, expected: float) -> Boundary:
            """From the bytes that count, and the recalls of the router and of random routing."""
            precision = _ratio(int((near & routed).sum()), selected)
            random = int(near.sum()) / count if rate else 0.0
            return Boundary(
                _precision_recall(precision, found), _precision_recall(random, expected)
            )

        for name, place in (
            ("word_end", word & after(between)),
            ("space", space & after(text & ~space)),
            ("word_start", word & ~before(word)),
        ):
            found = _ratio(int((place & routed).sum()), int(place.sum()))
            yield name, boundary(place, found, rate if place.any() else 0.0)
        # runs of bytes between words, each extended by the bytes of text beside it
        starts = np.flatnonzero(between & ~before(between))
        ends = np.flatnonzero(between & ~after(between)) + 1
        starts, ends = starts - before(text)[starts], ends + after(text)[ends - 1]
        routed_before = np.append(0, np.cumsum(routed))
        found = routed_before[ends] > routed_before[starts]
        expected = 1 - (1 - rate) ** (ends - starts)
        near = text & (between | before(between) | after(between))
        yield (
            "near",
            boundary(near, *(float(x.mean()) if len(x) else 0.0 for x in (found, expected))),
        )

    def _records(self, limit: int, drafted: np.ndarray) -> list[list[GeneratedByte]]:
        at = np.flatnonzero(self.text[:limit])
        documents = np.searchsorted(self.corpus.offsets, at, "right")
        weights = np.exp(-np.logaddexp(0, -self.router_logits[at].astype(np.float64)))
        records: dict[int, list[GeneratedByte]] = {}
        for i, document, weight in zip(at, documents, weights, strict=True):
            record = GeneratedByte(
                int(self.data[i]),
                float(weight),
                bool(self.decisions[i]),
                -float(self.nats[i - 1]),
                bool(drafted[i]),
            )
            records.setdefault(int(document), []).append(record)
        return list(records.values())


def _visited(steps: np.ndarray) -> Iterator[int]:
    """Positions from 0 on, each followed by position + steps[position]."""
    steps, position = memoryview(steps), 0  # a memoryview yields Python integers, which is faster
    while position < len(steps):
        yield position
        position += steps[position]


def _interval(statistic: Callable[..., np.ndarray], *arrays: np.ndarray) -> list[float] | None:
    """[low, high], 95 % confidence interval of statistic(*sums of the arrays [N]): block bootstrap.

    Neighboring bytes depend on each other, so whole blocks of the text are drawn with replacement:
    BLOCKS blocks, of at least MIN_BLOCK bytes each. None if the statistic is undefined, or the text
    shorter than MIN_BLOCKS blocks: of 5 blocks, such an interval would cover the truth in 83 % of
    the cases.
    """
    N = len(arrays[0])
    blocks = min(BLOCKS, N // MIN_BLOCK)
    if blocks < MIN_BLOCKS:
        return None
    starts = np.arange(blocks) * N // blocks
    drawn = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
    sums = [drawn @ np.add.reduceat(array.astype(np.float64), starts) for array in arrays]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(*sums)
    values = values[np.isfinite(values)]
    return np.quantile(values, [0.025, 0.975]).tolist() if len(values) else None


def _ratio_of_means(a: np.ndarray, m: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
    return (a / m) / (b / n)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _precision_recall(precision: float, recall: float) -> PrecisionRecall:
    return PrecisionRecall(precision, recall, _ratio(2 * precision * recall, precision + recall))
