"""Data: a DATASET string becomes two flat, memory-mapped byte corpora, train and validation.

- spec.py: DataSpec, which data to train and validate on
- sources.py and hub.py: which files those are, and which split each belongs to
- formats.py: files become documents; cache.py: documents become a corpus
- __init__.py: training and validation data without a document in common
- windows.py: a corpus becomes batches
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import PicoError, differences
from .cache import SEQ_END, SEQ_START, Corpus, cached, digest
from .formats import format_of, reason
from .hub import hub_splits
from .sources import (
    HUB,
    LEFT_OUT,
    Source,
    Splits,
    file_source,
    listed,
    local_archive,
    local_folder,
    one_file,
    python_docs,
    without,
)
from .spec import PYTHON_DOCS, DataSpec
from .windows import MAX_BATCH_BYTES, Windows

__all__ = [
    "MAX_BATCH_BYTES",
    "SEQ_END",
    "SEQ_START",
    "Corpus",
    "Data",
    "DataSpec",
    "Windows",
    "describe_data",
    "has_validation",
    "load_data",
    "load_whole",
    "open_data",
    "stored_spec",
]

HELD_OUT = 0.05  # of the bytes, by default


@dataclass(frozen=True, eq=False)
class Data:
    """What `load_data` found.

    - note: what is trained on, what is validated on, and what is not used and why; one to few lines
    - spec: the given one, with the revision of hub data
    """

    train: Corpus
    validation: Corpus
    note: str
    spec: DataSpec


def load_data(spec: DataSpec, progress: bool = True) -> Data:
    """Open the data of `spec`; the first time, stream the data into the cache.

    progress: show a bar on stderr while building the cache. Raises PicoError, and leaves no files,
    on data that is missing, unreadable or empty, on a column or split that does not exist, and on a
    full disk.
    """
    found = _find(spec)
    folder, train = cached(found.train, progress)
    files, remarks = _files_read(found.train, train), list(train.remarks)
    if found.validation is None:
        label = found.train.label
        train, validation, origin = _hold_out(label, folder, train, spec.validation_size)
        held_out = _sizes(validation)
    else:
        _, validation = cached(found.validation, progress)
        origin = found.validation.label
        held_out = _sizes(validation) + _files_read(found.validation, validation)
        remarks += validation.remarks
        if spec.validation_size is not None:
            origin += " (so validation_size is not used)"
    if train.fingerprint == validation.fingerprint:
        raise _same_data(found.train.label)
    note = f"training on {_sizes(train)}{files}; validating on {origin}: {held_out}"
    if found.unused:
        note = f"{note}\nnot used: {'; '.join(found.unused)}"
    return Data(train, validation, "\n".join([note, *remarks]), found.spec)


def load_whole(spec: DataSpec, progress: bool = True) -> Corpus:
    """The training data of `load_data`, including the part that `load_data` would hold out.

    One document of one byte is enough. Raises PicoError as `load_data` does.
    """
    return cached(_find(spec).train, progress)[1]


def has_validation(spec: DataSpec) -> bool:
    """Whether `spec` gives a validation_size, names validation data or has a validation split."""
    return spec.validation_size is not None or _find(spec).validation is not None


def _sizes(corpus: Corpus) -> str:
    documents = "1 document" if corpus.documents == 1 else f"{corpus.documents:,} documents"
    return f"{len(corpus.bytes):,} bytes in {documents}"


def _files_read(source: Source, corpus: Corpus) -> str:
    """The files of `source` that hold the text of `corpus`; remarks name the files left out."""
    names = [
        file.name
        for file in source.files
        if not any(text.startswith(f"{LEFT_OUT}{file.name} in ") for text in corpus.remarks)
    ]
    if len(names) > 1:
        return f" from {len(names)} files ({listed(names)})"
    return f" from {names[0]}" if names else ""


def _same_data(label: str) -> PicoError:
    return PicoError(
        f"{label} is to be both the training and the validation data; to hold out the end of the "
        "data instead, give no validation file or split"
    )


# The data of a run --------------------------------------------------------------------------------


def stored_spec(stored: dict[str, Any], run: Path) -> DataSpec:
    """The data of a run, from its training.json. Raises PicoError if the entry is broken."""
    try:
        return DataSpec(**stored["dataset"])
    except TypeError as error:
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
    if isinstance(dataset, str | os.PathLike):
        dataset = DataSpec(dataset)
    before = stored_spec(stored, run) if stored else DataSpec()
    if dataset is None:
        dataset = before
    elif isinstance(dataset, DataSpec) and dataset.dataset == before.dataset:
        revision = dataset.revision or before.revision  # the hub may have a newer one
        dataset = dataclasses.replace(dataset, revision=revision)
    data = dataset if isinstance(dataset, Data) else load_data(dataset, progress=progress)
    described = describe_data(data)
    if not stored or described["fingerprints"] == stored["fingerprints"]:
        return data
    if changed := differences(stored["dataset"], described["dataset"]):
        raise PicoError(f"{run} was trained on other data: {changed}")
    raise PicoError(f"the data of {run} have changed since; train a new RUN on them")


def describe_data(data: Data) -> dict[str, Any]:
    """The entries of training.json about the data."""
    spec = data.spec.absolute()  # so that the run can be resumed from any folder
    fingerprints = [data.train.fingerprint, data.validation.fingerprint]
    return {"dataset": dataclasses.asdict(spec), "data": data.note, "fingerprints": fingerprints}


# What a DataSpec names ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Sources without a file in common; validation is None if it is to be held out of train."""

    train: Source
    validation: Source | None
    unused: list[str]
    spec: DataSpec


