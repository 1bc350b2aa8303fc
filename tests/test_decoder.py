"""A pass with KV caches gives what a full forward pass gives, in every state of the caches."""

import dataclasses
import itertools

import numpy as np
import oracle
import pytest
from helpers import TINY
from tinygrad import Context, Device, GlobalCounters, Tensor, nn

from pico_tg import decoder as decoder_module
from pico_tg.backend.cpu_kernels import cpu_kernels
from pico_tg.backend.runtime import write_into
from pico_tg.config import Config
from pico_tg.decoder import PREFILL_CHUNK, Decoder
from pico_tg.files import PicoError
from pico_tg.generation import generate
from pico_tg.model import Pico


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(TINY, seed=7)


@pytest.fixture(scope="module")
def weights(model) -> oracle.Weights:
    return {name: t.numpy() for name, t in nn.state.get_state_dict(model).items()}


@pytest.fixture(scope="module")
def text() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 330, np.uint8).tobytes()


@pytest.fixture
def prefill(monkeypatch):
    """Passes of many rows for short prompts as well."""
    monkeypatch.setattr(decoder_module, "SHORTEST", {PREFILL_CHUNK: PREFILL_CHUNK, 4: 5})


def test_pieces_of_every_size(model, weights, text, prefill):
    """Three times round the ring buffers, with decode passes and prefill passes."""
    decoder = Decoder(model)
    cuts = [0, 1, 2, 66, 67, 130, 131, 200, 203, 209, len(text)]
    assert len(text) > 3 * decoder.fb_in[0].slots
    found = [decoder.forward(text[a:b])[0] for a, b in itertools.pairwise(cuts)]
    expected = oracle.decode(weights, TINY, text)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-4)
    assert decoder.position == len(text)
    assert 0 < decoder.selected < len(text)


@pytest.mark.skipif(not cpu_kernels(Device.DEFAULT), reason="only the kernels of cpu/ promise it")
@pytest.mark.parametrize("preset", ["minutes", "published"])
def test_passes_of_any_size_give_the_same_bits(preset, text):
    """So the number of drafts, which follows the clock, cannot change the text."""
    fewer = {"fb_num_blocks": 1, "latent_num_blocks": 1, "next_tokens": 4}
    decoder = Decoder(Pico(dataclasses.replace(Config.preset(preset), **fewer), seed=7))
    found = []
    for rows in (1, 4):
        decoder.reset()
        passes = [decoder.forward(text[i : i + rows]) for i in range(0, 200, rows)]
        found.append([np.concatenate(outputs) for outputs in zip(*passes, strict=True)])
    for one, four in zip(*found, strict=True):
        np.testing.assert_array_equal(one, four)


def test_a_pass_in_one_graph(model, weights, text):
    """As on a GPU. Unused slots and rejected bytes leave no trace in the caches."""
    decoder = Decoder(model)
    decoder.single_graph = True
    found = []
    for start in range(0, 90, 5):
        decoder.forward(text[-4:])
        decoder.rollback(4)
        found += [decoder.forward(text[a : a + n])[0] for a, n in ((start, 1), (start + 1, 4))]
    expected = oracle.decode(weights, TINY, text[:90])
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-4)
    assert 0 < decoder.selected < 90
    assert decoder.graphs.keys() == {("_whole_pass", 1, 1), ("_whole_pass", 4, 4)}


def test_rollback_and_restore(model, text, prefill):
    """Bytes that were rolled back, or fed after a snapshot, leave no trace."""
    plain, other = Decoder(model), Decoder(model)
    for decoder in (plain, other):
        decoder.forward(text[:150])
    snapshot = other.snapshot()
    for rejected in (1, 3, PREFILL_CHUNK):
        other.forward(text[-rejected:])
        other.rollback(rejected)
        assert (other.position, other.selected) == (plain.position, plain.selected)
    for _ in range(2):
        expected = [plain.forward(piece) for piece in (text[150:151], text[151:190])]
        found = [other.forward(piece) for piece in (text[150:151], text[151:190])]
        for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        other.restore(snapshot)
        plain = Decoder(model)
        plain.forward(text[:150])


@pytest.mark.parametrize("method", ["reset", "refresh"])
def test_the_weights_have_changed(method, text):
    """A decoder computes what a new one does, after `refresh` even if the norm is the same."""
    model = Pico(TINY, seed=7)
    decoder = Decoder(model)
    before = decoder.forward(text[:20])
    weights = nn.state.get_state_dict(model)
    for name, tensor in nn.state.get_state_dict(Pico(TINY, seed=8)).items():
        if name != "norm.weight" or method == "reset":
            # fresh norms and biases have one value each
            write_into(weights[name], tensor.numpy() + np.float32(0.1))
    graphs = dict(decoder.graphs)
    getattr(decoder, method)()
    new = Decoder(model)
    found, expected = decoder.forward(text[:20]), new.forward(text[:20])
    z = expected[1]
    assert 0 < decoder.selected == new.selected == (z > 0).sum()
    assert decoder.graphs.items() >= graphs.items()
    assert np.abs(expected[0] - before[0]).max() > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    options = {"max_bytes": 30, "seed": 0, "raw_prompt": True}
    ours, theirs = (
        [record.byte for record in generate(model, b"a", decoder=used, **options)]
        for used in (decoder, new)
    )
    assert ours == theirs


def test_without_the_latent_blocks(model, weights, text):
    """The logits are those of a model whose latent blocks add nothing."""
    cut = dict(weights)
    for name in weights:
        if "latent.blocks" in name and ("proj" in name or "fc2" in name):
            cut[name] = np.zeros_like(weights[name])
    decoder = Decoder(model, use_latent=False)
    found = decoder.forward(text[:20])[0]
    x = np.frombuffer(text[:20], np.uint8)[None]
    expected = oracle.forward(cut, TINY, x, causal=True)[0][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert decoder.selected == 0


def test_memory_does_not_grow(model, text):
    """The caches have a fixed size, and a replayed graph allocates nothing."""
    decoder = Decoder(model)
    for _ in range(3):
        decoder.forward(text[:1])
        decoder.forward(text)
    before = GlobalCounters.mem_used
    for _ in range(5):
        decoder.forward(text)
    assert GlobalCounters.mem_used == before


@pytest.mark.slow
def test_twenty_thousand_bytes(model):
    """At constant memory; the last logits are those of the last 400 bytes alone."""
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
    tail = Decoder(model)  # 400 bytes are more than all windows together reach
    tail.forward(data[-400:-1])
    np.testing.assert_allclose(last, tail.forward(data[-1:])[0], rtol=0, atol=2e-4)


def test_without_captured_graphs(model):
    """tinygrad's JIT=0, under which a pass would return the logits of the first one."""
    with Context(JIT=0), pytest.raises(PicoError, match="JIT=0"):
        Decoder(model).forward(b"a")


def test_decoding_while_training(text):
    """A sample in the middle of a step: decoding is not training, whatever its caller does."""
    model = Pico(TINY, seed=0)
    expected = Decoder(model).forward(text[:9])[0]
    with Tensor.train():
        found = Decoder(model).forward(text[:9])[0]
    np.testing.assert_array_equal(found, expected)
