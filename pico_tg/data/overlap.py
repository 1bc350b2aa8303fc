"""How much of a text also occurs in another one, wherever it begins and in whichever file it is."""

from collections.abc import Iterator

import numpy as np

PIECE = 48  # bytes that both texts share, a multiple of 8: short texts are said twice by chance
ONE_IN = 16  # of the pieces, chosen by their first bytes, so that both texts choose the same ones
SMALL = 1 << 20  # bytes of both texts, of which all pieces are chosen: repetitions have few
CHANCE = 0.05  # an overlap below is usual between texts of one kind (stories: 0.02)
CHUNK = 1 << 18  # bytes at a time
AT_MOST = 1 << 23  # bytes of the other text that are read, in chunks from everywhere
WEIGHTS = np.random.default_rng(0).integers(1 << 63, size=PIECE // 8, dtype=np.uint64) * 2 + 1


def shared(text: np.ndarray, other: np.ndarray) -> float:
    """The share of the pieces of `text` (uint8) that are also in `other` (uint8); 0 of no piece.

    Carriage returns do not count. A lower bound if `other` is larger than AT_MOST.
    """
    one_in = ONE_IN if len(text) + len(other) > SMALL else 1
    hashes = np.concatenate([np.empty(0, np.uint64), *_pieces(text, one_in)])
    if not len(hashes):
        return 0.0
    wanted, counts = np.unique(hashes, return_counts=True)
    found = np.zeros(len(wanted), bool)
    for hashes in _pieces(other, one_in, every=1 + len(other) // AT_MOST):
        at = np.searchsorted(wanted, hashes) % len(wanted)
        found[at[wanted[at] == hashes]] = True
    return float(counts[found].sum() / counts.sum())


def _pieces(text: np.ndarray, one_in: int, every: int = 1) -> Iterator[np.ndarray]:
    """Hashes of the chosen pieces of every n-th chunk: uint64 [pieces]."""
    for start in range(0, len(text) - PIECE + 1, every * CHUNK):
        block = text[start : start + CHUNK + PIECE - 1]
        block = block[block != ord("\r")]  # a copy of a text may end its lines otherwise
        if len(block) < PIECE:
            continue
        first = block.astype(np.uint32)  # becomes a hash of the first 4 bytes of each piece
        for width in (1, 2):
            first = first[:-width] * np.uint32(0x9E3779B1) + first[width:]
        first = first[: len(block) - PIECE + 1] * np.uint32(0x85EBCA6B)
        chosen = np.flatnonzero(first <= (2**32 - 1) // one_in)
        pieces = np.lib.stride_tricks.sliding_window_view(block, PIECE)[chosen]  # [chosen, PIECE]
        yield pieces.view(np.uint64) @ WEIGHTS
