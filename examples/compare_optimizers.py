"""SOAP against AdamW on the same model, data, seed and number of steps, each at its best of three
learning rates. Writes a picture and prints a table in Markdown.

python examples/compare_optimizers.py [DATASET] [--steps 600] [--svg FILE]
"""

import argparse
from pathlib import Path

from tqdm import tqdm

import pico_tg
from pico_tg.tools.plot import COLORS, Line, Panel, svg

RATES = {"adamw": (4e-3, 8e-3, 16e-3), "soap": (6e-3, 12e-3, 24e-3)}
EVERY = 25  # steps between two measurements

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("dataset", nargs="?", default="python-docs")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--rates", type=int, default=3, help="try so many of the learning rates")
parser.add_argument("--svg", type=Path, default=Path(__file__).parent / "optimizers.svg")
args = parser.parse_args()

config = pico_tg.Config.preset(
    "xs", dim=96, att_q_heads=6, att_kv_heads=2, latent_num_blocks=2, next_tokens=4
)
data = pico_tg.load_data(pico_tg.DataSpec(args.dataset))
curves: dict[tuple[str, float], list[tuple[int, float]]] = {}
seconds: dict[str, float] = {}
for optimizer, rates in RATES.items():
    for rate in rates[: args.rates]:
        records = pico_tg.train(
            pico_tg.Pico(config, seed=0), data, context_len=512, batch_size=4, max_steps=args.steps,
            epochs=1000, warmup_steps=50, learning_rate=rate, optimizer=optimizer,
            validation_interval=EVERY,
        )  # fmt: skip
        curve, speeds = [], []
        for record in tqdm(records, total=args.steps, desc=f"{optimizer} {rate:g}", unit="step"):
            speeds.append(2048 / record["bytes_per_second"])
            if "validation_bits_per_byte" in record:
                curve.append((record["step"], record["validation_bits_per_byte"]))
        curves[optimizer, rate] = curve
        steady = speeds[3:]  # the first ones compile
        seconds[optimizer] = sum(steady) / max(1, len(steady))

print("\n| optimizer | learning rate | bits per byte |\n|---|---|---|")
for (optimizer, rate), curve in curves.items():
    print(f"| {optimizer} | {rate:g} | {curve[-1][1]:.3f} |")

best = {o: min((k for k in curves if k[0] == o), key=lambda k: curves[k][-1][1]) for o in RATES}
goal = curves[best["adamw"]][-1][1]
reached = next((step for step, bits in curves[best["soap"]] if bits <= goal), None)
print(f"\nAdamW ends at {goal:.3f} bits per byte after {args.steps} steps;", end=" ")
print(f"SOAP is there after {reached}" if reached else "SOAP does not get there")
if seconds["adamw"]:
    ratio = seconds["soap"] / seconds["adamw"]
    print(f"a step of SOAP takes {ratio:.2f} times as long as one of AdamW, refreshes included")

lines = [
    Line(f"{o} {rate:g}", *map(list, zip(*curves[o, rate], strict=True)), color, dashed)
    for (o, color) in zip(RATES, (COLORS[1], COLORS[0]), strict=True)
    for rate in RATES[o][: args.rates]
    for dashed in [(o, rate) != best[o]]
]
top = max(min(bits for _, bits in curve) for curve in curves.values()) + 1.5
low = min(bits for curve in curves.values() for _, bits in curve)
name = "python-docs" if args.dataset == "python-docs" else Path(args.dataset).name
title = f"SOAP and AdamW on {name}"
panel = Panel(lines, title, "step", "bits per byte (held out)", y_range=(low, top))
args.svg.write_text(svg([panel]))
print(f"wrote {args.svg}")
