"""Cached decoding against the oracle and against recomputation; sampling and its ends."""

import itertools
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import oracle
import pytest
from helpers import TINY, WINDOWS
from tinygrad import Device, GlobalCounters, Tensor, nn

from pico_tg import PicoError, Stats, kv_cache, train
from pico_tg.attention import alibi_slopes
from pico_tg.config import Config
from pico_tg.data import SEQ_END, SEQ_START
from pico_tg.decoder import PREFILL_CHUNK, Decoder
from pico_tg.generation import Sampler, generate
from pico_tg.model import Pico
from pico_tg.runtime import has_cpu_kernels

CONFIG = Config(
    dim=18,
    next_tokens=2,
    att_q_heads=4,
    att_kv_heads=2,
    fb_num_blocks=1,
    fb_att_window_size=3,
    latent_capacity_factor=0.5,
    latent_num_blocks=1,
    latent_att_window_size=5,
)


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(CONFIG, seed=7)


@pytest.fixture(scope="module")
def weights(model) -> oracle.Weights:
    return {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}


@pytest.fixture(scope="module")
def text() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 330, np.uint8).tobytes()


def test_rings_wrap_around(model, weights, text, monkeypatch):
    """Three times round the ring of 96 slots, by pieces of every kind, whole chunks among them."""
    monkeypatch.setattr(sys.modules["pico_tg.decoder"], "MIN_PREFILL", PREFILL_CHUNK)
    decoder = Decoder(model)
    pieces = [
        text[a:b] for a, b in itertools.pairwise([0, 1, 2, 66, 67, 130, 131, 200, 203, 209, 330])
    ]
    assert len(text) > 3 * decoder.before[0].ring.slots
    found = np.concatenate([decoder.forward(piece)[0] for piece in pieces])
    np.testing.assert_allclose(found, oracle.decode(weights, CONFIG, text), rtol=0, atol=2e-4)
    assert decoder.position == len(text)
    assert 0 < decoder.selected < len(text)


