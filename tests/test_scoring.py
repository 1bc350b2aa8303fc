"""score against the oracle, and complete against generate."""

import math

import numpy as np
import oracle
import pytest
from helpers import TINY
from tinygrad import nn

import pico_tg
from pico_tg import Decoder, Pico, PicoError
from pico_tg.backend.runtime import write_into
from pico_tg.data import SEQ_START


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(TINY, seed=7)


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return Decoder(model)


def test_a_score_is_the_oracle_s(model, decoder):
    """Of every byte, the first one included, over several windows."""
    weights = {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}
    text = np.random.default_rng(1).integers(0, 256, 150, np.uint8).tobytes()
    x = np.frombuffer(SEQ_START + text, np.uint8)[None]
    logits, z, _ = oracle.forward(weights, TINY, x, causal=True)
    rows = logits[0, :, 0].astype(np.float64)
    logprobs = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    first = len(SEQ_START)
    expected = np.array([logprobs[first + i - 1, byte] for i, byte in enumerate(text)])
    decoder.reset(use_latent=False)  # a former use does not matter
    scored = pico_tg.score(model, text, decoder=decoder)
    assert bytes(record.byte for record in scored) == text
    np.testing.assert_allclose([r.logprob for r in scored], expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(
        [r.router_weight for r in scored], 1 / (1 + np.exp(-z[0, first:])), rtol=0, atol=1e-4
    )
    assert [r.router_decision for r in scored] == list(z[0, first:] > 0)
    assert 0 < sum(r.router_decision for r in scored) < len(text)
    assert scored.bits == pytest.approx(-expected.sum() / math.log(2), abs=1e-2)
    assert scored.bits_per_byte == pytest.approx(scored.bits / 150)


def test_generated_text_has_the_scores_that_generate_names(model, decoder):
    options = {"max_bytes": 40, "seed": 2, "temperature": 1, "ignore_end": True, "decoder": decoder}
    written = list(pico_tg.generate(model, "once", **options))
    scored = pico_tg.score(model, b"once" + bytes(r.byte for r in written), decoder=decoder)[4:]
    for ours, theirs in zip(scored, written, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-4)
        assert ours.router_weight == pytest.approx(theirs.router_weight, abs=1e-4)
        assert ours.router_decision == theirs.router_decision


def test_what_is_scored(model, decoder):
    as_text = pico_tg.score(model, "naïve", decoder=decoder)
    assert as_text == pico_tg.score(model, "naïve".encode(), decoder=decoder)
    assert len(as_text) == 6
    for wrong, message in (
        ("", "the text is empty"),
        (b"", "the text is empty"),
        (5, "the text must be a str or bytes, not int"),
        (["a"], "the text must be a str or bytes, not list"),
    ):
        with pytest.raises(PicoError, match=f"^{message}"):
            pico_tg.score(model, wrong, decoder=decoder)


def test_logits_that_are_not_finite():
    model = Pico(TINY, seed=7)
    weight = model.unembedding.weight
    write_into(weight, np.full(weight.shape, 3.3e38, np.float32))
    with pytest.raises(PicoError, match=r"^the model's logits are not finite"):
        pico_tg.score(model, "a")


def test_complete(model, decoder):
    """The text of generate, without the prompt, whatever the bytes are."""
    options = {"max_bytes": 40, "seed": 1, "decoder": decoder}
    written = bytes(r.byte for r in pico_tg.generate(model, "é", **options))
    found = pico_tg.complete(model, "é", **options)
    assert found == written.decode(errors="replace")
    assert "\ufffd" in found
    stop = written[10:12]
    cut = written[: written.index(stop)].decode(errors="replace")
    assert pico_tg.complete(model, "é", stop=stop, **options) == cut
    assert pico_tg.complete(model, max_bytes=0, decoder=decoder) == ""
    with pytest.raises(PicoError, match=r"^complete returns one text"):
        pico_tg.complete(model, "é", num_samples=2, **options)
    with pytest.raises(PicoError, match=r"^unknown setting max_tokens"):
        pico_tg.complete(model, "é", max_tokens=3)
