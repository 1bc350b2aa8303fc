"""Data: a DATASET string becomes two flat, memory-mapped byte corpora, train and validation.

- spec.py: DataSpec, which data to train and validate on
- folder.py and hub.py: the files that it names, and the split of each
- formats.py: a file becomes documents
- corpus.py: documents become a corpus, once
- hold_out.py: the end of a corpus becomes validation data
- overlap.py: how much of a text also occurs in another one
- windows.py: a corpus becomes batches
"""

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import PicoError, differences
from .corpus import SEQ_END, SEQ_START, Corpus, cached
from .folder import Found, find, listed
from .hold_out import hold_out
from .overlap import CHANCE, shared
from .spec import PYTHON_DOCS, DataSpec
from .windows import MAX_BATCH_BYTES, Windows

__all__ = [
    "MAX_BATCH_BYTES", "SEQ_END", "SEQ_START", "Corpus", "Data", "DataSpec", "Windows",
    "describe_data", "has_validation", "load_data", "load_whole", "open_data", "stored_spec",
    "trained_on",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Data:
    """What `load_data` found.

    - note: what is trained on, what is validated on, and the remarks; one to few lines
    - spec: the given one with absolute paths, so that it means the same in any working directory,
      and with the revision of hub data
    - remarks: which files are not used and why, and what the user should know about the others
    """

    train: Corpus
    validation: Corpus
    note: str
    spec: DataSpec
    remarks: tuple[str, ...] = ()


def load_data(spec: DataSpec, progress: bool = True) -> Data:
    """Open the data of `spec`; the first time, read the files into the cache.

    progress: show a bar on stderr while downloading and while building the cache. Raises PicoError,
    and leaves no corpus in the cache, on data that is missing, unreadable, empty or of a format
    that is not read, on a column or split that does not exist, on hub data that is too large to
    download unless a file is named, and on a full disk.
    """
    found = find(spec)
    found.fetch(progress)
    folder, train = cached(found.train, progress)
    label, remarks = found.train.label, _unused(found) + train.remarks
    if found.validation is None:
        documents = train.documents
        train, validation = hold_out(label, folder, train, spec.validation_size)
        alone = ", which is one document" if documents == 1 else ", cut within a document"
        alone = alone if train.documents + validation.documents > documents else ""
        held_out = f"the end of {label}{alone}: {_sizes(validation)}"
        held_out += _files(validation) if len(found.train.files) > 1 else ""
    else:
        _, validation = cached(found.validation, progress)
        unused = "" if spec.validation_size is None else " (so validation_size is not used)"
        held_out = f"{found.validation.label}{unused}: {_sizes(validation)}{_files(validation)}"
        remarks += validation.remarks
    if train.fingerprint == validation.fingerprint:
        raise PicoError(
            f"{label} and the validation data hold the same text; name other data to "
            "validate on, or none to hold out the end"
        )
    note = [f"training on {_sizes(train)}{_files(train)}; validating on {held_out}", *remarks]
    if (share := shared(validation.bytes, train.bytes)) > CHANCE:
        note.append(f"warning: about {share:.0%} of the text to validate on is also trained on")
    return Data(train, validation, "\n".join(note), found.spec, remarks)


def load_whole(spec: DataSpec, progress: bool = True) -> Corpus:
    """The training data of `load_data`, including the part that `load_data` would hold out.

    One document of one byte is enough. Its remarks are those of `Data`. Raises PicoError as
    `load_data` does.
    """
    found = find(spec)
    found.fetch(progress)
    corpus = cached(found.train, progress)[1]
    return dataclasses.replace(corpus, remarks=_unused(found) + corpus.remarks)


def has_validation(spec: DataSpec) -> bool:
    """Whether `spec` gives a validation_size, names validation data or has a validation split."""
    return spec.validation_size is not None or find(spec).validation is not None


def _unused(found: Found) -> tuple[str, ...]:
    return (f"not used: {'; '.join(found.unused)}",) if found.unused else ()


def _sizes(corpus: Corpus) -> str:
    documents = "1 document" if corpus.documents == 1 else f"{corpus.documents:,} documents"
    return f"{len(corpus.bytes):,} bytes in {documents}"


def _files(corpus: Corpus) -> str:
    names = [name for name, _ in corpus.files]
    return f" from {names[0] if len(names) == 1 else f'{len(names)} files ({listed(names)})'}"


# The data of a run --------------------------------------------------------------------------------


def stored_spec(stored: dict[str, Any], run: Path) -> DataSpec:
    """The data of a run, from its training.json. Raises PicoError if the entry is broken."""
    try:
        return DataSpec(**stored["dataset"])
    except (TypeError, PicoError) as error:
        raise PicoError(f"{run}/training.json is broken: dataset: {error}") from error


def open_data(
    dataset: str | os.PathLike | DataSpec | Data | None,
    stored: dict[str, Any],
    run: Path | None,
    progress: bool,
) -> Data:
    """The data to train on; by default those of the run to resume, whose training.json is `stored`.

    Raises PicoError if that run was trained on other data; the path of the same data may differ.
    """
    if dataset is not None and not isinstance(dataset, DataSpec | Data):
        dataset = DataSpec(dataset)
    before = stored_spec(stored, run) if stored else DataSpec()
    if dataset is None:
        dataset = before
    elif isinstance(dataset, DataSpec) and dataset.dataset == before.dataset:
        revision = dataset.revision or before.revision  # the hub may have a newer one
        dataset = dataclasses.replace(dataset, revision=revision)
    try:
        data = dataset if isinstance(dataset, Data) else load_data(dataset, progress=progress)
    except PicoError as error:
        if dataset is not before or not os.path.isabs(before.dataset) or before.path.exists():
            raise
        raise PicoError(
            f"{error}; if it was moved, give DATASET (and --valid, if the run had it) with the new "
            "path"
        ) from error
    described = describe_data(data)
    if not stored or described["fingerprints"] == stored["fingerprints"]:
        return data
    if changed := differences(stored["dataset"], described["dataset"]):
        raise PicoError(
            f"{run} was trained on other data: {changed}; leave DATASET and its options out to "
            "continue with the run's, or train a new RUN"
        )
    why = ""
    if data.spec.dataset == PYTHON_DOCS:
        why = f" (python-docs are those of the Python that runs, now {platform.python_version()})"
    raise PicoError(f"the data of {run} have changed since{why}; train a new RUN on them")


def trained_on(text: np.ndarray, data: Data | Corpus, stored: dict[str, Any], run: Path) -> str:
    """A line: how much of `text` (uint8) `run` was trained on; "" for no more than CHANCE.

    `data`: where `text` is from; may be the data of the run under another path. If the data of the
    run have changed or are missing, the line says that the share is not known.
    """
    try:
        if (
            isinstance(data, Corpus)
            or describe_data(data)["fingerprints"] != stored["fingerprints"]
        ):
            found = find(stored_spec(stored, run))
            if found.spec.revision and not all(file.path.is_file() for file in found.train.files):
                raise PicoError(f"{found.spec.dataset} is not downloaded")
            data = open_data(None, stored, run, False)
        share = shared(text, data.train.bytes)
    except PicoError as error:
        return f"it is not known whether {run} was trained on this text: {error}"
    line = f"{run} was trained on about {share:.0%} of this text"
    return line if share > CHANCE else ""


def describe_data(data: Data) -> dict[str, Any]:
    """The entries of training.json about the data."""
    return {
        "dataset": dataclasses.asdict(data.spec),
        "data": data.note,
        "fingerprints": [data.train.fingerprint, data.validation.fingerprint],
    }
