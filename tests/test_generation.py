"""Sampling, exact speculation, ends of a text, and who may use a decoder."""

import itertools
import math
import threading
import tracemalloc
from collections import Counter

import numpy as np
import oracle
import pytest
from helpers import TINY, WINDOWS, AllDrafts
from tinygrad import GlobalCounters, nn

from pico_tg import PicoError, Stats, generation, score, train
from pico_tg.backend.runtime import write_into
from pico_tg.config import Config
from pico_tg.data import SEQ_END, SEQ_START
from pico_tg.decoder import Decoder
from pico_tg.generation import DraftPolicy, Sampler, generate
from pico_tg.model import Pico


def text_of(records) -> bytes:
    return bytes(record.byte for record in records)


# --- the sampler ---

LOGITS = np.log(np.arange(1, 257, dtype=np.float64))  # byte b has probability (b + 1) / 32896


def test_temperature():
    np.testing.assert_allclose(Sampler(1).distribution(LOGITS), np.arange(1, 257) / 32896)
    squared = np.arange(1, 257.0) ** 2
    np.testing.assert_allclose(Sampler(0.5).distribution(LOGITS), squared / squared.sum())
    assert Sampler(0).distribution(LOGITS).argmax() == 255
    assert Sampler(1e-6).distribution(LOGITS * 1e6)[255] == 1  # no overflow
    assert Sampler(1e-320).distribution(LOGITS)[255] == 1


def test_filters():
    whole = np.arange(1, 257) / 32896
    top = Sampler(1, top_k=3).distribution(LOGITS)
    np.testing.assert_allclose(top[253:], whole[253:] / whole[253:].sum())
    assert not top[:253].any()
    # 256 + 255 + 254 of 32896 is just above 0.02325
    assert np.count_nonzero(Sampler(1, top_p=0.0232).distribution(LOGITS)) == 3
    assert np.count_nonzero(Sampler(1, top_p=0.0233).distribution(LOGITS)) == 4
    assert np.count_nonzero(Sampler(1, top_p=1e-9).distribution(LOGITS)) == 1
    half = Sampler(1, min_p=0.499).distribution(LOGITS)
    np.testing.assert_allclose(half[127:], whole[127:] / whole[127:].sum())
    assert not half[:127].any()
    # top_p applies after top_k: half of the mass of four bytes is two of them
    assert np.count_nonzero(Sampler(1, top_k=4, top_p=0.5).distribution(LOGITS)) == 2
    flat = Sampler(top_k=5).distribution(np.zeros(256))  # of equally likely bytes the smaller
    np.testing.assert_array_equal(np.flatnonzero(flat), range(5))
    for sampler in (Sampler(1, 300), Sampler(1, 256), Sampler(1, min_p=0.0)):
        np.testing.assert_array_equal(sampler.distribution(LOGITS), Sampler(1).distribution(LOGITS))


def test_samples_are_distributed_as_the_distribution():
    rng = np.random.default_rng(0)
    sampler = Sampler(top_k=3)
    drawn = Counter(sampler(LOGITS, rng)[0] for _ in range(3000))
    assert drawn.keys() == {253, 254, 255}
    assert all(abs(count - 1000) < 130 for count in drawn.values())  # five deviations


def test_a_raw_prompt_of_nothing():
    with pytest.raises(PicoError, match="raw prompt must hold"):
        generate(None, b"", raw_prompt=True)


# --- drafts, with a decoder whose text is known ---


