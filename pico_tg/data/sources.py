"""Sources: the files of a local data set, the split of each file, and their documents.

Every file of a folder or an archive is either read, or listed in `Splits.unused` with the reason.
"""

import glob
import logging
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..files import PicoError
from .formats import (
    READERS,
    MissingColumn,
    Pieces,
    Remark,
    decompress,
    document,
    find_column,
    format_of,
    reason,
)

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLITS = ("train", "validation", "test")
HUB = "hf://"
LEFT_OUT = "left out: "  # beginning of the remark about a file without the column of text
KNOWN = f"{', '.join(READERS)}, each also compressed (.gz, .bz2, .xz) or in a .zip"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class File:
    """One file of a data set.

    - name: the path within the data set, which determines format and split
    - path: a local path, or hf://datasets/owner/name@revision/path
    - member: the name within the archive, if `path` is a .zip
    """

    name: str
    path: str
    member: str | None = None

    def open(self, stack: ExitStack) -> BinaryIO:
        """The decompressed content as a seekable stream, which `stack` closes."""
        if self.path.startswith(HUB):
            from huggingface_hub import HfFileSystem

            file = stack.enter_context(HfFileSystem().open(self.path.removeprefix(HUB), "rb"))
        else:
            file = stack.enter_context(open(self.path, "rb"))  # noqa: SIM115
        if self.member is not None:
            archive = stack.enter_context(zipfile.ZipFile(file))
            file = stack.enter_context(archive.open(self.member))
        elif file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise PicoError(f"{self.path} is a pointer of Git LFS; run: git lfs pull")
        else:
            file.seek(0)
        return decompress(file, self.name)

    def stamp(self) -> list:
        """Changes whenever the content may have: [path, member, size, modification time in ns]."""
        stat = os.stat(self.path)
        return [os.path.abspath(self.path), self.member, stat.st_size, stat.st_mtime_ns]

    def key(self) -> tuple:
        """Equal for two paths of the same file, links included."""
        try:
            stat = os.stat(self.path)
        except OSError:  # on the hub
            return self.path, self.member
        return stat.st_dev, stat.st_ino, self.member


@dataclass(frozen=True)
class Source:
    """One split, not yet read.

    - label: for messages
    - identity: JSON that changes whenever the text may have; its hash is the key of the cache
    - read: yields the documents; raises no other exception than PicoError
    - size: bytes, if known beforehand, for the progress bar
    - files: the files to read, in this order; none if `datasets` reads the rows
    """

    label: str
    identity: list
    read: Callable[[Remark], Pieces]
    size: int | None = None
    files: tuple[File, ...] = ()


@dataclass
class Splits:
    """The splits of a data set by name, and sentences about the files in no split."""

    sources: dict[str, Source] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    revision: str | None = None

    def pick(self, name: str | None, dataset: str) -> Source:
        """The split `name`; None is `train` if there is one, otherwise the only split."""
        hint = ""
        if name is None:
            name = next(iter(self.sources)) if len(self.sources) == 1 else "train"
            hint = "; name the split to train on"
        found = self.find(name)
        if found is None:
            there = ", ".join(self.sources)
            raise PicoError(f"{dataset} has no split {name!r}; there is: {there}{hint}")
        return found

    def find(self, name: str) -> Source | None:
        """The split `name`, or the one that means the same, such as dev for validation."""
        same = [n for n in self.sources if SPLIT_WORDS.get(n, n) == SPLIT_WORDS.get(name, name)]
        return self.sources.get(name, self.sources[same[0]] if same else None)


def split_of(name: str) -> str:
    """The split of a path within a data set; the file's name takes precedence over its folders.

    A name with the words of several splits is not training data.
    """
    for part in reversed(name.lower().split("/")):
        found = {SPLIT_WORDS[word] for word in re.split(r"[\W\d_]+", part) if word in SPLIT_WORDS}
        if found:
            return max(found, key=SPLITS.index)
    return "train"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Names in a line: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# Files --------------------------------------------------------------------------------------------


def file_source(
    label: str, files: Iterable[File], column: str | None, identity: list | None = None
) -> Source:
    """The documents of `files`, one file after another.

    identity: see `Source`; by default the path, size and modification time of each file.
    """
    files, size = tuple(files), None
    if identity is None:
        stamps = [file.stamp() for file in files]
        identity = ["files", column, stamps]
        if all(file.name.lower().endswith(".txt") and file.member is None for file in files):
            size = sum(stamp[2] for stamp in stamps)
    return Source(label, identity, partial(_read_files, label, files, column), size, files)


