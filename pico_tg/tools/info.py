"""Facts about a model and its runs that need no computation: sizes, costs, checkpoints, losses."""

import os
from pathlib import Path
from typing import Any

from ..backend.cache_file import cache_file
from ..checkpoint import check, list_checkpoints
from ..config import Config, TrainSettings
from ..costs import decoding_flops, forward_flops, training_flops
from ..files import PicoError
from ..kv_cache import cache_bytes
from ..runs import (
    edited,
    existing_run,
    find_description,
    load_config,
    read_description,
    read_metrics,
    run_folder,
    runs_of,
    stored_settings,
)

FIGURES = ("bits_per_byte", "validation_bits_per_byte", "router_rate")


def describe(path: str | os.PathLike, run: str | None = None) -> dict[str, Any]:
    """Everything that `info` shows about the model PATH, and about RUN if given; valid JSON.

    - model: the sizes; parameters: of each part, and total
    - operations_a_byte: model FLOPs (`pico_tg.costs`), on average over a window of context_len
      bytes: forward, training (forward and backward); and decoding, for one byte after context_len
      bytes at decoding_router_rate, the share of bytes routed. It is the one measured at the run's
      newest checkpoint. Without a measurement it is the capacity; training makes `learned` keep to
      it, while `space` may differ
    - cache_bytes: memory of the KV caches, float32, independent of the length of the text
    - kernel_cache: path of the file that holds compiled kernels, and its bytes
    - runs, unless one is given: the names of those with a checkpoint, the newest first
    - run: its name, settings, dataset, data (what is trained on and what is held out, in words),
      edited (a line if it was trained with another model.json, or ""), base_weights, devices,
      steps (completed), planned_steps (at which training ends; None before the first step), and
      checkpoints: step, file, bytes, the figures of that step's record where one exists, and
      `defect` if a file of the checkpoint is truncated or broken (headers and sizes are checked,
      not digests). Weights from elsewhere, without a training.json of pico_tg, have neither
      settings nor dataset

    context_len is the run's, or the default. Raises PicoError on a missing or broken model or run.
    """
    config = load_config(path)
    length, checkpoints = TrainSettings.context_len, []
    if run is None:
        described = {"runs": runs_of(path)}
    else:
        facts = {"name": run} | _describe_run(existing_run(path, run), config)
        described, checkpoints = {"run": facts}, facts["checkpoints"]
        if facts["settings"]:
            length = stored_settings(facts, run_folder(path, run)).context_len
    rate = _decoding_rate(config, checkpoints)
    return {
        "model": config.to_dict(),
        "parameters": config.parameters_by_part | {"total": config.parameters},
        "operations_a_byte": {
            "context_len": length,
            "forward": forward_flops(config, length) / length,
            "training": training_flops(config, length) / length,
            "decoding": decoding_flops(config, length, rate),
            "decoding_router_rate": rate,
        },
        "cache_bytes": cache_bytes(config),
        "kernel_cache": cache_file(),
        **described,
    }


def _decoding_rate(config: Config, checkpoints: list[dict[str, Any]]) -> float:
    """The share of bytes that decoding routes: as last measured, or else an estimate."""
    measured = [c["router_rate"] for c in checkpoints if "router_rate" in c]
    return measured[-1] if measured else config.capacity_share


def _describe_run(folder: Path, config: Config) -> dict[str, Any]:
    stored = find_description(folder)
    if stored is None and list_checkpoints(folder):  # weights from elsewhere
        stored = {"settings": {}, "dataset": {}}
    stored = stored or read_description(folder)  # raises an error that names what is missing
    logged = (folder / "metrics.jsonl").exists()
    records = {record["step"]: record for record in (read_metrics(folder) if logged else [])}
    checkpoints = []
    for step, file in list_checkpoints(folder):
        record = records.get(step, {})
        figures = {key: record[key] for key in FIGURES if key in record}
        size = file.stat().st_size
        try:
            check(file)
        except PicoError as error:
            figures["defect"] = str(error)
        checkpoints.append({"step": step, "file": file.name, "bytes": size} | figures)
    kept = {
        key: stored.get(key) for key in ("settings", "dataset", "data", "base_weights", "devices")
    }
    steps = max(records, default=0)
    planned = records[steps].get("steps") if records else None
    kept["edited"] = edited(config, folder)
    return kept | {"steps": steps, "planned_steps": planned, "checkpoints": checkpoints}