class Scripted:
    """Stands in for a Decoder: whatever it is fed, the next byte of the script is certain.

    `right(position)`: whether a draft for that position is right.
    """

    def __init__(self, script: bytes, drafts: int = 0, right=lambda position: True) -> None:
        self.script, self.drafts, self.right = script, drafts, right
        self.rows: list[int] = []  # of each pass, the prompt's left out
        self.changes, self.model = 0, Heads

    def reset(self, use_latent: bool) -> None:
        self.position = None  # before the prompt

    def passes(self, prompt: bytes):
        self.position = -len(prompt)
        for start in range(0, len(prompt), 8):
            piece = prompt[start : start + 8]
            yield piece, *self._logits(piece)

    def forward(self, data: bytes):
        self.rows.append(len(data))
        return self._logits(data)

    def _logits(self, data: bytes):
        rows = len(data)
        logits = np.full((rows, 1 + self.drafts, 256), -1e4, np.float32)
        for row, head in itertools.product(range(rows), range(1 + self.drafts)):
            at = self.position + 1 + row + head
            byte = self.script[min(at, len(self.script) - 1) % len(self.script)]
            wrong = head > 0 and not self.right(at)
            logits[row, head, byte ^ 1 if wrong else byte] = 0
        self.position += rows
        self.last_decisions = np.zeros(rows, bool)
        return logits, np.zeros(rows, np.float32)

    def rollback(self, count: int) -> None:
        self.position -= count


class Heads:
    """Stands in for a model with 8 heads."""

    config = Config(**(vars(TINY) | {"next_tokens": 8}))


SCRIPT = bytes(range(32, 127)) * 4


def test_ends_at_the_end_tag():
    script = b"a <b></pico" + SEQ_END + b"more"
    options = {"max_bytes": len(script), "decoder": Scripted(script)}
    assert text_of(generate(Heads, **options)) == b"a <b></pico"
    assert text_of(generate(Heads, ignore_end=True, **options)) == script


@pytest.mark.parametrize("script", [b"a</pico:se", b"</pico:sex"])
def test_a_tag_that_does_not_end_is_text(script):
    assert text_of(generate(Heads, max_bytes=10, decoder=Scripted(script))) == script


@pytest.mark.parametrize(
    ("prompt", "script", "text"),
    [
        (b"end</pico:", b"seq>more", b""),
        ("end</pico:seq", b">", b""),
        (b"end<", b"/pico:sex", b"/pico:sex"),
        (b"end</pico:", b"</pico:seq>", b""),
        (b"</pico:seq>", b"</pico:", b"</pico:"),
        (b"a < b", SEQ_END, b""),
    ],
)
def test_the_prompt_may_begin_the_end_tag(prompt, script, text):
    options = {"max_bytes": len(script)}
    assert text_of(generate(Heads, prompt, decoder=Scripted(script), **options)) == text
    options["ignore_end"] = True
    assert text_of(generate(Heads, prompt, decoder=Scripted(script), **options)) == script


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("END", "one two "),
        (b"END", "one two "),
        (["absent", "END", b"th"], "one two "),
        ("one", ""),
        ((" two END", "two"), "one "),  # the first that is complete
        (("two", "one two"), ""),  # of two that are complete at the same byte, the longer one
        ("ooé", "one two END tooo"),  # after a false start, and across the bytes of a character
        ("ééé", "one two END toooooé."),
        ("one two END no", "one two END toooooé.ééé."),
        ("longer than the text" * 9, "one two END toooooé.ééé."),
        ([], "one two END toooooé.ééé."),
    ],
)
@pytest.mark.parametrize("speculative", [True, False])
def test_stops(stop, text, speculative):
    decoder = Scripted("one two END toooooé.ééé.".encode() + SEQ_END, drafts=7)
    options = {"max_bytes": 99, "speculative": speculative, "decoder": decoder}
    assert text_of(generate(Heads, "END", stop=stop, **options)).decode() == text


@pytest.mark.parametrize(
    ("script", "length"),
    [
        ("a" * 900 + ". More. End", 901),
        ("a" * 799 + ". b? More", 800),
        ("a" * 798 + ". b? More", 802),  # a sentence that ends before 800 bytes does not count
        ("a" * 800 + " 3.14\n\nis pi.) More.", 814),
        ("“" + "a" * 900 + "!”\nMore.", 907),
        ("a" * 2000, 1024),
        ("a. " * 99 + "</pico:seq>", 297),
    ],
)
def test_the_text_ends_with_a_sentence(script, length):
    """Where max_bytes is not given; the script is written as long as it lasts."""
    data, decoder = script.encode(), Scripted(script.encode(), drafts=7)
    assert text_of(generate(Heads, decoder=decoder)) == data[:length]
    assert text_of(generate(Heads, max_bytes=290, decoder=decoder)) == data[:290]


