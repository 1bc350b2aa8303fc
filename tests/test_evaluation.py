"""Evaluation against the oracle and plain loops: windows, heads, drafts, the router."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from helpers import TINY as CONFIG
from oracle import forward
from tinygrad import Tensor, dtypes, nn

from pico_tg import evaluation
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
from pico_tg.tools.report import describe_evaluation

CONTEXT, STRIDE = 24, 16  # the held-out text below is 4 windows and a part of one
OPTIONS = {"context_len": CONTEXT, "stride": STRIDE, "batch_size": 2}
DOCUMENTS = ["the cat; sat", "on a mât, 1_2 €!\n\n And then a\tdog,", "ran\n"]


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "MIN_BLOCK", 4)  # the text is short
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
        start = max(0, (p - CONTEXT) // STRIDE * STRIDE)
        if start not in seen:
            x = text[None, start : start + CONTEXT + STRIDE]
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
    return evaluate(model, data, passage=60, **OPTIONS)


def bits(logits: np.ndarray, targets: np.ndarray) -> float:
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(targets)), targets]
    return nats.mean() / math.log(2)


def test_the_windows_are_those_of_the_test(read):
    assert len(read.data) > CONTEXT + 4 * STRIDE
    assert (len(read.data) - CONTEXT) % STRIDE != 0


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


@pytest.mark.parametrize("which", ["text", "greedy"])
def test_drafts(which, found, read):
    """Simulate a decoder: a pass produces one byte and the accepted drafts after it."""
    likeliest = read.logits.argmax(axis=2)  # (N, T)

    def accepted(p: int) -> int:
        count = 0
        for j in (1, 2):
            at = p + 1 + j
            if at >= len(read.data) or not read.own[at]:
                break
            real = read.data[at] if which == "text" else likeliest[at - 1, 0]
            if likeliest[p, j] != real:
                break
            count += 1
        return count

    starts = np.flatnonzero(read.own) - 1
    runs = np.array([accepted(p) for p in starts])
    shares = [(runs >= 1).mean(), (runs >= 2).mean()]
    assert getattr(found, f"drafts_right_{which}") == pytest.approx(shares)
    assert shares[0] > 0
    passes, byte, drafted = [], 0, []
    while byte < len(read.data):
        if read.own[byte]:
            passes.append(accepted(byte - 1))
            drafted += range(byte + 1, byte + 1 + passes[-1])
            byte += passes[-1]
        byte += 1
    assert getattr(found, f"accepted_{which}") == pytest.approx(np.mean(passes))
    if which == "text":
        own = np.flatnonzero(read.own)
        marked = [r.drafted for document in found.passage for r in document]
        assert marked == [p in drafted for p in own if p < 60]
        assert any(marked)


def test_router(found, read):
    routed = (read.router > 0) & read.own
    count = read.own.sum()
    assert found.router_rate == pytest.approx(routed.sum() / count)
    kinds = {name: [] for name in found.places}
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
        if before.isspace() and not byte.isspace():
            kinds["after_whitespace"].append(p)
        if before == b"\n":
            kinds["after_newline"].append(p)
        if byte == b" ":
            kinds["space"].append(p)
    for name, at in kinds.items():
        place = found.places[name]
        assert at, name
        assert place.share_of_bytes == pytest.approx(len(at) / count), name
        assert place.share_of_decisions == pytest.approx(routed[at].sum() / routed.sum()), name
        assert place.rate == pytest.approx(routed[at].mean()), name
        low, high = place.interval
        assert 0 <= low <= place.share_of_decisions <= high <= 1, name


def places_of(read) -> tuple[dict[str, list[int]], list[range]]:
    """The bytes of each place of a boundary, and the bytes within one byte of each boundary."""
    kinds = []  # of each byte: "w" of a word, " " whitespace, "." other text, "" a wrapper tag
    for byte, own in zip(read.data, read.own, strict=True):
        letter = bytes([byte])
        word = letter.isalnum() or letter == b"_" or byte > 127
        kinds.append(("w" if word else " " if letter.isspace() else ".") if own else "")
    kinds.append("")
    places = {"word_end": [], "space": [], "word_start": []}
    for p, (kind, after) in enumerate(itertools.pairwise(kinds)):
        before = kinds[p - 1] if p else ""
        if kind == "w" and after in (" ", ".") and after:
            places["word_end"].append(p)
        if kind == "w" and before != "w":
            places["word_start"].append(p)
        if kind == " " and after in ("w", ".") and after:
            places["space"].append(p)
    runs, p = [], 0
    while p < len(read.data):
        end = p
        while kinds[end] in (" ", ".") and kinds[end]:
            end += 1
        if end > p:
            runs.append(range(p - (p > 0 and kinds[p - 1] == "w"), end + (kinds[end] == "w")))
        p = max(end, p + 1)
    return places, runs


def test_boundaries(found, read):
    """Each place, against plain loops; random routing, against 2000 simulations at that rate."""
    routed = (read.router > 0) & read.own
    places, runs = places_of(read)
    near = sorted({p for run in runs for p in run})
    rng = np.random.default_rng(0)
    at_random = (rng.random((2000, len(routed))) < found.router_rate) & read.own
    assert found.boundaries.keys() == {*places, "near"}
    for name, boundary in found.boundaries.items():
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


def test_surprisal(found, read):
    """The mean over bytes after routed bytes, divided by the mean over all bytes after text."""
    at = np.flatnonzero(read.own[:-1] & read.own[1:])
    rows = read.logits[at, 0]
    nats = np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(at)), read.data[at + 1]]
    expected = nats[read.router[at] > 0].mean() / nats.mean()
    assert found.surprisal_ratio == pytest.approx(expected, rel=1e-5)
    low, high = found.surprisal_interval
    assert low <= found.surprisal_ratio <= high


def test_a_confidence_interval():
    """95 % of the intervals of a share hold the true share; bytes in blocks widen the interval."""
    rng = np.random.default_rng(1)
    whole, inside, widths = np.ones(12_800), 0, []
    for _ in range(100):
        low, high = evaluation._interval(np.divide, rng.random(len(whole)) < 0.3, whole)
        inside += low <= 0.3 <= high
        widths.append(high - low)
    assert 88 <= inside <= 99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 12_800), rel=0.1)
    clumped = np.repeat(rng.random(200) < 0.3, 64)
    low, high = evaluation._interval(np.divide, clumped, whole)
    assert high - low > 4 * np.mean(widths)
    assert evaluation._interval(np.divide, 0 * whole, 0 * whole) is None  # undefined
    few = evaluation.MIN_BLOCKS * evaluation.MIN_BLOCK
    assert evaluation._interval(np.divide, clumped[:few], whole[:few])
    assert evaluation._interval(np.divide, clumped[: few - 1], whole[: few - 1]) is None


def test_the_gap_is_that_of_validation(found, data, model):
    settings = TrainSettings(context_len=CONTEXT, batch_size=2, validation_bytes=10**6)
    measured = Validation(model, data.validation, settings)()
    assert found.routing_gap == pytest.approx(measured["validation_routing_gap"], abs=1e-6)
    assert found.routing_gap != 0


def test_a_rule_has_no_top_k_and_no_routed_byte_no_surprisal(data):
    model = Pico(dataclasses.replace(CONFIG, router="none"), seed=0)
    settings = TrainSettings(context_len=CONTEXT, batch_size=2, validation_bytes=10**6)
    assert not [key for key in Validation(model, data.validation, settings)() if "top_k" in key]
    found = evaluate(model, data, **OPTIONS)
    assert found.routing_gap is found.surprisal_ratio is found.surprisal_interval is None
    lines = describe_evaluation(found).splitlines()
    for name in (
        "causal routing minus top-k, bits per byte",
        "surprisal after routed bytes / mean",
    ):
        assert [line.split()[-1] for line in lines if line.startswith(name)] == ["-"]


def test_passage(found, read):
    """Every byte of text among the first 60, by document, against the oracle."""
    at = [p for p in np.flatnonzero(read.own) if p < 60]
    first = DOCUMENTS[0].encode()
    assert [bytes(r.byte for r in d) for d in found.passage] == [
        first,
        DOCUMENTS[1].encode()[: len(at) - len(first)],
    ]
    for p, record in zip(at, [r for d in found.passage for r in d], strict=True):
        row = read.logits[p - 1, 0]
        logprob = row[read.data[p]] - np.logaddexp.reduce(row)
        assert record.logprob == pytest.approx(logprob, abs=1e-4)
        assert record.router_weight == pytest.approx(1 / (1 + math.exp(-read.router[p])), abs=1e-5)
        assert record.router_decision == (read.router[p] > 0)


@pytest.mark.slow
def test_the_same_on_every_run_and_for_any_batch_size(found, data, model):
    assert evaluate(model, data, passage=60, **OPTIONS) == found
    one = evaluate(model, data, passage=60, **OPTIONS | {"batch_size": 1})
    assert one.bits_per_byte == pytest.approx(found.bits_per_byte)
    assert (one.head_accuracy, one.router_rate) == (found.head_accuracy, found.router_rate)


def test_as_dict_is_json(found):
    values = json.loads(json.dumps(found.as_dict()))
    assert values["places"]["whitespace"]["rate"] == found.places["whitespace"].rate
    assert "passage" not in values


@pytest.mark.parametrize("total", [1, 40, 41, 55, 56, 57, 200])
@pytest.mark.parametrize("stride", [1, 7, 16, 40])
def test_windows_score_every_position_once(total, stride):
    """And each position has a whole context before it, or all bytes before it."""
    length = min(24 + stride, total)
    windows = list(_windows(total, length, min(stride, length)))
    assert [p for _, begin, end in windows for p in range(begin, end)] == list(range(total))
    for start, begin, end in windows:
        assert end <= start + length
        assert start == 0 or begin - start >= 24


def test_slots(read, data, model):
    """The windows of the first batch fit twice the capacity, one of the second does not."""
    length = CONTEXT + STRIDE
    slots = CausalPass(model, length, TrainSettings()).slots
    named = {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}
    routed = []
    for start, _, _ in _windows(len(read.data), length, STRIDE):
        x = read.data[None, start : start + length]
        routed.append(int(forward(named, CONFIG, x, causal=True)[2].sum()))
    assert max(routed[:2]) <= slots < max(routed[2:4])


class Decided(CausalPass):
    """Returns the number of slots of the pass."""

    def _graph(self, count, windows, flags):
        decisions = windows[:, :-1].cast(dtypes.bool)
        return Tensor([count]), (decisions & flags.cast(dtypes.bool)).sum(axis=1).max()


def test_routed_padding_takes_no_slots(model):
    """Bytes after the end of the text may be routed as well, and need no slot."""
    decisions = np.zeros((2, 41), np.uint8)
    decisions[0, :20] = decisions[1, 5:35] = 1
    measure = Decided(model, 40, TrainSettings())
    assert measure.slots == 20
    for length, slots in ((25, 20), (26, 40)):
        real = np.arange(40) < np.array([[40], [length]])
        assert measure.run(decisions, real.astype(np.uint8))[0] == [slots]


def test_other_parts(model, data, tmp_path, monkeypatch):
    """A split, the whole data and a corpus; one byte of text is enough for a corpus."""
    measured = []

    def kept(corpus, *rest):
        measured.append(bytes(corpus.bytes))
        raise InterruptedError

    monkeypatch.setattr(evaluation, "_Measured", kept)
    whole = load_whole(data.spec, progress=False)
    for part, options in ((data, {"split": "train"}), (data.spec, {"split": "all"}), (whole, {})):
        with pytest.raises(InterruptedError):
            evaluate(model, part, **OPTIONS, **options)
    train, everything, same = measured
    assert everything == same == train + bytes(data.validation.bytes)
    (tmp_path / "x.txt").write_text("x")
    whole = load_whole(DataSpec(str(tmp_path / "x.txt")), progress=False)
    assert bytes(whole.bytes) == b"<pico:seq>x</pico:seq>"


def test_bad_data(model, data, monkeypatch):
    with pytest.raises(PicoError, match="first 10 bytes of the validation data hold no byte"):
        evaluate(model, data, max_bytes=10)
    monkeypatch.setattr(evaluation, "MAX_BATCH_BYTES", 2 * CONTEXT)
    with pytest.raises(PicoError, match=r"2 windows of 40 bytes .* smaller context_len"):
        evaluate(model, data, **OPTIONS)
