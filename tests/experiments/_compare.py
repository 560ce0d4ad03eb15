"""What the main() of most experiments does: train several settings alike, sample, score, and print one table.

compare({label: flags of 03_train.py}, more flags for every training).  600 steps of the shapes preset say what speeds
learning up at the start, and nothing about long runs.
"""
import csv
import json
import re
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, train, sample, evaluate = (import_module(name) for name in ("01_data", "03_train", "04_sample", "05_eval"))

SHORT = ("--steps", 600, "--ema", 0.99, "--preview-every", 0, "--snapshots", 0)

def call(script, *arguments):
    """Run a script's main in this process, as the command line would; an error ends everything."""
    code = data.run(lambda: script.main([str(argument) for argument in arguments]))
    if code:
        sys.exit(code)

def compare(rows, more=(), num=500, sampling=(), common=SHORT):
    """Train, sample `num` images of, and score every row: {label: (held-out loss, FD, class accuracy)}."""
    print("| what | ms a step | held-out loss | FD | class accuracy |\n|---|---|---|---|---|", flush=True)
    results = {}
    for label, flags in rows.items():
        run = "compare-" + re.sub(r"\W+", "-", label)
        call(train, *common, "--run", run, *flags, *more)
        own = flags[flags.index("--experiment"):][:2] if "--experiment" in flags else []
        call(sample, "--run", run, "--num", num, *own, *sampling)
        call(evaluate, "--run", run, "--metrics", "fd")
        log = list(csv.DictReader(open(f"runs/{run}/log.csv")))
        scores = json.loads(Path(f"runs/{run}/metrics.json").read_text())
        results[label] = float(log[-1]["held_out"]), scores["fd"], scores.get("class_accuracy", float("nan"))
        speed = sum(float(row["images_per_s"]) for row in log) / len(log)
        milliseconds = 1e3 * float(log[-1]["images"]) / float(log[-1]["step"]) / speed
        print("| {} | {:.0f} | {:.3f} | {:.1f} | {:.2f} |".format(label, milliseconds, *results[label]), flush=True)
    return results