@pytest.mark.parametrize("rejected", [1, 5, PREFILL_CHUNK])
def test_setting_the_position_back_forgets(rejected, model, text, monkeypatch):
    monkeypatch.setattr(sys.modules["pico_tg.decoder"], "MIN_PREFILL", PREFILL_CHUNK)
    plain, undone = Decoder(model), Decoder(model)
    for decoder in (plain, undone):
        decoder.forward(text[:150])
    undone.forward(text[-rejected:])
    undone.rollback(rejected)
    for piece in (text[150:151], text[151:190]):
        for ours, theirs in zip(undone.forward(piece), plain.forward(piece), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_memory_does_not_grow(model, text):
    decoder = Decoder(model)
    for _ in range(3):
        decoder.forward(text[:1])
        decoder.forward(text)
    before = GlobalCounters.mem_used
    for _ in range(5):
        decoder.forward(text)
    assert GlobalCounters.mem_used == before


@pytest.fixture(scope="module")
def shared(model) -> Decoder:
    """A decoder of the model that has compiled what it needs, for `generate` to use."""
    return Decoder(model)


def test_greedy_is_the_likeliest_byte_of_a_full_pass(model, weights, shared):
    prompt = b"once upon"
    sample = list(generate(model, prompt, max_bytes=4, temperature=0, decoder=shared))
    context = np.frombuffer(SEQ_START + prompt + bytes(r.byte for r in sample), np.uint8)
    logits, z, _ = oracle.forward(weights, CONFIG, context[None], causal=True)
    expected = np.argmax(logits[0, -len(sample) - 1 : -1, 0], axis=-1)
    assert [r.byte for r in sample] == expected.tolist()
    z = z[0, -len(sample) :]
    np.testing.assert_allclose([r.router_weight for r in sample], 1 / (1 + np.exp(-z)), atol=1e-5)
    assert [r.router_decision for r in sample] == list(z > 0)
    assert all(r.logprob == 0 for r in sample)


def test_the_seed_decides(model, shared):
    def sample(seed):
        return bytes(r.byte for r in generate(model, b"a", max_bytes=20, seed=seed, decoder=shared))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_logprob_is_that_of_the_distribution_sampled(model, shared):
    options = {"temperature": 0.7, "top_k": 9, "seed": 3, "decoder": shared}
    (record,) = generate(model, b"a", max_bytes=1, **options)
    shared.position = shared.selected = 0
    logits = shared.forward(SEQ_START + b"a")[0][-1, 0]
    expected = Sampler(0.7, top_k=9).distribution(logits)[record.byte]
    assert np.exp(record.logprob) == pytest.approx(expected, rel=1e-6)


LOGITS = np.log(np.arange(1, 257, dtype=np.float64))


def test_temperature():
    np.testing.assert_allclose(Sampler().distribution(LOGITS), np.arange(1, 257) / (128 * 257))
    squared = np.arange(1, 257.0) ** 2
    np.testing.assert_allclose(Sampler(0.5).distribution(LOGITS), squared / squared.sum())
    assert Sampler(0).distribution(LOGITS).argmax() == 255
    assert Sampler(1e-6).distribution(LOGITS * 1e6)[255] == 1  # no overflow
    assert Sampler(1e-320).distribution(LOGITS)[255] == 1


def test_filters():
    whole = np.arange(1, 257) / (128 * 257)
    top = Sampler(top_k=3).distribution(LOGITS)
    np.testing.assert_allclose(top[253:], whole[253:] / whole[253:].sum())
    assert not top[:253].any()
    # 256 + 255 + 254 of 32896 is just above 0.02325
    assert np.count_nonzero(Sampler(top_p=0.0232).distribution(LOGITS)) == 3
    assert np.count_nonzero(Sampler(top_p=0.0233).distribution(LOGITS)) == 4
    assert np.count_nonzero(Sampler(top_p=1e-9).distribution(LOGITS)) == 1
    half = Sampler(min_p=0.499).distribution(LOGITS)
    np.testing.assert_allclose(half[127:], whole[127:] / whole[127:].sum())
    assert not half[:127].any()
    # in that order: half of the mass of the four likeliest is the two likeliest, or a little more
    assert np.count_nonzero(Sampler(top_k=4, top_p=0.5).distribution(LOGITS)) == 2
    flat = Sampler(top_k=5).distribution(np.zeros(256))  # ties: the smaller bytes
    np.testing.assert_array_equal(np.flatnonzero(flat), range(5))
    for sampler in (Sampler(top_k=300), Sampler(top_k=256), Sampler(min_p=0.0)):
        np.testing.assert_array_equal(sampler.distribution(LOGITS), Sampler().distribution(LOGITS))


class Scripted:
    """Stands in for a Decoder: whatever is fed, the next byte of the script is certain.

    `right(position)` says whether the first draft made there will be right, and so on.
    """

    def __init__(self, script: bytes, drafts: int = 0, right=lambda position: True) -> None:
        self.script, self.drafts, self.right = script, drafts, right
        self.position, self.passes, self.fed = 0, 0, []
        self.last_decisions = np.zeros(0, bool)

    def forward(self, data: bytes):
        rows = len(data)
        if self.passes == 0:  # the prompt
            rows = 1
        logits = np.full((rows, 1 + self.drafts, 256), -np.inf, np.float32)
        for row in range(rows):
            at = self.position + row + (self.passes > 0)
            for head in range(1 + self.drafts):
                byte = self.script[min(at + head, len(self.script) - 1)]
                wrong = head > 0 and not self.right(at + head)
                logits[row, head, byte ^ 1 if wrong else byte] = 0
        self.position += rows if self.passes else 0
        self.passes += 1
        self.fed.append(rows)
        self.last_decisions = np.zeros(rows, bool)
        return logits, np.zeros(rows, np.float32)

    def rollback(self, count: int) -> None:
        self.position -= count


def scripted(monkeypatch, script: bytes, max_bytes: int = 100, decoder=None, **options) -> bytes:
    module = sys.modules["pico_tg.generation"]  # the name in the package is the function
    decoder = decoder or Scripted(script)
    monkeypatch.setattr(module, "Decoder", lambda *_: decoder)
    heads = type("Model", (), {"config": Config(**(vars(CONFIG) | {"next_tokens": 8}))})
    records = generate(heads, max_bytes=max_bytes, **options)
    return bytes(r.byte for r in records)


def test_ends_at_the_end_tag(monkeypatch):
    script = b"a <b></pico" + SEQ_END + b"more"
    assert scripted(monkeypatch, script) == b"a <b></pico"
    assert scripted(monkeypatch, script, len(script), ignore_end=True) == script


def test_a_tag_that_does_not_end_is_text(monkeypatch):
    assert scripted(monkeypatch, b"a</pico:se", max_bytes=10) == b"a</pico:se"
    assert scripted(monkeypatch, b"</pico:sex", max_bytes=10) == b"</pico:sex"


SCRIPT = bytes(range(32, 127)) * 4


def test_drafts_that_are_always_right(monkeypatch):
    """After a while a pass takes eight bytes in, and all of them stay."""
    decoder, stats = Scripted(SCRIPT, 7), Stats()
    assert scripted(monkeypatch, SCRIPT, 300, decoder, stats=stats) == SCRIPT[:300]
    assert decoder.fed[-3:-1] == [8, 8]
    assert stats.drafts == stats.accepted
    assert stats.bytes == stats.passes + stats.accepted == 300
    assert stats.passes == len(decoder.fed) - 1 < 70


@pytest.mark.parametrize("heads", [9, 16])
def test_more_heads_than_a_pass_has_rows(heads, monkeypatch):
    decoder = Scripted(SCRIPT, heads - 1)
    config = Config(**(vars(CONFIG) | {"next_tokens": heads}))
    monkeypatch.setattr(sys.modules["pico_tg.generation"], "Decoder", lambda *_: decoder)
    records = generate(type("Model", (), {"config": config}), max_bytes=300)
    assert bytes(r.byte for r in records) == SCRIPT[:300]
    assert max(decoder.fed) == 8


def test_drafts_that_are_never_right(monkeypatch):
    """After a while there are none."""
    decoder, stats = Scripted(SCRIPT, 7, lambda at: False), Stats()
    assert scripted(monkeypatch, SCRIPT, 200, decoder, stats=stats) == SCRIPT[:200]
    assert stats.accepted == 0
    assert stats.passes == 200
    assert decoder.fed[-100:] == [1] * 100


def test_drafts_that_are_sometimes_right(monkeypatch):
    """Every third is wrong: two more bytes a pass, at most."""
    stats = Stats()
    heads = type("Model", (), {"config": Config(**(vars(CONFIG) | {"next_tokens": 8}))})
    decoder = Scripted(SCRIPT, 7, lambda at: at % 3 != 0)
    monkeypatch.setattr(sys.modules["pico_tg.generation"], "Decoder", lambda *_: decoder)
    records = list(generate(heads, max_bytes=240, stats=stats))
    assert bytes(r.byte for r in records) == SCRIPT[:240]
    assert sum(r.drafted for r in records) == stats.accepted > 100
    assert 80 <= stats.passes < 140


def test_no_speculation(monkeypatch):
    decoder = Scripted(SCRIPT, 7)
    assert scripted(monkeypatch, SCRIPT, 50, decoder, speculative=False) == SCRIPT[:50]
    assert set(decoder.fed) == {1}


class Eager:
    """A policy that always drafts all, right or wrong."""

    def __init__(self, most: int) -> None:
        self.most = most

    def choose(self) -> int:
        return self.most

    def guess(self, guesses: list[int]) -> None: ...

    def see(self, byte: int) -> None: ...


WORDS = ["ab ", "ac ", "bad ", "bc ", "cab ", "cb ", "abcde "]


@pytest.fixture(scope="module")
def repetitive() -> Pico:
    """A model that learned a few words by heart, so that some drafts are right."""
    model = Pico(TINY, seed=3)
    settings = WINDOWS | {"learning_rate": 1e-2, "warmup_steps": 5, "optimizer": "adamw"}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", folder)
        path = Path(folder) / "text.txt"
        rng = np.random.default_rng(0)
        path.write_text("".join(rng.choice(WORDS) for _ in range(500)))
        list(train(model, str(path), max_steps=250, epochs=999, **settings))
    return model


@pytest.fixture(scope="module")
def repetitive_decoder(repetitive) -> Decoder:
    return Decoder(repetitive)


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_speculation_changes_no_byte(options, repetitive, repetitive_decoder, monkeypatch):
    """The same uniforms are spent on the same bytes, however many a pass took in."""
    monkeypatch.setattr(sys.modules["pico_tg.generation"], "DraftPolicy", Eager)
    found = {}
    for speculative in (True, False):
        options = options | {"speculative": speculative, "decoder": repetitive_decoder}
        records = generate(repetitive, b"abc", max_bytes=120, seed=5, **options)
        found[speculative] = list(records)
    assert [r.byte for r in found[True]] == [r.byte for r in found[False]]
    assert [r.router_decision for r in found[True]] == [r.router_decision for r in found[False]]
    for name in ("router_weight", "logprob"):
        a, b = ([getattr(r, name) for r in found[kind]] for kind in (True, False))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
    drafted = sum(r.drafted for r in found[True])
    assert 10 < drafted < 110
    assert not any(r.drafted for r in found[False])


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_three_bytes_are_distributed_as_enumerated(
    options, repetitive, repetitive_decoder, monkeypatch
):
    """Pearson's chi-squared, against the product of byte-by-byte distributions."""
    monkeypatch.setattr(sys.modules["pico_tg.generation"], "DraftPolicy", Eager)
    sampler, decoder = Sampler(**options), repetitive_decoder
    decoder.position = decoder.selected = 0
    start = decoder.forward(SEQ_START + b"bad ")[0][-1, 0]

    def enumerate_(logits, depth, text, chance, found):
        for byte, p in enumerate(sampler.distribution(logits)):
            if chance * p < 1e-4:
                continue
            if depth == 1:
                found[text + bytes([byte])] = chance * p
                continue
            before = decoder.position, decoder.selected
            after = decoder.forward(bytes([byte]))[0][0, 0]
            enumerate_(after, depth - 1, text + bytes([byte]), chance * p, found)
            decoder.position, decoder.selected = before
        return found

    expected = enumerate_(start, 3, b"", 1.0, {})
    samples = 1200
    records = generate(
        repetitive, b"bad ", max_bytes=3, num_samples=samples, seed=11, ignore_end=True,
        decoder=decoder, **options,
    )  # fmt: skip
    counts = Counter()
    for _, group in itertools.groupby(records, key=lambda r: r.sample):
        counts[bytes(r.byte for r in group)] += 1
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


def test_prompts_of_every_length_about_the_windows(model, weights, text, shared):
    """The first byte after the prompt has the distribution of a full pass."""
    for length in (1, 2, 3, 4, 5, 6, 7, 62, 63, 64, 65, 66, 127, 128, 129):
        prompt = text[:length]
        options = {"temperature": 0, "raw_prompt": True, "decoder": shared}
        (record,) = generate(model, prompt, max_bytes=1, **options)
        logits = oracle.forward(
            weights, CONFIG, np.frombuffer(prompt, np.uint8)[None], causal=True
        )[0][0, -1, 0]
        assert record.byte == np.argmax(logits)


def test_samples_share_a_prompt(model, shared):
    """Each is what it would be alone with its own uniforms; the first is that of the seed."""
    options = {"max_bytes": 20, "seed": 4, "ignore_end": True, "decoder": shared}
    records = list(generate(model, b"once", num_samples=3, **options))
    samples = [bytes(r.byte for r in records if r.sample == n) for n in range(3)]
    assert [len(sample) for sample in samples] == [20] * 3
    assert len(set(samples)) == 3
    alone = generate(model, b"once", **options)
    assert bytes(r.byte for r in alone) == samples[0]


def test_a_decoder_serves_again(model):
    """Whatever it was used for before, without compiling or allocating anew."""
    decoder = Decoder(model)

    def sample(**options):
        return list(generate(model, b"once", max_bytes=80, seed=6, ignore_end=True, **options))

    first = sample(decoder=decoder)
    assert first == sample()
    for _ in range(3):  # a graph is made at its second use, and replayed from the third on
        sample(decoder=decoder, latent=False)
        sample(decoder=decoder)
    before = GlobalCounters.mem_used
    assert sample(decoder=decoder) == first
    assert GlobalCounters.mem_used == before


def test_without_the_latent_blocks(model, weights):
    """As if their contribution were nothing."""
    cut = {k: v * 0 if "latent.blocks" in k and "proj" in k else v for k, v in weights.items()}
    cut = {k: v * 0 if "latent.blocks" in k and "fc2" in k else v for k, v in cut.items()}
    data = SEQ_START + b"some text"
    found = Decoder(model, use_latent=False).forward(data)[0]
    x = np.frombuffer(data, np.uint8)[None]
    np.testing.assert_allclose(
        found, oracle.forward(cut, CONFIG, x, causal=True)[0][0], rtol=0, atol=2e-4
    )
    records = list(generate(model, b"a", max_bytes=30, latent=False, seed=1))
    assert not any(r.router_decision for r in records)


@pytest.mark.slow
def test_twenty_thousand_bytes(model):
    """At constant memory; the last bytes are still those of a full pass."""
    decoder = Decoder(model)
    data = np.random.default_rng(5).integers(0, 256, 20_000, np.uint8).tobytes()
    used = []
    for start in range(0, len(data), 1000):
        decoder.forward(data[start : start + 990])
        for byte in data[start + 990 : start + 1000]:
            last = decoder.forward(bytes([byte]))[0]
        used.append(GlobalCounters.mem_used)
    assert decoder.position == 20_000
    assert len(set(used[1:])) == 1
    # what is out of every window, of bytes or of selected bytes, does not matter
    tail = Decoder(model)
    reach = 400
    tail.forward(data[-reach:-1])
    again = tail.forward(data[-1:])[0]
    np.testing.assert_allclose(last, again, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, PREFILL_CHUNK])
