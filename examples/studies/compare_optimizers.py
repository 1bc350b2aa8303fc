"""Compare SOAP with AdamW on the same model, data, seed and number of steps.

Each optimizer is trained at up to three learning rates. Prints a table in Markdown and draws the
held-out bits per byte of every run.

python examples/studies/compare_optimizers.py [DATASET] [--steps 600] [--model MODEL.json]
"""

import argparse
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.tools.plot import COLORS, Line, Panel, settled, svg

LEARNING_RATES = {"adamw": (4e-3, 8e-3, 16e-3), "soap": (6e-3, 12e-3, 24e-3)}
CONTEXT_LEN, BATCH_SIZE = 512, 4
VALIDATION_INTERVAL = 25

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("dataset", nargs="?", default="python-docs")
parser.add_argument("--model", type=Path, help="sizes of the model (default: the quickstart's)")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--rates", type=int, default=3, help="number of learning rates to try, 1 to 3")
parser.add_argument("--svg", type=Path, default=Path(__file__).parent / "optimizers.svg")
args = parser.parse_args()
pico_tg.enable_compile_cache(training_graphs=True)

config = pico_tg.Config(dim=96, att_q_heads=6, att_kv_heads=2, latent_num_blocks=2, next_tokens=4)
if args.model:
    config = pico_tg.Config.from_json(args.model)
data = pico_tg.load_data(pico_tg.DataSpec(args.dataset))
curves: dict[tuple[str, float], list[tuple[int, float]]] = {}  # of (step, bits per byte)
step_seconds: dict[str, float] = {}
for optimizer, rates in LEARNING_RATES.items():
    for rate in rates[: args.rates]:
        records = pico_tg.train(
            pico_tg.Pico(config, seed=0), data, context_len=CONTEXT_LEN, batch_size=BATCH_SIZE,
            max_steps=args.steps, epochs=1000, warmup_steps=50, learning_rate=rate,
            optimizer=optimizer, validation_interval=VALIDATION_INTERVAL, settings="published",
        )  # fmt: skip
        curve, seconds = [], []
        for record in tqdm(records, total=args.steps, desc=f"{optimizer} {rate:g}", unit="step"):
            seconds.append(CONTEXT_LEN * BATCH_SIZE / record["bytes_per_second"])
            if "validation_bits_per_byte" in record:
                curve.append((record["step"], record["validation_bits_per_byte"]))
        curves[optimizer, rate] = curve
        steady = seconds[3:]  # the first three steps include compiling
        step_seconds[optimizer] = sum(steady) / max(1, len(steady))

print("\n| optimizer | learning rate | bits per byte |\n|---|---|---|")
for (optimizer, rate), curve in curves.items():
    print(f"| {optimizer} | {rate:g} | {curve[-1][1]:.3f} |")

best = {
    optimizer: min((key for key in curves if key[0] == optimizer), key=lambda k: curves[k][-1][1])
    for optimizer in LEARNING_RATES
}
goal = curves[best["adamw"]][-1][1]
reached = next((step for step, bits in curves[best["soap"]] if bits <= goal), None)
print(f"\nAdamW ends at {goal:.3f} bits per byte after {args.steps} steps.")
print(f"SOAP reaches that after {reached} steps." if reached else "SOAP does not reach that.")
if step_seconds["adamw"]:
    ratio = step_seconds["soap"] / step_seconds["adamw"]
    print(f"A step of SOAP takes {ratio:.2f} times as long as one of AdamW, refreshes included.")

line_color = {"adamw": COLORS[1], "soap": COLORS[0]}
lines = []
for (optimizer, rate), curve in curves.items():
    steps, bits = map(list, zip(*curve, strict=True))
    dash = int((optimizer, rate) != best[optimizer])
    lines.append(Line(f"{optimizer} {rate:g}", steps, bits, line_color[optimizer], dash))
title = f"SOAP and AdamW on {Path(args.dataset).name}"
panel = Panel(lines, title, "step", "bits per byte (held out)", y_range=settled(lines))
args.svg.write_text(svg([panel]))
print(f"wrote {args.svg}")
