"""Compare routers, positions and numbers of heads at equal training FLOPs, data and seeds.

Prints a table in Markdown and draws the held-out bits per byte.

python examples/studies/compare_routers.py [DATASET] [--steps 200] [--seeds 0,1,2] [--positions]
    [--next-tokens 1,2,4,8]

The budget is the FLOPs of --steps steps of the learned router with ALiBi and 4 heads. Each variant
is trained for as many steps as that budget pays for. Every result is appended to --results, a file
of JSON lines, and its weights go into a folder of the same name; a repeated command trains only
what is missing. Decoding speed is measured last, one model at a time; --sample-bytes 0 skips it.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.config import ROUTERS
from pico_tg.flops import training_flops
from pico_tg.tools.plot import COLORS, Line, Panel, svg

CONTEXT_LEN, BATCH_SIZE = 512, 4
LEARNING_RATE, WARMUP_STEPS = 0.012, 50
HERE = Path(__file__).parent


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("dataset", nargs="?", default="python-docs")
parser.add_argument("--steps", type=int, default=200, help="steps of the learned router")
parser.add_argument("--seeds", type=integers, default=[0, 1, 2], metavar="N,…")
parser.add_argument("--routers", default=",".join(ROUTERS), metavar="NAME,…")
parser.add_argument("--positions", action="store_true", help="also train learned with rope")
parser.add_argument(
    "--next-tokens", type=integers, default=[], metavar="N,…",
    help="also train learned with these numbers of heads",
)  # fmt: skip
parser.add_argument("--dim", type=int, default=96)
parser.add_argument("--latent-blocks", type=int, default=4)
parser.add_argument("--sample-bytes", type=int, default=400, help="to measure decoding; 0: skip")
parser.add_argument("--evaluation-bytes", type=int, default=4096, help="to find boundaries in")
parser.add_argument("--results", type=Path, default=HERE / "routers.jsonl")
parser.add_argument("--svg", type=Path, default=HERE / "routers.svg")
args = parser.parse_args()

base = pico_tg.Config.preset(
    "xs", dim=args.dim, att_q_heads=6, att_kv_heads=2, next_tokens=4,
    latent_num_blocks=args.latent_blocks,
)  # fmt: skip
budget = args.steps * training_flops(base, CONTEXT_LEN, BATCH_SIZE)
print(f"budget: {budget:.3g} FLOPs of training, {args.steps} steps of the learned router")

variants = {
    name: dataclasses.replace(base, router=name) for name in args.routers.split(",") if name
}
if args.positions:
    variants["learned, rope"] = dataclasses.replace(base, position="rope")
for heads in args.next_tokens:
    if heads != base.next_tokens or "learned" not in variants:
        variants[f"learned, heads {heads}"] = dataclasses.replace(base, next_tokens=heads)


def train_and_evaluate(
    config: pico_tg.Config, seed: int, steps: int, name: str, weights: Path
) -> dict:
    """Train one variant, save its weights, and measure it on the held-out text."""
    model = pico_tg.Pico(config, seed=seed)
    records = pico_tg.train(
        model, data, context_len=CONTEXT_LEN, batch_size=BATCH_SIZE, max_steps=steps, epochs=10**6,
        warmup_steps=min(WARMUP_STEPS, steps // 2), learning_rate=LEARNING_RATE,
        validation_interval=max(1, steps // 10), seed=seed,
    )  # fmt: skip
    curve = []
    for record in tqdm(records, total=steps, desc=f"{name}, seed {seed}", unit="step"):
        if "validation_bits_per_byte" in record:
            curve.append((record["step"] / steps, record["validation_bits_per_byte"]))
            rate = record["validation_router_rate"]
    pico_tg.save_weights(model, weights)
    evaluation = pico_tg.evaluate(
        model, data, context_len=CONTEXT_LEN, max_bytes=args.evaluation_bytes
    )
    return {
        "bits_per_byte": curve[-1][1],
        "routed": rate,
        "boundary_f1": evaluation.boundaries.f1,
        "curve": curve,
    }


def decoding_speed(config: pico_tg.Config, weights: Path) -> dict[str, float]:
    """Bytes per second after the first byte, and bytes per decoding pass."""
    model = pico_tg.Pico(config, fresh=False)
    pico_tg.load_weights(model, weights)
    decoder = pico_tg.Decoder(model)
    for _ in range(2):  # the first sample compiles, the second one is measured
        stats = pico_tg.Stats()
        for _ in pico_tg.generate(
            model, b"The import statement", max_bytes=args.sample_bytes, temperature=0.7, seed=0,
            ignore_end=True, decoder=decoder, stats=stats,
        ):  # fmt: skip
            pass
    seconds = stats.seconds - stats.first_byte_seconds
    return {
        "bytes_per_second": stats.bytes / max(1e-9, seconds),
        "a_pass": stats.bytes / stats.passes,
    }


data = pico_tg.load_data(pico_tg.DataSpec(args.dataset))
weights_folder = args.results.with_suffix("")
weights_folder.mkdir(parents=True, exist_ok=True)
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


trained: list[tuple[str, pico_tg.Config, dict, Path, dict]] = []
for seed in args.seeds:
    for name, config in variants.items():
        steps = max(1, budget // training_flops(config, CONTEXT_LEN, BATCH_SIZE))
        # everything that a result depends on, except the machine
        key = {
            "length": CONTEXT_LEN, "batch": BATCH_SIZE, "rate": LEARNING_RATE,
            "warm_up": WARMUP_STEPS, "config": config.to_dict(), "seed": seed, "steps": steps,
            "fingerprint": str(data.train.fingerprint),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        weights = weights_folder / f"{digest}.safetensors"
        key["evaluation_bytes"] = args.evaluation_bytes
        result = cached(key, partial(train_and_evaluate, config, seed, steps, name, weights))
        trained.append((name, config, key, weights, result))

table: dict[str, list[dict]] = {}  # variant -> one result per seed
for name, config, key, weights, result in tqdm(trained, desc="decoding", unit="model"):
    if args.sample_bytes:
        key = key | {"sample_bytes": args.sample_bytes}
        result = result | cached(key, partial(decoding_speed, config, weights))
    table.setdefault(name, []).append(result)

# heading of a column, key of a result, digits
columns = [("routed", "routed", 2), ("boundary F1", "boundary_f1", 2)]
if args.sample_bytes:
    columns += [("bytes/s", "bytes_per_second", 0), ("bytes per pass", "a_pass", 2)]
headings = ["variant", "seeds", "steps", "bits per byte", *(heading for heading, _, _ in columns)]
print("\n| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
for name, seeds in table.items():
    bits = [result["bits_per_byte"] for result in seeds]
    spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
    row = [name, str(len(seeds)), str(seeds[0]["key"]["steps"])]
    row.append(f"{statistics.mean(bits):.3f}{spread}")
    row += [
        f"{statistics.mean(r[field] for r in seeds):.{digits}f}" for _, field, digits in columns
    ]
    print("| " + " | ".join(row) + " |")

lines = []
for number, (name, seeds) in enumerate(table.items()):
    xs = [share for share, _ in seeds[0]["curve"]]
    by_point = zip(*([bits for _, bits in result["curve"]] for result in seeds), strict=True)
    ys = [statistics.mean(bits) for bits in by_point]
    lines.append(Line(name, xs, ys, COLORS[number % len(COLORS)], number // len(COLORS)))
low = min(min(line.ys) for line in lines)
panel = Panel(
    lines, "Routers at equal training FLOPs", "fraction of the FLOPs", "bits per byte (held out)",
    y_range=(low, low + 1.5),
)  # fmt: skip
args.svg.write_text(svg([panel]))
print(f"\nwrote {args.svg} and {args.results}")
