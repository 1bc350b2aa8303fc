"""A data set is a folder of files: a local one, or one on the hub.

`find` chooses the files to train on and those to validate on, by the options of a DataSpec and by
the names of the files. Each file is used, or named in `Found.unused` with the reason. Nothing is
read or downloaded yet.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..files import PicoError, atomic_write, did_you_mean
from .corpus import ROOM, File, Source, cache_root, digest, writing_cache
from .formats import COMPRESSIONS, READERS, format_of, reason
from .hub import download, open_hub
from .spec import PYTHON_DOCS, DataSpec

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLITS = ("train", "validation", "test")
KNOWN = f"the formats are {', '.join(READERS)}, each also compressed ({', '.join(COMPRESSIONS)})"
ZIP = ".zip is not read: unpack it into a folder"


@dataclass(frozen=True)
class Found:
    """Sources without a file in common; validation is None if it is to be held out of train.

    - unused: one sentence for each reason, with the names of the files
    - spec: the given one with absolute paths, and with the revision of hub data
    - fetch: called with `progress` before files are read, makes or downloads them
    """

    train: Source
    validation: Source | None
    unused: list[str]
    spec: DataSpec
    fetch: Callable[[bool], None]


def find(spec: DataSpec) -> Found:
    """The files that `spec` names. Raises PicoError on a missing file, folder or split."""
    try:
        folder = _open(spec)
        if spec.train_file is not None:
            train = folder.file(spec.train_file)
        else:
            train = folder.split(spec.train_split)
        validation = _validation(spec, folder, train)
        if validation is not None:
            label, train = train.label, train.without(validation.files)
            if not train.files:
                raise PicoError(
                    f"{label} is to be both the training and the validation data; to hold out the "
                    "end of the data instead, give no validation file or split"
                )
        used = [file for source in (train, validation) if source for file in source.files]
        plain = all(format_of(file.name) in (".txt", None) for file in used)  # None: python-docs
        if spec.column_name is not None and plain:
            raise PicoError(
                f"{spec.dataset} is plain text, which has no column {spec.column_name!r}; leave "
                "column_name out"
            )
        unused = folder.unused | {
            file.name: f"split {name}"
            for name in folder.splits
            for file in folder.split(name).without(used).files
        }
        absolute = _absolute(spec, folder)
    except OSError as error:
        raise PicoError(f"cannot read {spec.dataset}: {reason(error)}") from error
    fetch = partial(folder.fetch, [file.path for file in used])
    return Found(train, validation, _sentences(unused), absolute, fetch)


def _validation(spec: DataSpec, folder: "Folder", train: Source) -> Source | None:
    if spec.validation_file is not None:
        return folder.file(spec.validation_file)
    if spec.validation_split is not None:
        return folder.split(spec.validation_split)
    if spec.train_file is not None and (spec.validation_size is not None or folder.revision):
        return None
    if "validation" not in folder.splits:
        return None
    # nothing is left of the split if it is trained on
    left = folder.split("validation").without(train.files)
    return left if left.files else None


def _absolute(spec: DataSpec, folder: "Folder") -> DataSpec:
    changes = {"revision": folder.revision}
    if spec.is_local:
        changes["dataset"] = os.path.abspath(spec.path)
    for name in ("train_file", "validation_file"):
        file = getattr(spec, name)
        if file is not None and folder.inside(file) is None:
            changes[name] = os.path.abspath(os.path.expanduser(file))
    return dataclasses.replace(spec, **changes)


# The files of a data set --------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The files of a data set, by split.

    - place: the data set's name, for messages
    - root: where its files are, or will be once fetched
    - unused: the name of each file that is in no split, and the reason
    - revision: the commit of data on the hub
    - fetch: called with (paths, progress), makes or downloads the files that are not there
    """

    place: str
    root: Path
    column: str | None
    splits: dict[str, list[File]]
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    revision: str | None = None
    fetch: Callable[[list[Path], bool], None] = lambda paths, progress: None

    def split(self, name: str | None) -> Source:
        """A split; None is train if there are several. Raises PicoError if there is none."""
        hint = ""
        if name is None:
            name = next(iter(self.splits)) if len(self.splits) == 1 else "train"
            hint = "; name the split to train on"
        found = SPLIT_WORDS.get(name, name)
        if found not in self.splits:
            there = ", ".join(self.splits)
            raise PicoError(f"{self.place} has no split {name!r}; there is: {there}{hint}")
        label = self.place if len(self.splits) == 1 else f"{self.place}, split {found}"
        return Source(label, tuple(self.splits[found]), self.column)

    def file(self, name: str) -> Source:
        """A file of the data set, or any other file. Raises PicoError if there is none."""
        file = self.inside(name)
        if file is not None and self.revision:
            return Source(f"{self.place}/{name}", (file,), self.column)
        if self.revision and name in self.unused:
            raise PicoError(f"{self.place}/{name} cannot be read: {self.unused[name]}; {KNOWN}")
        path = file.path if file else Path(os.path.expanduser(name))
        if not path.is_file():
            raise PicoError(f"there is no file {name!r}, neither in {self.place} nor here")
        return Source(str(path), (_readable_file(name, path),), self.column)

    def inside(self, name: str) -> File | None:
        """The file of this name in the data set."""
        if self.revision is None:
            path = self.root / name
            return _local_file(name, path) if path.is_file() else None
        return next((f for files in self.splits.values() for f in files if f.name == name), None)


