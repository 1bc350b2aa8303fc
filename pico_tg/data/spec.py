"""DataSpec: which data to train and validate on."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from ..config import check_fields, setting, settings_class
from ..files import PicoError

PYTHON_DOCS = "python-docs"


def _option(help: str, **more: str) -> str | None:
    return setting(help, None, minimum=None, **more)


@settings_class
@dataclass(frozen=True)
class DataSpec:
    """Which data to train and validate on. Raises PicoError on invalid options.

    A path may be a pathlib.Path. A file or folder with the word train or training in its name is
    training data; valid, validation, val or dev is validation data; test, testing, eval or
    evaluation is not used unless named. Files without such a word are training data. Names that
    begin with a dot are ignored.
    """

    dataset: str = setting(
        "python-docs (in Python itself); a file (.txt, .jsonl, .json, .csv, .tsv or .parquet, "
        "possibly compressed: .gz, .bz2, .xz) or a folder of such files; or a name on the Hugging "
        "Face hub, owner/name or owner/name:FOLDER. A .txt is one document, or several with "
        "<|endoftext|> between them. The tags <pico:seq> and </pico:seq> in a text begin and end a "
        "document for the model",
        PYTHON_DOCS,
        minimum=None,
    )
    column_name: str | None = _option("column that holds the text (default: text, else bytes)")
    train_file: str | None = _option("file to train on, in the data set or anywhere")
    validation_file: str | None = _option(
        "file to validate on, in the data set or anywhere; never trained on",
        flag="--dataset-validation-file --valid",
    )
    train_split: str | None = _option(
        "split to train on (default: train if there is one, else the only one)"
    )
    validation_split: str | None = _option(
        "split to validate on (default: validation if there is one; with train_file, only for "
        "local data and without validation_size)"
    )
    validation_size: float | int | None = setting(
        "without validation data, how much of the end to hold out: a fraction below 1 of the "
        "bytes, or a whole number of documents (default 0.05)",
        None,
        above=0,
    )
    revision: str | None = _option(
        "revision of a data set on the hub: a commit, tag or branch (default: the newest, which a "
        "run records)"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in dataclasses.asdict(self).items():
            if value == "":
                raise PicoError(
                    "the dataset has no name; python-docs needs no download"
                    if name == "dataset"
                    else f"{name} is empty; leave it out or name one"
                )
        if self.validation_file is not None and self.validation_split is not None:
            raise PicoError("give a validation_file or a validation_split, not both")
        size = self.validation_size
        if isinstance(size, float) and size >= 1:
            raise PicoError(
                "validation_size must be a fraction between 0 and 1, or a whole number of "
                f"documents, not {size!r}"
            )

    @property
    def path(self) -> Path:
        """`dataset` as a local path."""
        return Path(os.path.expanduser(self.dataset))

    @property
    def is_local(self) -> bool:
        """Whether `dataset` is a file or folder; only data on the hub have a revision."""
        return self.revision is None and self.dataset != PYTHON_DOCS and os.path.exists(self.path)
