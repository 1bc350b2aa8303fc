"""Data sets on the Hugging Face hub, by public functions of huggingface_hub.

Files lie in the hub's own cache, so a revision that is there is read without network.
"""

import glob
import re
from pathlib import Path

from ..files import PicoError
from .formats import reason

MAX_DOWNLOAD = 10 * 10**9  # bytes of a data set; to download more, name a file


def open_hub(name: str, revision: str | None) -> tuple[Path, dict[str, int], dict[str, str]]:
    """The data set `owner/name` at a commit, tag or branch; None is the newest revision.

    Returns the folder that holds its files once they are downloaded, whose name is the commit; the
    name and size of each file; and what is not used, with the reason: if the hub does not answer,
    any revision that is newer than the cached one. Raises PicoError if there is no such data set.
    """
    unused, silence = {}, None
    try:
        from huggingface_hub import HfApi, get_cached_repo_tree, logging, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise PicoError(
            f"this huggingface_hub is too old ({error}); pip install -U huggingface_hub"
        ) from error
    try:
        logging.set_verbosity_error()
        disable_progress_bars()
        if not re.fullmatch("[0-9a-f]{40}", revision or ""):  # a commit stays what it is
            try:
                HfApi().dataset_info(name, revision=revision, timeout=10)
            except Exception as error:  # httpx and huggingface_hub have their own types
                silence = error
        # of the files the README.md alone; this caches the list of all files
        asked = {"repo_type": "dataset", "revision": revision, "allow_patterns": "README.md"}
        root = Path(snapshot_download(name, local_files_only=silence is not None, **asked))
        try:
            tree = get_cached_repo_tree(name, repo_type="dataset", revision=root.name)
            sizes = {file.path: file.size for file in tree}
        except CachedRepoTreeNotFoundError:  # written by an older huggingface_hub
            paths = [path for path in root.rglob("*") if path.is_file()]
            sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
            unused[f"files of {name} that are not in the cache"] = "the cache has no list of them"
    except Exception as error:
        at = ", and it is no local file or folder" if revision is None else f" at {revision}"
        raise PicoError(
            f"cannot open {name!r} on the Hugging Face hub{at} ({reason(silence or error)}); "
            "check the name and the network, or use python-docs"
        ) from error
    if silence is not None:
        unused[f"any newer revision of {name} than {root.name}"] = (
            f"no answer from the hub: {reason(silence)}"
        )
    return root, sizes, unused


def download(
    name: str, root: Path, sizes: dict[str, int], named: bool, paths: list[Path], progress: bool
) -> None:
    """Download those of `paths`, files in `root`, that are not in the cache.

    Raises PicoError if they have more than MAX_DOWNLOAD bytes, unless the user named them.
    """
    missing = [path.relative_to(root).as_posix() for path in paths if not path.is_file()]
    size = sum(sizes[path] for path in missing)
    if size > MAX_DOWNLOAD and not named:
        raise PicoError(
            f"{name} is a download of {size / 1e9:.0f} GB; name a file of it by train_file, or a "
            f"folder as in {name}:FOLDER, or run: hf download {name} --repo-type dataset"
        )
    if not missing:
        return
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import enable_progress_bars

        if progress:
            enable_progress_bars()
        patterns = [glob.escape(path) for path in missing]
        asked = {"repo_type": "dataset", "revision": root.name}
        snapshot_download(name, allow_patterns=patterns, **asked)
    except Exception as error:
        raise PicoError(f"cannot download {name} from the hub: {reason(error)}") from error
