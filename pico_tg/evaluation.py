"""Evaluation: bits per byte of a text, with the routing of decoding.

`Validation` (during training) and `evaluate` (a report) run the same compiled pass, `CausalPass`,
over windows of the text, so that every byte is predicted once. All sums are NumPy's.

- `Validation` cuts the text into windows that do not overlap, as training does.
- `evaluate` takes windows of twice context_len, each of which overlaps half of the one before. Each
  window after the first scores its second half, so that every position has at least context_len
  bytes before it, or the whole text before it. More context still changes the figures a little
  (blocks stack their windows); less would measure each window's cold start.

`pico_tg.tools.router_report` tells which kinds of bytes the router selects.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes, nn

from .backend.precision import graph_context
from .backend.runtime import exclusive, jit_method
from .config import PRECISIONS, TrainSettings, check_fields, field_help, setting, settings_class
from .data import MAX_BATCH_BYTES, Corpus, Data, DataSpec, load_data, load_whole
from .files import PicoError
from .model import Pico, inputs_and_targets
from .ops import cross_entropy
from .progress import Bar, Events
from .routing import RULES

SPLITS = ("validation", "train", "all")
BATCH_POSITIONS = 1 << 14  # positions of one pass of `evaluate`


class CausalPass:
    """One compiled pass over a batch of windows; returns the figures `wanted`.

    Routing is causal, and the deep blocks have slots for twice the capacity, which keeps them
    cheap. If a window routes more bytes than that, its batch is computed again with one slot for
    each byte.

    - nats float32 [B, N]: cross-entropy of head 0; nats_top_k: the same with top-k routing;
      nats_without: the same without the deep blocks
    - guesses uint8 [B, N, T]: the likeliest byte of each head
    - router_logits float32 [B, N], decisions bool [B, N]
    """

    def __init__(
        self,
        model: Pico,
        length: int,
        settings: TrainSettings,
        wanted: tuple[str, ...],
        devices: tuple[str, ...] = (),
    ) -> None:
        self.model, self.wanted = model, wanted
        self.slots = min(length, 2 * max(1, model.config.capacity(length)))
        if wanted == ("nats_top_k",):  # which has as many slots as it selects
            self.slots = length
        compiled = partial(
            jit_method,
            self._graph,
            devices=devices,
            context=partial(graph_context, settings, devices),
            tensors=nn.state.get_parameters(model),
            determined_by=(model.config, wanted),
            of_training=True,
        )
        self.few_slots, self.all_slots = compiled(self.slots), compiled(length)

    def _graph(self, count: int, windows: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        x, targets = inputs_and_targets(windows, 1)
        model, capacity = self.model, self.model.config.capacity(x.shape[1])
        h, router_logits = model.encode(x)
        decisions = model.decide(x, router_logits, causal=True)
        logits = model.finish(h, router_logits, decisions, count)
        ahead = model.decide(x, router_logits)

        def nats(logits: Tensor) -> Tensor:
            return cross_entropy(logits[:, :, 0], targets[:, :, 0])

        figures = {
            "nats": lambda: nats(logits),
            "nats_top_k": lambda: nats(model.finish(h, router_logits, ahead, capacity)),
            "nats_without": lambda: nats(model.predict(h)),
            "guesses": lambda: logits.argmax(axis=-1).cast(dtypes.uint8),
            "router_logits": lambda: router_logits,
            "decisions": lambda: decisions,
        }
        results = [figures[name]().contiguous() for name in self.wanted]
        real = Tensor.arange(x.shape[1], device=x.device) < lengths  # (B, N): not padding
        routed = (decisions & real).sum(axis=1, dtype=dtypes.int32).max().contiguous()
        Tensor.realize(*results, routed)
        return *results, routed

    @exclusive
    def __call__(self, windows: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """The figures of windows uint8 [B, N + 1], by name.

        lengths int [B]: how many positions of a window are not padding, which needs no slots.
        """
        inputs = windows, lengths.reshape(-1, 1).astype(np.int32)
        *figures, routed = self.few_slots(*inputs)
        if routed > self.slots:
            *figures, routed = self.all_slots(*inputs)
        return {name: found.copy() for name, found in zip(self.wanted, figures, strict=True)}


class Validation:
    """Bits per byte of the same held-out windows every time, wrapper bytes left out.

    Measured with causal routing, as decoding routes; on request also with top-k routing, which
    looks ahead over the whole window, unless a rule routes. `bytes`: how many are read. Raises
    PicoError if the corpus holds no byte to predict.
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
        multiple = max(1, len(devices))  # all devices take equally many windows
        count = math.ceil(total / length)
        self.batch_size = math.ceil(min(settings.batch_size, count) / multiple) * multiple
        starts = np.arange(math.ceil(count / self.batch_size) * self.batch_size) * length
        self.windows = _windows_at(data, starts, length)
        self.lengths = np.clip(len(data) - 1 - starts, 0, length)
        self.scored = _windows_at(~corpus.wrapper_mask(len(data)), starts, length)[:, 1:]
        # which bytes top-k selects depends on the whole window, so padding would change the figure
        whole = self.scored & (starts + length < len(data))[:, None]
        self.whole = whole if whole.any() else self.scored
        if not self.scored.any():
            raise PicoError(
                f"the validation data has {len(data)} bytes, too few to measure anything; "
                "hold out more with --dataset-validation-size"
            )
        self.bytes = len(data)
        self.causal = CausalPass(model, length, settings, ("nats", "decisions"), devices)
        self.top_k: CausalPass | None = None
        if model.config.router not in RULES:
            self.top_k = CausalPass(model, length, settings, ("nats_top_k",), devices)

    def __call__(
        self, events: Events | None = None, top_k: bool = False
    ) -> dict[str, float] | None:
        """Measure -> a dict of these keys, each preceded by `validation_`; None if `events` stop.

        - bits_per_byte, router_rate: of all windows, with causal routing
        - seconds

        top_k adds these, unless a rule routes or `events` stop after the causal pass:

        - bits_per_byte_top_k: of the windows without padding, with top-k routing
        - routing_gap: bits per byte of causal routing minus that of top-k, over the same windows
        """
        start, events = time.perf_counter(), events or Events()
        if (found := self._measure(self.causal, events)) is None:
            return None

        def bits(nats: np.ndarray, where: np.ndarray) -> float:
            return float(nats[where].mean(dtype=np.float64) / math.log(2))

        record = {"validation_bits_per_byte": bits(found["nats"], self.scored)}
        if top_k and self.top_k and (ahead := self._measure(self.top_k, events)):
            record["validation_bits_per_byte_top_k"] = bits(ahead["nats_top_k"], self.whole)
            record["validation_routing_gap"] = (
                bits(found["nats"], self.whole) - record["validation_bits_per_byte_top_k"]
            )
        record["validation_router_rate"] = float(found["decisions"][self.scored].mean())
        return record | {"validation_seconds": time.perf_counter() - start}

    def _measure(self, measure: CausalPass, events: Events) -> dict[str, np.ndarray] | None:
        """The figures of all windows, by name; None if `events` stop."""
        parts, total = [], len(self.windows) // self.batch_size
        for first in range(0, len(self.windows), self.batch_size):
            if events.stop():
                return None
            rows = slice(first, first + self.batch_size)
            parts.append(measure(self.windows[rows], self.lengths[rows]))
            events.part(len(parts), total)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`. Only the text of the documents counts, never a wrapper tag.

    - bytes: number of bytes of the text, each predicted once
    - context_len: of the windows, see `pico_tg.evaluation`
    - bits_per_byte: of head 0, with causal routing; bits_per_byte_without_latent: the same without
      the deep blocks
    - head_accuracy [T]: how often the likeliest byte of head k at position i is byte i + 1 + k
    - router_rate: share of bytes routed, through the deep blocks
    - routing_gap: bits per byte of causal routing minus that of top-k, which looks ahead over the
      window; None under a rule
    - data uint8 [N]: the bytes that were read, wrapper tags included; text bool [N]: which of them
      are text; offsets int64: where documents begin, see `Corpus`
    - figures: what `CausalPass` found at each of these bytes, by name
    """

    bytes: int
    context_len: int
    bits_per_byte: float
    bits_per_byte_without_latent: float
    head_accuracy: list[float]
    router_rate: float
    routing_gap: float | None
    data: np.ndarray = dataclasses.field(repr=False)
    text: np.ndarray = dataclasses.field(repr=False)
    offsets: np.ndarray = dataclasses.field(repr=False)
    figures: dict[str, np.ndarray] = dataclasses.field(repr=False)

    def as_dict(self) -> dict:
        """All but the arrays, as valid JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if not isinstance(v, np.ndarray | dict)}


@settings_class
@dataclass(frozen=True)
class EvalSettings:
    """How `evaluate` measures a text. Raises PicoError on an impossible value."""

    split: str = setting(
        "validation (held out of train if the data has none), train, or all: train with nothing "
        "held out",
        "validation",
        choices=SPLITS,
    )
    max_bytes: int | None = setting(
        "measure only the first N bytes, wrapper tags included (default: all)", None, minimum=2
    )
    context_len: int = setting(
        "bytes of context before each predicted byte, where the text has them", 1024
    )
    precision: str = setting(field_help(TrainSettings)["precision"], "auto", choices=PRECISIONS)

    def __post_init__(self) -> None:
        check_fields(self)


def evaluate(
    model: Pico,
    dataset: str | os.PathLike | DataSpec | Data | Corpus | None = None,
    *,
    progress: bool = False,
    **settings: int | str | None,
) -> Evaluation:
    """Measure `model` on a split of a data set. The result is the same on every run.

    - dataset: `pico_tg.DataSpec`, its `dataset` alone, or loaded data; None is `python-docs`. A
      corpus is measured whole
    - progress: show a bar on stderr
    - settings: the fields of `EvalSettings`, such as split="train", max_bytes=10_000

    Memory: about 30 + T bytes for each byte of the split. Raises PicoError on a bad or unknown
    setting, and on data with no byte to predict.
    """
    chosen = EvalSettings(**settings)
    split, context_len = chosen.split, chosen.context_len
    corpus = _corpus(dataset, split, progress)
    total = min(len(corpus.bytes), chosen.max_bytes or len(corpus.bytes))
    data, text = corpus.bytes[:total], ~corpus.wrapper_mask(total)
    target = text[1:]  # which positions predict a byte of text
    if not target.any():
        part = "data" if split == "all" or corpus is dataset else f"{split} data"
        raise PicoError(
            f"the first {total:,} bytes of the {part} hold no byte to predict; take more of them, "
            "or other data"
        )
    length = min(2 * context_len, total)
    if length > MAX_BATCH_BYTES:
        raise PicoError(
            f"a window of {length:,} bytes is more than the {MAX_BATCH_BYTES:,} bytes that are "
            "taken for a mistake; take a smaller context_len"
        )
    windows = list(_windows(total, length, min(context_len, length)))
    batch_size = min(max(1, BATCH_POSITIONS // length), len(windows))
    top_k = () if model.config.router in RULES else ("nats_top_k",)
    wanted = ("nats", "nats_without", "guesses", "router_logits", "decisions", *top_k)
    measure = CausalPass(model, length, TrainSettings(precision=chosen.precision), wanted)
    figures: dict[str, np.ndarray] = {}
    whole = np.zeros(total, bool)  # in a window without padding, see `Validation`
    bar = Bar(total=total, desc="compiling", unit="B", unit_scale=True, disable=not progress)
    with bar:
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            # pad the last batch with windows that start after the end of the text
            starts = np.array([start for start, _, _ in rows] + [total] * (batch_size - len(rows)))
            lengths = np.clip(total - starts, 0, length)
            found = measure(_windows_at(data, starts, length), lengths)
            for name, array in found.items():
                if not first:
                    figures[name] = np.zeros((total, *array.shape[2:]), array.dtype)
                for row, (start, begin, end) in enumerate(rows):
                    figures[name][begin:end] = array[row, begin - start : end - start]
            bar.set_description_str("evaluating", refresh=False)
            for start, begin, end in rows:
                whole[begin:end] = start + length <= total
                bar.update(end - begin)

    def bits(name: str, where: np.ndarray = target) -> float:
        return float(figures[name][:-1][where].mean(dtype=np.float64) / math.log(2))

    gap = None
    if top_k:
        where = target & whole[:-1] if (target & whole[:-1]).any() else target
        gap = bits("nats", where) - bits("nats_top_k", where)
    if not np.isfinite([bits("nats"), bits("nats_without"), gap or 0.0]).all():
        raise PicoError("the model's loss on these data is not finite; try --precision fp32")
    accuracy = []
    for k in range(model.config.next_tokens):
        right = figures["guesses"][: max(0, total - 1 - k), k] == data[1 + k :]
        scored = text[1 + k :]
        accuracy.append(float(right[scored].mean()) if scored.any() else 0.0)
    rate = float(figures["decisions"][text].mean())
    return Evaluation(
        int(text.sum()), context_len, bits("nats"), bits("nats_without"), accuracy, rate, gap,
        data, text, corpus.offsets, figures,
    )  # fmt: skip


def _corpus(
    dataset: str | os.PathLike | DataSpec | Data | Corpus | None, split: str, progress: bool
) -> Corpus:
    if isinstance(dataset, Corpus):
        return dataset
    spec = DataSpec() if dataset is None else dataset
    spec = spec if isinstance(spec, DataSpec | Data) else DataSpec(spec)
    if split == "all":
        return load_whole(spec.spec if isinstance(spec, Data) else spec, progress=progress)
    data = spec if isinstance(spec, Data) else load_data(spec, progress=progress)
    return data.validation if split == "validation" else data.train


def _windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each window: (start, first scored position, end of the scored positions)."""
    yield 0, 0, length
    for begin in range(length, total, stride):
        yield begin + stride - length, begin, min(begin + stride, total)


def _windows_at(values: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """values [N] from each of starts [B] on: [B, length + 1], padded with 0 after the end."""
    at = starts[:, None] + np.arange(length + 1)  # (B, length + 1)
    return np.where(at < len(values), values[np.minimum(at, len(values) - 1)], values.dtype.type(0))
