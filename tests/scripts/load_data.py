"""Load each DataSpec of the JSON list on stdin; print the documents and notes, or the error."""

import dataclasses
import json
import sys

from pico_tg.data import SEQ_END, SEQ_START, Corpus, DataSpec, load_data
from pico_tg.files import PicoError


def documents(corpus: Corpus) -> list[str]:
    text = bytes(corpus.bytes).removeprefix(SEQ_START).removesuffix(SEQ_END)
    return text.decode().split((SEQ_END + SEQ_START).decode())


def loaded(options: dict) -> dict:
    try:
        data = load_data(DataSpec(**options), progress=False)
    except PicoError as error:
        return {"error": str(error)}
    corpora = {"train": documents(data.train), "validation": documents(data.validation)}
    return corpora | {"note": data.note, "spec": dataclasses.asdict(data.spec)}


json.dump([loaded(options) for options in json.load(sys.stdin)], sys.stdout)