def _read_files(label: str, files: tuple[File, ...], column: str | None, remark: Remark) -> Pieces:
    missing = []
    for file in files:
        name = label if len(files) == 1 else f"{file.name} in {label}"
        try:
            with ExitStack() as stack:
                reader = READERS[format_of(file.name)]
                yield from reader(file.open(stack), name, column, remark)
        except MissingColumn as error:
            missing.append(error)
            remark(f"{LEFT_OUT}{error}")
        except PicoError:
            raise
        except Exception as error:  # also the types of pyarrow, zlib and the hub
            raise PicoError(f"cannot read {name}: {reason(error)}") from error
    if len(missing) == len(files):
        raise missing[0]


def without(source: Source, files: Iterable[File], column: str | None) -> Source | None:
    """`source` without `files`; None if nothing is left."""
    keys = {file.key() for file in files}
    left = [file for file in source.files if file.key() not in keys]
    if len(left) == len(source.files):
        return source
    identity = [*source.identity, "only", [file.name for file in left]]
    return file_source(source.label, left, column, identity) if left else None


def one_file(path: str) -> list[File]:
    """The file `path`, or its members if it is an archive."""
    files, _ = expand_archives([File(os.path.basename(path), path)])
    if not files:
        raise PicoError(
            f"cannot tell what {path} is by its name; the formats are {KNOWN}; "
            "rename plain text to .txt"
        )
    return files


def expand_archives(found: Iterable[File]) -> tuple[list[File], dict[str, str]]:
    """The files that have a reader, members of archives included; why each other file has none."""
    files, unused = [], {}
    for file in found:
        if file.name.lower().endswith(".zip"):
            inner = [File(f"{file.name}/{name}", file.path, name) for name in _members(file)]
        else:
            inner = [file]
        for member in inner:
            if format_of(member.name):
                files.append(member)
            else:
                unused[member.name] = "no format that is read"
    return files, unused


