"""The fixed rules that select bytes, over a sequence and byte by byte."""

import numpy as np
import pytest
from references import TEXT
from tinygrad import Tensor

from pico_tg.config import RULES
from pico_tg.routing import rule_decisions


def by_rule(router: str, data: bytes, start: int = 0, kind: type = np.array) -> np.ndarray:
    """The decisions of a rule on the bytes of `data` from `start` on."""
    x = np.frombuffer(b"\0" + data, np.uint8).astype(np.int32)[start:]
    position = np.arange(start, len(data))
    arrays = (kind(x[1:]), kind(x[:-1]), kind(position))
    found = rule_decisions(router, *arrays, 4)
    return found.numpy() if kind is Tensor else found


def test_the_rule_of_spaces():
    marks = {i for i, c in enumerate("ab, c.d\n x") if c in ",.\n" or (i == 4 and c == " ")}
    found = by_rule("space", b"ab, c.d\n x")
    assert set(np.flatnonzero(found)) == marks == {2, 5, 7}
    # a UTF-8 lead byte counts as a space, its continuation bytes as letters
    assert np.flatnonzero(by_rule("space", "aé b".encode())).tolist() == [1, 3]


@pytest.mark.parametrize("router", RULES)
def test_rules_a_byte_at_a_time(router):
    whole = by_rule(router, TEXT)
    assert whole.dtype == bool
    np.testing.assert_array_equal(by_rule(router, TEXT, kind=Tensor), whole)
    for i in range(len(TEXT)):
        assert by_rule(router, TEXT[: i + 1], i).tolist() == [whole[i]]


@pytest.mark.parametrize("kind", [np.array, Tensor])
def test_an_unknown_rule(kind):
    with pytest.raises(ValueError, match="'random' is not a rule"):
        by_rule("random", TEXT, kind=kind)
