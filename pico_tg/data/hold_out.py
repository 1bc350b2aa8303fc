"""Holding out: the end of a corpus becomes validation data."""

from pathlib import Path

import numpy as np

from ..files import PicoError
from .corpus import SEQ_END, SEQ_START, Corpus, digest
from .formats import reason

HELD_OUT = 0.05  # of the bytes, by default
LEAST_CUT = 100  # bytes; a smaller part of a document measures nothing: hold out whole ones
Counts = tuple[tuple[str, int], ...]


def hold_out(
    label: str, folder: Path, corpus: Corpus, size: float | int | None
) -> tuple[Corpus, Corpus]:
    """Cut the end off a corpus, which is cached in `folder`: (train, validation).

    A fraction is cut at the nearest start of a document. The cut is within a document if the corpus
    is a single one, or if that start misses a wanted number of at least LEAST_CUT bytes by more
    than half of this number. size: see `DataSpec.validation_size`. Raises PicoError if nothing
    would be left to train on.
    """
    if corpus.documents == 1:
        if isinstance(size, int):
            raise PicoError(
                f"{label} is one document, so validation_size must be a fraction of it, not {size}"
            )
        length = len(corpus.bytes) - len(SEQ_START) - len(SEQ_END)
        held_out = max(1, round(length * (size or HELD_OUT)))
        if held_out >= length:
            raise PicoError(f"{label} is too small to hold validation data out: {length} bytes")
        return _cut_document(folder, corpus, 0, len(SEQ_START) + length - held_out)
    if isinstance(size, int):
        if size >= corpus.documents:
            raise PicoError(
                f"validation_size ({size}) leaves nothing to train on: {label} has "
                f"{corpus.documents} documents"
            )
        first = corpus.documents - size
    else:  # the document start that is nearest to the wanted cut, the later one in a tie
        total = len(corpus.bytes)
        wanted = total * (1 - (size or HELD_OUT))
        first = int(np.searchsorted(corpus.offsets, wanted))
        if wanted - corpus.offsets[first - 1] < corpus.offsets[first] - wanted:
            first -= 1
        first = min(max(first, 1), corpus.documents - 1)
        miss = abs(corpus.offsets[first] - wanted)
        if miss > (total - wanted) / 2 and total - wanted >= LEAST_CUT:
            number = int(np.searchsorted(corpus.offsets, wanted, "right")) - 1
            start, end = corpus.offsets[number : number + 2]  # at least LEAST_CUT / 2 apart
            cut = np.clip(round(wanted), start + len(SEQ_START) + 1, end - len(SEQ_END) - 1)
            return _cut_document(folder, corpus, number, int(cut))
    cut = int(corpus.offsets[first])
    name, starts = corpus.fingerprint, corpus.offsets
    before, after = _split_counts(corpus.files, first)
    return (
        Corpus(corpus.bytes[:cut], starts[: first + 1], digest(f"{name} to {cut}"), (), before),
        Corpus(corpus.bytes[cut:], starts[first:] - cut, digest(f"{name} from {cut}"), (), after),
    )


def _split_counts(files: Counts, first: int) -> tuple[Counts, Counts]:
    """`Corpus.files` of the documents before the one numbered `first`, and of the rest."""
    before, after = [], []
    for name, count in files:
        here = min(max(first, 0), count)
        before += [(name, here)] if here else []
        after += [(name, count - here)] if here < count else []
        first -= count
    return tuple(before), tuple(after)


def _cut_document(folder: Path, corpus: Corpus, number: int, cut: int) -> tuple[Corpus, Corpus]:
    """Cut at byte `cut`, within the text of document `number`, without another copy on disk.

    Both are copy-on-write maps of the cached file. The tag at the cut overwrites text of the other
    part, which changes a page in memory and never the file.
    """
    try:
        train = np.memmap(folder / "bytes", np.uint8, "c", shape=(cut + len(SEQ_END),))
        validation = np.memmap(folder / "bytes", np.uint8, "c", offset=cut - len(SEQ_START))
    except OSError as error:
        raise PicoError(f"cannot map {folder / 'bytes'}: {reason(error)}") from error
    train[cut:] = np.frombuffer(SEQ_END, np.uint8)
    validation[: len(SEQ_START)] = np.frombuffer(SEQ_START, np.uint8)
    starts, name = corpus.offsets, corpus.fingerprint
    before = np.append(starts[: number + 1], len(train))
    after = np.append(0, starts[number + 1 :] - cut + len(SEQ_START))
    to, _ = _split_counts(corpus.files, number + 1)
    _, since = _split_counts(corpus.files, number)
    for data in (train, validation):
        data.flags.writeable = False
    return (
        Corpus(np.asarray(train), before, digest(f"{name} to {cut}"), (), to),
        Corpus(np.asarray(validation), after, digest(f"{name} from {cut}"), (), since),
    )