def _open(spec: DataSpec) -> Folder:
    if spec.dataset == PYTHON_DOCS and spec.revision is None:
        return _python_docs(spec)
    if spec.is_local and spec.path.is_dir():
        return _local_folder(spec)
    if spec.is_local:
        splits = {"train": [_readable_file(spec.path.name, spec.path)]}
        return Folder(spec.dataset, spec.path.parent, spec.column_name, splits)
    name, _, part = spec.dataset.partition(":")
    if spec.revision is None and part and os.path.isdir(os.path.expanduser(name)):
        raise PicoError(f"there is no {spec.dataset}; a folder of {name} is written {name}/{part}")
    looks_local = spec.dataset.startswith((".", "/", "~")) or name.count("/") > 1
    looks_local |= bool(format_of(spec.dataset)) or spec.dataset.lower().endswith(".zip")
    if re.search(r"\n|.{4096}" if looks_local else r"\s|.{256}", spec.dataset):
        shown = f"{spec.dataset[:60]!r}{'…' if spec.dataset[60:] else ''}"
        raise PicoError(f"{shown} is no data set or file; `score` and eval --text measure a text")
    if looks_local:
        if os.path.exists(spec.path):
            raise PicoError(f"{spec.dataset} is a local path, not on the hub; leave revision out")
        there = []
        with contextlib.suppress(OSError):
            there = os.listdir(spec.path.parent)
        meant = did_you_mean(spec.path.name, there, spec.path.parent)
        raise PicoError(f"there is no file or folder {spec.dataset}{meant}")
    return _hub_folder(spec, name, part)


def _python_docs(spec: DataSpec) -> Folder:
    """The topics of Python's built-in help, one document each, as a file in the cache."""
    from pydoc_data.topics import topics

    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    path = cache_root() / f"python-docs-{digest(rows)}.jsonl"

    def fetch(paths: list[Path], progress: bool) -> None:
        if not path.exists():
            with writing_cache():
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomic_write(path) as file:
                    file.write(rows.encode())
            except PicoError as error:
                raise PicoError(f"{error}; {ROOM}") from error

    unused = {}
    if os.path.exists(PYTHON_DOCS):
        unused[f"./{PYTHON_DOCS}"] = "python-docs is built into Python; ./ names this folder"
    splits = {"train": [File(PYTHON_DOCS, path, path)]}
    return Folder(PYTHON_DOCS, path.parent, None, splits, unused, fetch=fetch)


def _local_folder(spec: DataSpec) -> Folder:
    root = spec.path
    sizes = dict(_sizes(root, root))
    splits, unused = _by_name(spec.dataset, sizes, lambda name: _local_file(name, root / name))
    if spec.train_file is None:
        if archives := [name for name in unused if unused[name] == ZIP]:
            raise PicoError(f"{spec.dataset} holds {listed(archives)}; {ZIP}, or move it elsewhere")
        _check_card(spec.dataset, root, splits, "/")
    return Folder(spec.dataset, root, spec.column_name, splits, unused)


