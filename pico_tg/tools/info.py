"""What is known of a model and its runs without running it: sizes, costs, checkpoints, losses."""

import os
from pathlib import Path
from typing import Any

from ..checkpoint import list_checkpoints, load_config
from ..config import Config, TrainSettings
from ..files import PicoError, command
from ..flops import (
    cache_bytes,
    decoding_operations,
    forward_operations,
    parameters_by_part,
    training_operations,
)
from ..runs import find_description, read_description, read_metrics, run_folder


def describe(path: str | os.PathLike, run: str | None = None) -> dict[str, Any]:
    """All that `info` shows of the model PATH, and of RUN if given; valid JSON.

    - model: the sizes; parameters: of each part, and total
    - operations_a_byte: multiplications and additions of matrix products (`pico_tg.flops`), for a
      byte of a window of context_len, on average: forward, training (forward and backward); and
      decoding, for the byte after so many at decoding_router_rate. Nothing caps the rate of
      decoding: it is what the run's newest checkpoint measured; else 1 / n of the router
      `stride`, and of others the capacity, which `learned` is trained to hold and `space` is not
    - cache_bytes: memory of decoding's caches, float32; it does not grow with the text
    - run: its name, settings, dataset, base_weights, devices, and checkpoints: step, file, bytes,
      the record of that step's figures where there is one. Of weights from elsewhere, without a
      training.json of pico_tg, settings and dataset are empty

    context_len is the run's, else the default. Raises PicoError on what is missing or broken.
    """
    config = load_config(path)
    described: dict[str, Any] | None = None
    if run is not None:
        described = _describe_run(run_folder(path, run))
    settings = described["settings"] if described else {}
    length = settings.get("context_len", TrainSettings.context_len)
    rate = _decoding_rate(config, described["checkpoints"] if described else [])
    facts: dict[str, Any] = {
        "model": config.to_dict(),
        "parameters": parameters_by_part(config) | {"total": config.parameters},
        "operations_a_byte": {
            "context_len": length,
            "forward": forward_operations(config, length) / length,
            "training": training_operations(config, length) / length,
            "decoding": decoding_operations(config, length, rate),
            "decoding_router_rate": rate,
        },
        "cache_bytes": cache_bytes(config),
    }
    return facts | ({"run": {"name": run} | described} if described else {})


def _decoding_rate(config: Config, checkpoints: list[dict[str, Any]]) -> float:
    """The share of the bytes that decoding routes, as far as is known."""
    measured = [c["router_rate"] for c in checkpoints if "router_rate" in c]
    if measured:
        return measured[-1]
    return 1 / config.stride if config.router == "stride" else config.capacity_share


def _describe_run(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        model, run = folder.parent, folder.name
        raise PicoError(f"there is no run {folder}; train it: {command('train', model, run)}")
    stored = find_description(folder)
    if stored is None and list_checkpoints(folder):  # weights from elsewhere
        stored = {"settings": {}, "dataset": {}}
    stored = stored or read_description(folder)  # which says what is missing
    logged = (folder / "metrics.jsonl").exists()
    records = {record["step"]: record for record in (read_metrics(folder) if logged else [])}
    measured = ("bits_per_byte", "validation_bits_per_byte", "router_rate")
    checkpoints = []
    for step, file in list_checkpoints(folder):
        record = records.get(step, {})
        figures = {key: record[key] for key in measured if key in record}
        size = file.stat().st_size
        checkpoints.append({"step": step, "file": file.name, "bytes": size} | figures)
    kept = {key: stored.get(key) for key in ("settings", "dataset", "base_weights", "devices")}
    return kept | {"steps": max(records, default=0), "checkpoints": checkpoints}
