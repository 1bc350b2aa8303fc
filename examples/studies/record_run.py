"""Measure a run that `train` has ended, and append its result to a file of JSON lines.

python examples/studies/record_run.py PATH RUN --machine TEXT [--text FILE] [--commit NAME]
    [--context-len 6144] [--max-bytes 131072] [--results runs.jsonl]

Without --text, the held-out text of the run is measured.
"""

import argparse
import json
import subprocess
from pathlib import Path

import pico_tg
from pico_tg.costs import training_flops
from pico_tg.runs import read_metrics
from pico_tg.tools.router_report import router_report

HERE = Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("path", type=Path)
parser.add_argument("run")
parser.add_argument("--text", help="file to measure")
parser.add_argument("--commit", help="commit that trained the run (default: the present one)")
parser.add_argument("--context-len", type=int, default=6144)
parser.add_argument("--max-bytes", type=int, default=131072)
parser.add_argument("--machine", required=True, help="processor and number of its cores")
parser.add_argument("--results", type=Path, default=HERE / "runs.jsonl")
args = parser.parse_args()

run_dir = args.path / args.run
run = json.loads((run_dir / "training.json").read_text())
settings = run["settings"]
metrics = read_metrics(run_dir)
model = pico_tg.load(args.path, args.run)
evaluation = pico_tg.evaluate(
    model,
    args.text or pico_tg.DataSpec(**run["dataset"]),
    split="all" if args.text else "validation",
    context_len=args.context_len,
    max_bytes=args.max_bytes,
    progress=True,
)
here = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
).stdout.strip()
batch = settings["batch_size"] * settings["grad_accumulation_steps"]
step_flops = training_flops(model.config, settings["context_len"], batch)
curve = [
    (record["step"], record["validation_bits_per_byte"])
    for record in metrics
    if "validation_bits_per_byte" in record
]
result = {
    "run": f"{args.path.name} {args.run}",
    "commit": args.commit or here,
    "evaluated_at": here,
    "machine": args.machine,
    "config": model.config.to_dict(),
    "settings": settings,
    "data": run["data"],
    "parameters": model.config.parameters,
    "steps": metrics[-1]["step"],
    "flops": metrics[-1]["step"] * step_flops,
    "minutes": metrics[-1].get("minutes"),
    "curve": curve,
    "text": Path(args.text).name if args.text else "validation data of the run",
    "evaluation": evaluation.as_dict() | router_report(evaluation).as_dict(),
}
with args.results.open("a") as file:
    file.write(json.dumps(result) + "\n")
print(f"{result['run']}: {evaluation.bits_per_byte:.4f} bits per byte, appended to {args.results}")
