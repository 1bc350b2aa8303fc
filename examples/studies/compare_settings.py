"""Compare rules that choose context, batch size, learning rate and warm-up, at equal FLOPs.

Every rule trains one model on every DATASET for as many steps as --flops pays for, and is measured
on held-out text with contexts of 512 bytes. Prints a table in Markdown.

python examples/studies/compare_settings.py [DATASET ...] [--flops 2e12] [--model MODEL.json]

Every result is appended to --results, a file of JSON lines; a repeated command trains only what is
missing.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.costs import training_flops

# context length, batch size, learning rate, and warm-up: a number of steps, or a fraction of them
RULES: dict[str, tuple[int, int, float, float]] = {
    "rate 0.001, warm-up 150 steps (published)": (512, 4, 0.001, 150),
    "rate 0.004, warm-up 10 %": (512, 4, 0.004, 0.1),
    "rate 0.012, warm-up 10 %": (512, 4, 0.012, 0.1),
    "rate 0.012, warm-up 10 %, batch 16": (512, 16, 0.012, 0.1),
    "rate 0.012, warm-up 10 %, context 2048, batch 1": (2048, 1, 0.012, 0.1),
}

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("datasets", nargs="*", default=["python-docs"], metavar="DATASET")
parser.add_argument("--flops", type=float, default=2e12, help="training FLOPs of each run")
parser.add_argument("--model", type=Path, help="sizes of the model (default: those of Config)")
parser.add_argument("--rules", type=int, default=len(RULES), help="number of rules to try")
parser.add_argument("--evaluation-bytes", type=int, default=16384)
parser.add_argument("--results", type=Path, default=Path(__file__).parent / "settings.jsonl")
args = parser.parse_args()
pico_tg.enable_compile_cache(training_graphs=True)

config = pico_tg.Config.from_json(args.model) if args.model else pico_tg.Config()


def train_and_evaluate(data, context_len: int, batch_size: int, rate: float, warm_up: float):
    """Train a fresh model for args.flops; return its steps and held-out bits per byte."""
    steps = max(1, round(args.flops / training_flops(config, context_len, batch_size)))
    model = pico_tg.Pico(config, seed=0)
    records = pico_tg.train(
        model, data, context_len=context_len, batch_size=batch_size, learning_rate=rate,
        warmup_steps=round(warm_up if warm_up >= 1 else warm_up * steps), max_steps=steps,
        epochs=10**6, validation_interval=10**9, seed=0, settings="published",
    )  # fmt: skip
    for _ in tqdm(records, total=steps, unit="step"):
        pass
    evaluation = pico_tg.evaluate(model, data, context_len=512, max_bytes=args.evaluation_bytes)
    return {"steps": steps, "bits_per_byte": evaluation.bits_per_byte}


results: dict[str, dict] = {}  # by their key as JSON
if args.results.exists():
    for line in args.results.read_text().splitlines():
        record = json.loads(line)
        results[json.dumps(record["key"])] = record

rows: dict[str, list[dict]] = {rule: [] for rule in list(RULES)[: args.rules]}
for dataset in args.datasets:
    data = pico_tg.load_data(pico_tg.DataSpec(dataset))
    for rule, row in rows.items():
        # everything that a result depends on, except the machine
        key = [config.to_dict(), args.flops, RULES[rule], str(data.train.fingerprint)]
        key = json.dumps([*key, args.evaluation_bytes])
        if key not in results:
            print(f"{Path(dataset).name}: {rule}")
            results[key] = {"key": json.loads(key), **train_and_evaluate(data, *RULES[rule])}
            with args.results.open("a") as file:
                file.write(json.dumps(results[key]) + "\n")
        row.append(results[key])

names = [Path(dataset).name for dataset in args.datasets]
print("\n| " + " | ".join(["rule", "steps", *names]) + " |\n" + "|---" * (2 + len(names)) + "|")
for rule, row in rows.items():
    bits = [f"{result['bits_per_byte']:.3f}" for result in row]
    print("| " + " | ".join([rule, str(row[0]["steps"]), *bits]) + " |")