def _find(spec: DataSpec) -> _Found:
    splits = _splits(spec, spec.train_file)
    spec = dataclasses.replace(spec, revision=splits.revision)  # also of the validation data
    train = splits.pick(spec.train_split, spec.train_file or spec.dataset)
    whole = splits if spec.train_file is None else _splits_beside_train_file(spec)
    if spec.validation_file is not None:
        file = spec.validation_file
        validation = _splits(spec, file).pick(None, file)
    elif spec.validation_split is not None:
        validation = whole.pick(spec.validation_split, spec.dataset)
    else:
        validation = whole.find("validation")
        if validation is train or (
            spec.train_file is not None and spec.validation_size is not None
        ):
            validation = None
        elif validation is not None and spec.train_file is not None:
            validation = without(validation, train.files, spec.column_name)
    unused = [*splits.unused, *_unused_splits(whole, [train, validation], spec)]
    if validation is not None:
        if not train.files and validation.files and validation.files[0].path.startswith(HUB):
            raise PicoError(
                f"{spec.validation_file} may be part of {train.label}, whose files are not known; "
                "name a train_file too"
            )
        left = without(train, validation.files, spec.column_name)
        if left is None or train is validation:
            raise _same_data(train.label)
        train = left
    return _Found(train, validation, unused, spec)


def _splits_beside_train_file(spec: DataSpec) -> Splits:
    """The splits of the dataset, if `train_file` alone is trained on.

    Unless a split is named, the splits are optional: there are none if the dataset cannot be opened
    as a whole, or is on the hub, where the splits would depend on whether the hub can be reached.
    """
    if spec.validation_split is not None:
        return _splits(spec, None)
    try:
        return _splits(spec, None) if spec.is_local() else Splits()
    except PicoError:
        return Splits()


def _unused_splits(splits: Splits, used: list[Source | None], spec: DataSpec) -> Iterator[str]:
    """The unused splits, each with those of its files that no used split contains."""
    files = [file for source in used if source is not None for file in source.files]
    for name, source in splits.sources.items():
        left = without(source, files, spec.column_name)
        if left is not None and all(source is not other for other in used):
            names = f"{listed(file.name for file in left.files)} " if left.files else ""
            yield f"{names}(split {name})"


