"""Evaluation against the oracle and plain loops: windows, heads, drafts, the router."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from helpers import TINY as CONFIG
from helpers import Watch
from oracle import forward
from tinygrad import Tensor, nn

from pico_tg.config import TrainSettings
from pico_tg.data import DataSpec, load_data, load_whole
from pico_tg.evaluation import (
    CausalPass,
    Evaluation,
    Validation,
    _windows,
    evaluate,
)
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.tools import router_report
from pico_tg.tools.report import conclusion, describe_evaluation

CONTEXT = 17  # the held-out text below is 5 windows and a part of one
OPTIONS = {"context_len": CONTEXT}
DOCUMENTS = ["the cat; sat", "on a mât, 1_2 €!\n\n And then a\tdog,", "ran\n"]


@pytest.fixture(scope="module", autouse=True)
def two_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pico_tg.evaluation.BATCH_POSITIONS", 4 * CONTEXT)  # of a pass
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ["to train on", *DOCUMENTS])
    (folder / "rows.jsonl").write_text(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(folder / "cache"))
        return load_data(DataSpec(str(folder / "rows.jsonl"), validation_size=3), progress=False)


@pytest.fixture(scope="module")
def model() -> Pico:
    """A model with a bias for a few bytes, so that some of its predictions are right."""
    model = Pico(CONFIG, seed=14)
    bias = np.zeros((3, 256), np.float32)
    bias[:, [*b" at", 0xE2]] = 1.2
    model.unembedding.bias.assign(Tensor(bias.reshape(-1))).realize()
    return model


@dataclasses.dataclass
class Read:
    """The text, and the outputs of the oracle at each position, in the documented windows."""

    data: np.ndarray  # [N]
    own: np.ndarray  # [N]: no wrapper tag
    logits: np.ndarray  # [N, T, 256]
    without: np.ndarray  # [N, 256]: head 0 without latent blocks
    router: np.ndarray  # [N]: logits


@pytest.fixture(scope="module")
def read(data, model) -> Read:
    named = {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}
    text = np.array(data.validation.bytes)
    tags = b"".join(b"<pico:seq>" + t.encode() + b"</pico:seq>" for t in DOCUMENTS)
    assert text.tobytes() == tags
    own = np.concatenate(
        [np.repeat([False, True, False], [10, len(t.encode()), 11]) for t in DOCUMENTS]
    )
    seen = {}
    logits, without, router = [], [], []
    for p in range(len(text)):
        start = max(0, (p - CONTEXT) // CONTEXT * CONTEXT)
        if start not in seen:
            x = text[None, start : start + 2 * CONTEXT]
            none = np.zeros(x.shape, bool)
            seen[start] = (
                forward(named, CONFIG, x, causal=True),
                forward(named, CONFIG, x, decisions=none)[0],
            )
        (a, z, _), b = seen[start]
        logits.append(a[0, p - start])
        without.append(b[0, p - start, 0])
        router.append(z[0, p - start])
    return Read(text, own, np.array(logits), np.array(without), np.array(router))


@pytest.fixture(scope="module")
def found(data, model) -> Evaluation:
    return evaluate(model, data, **OPTIONS)


@pytest.fixture(scope="module")
def report(found) -> router_report.RouterReport:
    return router_report.router_report(found)


def bits(logits: np.ndarray, targets: np.ndarray) -> float:
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(targets)), targets]
    return nats.mean() / math.log(2)


def test_the_windows_are_those_of_the_test(read):
    assert len(read.data) > 5 * CONTEXT
    assert len(read.data) % CONTEXT != 0


def test_bits_per_byte(found, read):
    at = np.flatnonzero(read.own) - 1
    targets = read.data[at + 1].astype(int)
    assert found.bytes == len(at)
    assert found.bits_per_byte == pytest.approx(bits(read.logits[at, 0], targets), 1e-5)
    without = bits(read.without[at], targets)
    assert found.bits_per_byte_without_latent == pytest.approx(without, 1e-5)
    assert abs(found.bits_per_byte - without) > 5e-4


def test_head_accuracy(found, read):
    for k in range(3):
        hits = [
            read.logits[p, k].argmax() == read.data[p + 1 + k]
            for p in range(len(read.data) - 1 - k)
            if read.own[p + 1 + k]
        ]
        assert found.head_accuracy[k] == pytest.approx(np.mean(hits))
        assert 0 < sum(hits) < len(hits)


def test_router(found, report, read):
    routed = (read.router > 0) & read.own
    count = read.own.sum()
    assert found.router_rate == pytest.approx(routed.sum() / count)
    kinds = {name: [] for name in report.places}
    for p in np.flatnonzero(read.own):
        byte, before = bytes([read.data[p]]), bytes([read.data[p - 1]] if read.own[p - 1] else b"")
        if 0x80 <= byte[0] < 0xC0:
            kinds["continuation"].append(p)
        elif byte.isspace():
            kinds["whitespace"].append(p)
        elif byte.isalnum() or byte == b"_" or byte[0] >= 0xC0:
            word = before.isalnum() or before == b"_" or before > b"\x7f"
            kinds["word_inside" if word else "word_start"].append(p)
        else:
            kinds["punctuation"].append(p)
        if byte == b" ":
            kinds["space"].append(p)
    for name, at in kinds.items():
        place = report.places[name]
        assert at, name
        assert place.share_of_bytes == pytest.approx(len(at) / count), name
        assert place.share_of_decisions == pytest.approx(routed[at].sum() / routed.sum()), name
        assert place.rate == pytest.approx(routed[at].mean()), name


def places_of(read) -> tuple[dict[str, list[int]], list[range]]:
    """The bytes of each place of a boundary, and the bytes within one byte of each boundary."""
    kinds = []  # of each byte: "w" of a word, " " whitespace, "." other text, "" a wrapper tag
    for byte, own in zip(read.data, read.own, strict=True):
        letter = bytes([byte])
        word = letter.isalnum() or letter == b"_" or byte > 127
        kinds.append(("w" if word else " " if letter.isspace() else ".") if own else "")
    kinds.append("")
    places = {"word_start": []}
    for p, (before, kind) in enumerate(itertools.pairwise(["", *kinds])):
        if kind == "w" and before != "w":
            places["word_start"].append(p)
    runs, p = [], 0
    while p < len(read.data):
        end = p
        while kinds[end] in (" ", ".") and kinds[end]:
            end += 1
        if end > p:
            runs.append(range(p - (p > 0 and kinds[p - 1] == "w"), end + (kinds[end] == "w")))
        p = max(end, p + 1)
    return places, runs


def test_boundaries(found, report, read):
    """Each place, against plain loops; random routing, against 2000 simulations at that rate."""
    routed = (read.router > 0) & read.own
    places, runs = places_of(read)
    near = sorted({p for run in runs for p in run})
    rng = np.random.default_rng(0)
    at_random = (rng.random((2000, len(routed))) < found.router_rate) & read.own
    assert report.boundaries.keys() == {*places, "near"}
    for name, boundary in report.boundaries.items():
        for rows, measured, tolerance in (
            (routed[None], boundary.router, 1e-6),
            (at_random, boundary.random, 0.05),
        ):
            at = places.get(name, near)
            precision = rows[:, at].sum() / rows.sum()
            recall = rows[:, at].mean()
            if name == "near":
                recall = np.mean([rows[:, list(run)].any(axis=1).mean() for run in runs])
            assert measured.precision == pytest.approx(precision, rel=tolerance), name
            assert measured.recall == pytest.approx(recall, rel=tolerance), name
            harmonic = 2 * measured.precision * measured.recall
            harmonic /= measured.precision + measured.recall
            assert measured.f1 == pytest.approx(harmonic)
        assert 0 < boundary.router.precision < 1


def test_surprisal(report, read):
    """The mean over bytes after routed bytes, divided by the mean over all bytes after text."""
    at = np.flatnonzero(read.own[:-1] & read.own[1:])
    rows = read.logits[at, 0]
    nats = np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(at)), read.data[at + 1]]
    expected = nats[read.router[at] > 0].mean() / nats.mean()
    assert report.surprisal_ratio == pytest.approx(expected, rel=1e-5)


def test_a_text_that_is_certain_has_no_surprisal(found):
    """As after training on one repeated byte: NaN would be no JSON."""
    certain = found.figures | {"nats": np.zeros_like(found.figures["nats"])}
    of_nothing = router_report.router_report(dataclasses.replace(found, figures=certain))
    assert of_nothing.surprisal_ratio is None


def test_the_gap(found, read, model):
    """Over the windows without padding: which bytes are the top k depends on the whole window."""
    named = {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}
    gaps = []
    for start in range(0, len(read.data) - 2 * CONTEXT + 1, CONTEXT):
        x = read.data[start : start + 2 * CONTEXT]
        ahead = forward(named, CONFIG, x[None])[0][0, :, 0]
        for p in range(CONTEXT if start else 0, min(2 * CONTEXT, len(read.data) - 1 - start)):
            if read.own[start + p + 1]:
                at = read.data[start + p + 1 :][:1].astype(int)
                gaps.append(bits(read.logits[start + p, :1], at) - bits(ahead[p : p + 1], at))
    assert found.routing_gap == pytest.approx(np.mean(gaps), abs=1e-5)
    assert abs(found.routing_gap) > 1e-4


def test_a_validation_stops_between_its_batches(data, model):
    settings = TrainSettings(context_len=CONTEXT, batch_size=2, validation_bytes=10**6)
    validation, watch = Validation(model, data.validation, settings), Watch()
    whole = validation(watch, top_k=True)
    total = len(watch.seen) // 2
    assert watch.seen == 2 * [(done, total) for done in range(1, total + 1)]
    watch = Watch(lambda: len(watch.seen) == 1)
    assert validation(watch) is None
    assert watch.seen == [(1, total)]
    watch = Watch(lambda: len(watch.seen) == total)  # only the gap is left out
    clocks = ("validation_seconds", "validation_routing_gap", "validation_bits_per_byte_top_k")
    kept = {key: value for key, value in whole.items() if key not in clocks}
    assert {k: v for k, v in validation(watch, top_k=True).items() if k not in clocks} == kept
    assert {k: v for k, v in validation().items() if k not in clocks} == kept


def test_a_rule_has_no_top_k_and_no_routed_byte_no_surprisal(data):
    model = Pico(dataclasses.replace(CONFIG, router="none"), seed=0)
    settings = TrainSettings(context_len=CONTEXT, batch_size=2, validation_bytes=10**6)
    measured = Validation(model, data.validation, settings)(top_k=True)
    assert not {key for key in measured if "top_k" in key or "gap" in key}
    found = evaluate(model, data, **OPTIONS)
    report = router_report.router_report(found)
    assert found.routing_gap is report.surprisal_ratio is None
    lines = describe_evaluation(found, report).splitlines()
    assert lines[0].startswith("bytes of text")
    assert not [line for line in lines if "top-k" in line or "surprisal" in line]
    assert conclusion(found, report).endswith("none of the bytes through the deep blocks.")


def test_passage(found, read):
    """Every byte of text among the first 60, by document, against the oracle."""
    at = [p for p in np.flatnonzero(read.own) if p < 60]
    first, documents = DOCUMENTS[0].encode(), router_report.passage(found, 60)
    assert [bytes(r.byte for r in d) for d in documents] == [
        first,
        DOCUMENTS[1].encode()[: len(at) - len(first)],
    ]
    for p, record in zip(at, [r for d in documents for r in d], strict=True):
        row = read.logits[p - 1, 0]
        logprob = row[read.data[p]] - np.logaddexp.reduce(row)
        assert record.logprob == pytest.approx(logprob, abs=1e-4)
        assert record.router_weight == pytest.approx(1 / (1 + math.exp(-read.router[p])), abs=1e-5)
        assert record.router_decision == (read.router[p] > 0)


@pytest.mark.slow
def test_the_same_on_every_run_and_for_any_batch_size(found, data, model, monkeypatch):
    again = evaluate(model, data, **OPTIONS)
    assert again.as_dict() == found.as_dict()
    for name, array in found.figures.items():
        np.testing.assert_array_equal(again.figures[name], array)
    monkeypatch.setattr("pico_tg.evaluation.BATCH_POSITIONS", 1)
    one = evaluate(model, data, **OPTIONS)
    assert one.bits_per_byte == pytest.approx(found.bits_per_byte)
    assert (one.head_accuracy, one.router_rate) == (found.head_accuracy, found.router_rate)


def test_as_dict_is_json(found, report):
    values = json.loads(json.dumps(found.as_dict() | report.as_dict()))
    assert values["places"]["whitespace"]["rate"] == report.places["whitespace"].rate
    assert values["bits_per_byte"] == found.bits_per_byte


@pytest.mark.parametrize("total", [1, 40, 41, 55, 56, 57, 200])
@pytest.mark.parametrize("context", [1, 7, 16, 40])
def test_windows_score_every_position_once(total, context):
    """And each position has a whole context before it, or all bytes before it."""
    length = min(2 * context, total)
    windows = list(_windows(total, length, min(context, length)))
    assert [p for _, begin, end in windows for p in range(begin, end)] == list(range(total))
    for start, begin, end in windows:
        assert end <= start + length
        assert start == 0 or begin - start >= context


def test_more_routed_bytes_than_slots(read, model):
    """A batch that routes more than twice the capacity of a window is computed with more slots."""
    length = 2 * CONTEXT
    measure = CausalPass(model, length, TrainSettings(), ("nats", "decisions"))
    fits, exceeds = [], []
    for start, _, _ in _windows(len(read.data), length, CONTEXT):
        if len(window := read.data[start : start + length + 1]) == length + 1:
            found = measure(window[None], np.array([length]))
            routed = int(found["decisions"].sum())
            (fits if routed <= measure.slots else exceeds).append(routed)
            logits = model(Tensor(window[None, :-1]), causal=True)[0].numpy()[0, :, 0]
            expected = bits(logits, window[1:].astype(int)) * math.log(2)
            assert found["nats"].mean() == pytest.approx(expected, abs=1e-5)
    assert fits
    assert exceeds


def test_batches_of_several_sizes(read, model):
    """Each size has a graph of its own, also in the compile cache."""
    window = read.data[: CONTEXT + 1]
    for size in (1, 2):
        measure = CausalPass(model, CONTEXT, TrainSettings(), ("nats",))
        nats = measure(np.tile(window, (size, 1)), np.full(size, CONTEXT))["nats"]
        assert nats.shape == (size, CONTEXT)
        logits = model(Tensor(window[None, :-1]), causal=True)[0].numpy()[0, :, 0]
        expected = bits(logits, window[1:].astype(int)) * math.log(2)
        assert nats.mean(axis=1) == pytest.approx([expected] * size, abs=1e-5)


@pytest.mark.usefixtures("without_stored_graphs")
def test_routed_padding_takes_no_slots(model, monkeypatch):
    """A window that is mostly padding, all of which is routed, is computed with few slots."""
    monkeypatch.setattr(model, "decide", lambda x, z, causal=False: (x >= 0).contiguous())
    measure = CausalPass(model, 40, TrainSettings(), ("nats", "decisions"))
    measure.all_slots = None  # not callable
    assert measure(np.zeros((2, 41), np.uint8), np.array([measure.slots, 3]))["decisions"].all()
    with pytest.raises(TypeError):
        measure(np.zeros((2, 41), np.uint8), np.array([measure.slots + 1, 3]))


def test_other_parts(model, data, tmp_path):
    """A split, the whole data and a corpus; one byte of text is enough for a corpus."""
    whole = load_whole(data.spec, progress=False)
    train, everything, same = (
        evaluate(model, part, **OPTIONS, **options).data.tobytes()
        for part, options in (
            (data, {"split": "train"}),
            (data.spec, {"split": "all"}),
            (whole, {}),
        )
    )
    assert everything == same == train + bytes(data.validation.bytes)
    (tmp_path / "x.txt").write_text("x")
    found = evaluate(model, load_whole(DataSpec(str(tmp_path / "x.txt")), progress=False))
    assert found.bytes == 1


def test_bad_data(model, data, monkeypatch):
    with pytest.raises(PicoError, match="first 10 bytes of the validation data hold no byte"):
        evaluate(model, data, max_bytes=10)
    monkeypatch.setattr("pico_tg.evaluation.MAX_BATCH_BYTES", 2 * CONTEXT - 1)
    with pytest.raises(PicoError, match=r"window of 34 bytes .* smaller context_len"):
        evaluate(model, data, **OPTIONS)
