"""Kill a training run with signal 9 at random moments and resume it, again and again; then compare with an undisturbed run.

python tests/kill_test.py [kills]      50 kills take some minutes; run it where data/shapes exists (python 01_data.py --size 16 --count 200)
"""
import csv
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--model", "JiT-T/8", "--patch-size", "8", "--hidden-size", "32", "--depth", "3", "--num-heads", "2", "--batch-size", "8", "--micro-batch", "4",
         "--lr", "1e-3", "--preview-every", "7", "--snapshots", "3", "--log-every", "3", "--save-minutes", "0.01", "--amp", "off", "--no-compile"]

def torture(folder, kills, steps, seed=0):
    """Returns 0 if every checkpoint found after a kill loads and the final log equals the undisturbed run's."""
    sys.path.insert(0, str(ROOT))
    from importlib import import_module
    model, chance = import_module("02_model"), random.Random(seed)
    script, env = [sys.executable, str(ROOT / "03_train.py")], {**os.environ, "OMP_NUM_THREADS": "1"}

    def loss_log(run):
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "gpu_MiB")}
                for row in csv.DictReader((Path(folder) / "runs" / run / "log.csv").open())]
    command = [*script, *FLAGS, "--steps", str(steps)]
    start = time.time()
    subprocess.run([*script, "--help"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    startup, checkpoint, done = time.time() - start, Path(folder) / "runs" / "hunted" / "checkpoint.pt", 0
    subprocess.run([*command, "--run", "calm"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    while done < kills:
        child = subprocess.Popen([*command, "--run", "hunted"], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(startup + chance.uniform(0, 2))
            shutil.rmtree(checkpoint.parent)              # it was faster: begin again, so that every kill hits a run
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            done += 1
            step = model.read_checkpoint(checkpoint)["info"]["step"] if checkpoint.exists() else 0         # raises if it does not load
            print(f"kill {done}: checkpoint at step {step}", flush=True)
    subprocess.run([*command, "--run", "hunted"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    same = loss_log("calm") == loss_log("hunted")
    print("the logs are equal" if same else "THE LOGS DIFFER")
    return 0 if same else 1

if __name__ == "__main__":
    sys.exit(torture(".", int(sys.argv[1]) if len(sys.argv) > 1 else 50, steps=1500))
