"""Kill a script with signal 9 at random moments and call it again, again and again; then compare with an undisturbed run.

python tests/kill_test.py [kills] [01 | 03 | 04 | 05]      50 kills of 03 take some minutes, as do those of another stage

Run it where data/shapes and, for 04 and 05, runs/shapes and its samples are: python 01_data.py --size 16 --count 200 &&
python 03_train.py --model JiT-T/8 --steps 20 && python 04_sample.py --num 100
"""
import csv
import json
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

# script, flags, what a call with the name NAME makes, what else it remembers (removed to begin again)
STAGES = {"01": ("01_data.py", "--size 32 --count 8000 --name NAME", "data/NAME", ()),
          "04": ("04_sample.py", "--num 400 --batch-size 10 --steps 12 --amp off --out NAME", "NAME", ("NAME-grid.png",)),
          "05": ("05_eval.py", "--out NAME.json", "NAME.json", ("data/shapes/classifier-*", "data/shapes/statistics-*"))}

def content(path):
    """What must be equal, {name: bytes}; every file must be readable by itself."""
    if path.is_file():
        return json.loads(path.read_text())
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "meta.json" and ".lock" not in file.name}

def hunt(folder, kills, stage, seed=0):
    """The stages but 03.  Returns 0 if, killed and called again, a script leaves the same files as undisturbed."""
    name_of_script, flags, made, memory = STAGES[stage]
    chance, done, env = random.Random(seed), 0, {**os.environ, "OMP_NUM_THREADS": "1"}
    command = lambda name: [sys.executable, str(ROOT / name_of_script), *flags.replace("NAME", name).split()]
    calm, hunted = (Path(folder) / made.replace("NAME", name) for name in ("calm", "hunted"))

    def forget(name="hunted"):
        for pattern in (made, *memory):
            for path in Path(folder).glob(pattern.replace("NAME", name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    forget("calm")                                        # of an earlier hunt: its time would be that of looking
    start = time.time()
    subprocess.run(command("calm"), cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    seconds = time.time() - start
    forget()
    while done < kills:
        child = subprocess.Popen(command("hunted"), cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(chance.uniform(0.3, 1) * seconds)
            forget()                                      # it was faster: begin again, so that every kill hits its work
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            done += 1
            there = len(list(hunted.iterdir())) if hunted.is_dir() else int(hunted.exists())
            print(f"kill {done}: {there} files", flush=True)
    subprocess.run(command("hunted"), cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    same = content(calm) == content(hunted)
    print("the files are equal" if same else "THE FILES DIFFER")
    return 0 if same else 1

if __name__ == "__main__":
    number, stage = int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2] if len(sys.argv) > 2 else "03"
    sys.exit(torture(".", number, steps=1500) if stage == "03" else hunt(".", number, stage))