def _members(archive: File) -> list[str]:
    try:
        with ExitStack() as stack:
            file = stack.enter_context(zipfile.ZipFile(archive.open(stack)))
            names = [info.filename for info in file.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise PicoError(f"cannot read {archive.path}: {reason(error)}") from error
    return sorted(name for name in names if not _hidden(name) and "__MACOSX/" not in name)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


# Folders ------------------------------------------------------------------------------------------


def local_folder(path: str, config: str | None, column: str | None) -> Splits:
    """The splits of a folder: a saved dataset, a clone with configurations, or files by name."""
    folder = Path(path)
    names = {entry.name for entry in folder.iterdir()}
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
        return _saved_dataset(folder, column)
    configs = _configurations(folder)
    if config is not None and config not in configs and (folder / config).is_dir():
        return local_folder(str(folder / config), None, column)
    about = _choose_configuration(path, configs, config)
    found, unused = _list_files(folder)
    if not found:
        raise PicoError(f"the folder {path} holds no files")
    files, unread = expand_archives(found)
    unused |= unread
    if about is None:
        empty = {file.name: "empty" for file in files if os.path.getsize(file.path) == 0}
        if len(empty) < len(files):
            files = [file for file in files if file.name not in empty]
            unused |= empty
        splits = _by_name(files)
    else:
        splits = {}
        for split, patterns in _patterns(about).items():
            names = {n for p in patterns for n in glob.iglob(p, root_dir=folder, recursive=True)}
            paths = {str(folder / name) for name in names}
            splits[split] = [file for file in files if file.path in paths]
        chosen = {file.name for members in splits.values() for file in members}
        unused |= {f.name: "not in the configuration" for f in files if f.name not in chosen}
        # README.md was read for the configuration; a file system may ignore the case of its name
        unused = {name: why for name, why in unused.items() if name.lower() != "readme.md"}
    label = path if config is None else f"{path}:{config}"
    return _file_splits(label, splits, unused, column)


def local_archive(path: str, column: str | None) -> Splits:
    """The splits of a .zip, by the names of its files."""
    files, unused = expand_archives([File(os.path.basename(path), path)])
    # only the names of the members determine splits, not the archive's name, which the user gave
    splits = _by_name([replace(file, name=file.member) for file in files])
    return _file_splits(path, splits, unused, column)


def _by_name(files: Iterable[File]) -> dict[str, list[File]]:
    splits: dict[str, list[File]] = {name: [] for name in SPLITS}
    for file in files:
        splits[split_of(file.name)].append(file)
    return splits


def _file_splits(
    label: str, splits: dict[str, list[File]], unused: dict[str, str], column: str | None
) -> Splits:
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        raise PicoError(f"{label} holds no data that can be read; the formats are {KNOWN}")
    sources = {
        name: file_source(split_label(label, name, splits), files, column)
        for name, files in splits.items()
    }
    return Splits(sources, unused_sentences(unused))


def split_label(label: str, name: str, splits: Collection[str]) -> str:
    """The name of a split in messages; the only split has the data set's name."""
    return label if len(splits) == 1 else f"{label}, split {name}"


def _list_files(folder: Path) -> tuple[list[File], dict[str, str]]:
    """All files below a folder, sorted; why each other entry is no file. Skips hidden names.

    Raises OSError on a folder that cannot be listed.
    """
    found, unused = [], {}

    def fail(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(root, name) for name in [*folders, *names]):
            name = path.relative_to(folder).as_posix()
            if _hidden(name):
                continue
            if path.is_file():
                found.append(path)
            elif path.is_symlink() or not path.is_dir():
                unused[name] = "a link to a folder, or no file"
    return [File(path.relative_to(folder).as_posix(), str(path)) for path in sorted(found)], unused


def _choose_configuration(path: str, configs: dict[str, dict], name: str | None) -> dict | None:
    """The configuration `name`, by default the default one; None if there are none."""
    if name is None:
        defaults = [n for n in configs if configs[n].get("default") or n == "default"]
        if len(configs) > 1 and not defaults:
            raise PicoError(
                f"{path} has the configurations {', '.join(configs)}; name one, as in "
                f"{path}:{next(iter(configs))}"
            )
        name = next(iter(defaults or configs), None)
    elif name not in configs:
        there = ", ".join(configs) or "none"
        raise PicoError(f"{path} has no configuration {name!r}; there is: {there}")
    return configs.get(name)


def unused_sentences(unused: dict[str, str]) -> list[str]:
    """One sentence for each reason, with the names of the unused files."""
    reasons: dict[str, list[str]] = {}
    for name, why in unused.items():
        reasons.setdefault(why, []).append(name)
    return [f"{listed(names)} ({why})" for why, names in reasons.items()]


def _configurations(folder: Path) -> dict[str, dict]:
    """The configurations that the README.md of a hub data set declares, by name."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    header = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    if header is None or not re.search(r"^configs:", header[1], re.MULTILINE):
        return {}
    import yaml

    try:
        configs = yaml.safe_load(header[1])["configs"]
        configs = {about["config_name"]: about for about in configs}
        for about in configs.values():
            _patterns(about)
    except (yaml.YAMLError, TypeError, KeyError) as error:
        card = folder / "README.md"
        raise PicoError(f"cannot read the configurations in {card}: {reason(error)}") from error
    return configs


def _patterns(about: dict) -> dict[str, list[str]]:
    """The file patterns of each split of a configuration."""
    files, base = about.get("data_files"), about.get("data_dir", "")
    if files is None:
        files = [f"{glob.escape(base)}/**" if base else "**"]
        base = ""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    splits: dict[str, list[str]] = {}
    for entry in [files] if isinstance(files, str) else files:
        if isinstance(entry, str):
            entry = {"split": "train", "path": entry}
        paths = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        splits.setdefault(entry["split"], []).extend(os.path.join(base, path) for path in paths)
    return splits


# Other data ---------------------------------------------------------------------------------------


def python_docs() -> Splits:
    """The topics of Python's built-in help, one document each."""
    from pydoc_data.topics import topics

    documents = [topics[name].encode() for name in sorted(topics) if topics[name]]

    def read(remark: Remark) -> Pieces:
        return ((text, True) for text in documents)

    size = sum(map(len, documents))
    identity = ["python-docs", [text.decode() for text in documents]]
    return Splits({"train": Source("python-docs", identity, read, size)})


def _saved_dataset(folder: Path, column: str | None) -> Splits:
    files = [File(str(file), str(file)) for file in sorted(folder.rglob("*")) if file.is_file()]
    identity = ["saved", column, [file.stamp() for file in files]]
    try:
        loaded = quiet_datasets().load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets have their own types
        raise PicoError(f"cannot read the dataset in {folder}: {reason(error)}") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    sources = {}
    for name, split in splits.items():
        label = split_label(str(folder), name, splits)
        read = partial(read_rows, label, split, column)
        sources[name] = Source(label, [*identity, name], read)
    return Splits(sources)


def quiet_datasets():
    """The `datasets` module, imported on demand, since the import takes seconds."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are raised as well
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    return datasets


def read_rows(label: str, dataset, column: str | None, remark: Remark) -> Pieces:
    """One document per row of a dataset of `datasets`. Empty rows are skipped."""
    try:
        # Arrow batches are far faster than rows, and each text is copied only when it is yielded;
        # few rows a batch, since `datasets` collects them in memory, and they may be long
        for batch in dataset.with_format("arrow").iter(batch_size=16):
            name = find_column(label, batch.column_names, column)
            for scalar in batch.column(name):
                if text := document(label, name, scalar.as_py(), batch.column_names):
                    yield text, True
    except PicoError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets have their own types
        raise PicoError(f"cannot read {label}: {reason(error)}") from error
