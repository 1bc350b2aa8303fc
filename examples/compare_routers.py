"""Routers, positions and numbers of heads compared at equal training operations, on the same data
and seeds. Writes a table in Markdown and a picture.

python examples/compare_routers.py [DATASET] [--steps 200] [--seeds 0,1,2] [--positions]
    [--next-tokens 1,2,4,8]

--steps are those of the learned router with ALiBi and 4 heads; their operations are the budget, and
each variant gets as many steps as that pays for. Results are kept in a file of JSON lines, with the
weights in a folder beside it, and what is there already is not done again. Speed is measured at the
end, one model after the other: --sample-bytes 0 leaves that to a later run on a quieter machine.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
from functools import partial
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.config import ROUTERS
from pico_tg.decoder import Decoder
from pico_tg.flops import training_operations
from pico_tg.tools.plot import COLORS, Line, Panel, svg

LENGTH, BATCH = 512, 4
RATE, WARM_UP = 0.012, 50
HERE = Path(__file__).parent


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("dataset", nargs="?", default="python-docs")
parser.add_argument("--steps", type=int, default=200, help="of the learned router: the budget")
parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,…")
parser.add_argument("--routers", default=",".join(ROUTERS), metavar="NAME,…")
parser.add_argument("--positions", action="store_true", help="the learned router with rope as well")
parser.add_argument(
    "--next-tokens", type=numbers, default=[], metavar="N,…",
    help="the learned router with so many heads as well",
)  # fmt: skip
parser.add_argument("--dim", type=int, default=96)
parser.add_argument("--latent-blocks", type=int, default=4)
parser.add_argument("--sample-bytes", type=int, default=400, help="to measure decoding with, or 0")
parser.add_argument("--evaluation-bytes", type=int, default=4096, help="to find boundaries in")
parser.add_argument("--results", type=Path, default=HERE / "routers.jsonl")
parser.add_argument("--svg", type=Path, default=HERE / "routers.svg")
args = parser.parse_args()

base = pico_tg.Config.preset(
    "xs", dim=args.dim, att_q_heads=6, att_kv_heads=2, next_tokens=4,
    latent_num_blocks=args.latent_blocks,
)  # fmt: skip
budget = args.steps * training_operations(base, LENGTH, BATCH)
print(f"budget: {budget:.3g} operations of training, {args.steps} steps of the learned router")

variants = {
    name: dataclasses.replace(base, router=name) for name in args.routers.split(",") if name
}
if args.positions:
    variants["learned, rope"] = dataclasses.replace(base, position="rope")
for heads in args.next_tokens:
    if heads != base.next_tokens or "learned" not in variants:
        variants[f"learned, heads {heads}"] = dataclasses.replace(base, next_tokens=heads)


def decoding(config: pico_tg.Config, weights: Path) -> dict[str, float]:
    """Bytes per second and per pass, compiled before; the prompt is left out."""
    model = pico_tg.Pico(config, fresh=False)
    pico_tg.load_weights(model, weights)
    decoder = Decoder(model)
    for _ in range(2):
        stats = pico_tg.Stats()
        options = {"temperature": 0.7, "seed": 0, "ignore_end": True, "decoder": decoder}
        options |= {"max_bytes": args.sample_bytes, "stats": stats}
        for _ in pico_tg.generate(model, b"The import statement", **options):
            pass
    seconds = stats.seconds - stats.first_byte_seconds
    return {
        "bytes_per_second": stats.bytes / max(1e-9, seconds),
        "a_pass": stats.bytes / stats.passes,
    }


def measure(config: pico_tg.Config, seed: int, steps: int, name: str, weights: Path) -> dict:
    model = pico_tg.Pico(config, seed=seed)
    every = max(1, steps // 10)
    records = pico_tg.train(
        model, data, context_len=LENGTH, batch_size=BATCH, max_steps=steps, epochs=10**6,
        warmup_steps=min(WARM_UP, steps // 2), learning_rate=RATE, validation_interval=every,
        seed=seed,
    )  # fmt: skip
    curve = []
    for record in tqdm(records, total=steps, desc=f"{name}, seed {seed}", unit="step"):
        if "validation_bits_per_byte" in record:
            curve.append((record["step"] / steps, record["validation_bits_per_byte"]))
            rate = record["validation_router_rate"]
    pico_tg.save_weights(model, weights)
    evaluated = pico_tg.evaluate(model, data, context_len=LENGTH, max_bytes=args.evaluation_bytes)
    return {
        "bits_per_byte": curve[-1][1],
        "routed": rate,
        "boundary_f1": evaluated.boundaries.f1,
        "curve": curve,
    }


data = pico_tg.load_data(pico_tg.DataSpec(args.dataset))
kept = args.results.with_suffix("")
kept.mkdir(parents=True, exist_ok=True)
done: dict[str, dict] = {}
if args.results.exists():
    for line in args.results.read_text().splitlines():
        record = json.loads(line)
        done[json.dumps(record["key"], sort_keys=True)] = record


def once(key: dict, make) -> dict:
    """What is noted under `key`, made now if it is not."""
    text = json.dumps(key, sort_keys=True)
    if text not in done:
        done[text] = {"key": key, **make()}
        with args.results.open("a") as file:
            file.write(json.dumps(done[text]) + "\n")
    return done[text]


trained: list[tuple[str, pico_tg.Config, dict, Path, dict]] = []
for seed in args.seeds:
    for name, config in variants.items():
        steps = max(1, budget // training_operations(config, LENGTH, BATCH))
        # all that a result depends on, but the machine
        key = {"length": LENGTH, "batch": BATCH, "rate": RATE, "warm_up": WARM_UP}
        key |= {"config": config.to_dict(), "seed": seed, "steps": steps}
        key |= {"fingerprint": str(data.train.fingerprint)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        weights = kept / f"{digest}.safetensors"
        key |= {"evaluation_bytes": args.evaluation_bytes}
        result = once(key, partial(measure, config, seed, steps, name, weights))
        trained.append((name, config, key, weights, result))

table: dict[str, list[dict]] = {}
for name, config, key, weights, result in tqdm(trained, desc="decoding", unit="model"):
    if args.sample_bytes:
        timed = key | {"sample_bytes": args.sample_bytes}
        result = result | once(timed, partial(decoding, config, weights))
    table.setdefault(name, []).append(result)

speeds = ["bytes_per_second", "a_pass"] if args.sample_bytes else []
heading = ["variant", "seeds", "steps", "bits per byte", "routed", "boundary F1"]
heading += ["bytes/s", "bytes a pass"] if speeds else []
print("\n| " + " | ".join(heading) + " |\n" + "|---" * len(heading) + "|")
for name, results in table.items():
    row = [name, str(len(results)), str(results[0]["key"]["steps"])]
    bits = [r["bits_per_byte"] for r in results]
    spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
    row.append(f"{statistics.mean(bits):.3f}{spread}")
    for column in ["routed", "boundary_f1", *speeds]:
        digits = 0 if column == "bytes_per_second" else 2
        row.append(f"{statistics.mean(r[column] for r in results):.{digits}f}")
    print("| " + " | ".join(row) + " |")

drawn = []
for number, (name, results) in enumerate(table.items()):
    at = [share for share, _ in results[0]["curve"]]
    together = zip(*([b for _, b in r["curve"]] for r in results), strict=True)
    heights = [statistics.mean(bits) for bits in together]
    drawn.append(Line(name, at, heights, COLORS[number % len(COLORS)], number // len(COLORS)))
low = min(min(line.ys) for line in drawn)
panel = Panel(
    drawn, "Routers at equal training operations", "share of the operations",
    "bits per byte (held out)", y_range=(low, low + 1.5),
)  # fmt: skip
args.svg.write_text(svg([panel]))
print(f"\nwrote {args.svg} and {args.results}")