def test_kernels_by_hand_are_the_plain_ones(rows, monkeypatch):
    """KVCache, scores, weighted values and packed products; before, at and beyond a full ring."""
    if not has_cpu_kernels(Device.DEFAULT):
        pytest.skip(f"{Device.DEFAULT} has no kernels of ours")
    H, K, C, window = 6, 3, 7, 9
    rng = np.random.default_rng(rows)
    rings = {}
    for by_hand in (True, False):
        monkeypatch.setenv("PICO_KERNELS", "1" if by_hand else "0")
        rings[by_hand] = kv_cache.KVCache(H, K, C, window, PREFILL_CHUNK, alibi_slopes(H))
        assert rings[by_hand].has_cpu_kernels == by_hand
    for start in (0, rows, 40, 40 + rows, 90, 1000):
        qkv = rng.standard_normal((rows, (H + 2 * K) * C)).astype(np.float32)
        at = Tensor(np.array([start], np.int32)).realize()
        one, other = (ring.attend(Tensor(qkv).realize(), at).numpy() for ring in rings.values())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    weight, scale = rng.standard_normal((50, 21)), rng.standard_normal(21)
    x, s = rng.standard_normal((rows, 21)), rng.standard_normal((rows, 1))
    residual = rng.standard_normal((rows, 64))
    tensors = [Tensor(v.astype(np.float32)).realize() for v in (weight, scale, x, s, residual)]
    expected = (x * scale) @ weight.T * s + residual[:, :50]
    for by_hand in ("1", "0"):
        monkeypatch.setenv("PICO_KERNELS", by_hand)
        packed = kv_cache.PackedLinear(tensors[0], tensors[1])
        found = packed(tensors[2], tensors[3], tensors[4][:, : packed.width].contiguous())
        np.testing.assert_allclose(found.numpy()[:, :50], expected, rtol=0, atol=1e-4)


def test_no_bytes_wanted(model, shared):
    assert list(generate(model, b"a", max_bytes=0, decoder=shared)) == []


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"max_bytes": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"num_samples": 0},
        {"seed": -1},
    ],
)
def test_bad_options(option, model):
    with pytest.raises(PicoError, match=next(iter(option))):
        generate(model, b"a", **option)


def test_a_raw_prompt_of_nothing(model):
    with pytest.raises(PicoError, match="raw prompt must hold"):
        generate(model, b"", raw_prompt=True)