def test_what_may_begin_a_stop_is_held_back():
    """Every byte comes as soon as it is known to be text."""
    decoder = Scripted(b"a--b---c")
    records = generate(Heads, stop=["---"], max_bytes=8, speculative=False, decoder=decoder)
    passes = [(chr(record.byte), len(decoder.rows)) for record in records]
    assert passes == [("a", 1), ("-", 4), ("-", 4), ("b", 4)]


def test_each_sample_has_stops_of_its_own(model, decoder):
    options = {"max_bytes": 30, "num_samples": 3, "seed": 1, "ignore_end": True}
    whole = list(generate(model, "a", decoder=decoder, **options))
    cut = list(generate(model, "a", decoder=decoder, stop="b", **options))
    for n in range(3):
        full, short = (text_of(r for r in records if r.sample == n) for records in (whole, cut))
        assert b"b" in full
        assert short == full.split(b"b")[0]


def test_a_prompt_is_a_str_or_bytes(model, decoder):
    options = {"max_bytes": 5, "seed": 1, "decoder": decoder}
    as_text = list(generate(model, "é", **options))
    assert as_text == list(generate(model, "é".encode(), **options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 5}, "the prompt must be a str or bytes, not int"),
        ({"prompt": None}, "the prompt must be a str or bytes, not NoneType"),
        ({"prompt": ["a"]}, "the prompt must be a str or bytes, not list"),
        ({"prompt": "\udcff"}, "the prompt has no UTF-8"),
        ({"stop": ""}, "stop is empty"),
        ({"stop": ["a", b""]}, "stop is empty"),
        ({"stop": 3}, "stop must be a str or bytes, not int"),
        ({"stop": ["a", None]}, "stop must be a str or bytes, not NoneType"),
        ({"filters": 3}, "filters must be functions"),
        ({"filters": ["a"]}, "filters must be functions"),
        ({"stops": "a"}, "unknown setting stops"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(arguments, message):
    with pytest.raises(PicoError, match=f"^{message}") as caught:
        generate(Heads, decoder=Scripted(b"a"), **arguments)
    assert "\n" not in str(caught.value)


def without(byte: str):
    def keep(p: np.ndarray) -> np.ndarray:
        p = p.copy()
        p[ord(byte)] = 0
        return p

    return keep


@pytest.mark.parametrize("temperature", [0, 1])
def test_filters_of_the_caller(temperature, model, decoder):
    options = {"max_bytes": 60, "temperature": temperature, "seed": 3, "decoder": decoder}
    assert b"a" in text_of(generate(model, "x", **options))
    found = list(generate(model, "x", filters=without("a"), **options))
    assert len(found) == 60
    assert not {*text_of(found)} & {*b"a"}
    both = text_of(generate(model, "x", filters=[without("a"), without("b")], **options))
    assert not {*both} & {*b"ab"}
    decoder.reset()
    row = decoder.forward(SEQ_START + b"x")[0][-1, 0]
    expected = Sampler(1).distribution(row)
    if temperature:
        expected /= 1 - expected[ord("a")]
    assert math.exp(found[0].logprob) == pytest.approx(expected[found[0].byte], rel=1e-4)


@pytest.mark.parametrize(
    "result", [None, np.zeros(256), -np.ones(256), np.ones(3), [math.nan] * 256]
)
def test_a_filter_that_returns_no_probabilities(result):
    records = generate(Heads, filters=lambda p: result, decoder=Scripted(b"a"))
    with pytest.raises(PicoError, match=r"^a filter must return 256 numbers"):
        list(records)


def choices(seconds: dict[int, float], accepted: int, policy=None, rounds=0) -> Counter:
    """How often a policy chooses each number of drafts, in rounds of these times.

    Of the drafts, the first `accepted` are right. A new policy has 10 periods after its tries, and
    the first round of each number takes a second longer.
    """
    fresh = policy is None
    policy = policy or DraftPolicy(list(seconds))
    rounds = rounds or (len(seconds) - 1) * policy.TRIES + 11 * policy.PERIOD
    counts = Counter()
    for _ in range(rounds):
        number = policy.number()
        policy.took(number, seconds[number] + (fresh and not counts[number]))
        policy.read(number, min(number, accepted))
        counts[number] += 1
    return counts


@pytest.mark.parametrize(
    ("seconds", "accepted", "best"),
    [
        ({0: 1e-3, 1: 1.1e-3, 3: 1.2e-3, 7: 1.3e-3}, 0, 0),
        ({0: 1e-3, 1: 1.1e-3, 3: 1.2e-3, 7: 1.3e-3}, 7, 7),
        ({0: 1e-3, 1: 1.1e-3, 3: 1.2e-3, 7: 2.5e-3}, 7, 3),  # 8 rows are expensive
        ({0: 1e-3, 1: 1.1e-3, 3: 1.2e-3, 7: 1.3e-3}, 1, 1),
        ({0: 1e-3, 1: 2.1e-3, 3: 4.1e-3, 7: 8.1e-3}, 7, 0),  # drafts do not pay
        ({0: 1e-3, 1: 2.1e-3, 3: 3.9e-3, 7: 8.1e-3}, 7, 0),  # nor by so little
        ({0: 1e-3, 1: 2.1e-3, 3: 3.6e-3, 7: 8.1e-3}, 7, 3),
    ],
)
def test_the_number_of_drafts_follows_the_clock(seconds, accepted, best):
    """64 rounds without drafts, nine tries of each number; then of 64 rounds one is a try."""
    expected = Counter({0: 64 + 3, 1: 9 + 3, 3: 9 + 2, 7: 9 + 2})
    expected[best] += 10 * 63
    assert choices(seconds, accepted) == expected


def test_the_number_of_drafts_follows_a_change():
    """A try shows a new time or text, the average follows it within a few periods."""
    policy = DraftPolicy([0, 3])
    slow, quick = {0: 1e-3, 3: 5e-3}, {0: 1e-3, 3: 1.5e-3}
    assert choices(slow, 3, policy, 9 + 3 * 64) == {0: 3 * 64 - 1, 3: 9 + 1}
    found = choices(quick, 3, policy, 40 * 64)
    assert found[3] > 20 * 63
    assert choices(quick, 3, policy, 64)[3] >= 63
    choices(slow, 3, policy, 2 * 64)  # every round shows the new time
    assert choices(slow, 3, policy, 64)[0] >= 63
    choices(quick, 3, policy, 40 * 64)
    choices(quick, 0, policy, 2 * 64)
    assert choices(quick, 0, policy, 64)[0] >= 63


def test_an_interruption_does_not_decide():
    """One round that takes a thousand times as long, as when another process computes."""
    policy, seconds = DraftPolicy([0, 3]), {0: 1e-3, 3: 1.5e-3}
    choices(seconds, 3, policy, 64 + 9)
    policy.took(3, 1.5)
    assert choices(seconds, 3, policy, 10 * 64)[3] >= 10 * 63


@pytest.mark.parametrize("heads", [4, 5, 16])
def test_drafts_that_are_always_right(heads, monkeypatch):
    """A pass takes in as many rows as there are, 4, and all of them stay."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    decoder, stats = Scripted(SCRIPT, heads - 1), Stats()
    decoder.model = model = type(
        "Heads", (), {"config": Config(**(vars(TINY) | {"next_tokens": heads}))}
    )
    records = list(generate(model, max_bytes=301, decoder=decoder, stats=stats))
    assert text_of(records) == SCRIPT[:301]
    assert decoder.rows == [4] * 75 + [1]
    assert stats.drafts == stats.accepted == sum(record.drafted for record in records) == 225
    assert stats.bytes == stats.passes + stats.accepted == 301


def test_drafts_that_are_never_right(monkeypatch):
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    decoder, stats = Scripted(SCRIPT, 7, lambda at: False), Stats()
    assert text_of(generate(Heads, max_bytes=200, decoder=decoder, stats=stats)) == SCRIPT[:200]
    assert stats.accepted == 0
    assert stats.passes == 200
    assert stats.drafts == 197 * 3 + 2 + 1


def test_drafts_that_are_sometimes_right(monkeypatch):
    """Every third is wrong: three bytes a pass, once the pass begins after a wrong one."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    decoder, stats = Scripted(SCRIPT, 7, lambda at: at % 3 != 0), Stats()
    records = list(generate(Heads, max_bytes=240, decoder=decoder, stats=stats))
    assert text_of(records) == SCRIPT[:240]
    assert sum(record.drafted for record in records) == stats.accepted == 160
    assert stats.passes == 80


def test_drafts_by_the_clock_change_no_byte():
    """Tries and choices alike, whatever the passes take here."""
    for right in (lambda at: True, lambda at: at % 3 != 0, lambda at: False):
        decoder, stats = Scripted(SCRIPT, 7, right), Stats()
        assert text_of(generate(Heads, max_bytes=300, decoder=decoder, stats=stats)) == SCRIPT[:300]
        assert decoder.rows[:64] == [1] * 64
        assert decoder.rows[64:73] == [4] * 9


def test_no_speculation():
    decoder = Scripted(SCRIPT, 7)
    records = generate(Heads, max_bytes=50, decoder=decoder, speculative=False)
    assert text_of(records) == SCRIPT[:50]
    assert set(decoder.rows) == {1}


# --- a real model ---


@pytest.fixture(scope="module")
def model() -> Pico:
    """Random weights, and a bias of all heads towards four bytes: many drafts are right."""
    model = Pico(TINY, seed=4)
    bias = np.zeros((TINY.next_tokens, 256), np.float32)
    bias[:, np.frombuffer(b"abcd", np.uint8)] = [13.5, 13, 13, 13]
    write_into(model.unembedding.bias, bias.reshape(-1))
    return model


@pytest.fixture(scope="module")
def weights(model) -> oracle.Weights:
    return {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    """One decoder for all tests: each of its graphs is compiled once."""
    return Decoder(model)


def test_greedy_is_the_likeliest_byte_of_a_full_pass(model, weights, decoder):
    prompt = b"once upon"
    sample = list(generate(model, prompt, max_bytes=4, temperature=0, decoder=decoder))
    context = np.frombuffer(SEQ_START + prompt + text_of(sample), np.uint8)
    logits, z, _ = oracle.forward(weights, TINY, context[None], causal=True)
    expected = np.argmax(logits[0, -len(sample) - 1 : -1, 0], axis=-1)
    assert [r.byte for r in sample] == expected.tolist()
    z = z[0, -len(sample) :]
    np.testing.assert_allclose([r.router_weight for r in sample], 1 / (1 + np.exp(-z)), atol=1e-5)
    assert [r.router_decision for r in sample] == list(z > 0)
    for record, row in zip(sample, logits[0, -len(sample) - 1 : -1, 0], strict=True):
        expected = Sampler(1).distribution(row)[record.byte]  # the model's own probability
        assert expected < 0.9
        assert math.exp(record.logprob) == pytest.approx(expected, rel=1e-3)
    assert list(generate(model, prompt, max_bytes=4, top_k=1, decoder=decoder)) == sample


def test_prompts_of_every_length_about_the_windows(model, weights, decoder):
    """The first byte is drawn from the distribution of a full pass over the prompt."""
    text = np.random.default_rng(0).integers(0, 256, 130, np.uint8).tobytes()
    for length in (1, 2, 5, 6, 7, 8, 9, 10, 11, 64, 129):
        prompt = text[:length]
        options = {"raw_prompt": True, "decoder": decoder, "seed": 1}
        (record,) = generate(model, prompt, max_bytes=1, **options)
        x = np.frombuffer(prompt, np.uint8)[None]
        logits = oracle.forward(weights, TINY, x, causal=True)[0][0, -1, 0]
        expected = Sampler().distribution(logits)[record.byte]
        assert np.exp(record.logprob) == pytest.approx(expected, rel=1e-3)


def test_a_decoder_of_another_model_is_refused(model, decoder):
    """It would write that model's text."""
    other = Pico(TINY, seed=9)
    for use in (generate, score):
        with pytest.raises(PicoError, match="decoder is of another model"):
            use(other, b"a", decoder=decoder)


def test_the_seed_decides(model, decoder):
    def sample(seed):
        return text_of(generate(model, b"a", max_bytes=20, seed=seed, decoder=decoder))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_samples_share_a_prompt(model, decoder):
    """Each has random numbers of its own; the first is the only sample of the same seed."""
    options = {"max_bytes": 20, "seed": 4, "ignore_end": True, "decoder": decoder}
    records = list(generate(model, b"once", num_samples=3, **options))
    samples = [text_of(r for r in records if r.sample == n) for n in range(3)]
    assert [len(sample) for sample in samples] == [20] * 3
    assert len(set(samples)) == 3
    assert text_of(generate(model, b"once", **options)) == samples[0]


def test_a_decoder_serves_again(model, decoder, monkeypatch):
    """Whatever it was used for before, with the same text and without allocating anew."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)

    def sample(**options):
        options = {"max_bytes": 80, "seed": 6, "ignore_end": True} | options
        return list(generate(model, b"once", **options))

    first = sample()
    for _ in range(3):  # a graph is captured at its first use, and replayed from the second on
        shallow = sample(decoder=decoder, latent=False)
        sample(decoder=decoder)
    assert not any(record.router_decision for record in shallow)
    before = GlobalCounters.mem_used
    assert sample(decoder=decoder) == first
    assert GlobalCounters.mem_used == before


def test_memory_of_a_long_prompt(model, decoder):
    """The logits of all its bytes would take 24 MB."""
    prompt, options = b"some text " * 800, {"max_bytes": 3, "seed": 1, "decoder": decoder}
    expected = list(generate(model, prompt, **options))
    tracemalloc.start()
    try:
        assert list(generate(model, prompt, **options)) == expected
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_no_bytes_wanted(model, decoder):
    assert list(generate(model, b"a", max_bytes=0, decoder=decoder)) == []


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_speculation_changes_no_byte(options, model, decoder, monkeypatch):
    """The same random numbers are spent on the same bytes, however many a pass takes in."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    found = {}
    for speculative in (True, False):
        options = options | {"speculative": speculative, "decoder": decoder}
        found[speculative] = list(generate(model, b"abc", max_bytes=120, seed=5, **options))
    assert text_of(found[True]) == text_of(found[False])
    assert [r.router_decision for r in found[True]] == [r.router_decision for r in found[False]]
    for name in ("router_weight", "logprob"):
        a, b = ([getattr(r, name) for r in found[kind]] for kind in (True, False))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
    drafted = sum(r.drafted for r in found[True])
    assert 10 < drafted < 110
    assert not any(r.drafted for r in found[False])


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_three_bytes_are_distributed_as_enumerated(options, model, decoder, monkeypatch):
    """Pearson's chi-squared, against the product of byte-by-byte distributions."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    sampler = Sampler(**options)

    def enumerate_texts(text: bytes, chance: float) -> dict[bytes, float]:
        if len(text) == 3:
            return {text: chance}
        decoder.reset()
        logits = decoder.forward(SEQ_START + b"bad " + text)[0][-1, 0]
        found = {}
        for byte, p in enumerate(sampler.distribution(logits)):
            if chance * p >= 1e-4:
                found |= enumerate_texts(text + bytes([byte]), chance * p)
        return found

    decoder.reset(use_latent=True)
    expected = enumerate_texts(b"", 1.0)
    samples = 1200
    records = generate(
        model, b"bad ", max_bytes=3, num_samples=samples, seed=11, ignore_end=True,
        decoder=decoder, **options,
    )  # fmt: skip
    groups = itertools.groupby(records, key=lambda record: record.sample)
    counts = Counter(text_of(group) for _, group in groups)
    assert counts.total() == samples
    frequent = {text: p for text, p in expected.items() if p * samples >= 5}
    assert len(frequent) > 3
    statistic = sum((counts[t] - samples * p) ** 2 / (samples * p) for t, p in frequent.items())
    rest = 1 - sum(frequent.values())
    others = samples - sum(counts[t] for t in frequent)
    if rest * samples >= 5:
        statistic += (others - samples * rest) ** 2 / (samples * rest)
    # mean k and variance 2k: five deviations are one chance in a million or less
    freedom = len(frequent)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [3.3e38, float("nan")])
def test_logits_that_are_not_finite(value, temperature, decoder):
    """Finite weights may give infinite logits. The first byte and a later one are both checked."""
    weight = decoder.packed.unembedding.weight.numpy()
    try:
        records = generate(
            decoder.model, b"a", max_bytes=9, temperature=temperature, decoder=decoder
        )
        next(records)
        write_into(decoder.packed.unembedding.weight, np.full_like(weight, value))
        with pytest.raises(PicoError, match=r"^the model's logits are not finite"):
            list(records)
        with pytest.raises(PicoError, match=r"^the model's logits are not finite"):
            list(generate(decoder.model, b"a", temperature=temperature, decoder=decoder))
    finally:
        write_into(decoder.packed.unembedding.weight, weight)


# --- several users of one model or one decoder ---


@pytest.mark.parametrize("speculative", [True, False])
def test_a_decoder_serves_one_generator_at_a_time(speculative, model, decoder):
    options = {"max_bytes": 40, "seed": 1, "ignore_end": True, "speculative": speculative}
    expected = text_of(generate(model, b"a", decoder=decoder, **options))
    first = generate(model, b"b", decoder=decoder, **options)
    next(first)
    second = generate(model, b"a", decoder=decoder, **options)
    found = [next(second)]
    with pytest.raises(PicoError, match="a decoder of its own"):
        list(first)
    found += second  # the error of the first does the second no harm
    assert text_of(found) == expected
    # nor does the end of a generator that has all its bytes, or is closed
    last = generate(model, b"b", decoder=decoder, **(options | {"max_bytes": 1}))
    closed = generate(model, b"b", decoder=decoder, **options)
    next(last), next(closed)
    third = generate(model, b"a", decoder=decoder, **options)
    found = [next(third)]
    assert list(last) == []
    closed.close()
    assert text_of([*found, *third]) == expected
    # other uses of the decoder are noticed as well
    fourth = generate(model, b"a", decoder=decoder, **options)
    next(fourth)
    decoder.forward(b"x")
    with pytest.raises(PicoError, match="a decoder of its own"):
        list(fourth)


def in_threads(*functions):
    """The results of functions that run at the same time, each in a thread of its own."""
    results = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def work(i: int) -> None:
        barrier.wait()
        results[i] = functions[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_threads(model):
    """Two decoders, made and used at the same time, give the texts that they give alone."""

    def sample(seed: int):
        options = {"max_bytes": 100, "seed": seed, "ignore_end": True}
        return lambda: text_of(generate(model, b"once", **options))

    expected = [sample(seed)() for seed in (1, 2)]
    assert in_threads(sample(1), sample(2)) == expected


@pytest.mark.slow
def test_training_and_generating_at_the_same_time(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words to train on, " * 100)

    def losses():
        settings = WINDOWS | {"max_steps": 4, "warmup_steps": 1, "optimizer": "adamw"}
        return [
            record["loss"]
            for record in train(Pico(TINY, seed=1), str(path), settings="published", **settings)
        ]

    def sample():
        options = {"max_bytes": 200, "seed": 1, "ignore_end": True}
        return text_of(generate(model, b"once", **options))

    expected = [losses(), sample()]
    assert in_threads(losses, sample) == expected