def _sizes(folder: Path, root: Path) -> Iterator[tuple[str, int | None]]:
    """The name and size of each file; None for what is no file. Names with a dot are skipped."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _sizes(path, root)
        else:
            yield path.relative_to(root).as_posix(), path.stat().st_size if path.is_file() else None


def _hub_folder(spec: DataSpec, name: str, part: str) -> Folder:
    """The files of `owner/name`, or of the folder `part` of it."""
    root, known, unused = open_hub(name, spec.revision)
    prefix = f"{part.strip('/')}/" if part else ""
    visible = [path for path in known if not re.search(r"(^|/)\.", path)]
    sizes = {path.removeprefix(prefix): known[path] for path in visible if path.startswith(prefix)}
    if part and not sizes:
        folders = listed(sorted({path.split("/")[0] for path in visible if "/" in path})) or "none"
        raise PicoError(f"{name} has no folder {part!r}; its folders: {folders}")
    place = root / prefix
    splits, unread = _by_name(spec.dataset, sizes, lambda name: File(name, place / name, name))
    if spec.train_file is None and not part:
        _check_card(name, root, splits, ":")
    named = spec.train_file is not None
    fetch = partial(download, name, root, known, named)
    return Folder(spec.dataset, place, spec.column_name, splits, unread | unused, root.name, fetch)


def _local_file(name: str, path: Path) -> File:
    stat = path.stat()
    return File(name, path, (stat.st_dev, stat.st_ino))


def _readable_file(name: str, path: Path) -> File:
    if path.suffix.lower() == ".zip":
        raise PicoError(f"cannot read {path}: {ZIP}")
    if format_of(path.name) is None:
        raise PicoError(
            f"cannot tell what {path} is by its name; {KNOWN}; rename plain text to .txt"
        )
    if not path.is_file():  # a pipe could be read only once
        raise PicoError(f"{path} is no regular file; write its text to one")
    return _local_file(name, path)


def _by_name(
    place: str, sizes: dict[str, int | None], at: Callable[[str], File]
) -> tuple[dict[str, list[File]], dict[str, str]]:
    """The files of each split, by their names; why each other file is unused."""
    ends = {name.rpartition("/")[2] for name in sizes}
    if "dataset_dict.json" in ends or ends >= {"state.json", "dataset_info.json"}:
        raise PicoError(
            f"{place} holds what save_to_disk of `datasets` wrote, which is not read; write each "
            'split as a file: load_from_disk(…)["train"].to_parquet("train.parquet")'
        )
    splits, unused = {name: [] for name in SPLITS}, {}
    for name in sorted(sizes, key=lambda name: name.split("/")):
        if sizes[name] is None:
            unused[name] = "a link to a folder, or no file"
        elif format_of(name) is None:
            unused[name] = ZIP if name.lower().endswith(".zip") else "no format that is read"
        elif sizes[name] == 0:
            unused[name] = "empty"
        else:
            splits[split_of(name)].append(at(name))
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        there = (
            f"no data that can be read: {'; '.join(_sentences(unused))}" if sizes else "no files"
        )
        raise PicoError(f"{place} holds {there}; {KNOWN}")
    return splits, unused


def split_of(name: str) -> str:
    """The split of a path within a data set; the file's name takes precedence over its folders.

    A name with the words of several splits is not training data.
    """
    for part in reversed(name.lower().split("/")):
        found = {SPLIT_WORDS[word] for word in re.split(r"[\W\d_]+", part) if word in SPLIT_WORDS}
        if found:
            return max(found, key=SPLITS.index)
    return "train"


def _check_card(place: str, root: Path, splits: dict[str, list[File]], joint: str) -> None:
    """Refuse data whose README.md, as on the hub, declares other splits than the files' names."""
    card = root / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    if not re.match(r"---\s*\n((?!---).*\n)*configs:", text):
        return
    from huggingface_hub import metadata_load

    files, declared = [file.name for split in splits.values() for file in split], {}
    with contextlib.suppress(Exception):  # what cannot be read, or is several, declares nothing
        (configuration,) = metadata_load(card)["configs"]
        for entry in configuration["data_files"]:
            paths = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            split = SPLIT_WORDS.get(entry["split"], entry["split"])
            declared |= {n: split for n in files for p in paths if fnmatch.fnmatchcase(n, p)}
    wrong = [f.name for name in splits for f in splits[name] if declared.get(f.name) != name]
    if wrong:
        folder = next((name.rpartition("/")[0] for name in files if "/" in name), "FOLDER")
        raise PicoError(
            f"the README.md of {place} declares configurations or splits that are not read from "
            f"the names of the files ({listed(wrong)}); name a folder of it, as in "
            f"{place}{joint}{folder}, or files by train_file and validation_file"
        )


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Names in a line: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _sentences(unused: dict[str, str]) -> list[str]:
    """One sentence for each reason, with the names of the unused files."""
    reasons: dict[str, list[str]] = {}
    for name, why in unused.items():
        reasons.setdefault(why, []).append(name)
    return [f"{listed(names)} ({why})" for why, names in reasons.items()]
