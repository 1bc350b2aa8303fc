"""data/windows.py: which bytes a batch holds, in which order."""

import hashlib

import numpy as np
import pytest

from pico_tg.data import Corpus, Windows
from pico_tg.files import PicoError


def corpus_of(content: bytes) -> Corpus:
    return Corpus(np.frombuffer(content, np.uint8), np.array([0, len(content)]), "test")


def test_windows_align_inputs_and_targets():
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    windows = Windows(corpus_of(content.tobytes()), 16, 3, batch_size=4, seed=0)
    assert len(windows) == (1000 - 3) // 16
    # the batches of an epoch hold each window once; find each by where its content stands
    rows = np.concatenate([windows.batch(i) for i in range(0, len(windows) + 1, 4)])
    places = [content.tobytes().find(row.tobytes()) for row in rows]
    assert rows.shape[1] == 16 + 3
    assert set(places) == {16 * i for i in range(len(windows))}


@pytest.mark.parametrize(("total", "count"), [(19, 1), (34, 1), (35, 2), (50, 2), (51, 3)])
def test_only_the_incomplete_window_is_left_out(total, count):
    assert len(Windows(corpus_of(bytes(total)), 16, 3, batch_size=1, seed=0)) == count


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_each_window_once_an_epoch(batch_size):
    corpus = corpus_of(bytes(range(10)) * 1 + b"!")  # ten windows of one byte, told by that byte
    windows = Windows(corpus, 1, 1, batch_size, seed=5)
    assert len(windows) == 10
    batches = [windows.batch(step * batch_size) for step in range(100)]
    assert all(batch.shape == (batch_size, 2) and batch.dtype == np.uint8 for batch in batches)
    shown = np.concatenate(batches)[:, 0]
    epochs = [shown[i : i + 10].tolist() for i in range(0, len(shown) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9
    for position in range(50):  # also from where no batch of this size begins
        rows = windows.batch(position)[:, 0]
        assert rows.tolist() == shown[position : position + batch_size].tolist()


def test_batch_is_a_pure_function_of_seed_and_position():
    corpus = corpus_of(np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes())
    forwards = Windows(corpus, 16, 8, 8, seed=1)
    expected = [forwards.batch(8 * step) for step in range(60)]
    backwards = Windows(corpus, 16, 8, 8, seed=1)
    for step in reversed(range(60)):
        batch = backwards.batch(8 * step)
        assert np.array_equal(batch, expected[step])
        batch[:] = 0  # a batch is the caller's own
    assert np.array_equal(backwards.batch(24), expected[3])
    other = Windows(corpus, 16, 8, 8, seed=2)
    assert not np.array_equal(other.batch(0), expected[0])


def test_order_does_not_change_between_versions():
    """A resumed run must see the data in the order it began with."""
    windows = Windows(corpus_of(bytes(range(256))), 4, 8, 16, seed=42)
    digest = hashlib.sha256(b"".join(windows.batch(16 * step).tobytes() for step in range(9)))
    assert digest.hexdigest()[:16] == "052cafb90ac06e05"


def test_windows_errors():
    with pytest.raises(PicoError, match=r"18 bytes, .* 16 \+ 3 bytes; a context_len of at most 15"):
        Windows(corpus_of(bytes(18)), 16, 3, 1, 0)
    Windows(corpus_of(bytes(18)), 15, 3, 1, 0)
    with pytest.raises(PicoError, match="use more data"):
        Windows(corpus_of(bytes(3)), 16, 3, 1, 0)
    with pytest.raises(PicoError, match="taken for a mistake"):
        Windows(corpus_of(bytes(100)), 16, 3, 1 << 27, 0)
