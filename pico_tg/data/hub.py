"""Data sets on the Hugging Face hub at a fixed revision; cached ones are read without network.

PICO_CACHE/hub-<key>.json lists the splits and files of each revision of a data set that was used,
the latest use last. With this file and the cached corpora, a run needs no answer from the hub.
"""

import json
from functools import partial
from pathlib import Path

from ..files import PicoError, atomic_write
from .cache import CACHE_FORMAT, cache_folder, cache_root, digest, open_cache, writing_cache
from .formats import Pieces, Remark, format_of, reason
from .sources import (
    HUB,
    KNOWN,
    File,
    Source,
    Splits,
    expand_archives,
    file_source,
    quiet_datasets,
    read_rows,
    split_label,
    unused_sentences,
)


def hub_splits(dataset: str, revision: str | None, file: str | None, column: str | None) -> Splits:
    """The splits of `owner/name` or `owner/name:config`, or of one file of it, at a revision.

    revision: a commit, tag or branch; None is the newest, or, if the hub cannot be reached, the
    cached revision that was used last. Raises PicoError if there is no such data set.
    """
    name, _, config = dataset.partition(":")
    label = dataset if file is None else f"{dataset}/{file}"
    index_key = digest(json.dumps([CACHE_FORMAT, name, config, file]))
    index_path = cache_root() / f"hub-{index_key}.json"
    entries = _read_index(index_path)

    def splits_of(entry: dict) -> Splits:
        return _splits(label, name, config, entry, column)

    entry = next((entry for entry in entries if entry["revision"] == revision), None)
    if entry is not None:
        return splits_of(entry)
    try:
        from huggingface_hub import HfApi

        # before `load_dataset`, which retries for half a minute without network
        options = {} if revision is None else {"revision": revision}
        info = HfApi().dataset_info(name, timeout=10, **options)
        entry = next((entry for entry in entries if entry["revision"] == info.sha), None)
        if entry is None:
            entry = _ask_hub(name, config, info, file)
    except PicoError:
        raise
    except Exception as error:  # httpx, huggingface_hub, fsspec and datasets have their own types
        for entry in reversed(entries if revision is None else []):
            splits = splits_of(entry)
            if any(open_cache(cache_folder(source)) for source in splits.sources.values()):
                splits.unused.append(
                    f"any newer revision of {name} (no answer from the hub: {reason(error)}); "
                    f"revision {entry['revision']} is in the cache"
                )
                return splits
        at = "" if revision is None else f" at revision {revision}"
        local = ", and it is no local file or folder" if revision is None else ""
        raise PicoError(
            f"cannot open {label!r}{at} on the Hugging Face hub ({reason(error)}){local}; "
            "check the name and the network, or use python-docs"
        ) from error
    if entry not in entries[-1:]:
        _write_index(index_path, [other for other in entries if other != entry] + [entry])
    return splits_of(entry)


def _read_index(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def _write_index(path: Path, entries: list[dict]) -> None:
    with writing_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(entries).encode())


def _ask_hub(name: str, config: str, info, file: str | None) -> dict:
    """Ask the hub for the splits of a revision, the files of each split, and the other files.

    The files are None for a split that only `datasets` can read.
    """
    root = f"{HUB}datasets/{name}@{info.sha}/"
    entry = {"revision": info.sha, "splits": {}, "unused": []}
    if file is not None:
        from huggingface_hub import HfFileSystem

        HfFileSystem().size((root + file).removeprefix(HUB))  # raises if there is no such file
        files, _ = expand_archives([File(file, root + file)])
        if not files:
            raise PicoError(f"cannot tell what {file} is by its name; the formats are {KNOWN}")
        entry["splits"]["train"] = [[file.name, file.path, file.member] for file in files]
        return entry
    loaded = _load(name, config, info.sha)
    used, unused = set(), {}
    for split, rows in loaded.items():
        paths = _paths(rows)
        found = [File(_name_in(path, root), path) for path in paths]
        used |= {file.name for file in found}
        files, unread = expand_archives(found)
        if not files or any(unread.get(file.name) for file in found):
            # this builder yields lines, which would split documents
            if getattr(rows.info, "builder_name", None) == "text":
                raise PicoError(
                    f"cannot find the .txt files of {name} on the hub; name one as the train file"
                )
            entry["splits"][str(split)] = None
        else:
            unused |= unread
            entry["splits"][str(split)] = [[file.name, file.path, file.member] for file in files]
    for sibling in getattr(info, "siblings", None) or []:
        path = sibling.rfilename
        if path not in used and path != "README.md" and not path.startswith("."):
            known = format_of(path) or path.endswith(".zip")
            unused[path] = "in no split of the configuration" if known else "no format that is read"
    entry["unused"] = unused_sentences(unused)
    return entry


def _load(name: str, config: str, revision: str) -> dict:
    loaded = quiet_datasets().load_dataset(
        name,
        config or None,
        revision=revision,
        streaming=True,
        cache_dir=str(cache_root() / "datasets"),
    )
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _paths(rows) -> list[str]:
    """The files that `datasets` would stream (datasets 4 and 5 name them only privately)."""
    arguments = getattr(getattr(rows, "_ex_iterable", None), "kwargs", {})
    paths = arguments.get("base_files") or arguments.get("files") or []
    return [path for path in paths if isinstance(path, str)]


def _name_in(path: str, root: str) -> str:
    return path.removeprefix(root) if path.startswith(root) else path.rsplit("/", 1)[-1]


def _splits(label: str, name: str, config: str, entry: dict, column: str | None) -> Splits:
    sources, revision = {}, entry["revision"]
    for split, files in entry["splits"].items():
        text = split_label(label, split, entry["splits"])
        identity = ["hub", label, revision, column, split]
        if files is None:
            read = partial(_read_split, text, name, config, revision, split, column)
            sources[split] = Source(text, identity, read)
        else:
            sources[split] = file_source(text, [File(*file) for file in files], column, identity)
    return Splits(sources, list(entry["unused"]), revision)


def _read_split(
    label: str,
    name: str,
    config: str,
    revision: str,
    split: str,
    column: str | None,
    remark: Remark,
) -> Pieces:
    try:
        rows = _load(name, config, revision)[split]
    except Exception as error:
        raise PicoError(
            f"cannot open {label!r} on the Hugging Face hub: {reason(error)}"
        ) from error
    yield from read_rows(label, rows, column, remark)