def _splits(spec: DataSpec, file: str | None) -> Splits:
    """The splits of the dataset, or of one file that belongs to it."""
    (path, config), column = spec.path_and_config(), spec.column_name
    local = spec.is_local()
    embedded = spec.revision is None and spec.dataset == PYTHON_DOCS
    try:
        if file is not None:
            found = spec.beside(file) or os.path.expanduser(file)
            if os.path.isfile(found):
                splits = {"train": file_source(found, one_file(found), column)}
                return Splits(splits, revision=spec.revision)
            if embedded or local:
                raise PicoError(f"there is no file {file!r}, neither in {spec.dataset} nor here")
        elif embedded:
            if column is not None:
                raise PicoError(f"python-docs has no column {column!r}; leave column_name out")
            return python_docs()
        elif local and os.path.isdir(path):
            return local_folder(path, config, column)
        elif local and path.lower().endswith(".zip"):
            return local_archive(path, column)
        elif local:
            return Splits({"train": file_source(path, one_file(path), column)})
    except OSError as error:
        raise PicoError(f"cannot read {error.filename or path}: {reason(error)}") from error

    looks_local = spec.dataset.startswith((".", "/", "~")) or spec.dataset.count("/") > 1
    if looks_local or format_of(path) or path.lower().endswith(".zip"):
        raise PicoError(f"there is no file or folder {spec.dataset}")
    return hub_splits(spec.dataset, spec.revision, file, column)


# Holding out validation data ----------------------------------------------------------------------


def _hold_out(
    label: str, folder: Path, corpus: Corpus, size: float | int | None
) -> tuple[Corpus, Corpus, str]:
    """Cut the end off `corpus`: (train, validation, where validation comes from)."""
    if corpus.documents == 1:
        if isinstance(size, int):
            raise PicoError(
                f"{label} is one document, so validation_size must be a fraction of it, not {size}"
            )
        train, validation = _cut_document(label, folder, corpus, size or HELD_OUT)
        return train, validation, f"the end of {label}, which is one document"

    if isinstance(size, int):
        if size >= corpus.documents:
            raise PicoError(
                f"validation_size ({size}) leaves nothing to train on: {label} has "
                f"{corpus.documents} documents"
            )
        first = corpus.documents - size
    else:
        # the document start that is nearest to the wanted cut
        wanted = len(corpus.bytes) * (1 - (size or HELD_OUT))
        first = int(np.searchsorted(corpus.offsets, wanted))
        if wanted - corpus.offsets[first - 1] < corpus.offsets[first] - wanted:
            first -= 1
        first = min(max(first, 1), corpus.documents - 1)
    cut = int(corpus.offsets[first])
    train = Corpus(
        corpus.bytes[:cut],
        corpus.offsets[: first + 1],
        digest(f"{corpus.fingerprint} to {cut}"),
    )
    validation = Corpus(
        corpus.bytes[cut:],
        corpus.offsets[first:] - cut,
        digest(f"{corpus.fingerprint} from {cut}"),
    )
    return train, validation, f"the end of {label}"


def _cut_document(
    label: str, folder: Path, corpus: Corpus, fraction: float
) -> tuple[Corpus, Corpus]:
    """Cut a single document into two wrapped documents, without another copy on disk.

    Both are copy-on-write maps of the cached file. The tag at the cut overwrites text of the other
    part, which changes a page in memory and never the file.
    """
    length = len(corpus.bytes) - len(SEQ_START) - len(SEQ_END)
    held_out = max(1, round(length * fraction))
    if held_out >= length:
        raise PicoError(f"{label} is too small to hold validation data out: {length} bytes")
    cut = len(SEQ_START) + length - held_out
    try:
        train = np.memmap(folder / "bytes", np.uint8, "c", shape=(cut + len(SEQ_END),))
        validation = np.memmap(folder / "bytes", np.uint8, "c", offset=cut - len(SEQ_START))
    except OSError as error:
        raise PicoError(f"cannot map {folder / 'bytes'}: {reason(error)}") from error
    train[cut:] = np.frombuffer(SEQ_END, np.uint8)
    validation[: len(SEQ_START)] = np.frombuffer(SEQ_START, np.uint8)
    return (
        _lone_document(train, f"{corpus.fingerprint} to {cut}"),
        _lone_document(validation, f"{corpus.fingerprint} from {cut}"),
    )


def _lone_document(data: np.memmap, identity: str) -> Corpus:
    data.flags.writeable = False
    return Corpus(np.asarray(data), np.array([0, len(data)], np.int64), digest(identity))
