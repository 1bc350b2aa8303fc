"""What the router selects: a report on the arrays of an `Evaluation`.

Which kinds of bytes it selects, whether it finds word boundaries, and whether it selects where the
text is hard to predict.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation import Evaluation
from ..generation import GeneratedByte

WHITESPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
CONTINUATION = (np.arange(256) & 0xC0) == 0x80  # bytes 2 to 4 of a UTF-8 character
WORD = np.array([chr(b).isalnum() or b == ord("_") if b < 128 else True for b in range(256)])


@dataclass(frozen=True)
class ByteKind:
    """Router decisions for one kind of byte.

    - share_of_bytes: the share of all bytes that are of this kind
    - share_of_decisions: the share of all routed bytes that are of this kind
    - rate: the share of the bytes of this kind that are routed
    """

    share_of_bytes: float
    share_of_decisions: float
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
class RouterReport:
    """The result of `router_report`. Only the text of the documents counts, never a wrapper tag.

    - surprisal_ratio: mean cross-entropy of the byte after a routed byte, divided by that of all
      bytes; above 1 the router selects where the text is hard to predict; None if no byte is
      routed, or if every byte is certain
    - places: router decisions by kind of byte. The kinds are: word_start, the first byte of a
      word (ASCII letters, digits, _ and all characters beyond ASCII); word_inside, the first byte
      of a later character of a word; whitespace; punctuation (other ASCII); continuation (byte 2 to
      4 of a UTF-8 character). space is the whitespace 0x20 alone
    - boundaries: routed bytes as predictions of word_start, the first byte of a word; and near,
      within one byte of a boundary. A boundary is a run of bytes between words; it is found if one
      of its bytes, or the byte before or after them, is routed
    """

    surprisal_ratio: float | None
    places: dict[str, ByteKind]
    boundaries: dict[str, Boundary]

    def as_dict(self) -> dict:
        """The report as valid JSON."""
        return dataclasses.asdict(self)


def router_report(evaluation: Evaluation) -> RouterReport:
    """The report of an evaluation."""
    return RouterReport(
        _surprisal(evaluation), dict(_places(evaluation)), dict(_boundaries(evaluation))
    )


def passage(evaluation: Evaluation, limit: int) -> list[list[GeneratedByte]]:
    """Records of the text among the first `limit` bytes, one list for each document."""
    figures = evaluation.figures
    at = np.flatnonzero(evaluation.text[:limit])
    documents = np.searchsorted(evaluation.offsets, at, "right")
    weights = np.exp(-np.logaddexp(0, -figures["router_logits"][at].astype(np.float64)))
    records: dict[int, list[GeneratedByte]] = {}
    for i, document, weight in zip(at, documents, weights, strict=True):
        decision, logprob = bool(figures["decisions"][i]), -float(figures["nats"][i - 1])
        record = GeneratedByte(int(evaluation.data[i]), float(weight), decision, logprob)
        records.setdefault(int(document), []).append(record)
    return list(records.values())


def routed_kinds(records: Sequence[GeneratedByte]) -> dict[str, float]:
    """The share of routed bytes among each kind of byte that the records hold."""
    data = np.array([record.byte for record in records], np.uint8)
    decisions = np.array([record.router_decision for record in records], bool)
    kinds = _kinds(data, np.ones(len(data), bool))
    return {name: float(decisions[kind].mean()) for name, kind in kinds if kind.any()}


def _places(evaluation: Evaluation) -> Iterator[tuple[str, ByteKind]]:
    text, decisions = evaluation.text, evaluation.figures["decisions"]
    count, routed = int(text.sum()), int((text & decisions).sum())
    for name, kind in _kinds(evaluation.data, text):
        size, hits = int(kind.sum()), int((kind & decisions).sum())
        yield name, ByteKind(size / count, _ratio(hits, routed), _ratio(hits, size))


def _kinds(data: np.ndarray, text: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each kind of byte: its name, and which bytes of the text are of that kind, bool [N]."""
    space, later, word = (table[data] for table in (WHITESPACE, CONTINUATION, WORD))
    first = text & ~space & ~later
    in_word = _before(text & word)
    yield "word_start", first & word & ~in_word
    yield "word_inside", first & word & in_word
    yield "whitespace", text & space
    yield "punctuation", first & ~word
    yield "continuation", text & later
    yield "space", text & (data == ord(" "))


def _surprisal(evaluation: Evaluation) -> float | None:
    """RouterReport.surprisal_ratio."""
    text, nats = evaluation.text, evaluation.figures["nats"]
    measured = text & _after(text)  # the next byte is text as well
    routed = measured & evaluation.figures["decisions"]
    if not routed.any() or not nats[measured].any():  # a text that is certain surprises nowhere
        return None
    return float(nats[routed].mean(dtype=np.float64) / nats[measured].mean(dtype=np.float64))


def _boundaries(evaluation: Evaluation) -> Iterator[tuple[str, Boundary]]:
    """Each place of a boundary: its name, and how well the routed bytes find it."""
    text, rate = evaluation.text, evaluation.router_rate
    routed = text & evaluation.figures["decisions"]
    word = text & WORD[evaluation.data]
    between = text & ~word  # bytes between words
    start = word & ~_before(word)
    found = _ratio(int((start & routed).sum()), int(start.sum()))
    yield "word_start", _boundary(text, routed, start, found, rate if start.any() else 0.0)
    # runs of bytes between words, each extended by the bytes of text beside it
    starts = np.flatnonzero(between & ~_before(between))
    ends = np.flatnonzero(between & ~_after(between)) + 1
    starts, ends = starts - _before(text)[starts], ends + _after(text)[ends - 1]
    routed_before = np.append(0, np.cumsum(routed))
    found = routed_before[ends] > routed_before[starts]
    expected = 1 - (1 - rate) ** (ends - starts)
    recalls = [float(x.mean()) if len(x) else 0.0 for x in (found, expected)]
    near = text & (between | _before(between) | _after(between))
    yield "near", _boundary(text, routed, near, *recalls)


def _boundary(
    text: np.ndarray, routed: np.ndarray, place: np.ndarray, found: float, expected: float
) -> Boundary:
    """From the bytes that count, and the recalls of the router and of random routing."""
    precision = _ratio(int((place & routed).sum()), int(routed.sum()))
    random = int(place.sum()) / int(text.sum()) if routed.any() else 0.0
    return Boundary(_precision_recall(precision, found), _precision_recall(random, expected))


def _before(x: np.ndarray) -> np.ndarray:
    """bool [N]: whether x holds at the position before."""
    return np.append(False, x[:-1])


def _after(x: np.ndarray) -> np.ndarray:
    return np.append(x[1:], False)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _precision_recall(precision: float, recall: float) -> PrecisionRecall:
    return PrecisionRecall(precision, recall, _ratio(2 * precision * recall, precision + recall))
