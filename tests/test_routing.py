"""The fixed rules that select bytes, over a sequence and byte by byte."""

import numpy as np
import pytest
from references import TEXT
from tinygrad import Tensor

from pico_tg.routing import RULES, causal_decisions


def by_rule(router: str, data: bytes, start: int = 0) -> np.ndarray:
    """The decisions of a rule on the bytes of `data` from `start` on."""
    x = np.frombuffer(b"\0" + data, np.uint8).astype(np.int32)[start:]
    return causal_decisions(router, Tensor(x[1:]), Tensor(x[:-1]), Tensor.zeros(len(x) - 1)).numpy()


def test_the_rule_of_spaces():
    marks = {i for i, c in enumerate("ab, c.d\n x") if c in ",.\n" or (i == 4 and c == " ")}
    found = by_rule("space", b"ab, c.d\n x")
    assert set(np.flatnonzero(found)) == marks == {2, 5, 7}
    # a UTF-8 lead byte counts as a space, its continuation bytes as letters
    assert np.flatnonzero(by_rule("space", "aé b".encode())).tolist() == [1, 3]


@pytest.mark.parametrize("router", RULES)
def test_rules_in_pieces(router):
    whole = by_rule(router, TEXT)
    assert whole.dtype == bool
    for cut in (1, 2, 7, len(TEXT) - 1):
        pieces = np.concatenate([by_rule(router, TEXT[:cut]), by_rule(router, TEXT, cut)])
        np.testing.assert_array_equal(pieces, whole)
