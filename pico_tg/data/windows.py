"""Windows: the batches of a corpus, in an order that is a pure function of the seed."""

import numpy as np

from ..files import PicoError
from .cache import Corpus

MAX_BATCH_BYTES = 1 << 30  # bytes of one step; a larger step is rejected as a mistake


class Windows:
    """Windows of a fixed size over a corpus, shuffled again each epoch.

    With C = context_len, window i reads C + next_tokens bytes from byte i * C on: its inputs are
    the first C, and target k of position n is byte i * C + n + 1 + k. Only the incomplete window at
    the end is left out. The order is a pure function of (seed, epoch), so a run resumes from a
    count of windows alone.
    """

    def __init__(
        self, corpus: Corpus, context_len: int, next_tokens: int, batch_size: int, seed: int
    ) -> None:
        """Raises PicoError on data shorter than one window, and on a batch that is too large."""
        size = batch_size * (context_len + next_tokens)
        if size > MAX_BATCH_BYTES:
            raise PicoError(
                f"a step of {batch_size} windows of context_len {context_len} is {size:,} bytes; "
                f"more than {MAX_BATCH_BYTES:,} are taken for a mistake"
            )
        total = len(corpus.bytes)
        if total < context_len + next_tokens:
            fits = total - next_tokens
            way_out = f"a context_len of at most {fits} would fit" if fits > 0 else "use more data"
            raise PicoError(
                f"the data has {total} bytes, fewer than one window of context_len + next_tokens = "
                f"{context_len} + {next_tokens} bytes; {way_out}"
            )
        self.context_len = context_len
        self.next_tokens = next_tokens
        self.batch_size = batch_size
        self.seed = seed
        self._bytes = corpus.bytes
        self._count = (total - next_tokens) // context_len
        self._shuffled: tuple[int, np.ndarray] | None = None  # the latest epoch and its order

    def __len__(self) -> int:
        """The number of windows of one epoch."""
        return self._count

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step, counted from 0: uint8 [batch_size, C + next_tokens], a new array."""
        return self.batch_at(step * self.batch_size)

    def batch_at(self, position: int) -> np.ndarray:
        """The batch after `position` windows; a batch may span two epochs."""
        batch = np.empty((self.batch_size, self.context_len + self.next_tokens), np.uint8)
        for row in range(self.batch_size):
            epoch, index = divmod(position + row, len(self))
            start = int(self._order(epoch)[index]) * self.context_len
            batch[row] = self._bytes[start : start + batch.shape[1]]
        return batch

    def _order(self, epoch: int) -> np.ndarray:
        """The windows of an epoch in the order of training: uint32, or int64, [windows]."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = None  # free the previous epoch's order before making the next one
            # the same order as `permutation(len(self))`, in half the memory
            order = np.arange(len(self), dtype=np.uint32 if len(self) <= 1 << 32 else np.int64)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
