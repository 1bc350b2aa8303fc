"""Cached decoding against the oracle and against recomputation; sampling and its ends."""

import itertools
import sys

import numpy as np
import oracle
import pytest
from tinygrad import GlobalCounters, Tensor, nn

from pico_tg import PicoError
from pico_tg.config import Config
from pico_tg.data import SEQ_END, SEQ_START
from pico_tg.generate import CHUNK, Decoder, Sampler, generate
from pico_tg.model import Pico

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
    Tensor.manual_seed(7)
    return Pico(CONFIG)


@pytest.fixture(scope="module")
def weights(model) -> oracle.Weights:
    return {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}


@pytest.fixture(scope="module")
def text() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 230, np.uint8).tobytes()


def test_rings_wrap_around(model, weights, text):
    """Three times round the ring of 67 slots, by pieces of every kind."""
    decoder = Decoder(model)
    pieces = [text[a:b] for a, b in itertools.pairwise([0, 1, 2, 66, 67, 130, 131, 200, 230])]
    assert len(text) > 3 * decoder.before[0].slots
    found = np.concatenate([decoder.feed(piece)[0] for piece in pieces])
    np.testing.assert_allclose(found, oracle.decode(weights, CONFIG, text), rtol=0, atol=2e-4)
    assert decoder.position == len(text)
    assert 0 < decoder.selected < len(text)


@pytest.mark.parametrize("rejected", [1, 5, CHUNK])
def test_setting_the_position_back_forgets(rejected, model, text):
    plain, undone = Decoder(model), Decoder(model)
    for decoder in (plain, undone):
        decoder.feed(text[:150])
    position, selected = undone.position, undone.selected
    undone.feed(text[-rejected:])
    undone.position, undone.selected = position, selected
    for piece in (text[150:151], text[151:190]):
        for ours, theirs in zip(undone.feed(piece), plain.feed(piece), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_memory_does_not_grow(model, text):
    decoder = Decoder(model)
    for _ in range(3):
        decoder.feed(text[:1])
        decoder.feed(text)
    before = GlobalCounters.mem_used
    for _ in range(5):
        decoder.feed(text)
    assert GlobalCounters.mem_used == before


def test_greedy_is_the_likeliest_byte_of_a_full_pass(model):
    prompt = b"once upon"
    sample = list(generate(model, prompt, max_bytes=4, temperature=0))
    context = SEQ_START + prompt
    for record in sample:
        x = Tensor(np.frombuffer(context, np.uint8)[None].copy())
        logits = model(x, causal=True)[0].numpy()[0, -1, 0]
        assert record.byte == np.argmax(logits)
        context += bytes([record.byte])
    x = Tensor(np.frombuffer(context, np.uint8)[None].copy())
    z = model(x, causal=True)[1].numpy()[0, -len(sample) :]
    np.testing.assert_allclose([r.router_weight for r in sample], 1 / (1 + np.exp(-z)), atol=1e-5)
    assert [r.router_decision for r in sample] == list(z > 0)
    assert all(r.logprob == 0 for r in sample)


def test_the_seed_decides(model):
    def sample(seed):
        return bytes(r.byte for r in generate(model, b"a", max_bytes=20, seed=seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_logprob_is_that_of_the_distribution_sampled(model):
    (record,) = generate(model, b"a", max_bytes=1, temperature=0.7, seed=3)
    logits = Decoder(model).feed(SEQ_START + b"a")[0][-1, 0]
    expected = distribution(logits, 0.7)[record.byte]
    assert np.exp(record.logprob) == pytest.approx(expected, rel=1e-6)


def test_distribution():
    logits = np.log(np.arange(1, 257, dtype=np.float64))
    np.testing.assert_allclose(distribution(logits, 1.0), np.arange(1, 257) / (128 * 257))
    squared = np.arange(1, 257.0) ** 2
    np.testing.assert_allclose(distribution(logits, 0.5), squared / squared.sum())
    assert distribution(logits, 0).argmax() == 255
    assert distribution(logits * 1e6, 1e-6)[255] == 1  # no overflow


class Scripted:
    """Stands in for a Decoder: whatever is fed, the next byte of the script is certain."""

    def __init__(self, script: bytes) -> None:
        self.script, self.fed = script, -1

    def feed(self, data: bytes):
        self.fed += 1
        logits = np.full((len(data), 1, 256), -np.inf, np.float32)
        logits[:, :, self.script[min(self.fed, len(self.script) - 1)]] = 0
        return logits, np.zeros(len(data), np.float32)


def scripted(monkeypatch, script: bytes, max_bytes: int = 100) -> bytes:
    module = sys.modules["pico_tg.generate"]  # the name in the package is the function
    monkeypatch.setattr(module, "Decoder", lambda _: Scripted(script))
    return bytes(r.byte for r in generate(None, max_bytes=max_bytes))


def test_ends_at_the_end_tag(monkeypatch):
    assert scripted(monkeypatch, b"a <b></pico" + SEQ_END + b"more") == b"a <b></pico"


def test_a_tag_that_does_not_end_is_text(monkeypatch):
    assert scripted(monkeypatch, b"a</pico:se", max_bytes=10) == b"a</pico:se"
    assert scripted(monkeypatch, b"</pico:sex", max_bytes=10) == b"</pico:sex"


def test_no_bytes_wanted(model):
    assert list(generate(model, b"a", max_bytes=0)) == []


@pytest.mark.parametrize(
    "option", [{"temperature": -1}, {"temperature": float("nan")}, {"max_bytes": -1}]
)
def test_bad_options(option, model):
    with pytest.raises(PicoError, match=next(iter(option))):
        generate(model, b"a", **option)
