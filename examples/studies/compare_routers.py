"""Compare routers, positions, heads, capacities and sizes at equal training FLOPs, data and seeds.

Prints a table in Markdown and draws the held-out bits per byte.

python examples/studies/compare_routers.py [DATASET] [--steps 200] [--seeds 0,1,2] [--sizes 1M]
    [--routers learned,none] [--positions alibi,rope] [--next-tokens 1,2,4,8]
    [--capacities 1/8,1/3] [--router-warmup-steps 0,200]

The budget of a size is the FLOPs of --steps steps of that model. Each variant is trained for as
many steps as that budget pays for. Every result is appended to --results, a file of JSON lines; the
models and runs go into a folder of the same name, for `pico_tg run`, `eval` and `plot`. A repeated
command continues an interrupted training, and trains only what is missing. Decoding speed is
measured last, one model at a time; --sample-bytes 0 skips it.
"""

import argparse
import dataclasses
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial, reduce
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.config import ROUTERS
from pico_tg.costs import training_flops
from pico_tg.runs import read_metrics
from pico_tg.tools.plot import COLORS, Line, Panel, settled, svg
from pico_tg.tools.router_report import router_report

HERE = Path(__file__).parent
SIZES = {
    "0.5M": {"dim": 96, "att_q_heads": 6, "att_kv_heads": 2, "latent_num_blocks": 4}
    | {"next_tokens": 4},
    "1M": {"dim": 128, "att_q_heads": 8, "att_kv_heads": 2, "latent_num_blocks": 5}
    | {"next_tokens": 2},
    "4M": {"dim": 256, "att_q_heads": 8, "att_kv_heads": 2, "latent_num_blocks": 6}
    | {"next_tokens": 2},
}


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def integers(text: str) -> list[int]:
    return [int(part) for part in names(text)]


def fractions(text: str) -> list[Fraction]:
    try:
        return [Fraction(part) for part in names(text)]
    except ZeroDivisionError as error:
        raise ValueError from error


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("dataset", nargs="?", default="python-docs")
parser.add_argument("--steps", type=int, default=200, help="steps of the learned router")
parser.add_argument("--seeds", type=integers, default=[0, 1, 2], metavar="N,…")
parser.add_argument(
    "--sizes", type=names, default=["0.5M"], metavar="NAME,…",
    help=f"{', '.join(SIZES)}, or a model.json",
)  # fmt: skip
parser.add_argument("--routers", type=names, default=list(ROUTERS), metavar="NAME,…")
parser.add_argument(
    "--positions", type=names, default=[""], metavar="NAME,…", help="default: that of the size"
)
parser.add_argument(
    "--next-tokens", type=integers, default=[0], metavar="N,…", help="default: that of the size"
)
parser.add_argument(
    "--capacities", type=fractions, default=[0], metavar="X,…",
    help="latent capacity factors, such as 1/8 (default: that of the size)",
)  # fmt: skip
parser.add_argument(
    "--router-warmup-steps", type=integers, default=[0], metavar="N,…",
    help="of the router learned; see pico_tg.TrainSettings",
)  # fmt: skip
parser.add_argument("--context-len", type=int, default=512)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=0.012)
parser.add_argument("--warmup-steps", type=int, default=50)
parser.add_argument("--validations", type=int, default=10, help="number for each run")
parser.add_argument("--sample-bytes", type=int, default=400, help="to measure decoding; 0: skip")
parser.add_argument("--evaluation-bytes", type=int, default=4096, help="held out, to evaluate")
parser.add_argument("--results", type=Path, default=HERE / "routers.jsonl")
parser.add_argument("--svg", type=Path, default=HERE / "routers.svg")
args = parser.parse_args()
pico_tg.enable_compile_cache(training_graphs=True)

folder = args.results.with_suffix("")
commit = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
).stdout.strip()


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table, and one line of the chart of its size."""

    size: str
    name: str
    config: pico_tg.Config
    steps: int
    router_warmup_steps: int

    @property
    def path(self) -> Path:
        """The folder of the model."""
        return folder / re.sub(r"[, /]+", "-", f"{self.size} {self.name}")

    def run(self, seed: int) -> str:
        return f"{self.steps}-steps-seed-{seed}"


def all_variants() -> list[Variant]:
    variants = []
    for size in args.sizes:
        if size in SIZES:
            base = pico_tg.Config(**SIZES[size])
        else:
            base = pico_tg.Config.from_json(size)
            size = Path(size).parent.name
        budget = args.steps * training_flops(base, args.context_len, args.batch_size)
        print(f"{size}: {base.parameters:,} parameters, budget of training: {budget:.3g} FLOPs")
        for router, position, heads, capacity in itertools.product(
            args.routers, args.positions, args.next_tokens, args.capacities
        ):
            if router in ("none", "all"):  # they ignore the capacity
                if capacity != args.capacities[0]:
                    continue
                capacity = 0
            config = dataclasses.replace(
                base, router=router, position=position or base.position,
                next_tokens=heads or base.next_tokens,
                latent_capacity_factor=float(capacity) or base.latent_capacity_factor,
            )  # fmt: skip
            name = router + (f", {position}" if position not in ("", base.position) else "")
            name += f", heads {heads}" if heads not in (0, base.next_tokens) else ""
            if config.latent_capacity_factor != base.latent_capacity_factor:
                name += f", capacity {capacity}"
            steps = max(1, budget // training_flops(config, args.context_len, args.batch_size))
            for warmup in args.router_warmup_steps if router == "learned" else [0]:
                full_name = name + (f", warm-up {warmup}" if warmup else "")
                variants.append(Variant(size, full_name, config, steps, warmup))
    return variants


def train_and_evaluate(variant: Variant, seed: int) -> dict:
    """Train one variant, or continue its training, and measure it on the held-out text."""
    variant.path.mkdir(parents=True, exist_ok=True)
    variant.config.to_json(variant.path / "model.json")
    run_dir = variant.path / variant.run(seed)
    model = pico_tg.Pico(variant.config, seed=seed)
    records = pico_tg.train(
        model, data, run_dir=run_dir, resume=(run_dir / "training.json").exists(), epochs=10**6,
        context_len=args.context_len, batch_size=args.batch_size, max_steps=variant.steps,
        warmup_steps=min(args.warmup_steps, variant.steps // 2), learning_rate=args.learning_rate,
        validation_interval=max(1, variant.steps // args.validations), checkpoint_interval=250,
        keep_checkpoints=2, seed=seed, router_warmup_steps=variant.router_warmup_steps,
    )  # fmt: skip
    for record in records:
        if "validation_bits_per_byte" in record:
            bits = f"{record['validation_bits_per_byte']:.4f} bits per byte"
            print(f"{run_dir}: step {record['step']} of {variant.steps}, {bits}", flush=True)
    metrics = read_metrics(run_dir)
    measured = [record for record in metrics if "validation_bits_per_byte" in record]
    evaluation = pico_tg.evaluate(
        model, data, context_len=args.context_len, max_bytes=args.evaluation_bytes
    )
    seconds = sum(
        args.context_len * args.batch_size / record["bytes_per_second"] for record in metrics
    )
    flops = variant.steps * training_flops(variant.config, args.context_len, args.batch_size)
    return {
        "command": shlex.join(sys.argv),
        "commit": commit,
        "minutes": seconds / 60,
        "flops": flops,
        "parameters": variant.config.parameters,
        "bits_per_byte": measured[-1]["validation_bits_per_byte"],
        "routed": measured[-1]["validation_router_rate"],
        "curve": [
            (record["step"] / variant.steps, record["validation_bits_per_byte"])
            for record in measured
        ],
        "evaluation": evaluation.as_dict() | router_report(evaluation).as_dict(),
    }


def decoding_speed(variant: Variant, seed: int) -> dict[str, float]:
    """Bytes per second after the first byte, and bytes per decoding pass."""
    decoder = pico_tg.Decoder(pico_tg.load(variant.path, variant.run(seed)))
    for _ in range(2):  # the first sample compiles, the second one is measured
        stats = pico_tg.Stats()
        for _ in pico_tg.generate(
            decoder.model, b"The import statement", max_bytes=args.sample_bytes, temperature=0.7,
            seed=0, ignore_end=True, decoder=decoder, stats=stats,
        ):  # fmt: skip
            pass
    seconds = stats.seconds - stats.first_byte_seconds
    return {
        "bytes_per_second": stats.bytes / max(1e-9, seconds),
        "a_pass": stats.bytes / stats.passes,
    }


data = pico_tg.load_data(pico_tg.DataSpec(args.dataset))
folder.mkdir(parents=True, exist_ok=True)
results: dict[str, dict] = {}  # by their key as JSON
if args.results.exists():
    for line in args.results.read_text().splitlines():
        record = json.loads(line)
        results[json.dumps(record["key"], sort_keys=True)] = record


def cached(key: dict, measure: Callable[[], dict]) -> dict:
    """Return the stored result of `key`, or measure and store it."""
    text = json.dumps(key, sort_keys=True)
    if text not in results:
        results[text] = {"key": key, **measure()}
        with args.results.open("a") as file:
            file.write(json.dumps(results[text]) + "\n")
    return results[text]


trained: list[tuple[Variant, int, dict, dict]] = []
for seed, variant in itertools.product(args.seeds, all_variants()):
    # everything that a result depends on, except the machine and the program
    key = {
        "length": args.context_len, "batch": args.batch_size, "rate": args.learning_rate,
        "warm_up": args.warmup_steps, "config": variant.config.to_dict(), "seed": seed,
        "steps": variant.steps, "fingerprint": str(data.train.fingerprint),
        "evaluation_bytes": args.evaluation_bytes,
    }  # fmt: skip
    if variant.router_warmup_steps:
        key["router_warmup_steps"] = variant.router_warmup_steps
    trained.append((variant, seed, key, cached(key, partial(train_and_evaluate, variant, seed))))

table: dict[Variant, list[dict]] = {}  # one result per seed
for variant, seed, key, result in tqdm(trained, desc="decoding", unit="model"):
    if args.sample_bytes:
        key = key | {"sample_bytes": args.sample_bytes}
        result = result | cached(key, partial(decoding_speed, variant, seed))
    table.setdefault(variant, []).append(result)

# heading of a column, path of a figure in a result, digits
columns = [
    ("without latent", "evaluation bits_per_byte_without_latent", 3), ("routed", "routed", 2),
    ("of spaces", "evaluation places space rate", 2),
    ("boundary F1", "evaluation boundaries near router f1", 2),  # within one byte of a boundary
    ("at random", "evaluation boundaries near random f1", 2),
    ("surprisal", "evaluation surprisal_ratio", 2), ("gap", "evaluation routing_gap", 4),
    ("minutes", "minutes", 1),
]  # fmt: skip
if args.sample_bytes:
    columns += [("bytes/s", "bytes_per_second", 0), ("bytes per pass", "a_pass", 2)]


def mean_of(path: str, digits: int, seeds: list[dict]) -> str:
    """The mean over seeds of a figure; "-" where a variant has none."""
    figures = [reduce(dict.__getitem__, path.split(), result) for result in seeds]
    return "-" if None in figures else f"{statistics.mean(figures):.{digits}f}"


headings = ["size", "variant", "seeds", "steps", "bits per byte"]
headings += [heading for heading, _, _ in columns]
print("\n| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
for variant, seeds in table.items():
    bits = [result["bits_per_byte"] for result in seeds]
    spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
    row = [variant.size, variant.name, str(len(seeds)), str(variant.steps)]
    row.append(f"{statistics.mean(bits):.3f}{spread}")
    row += [mean_of(path, digits, seeds) for _, path, digits in columns]
    print("| " + " | ".join(row) + " |")

panels = []
for size in dict.fromkeys(variant.size for variant in table):
    lines: list[Line] = []
    for variant, seeds in table.items():
        if variant.size == size:
            xs = [share for share, _ in seeds[0]["curve"]]
            by_point = zip(*([bits for _, bits in r["curve"]] for r in seeds), strict=True)
            ys = [statistics.mean(bits) for bits in by_point]
            n = len(lines)
            lines.append(Line(variant.name, xs, ys, COLORS[n % len(COLORS)], n // len(COLORS)))
    title = f"Routers at equal training FLOPs, {size} parameters"
    labels = ("share of the training FLOPs", "bits per byte (held out)")
    panels.append(Panel(lines, title, *labels, y_range=settled(lines)))
args.svg.write_text(svg(panels))
print(f"\nwrote {args.svg} and {args.results}")
