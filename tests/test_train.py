"""Training: the same model however the work is split, bit for bit the same after a kill, and nothing lost."""
import argparse
import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY_FLAGS, call, data, evaluate, model, said, shell, train

def settings(*flags):
    """Flags -> complete settings and configuration, as the script would have them for data/shapes."""
    meta, arrays = data.open_data("data/shapes")
    return *settled(meta, *TINY_FLAGS, *flags), arrays

def gathered(*flags):
    return train.gather(train.read_flags(list(map(str, flags))))

def settled(meta, *flags, world=1):
    return train.settle(gathered(*flags), meta, torch.device("cpu"), world)

def recorder_of(trainer, arrays, asked=()):
    return train.Recorder(trainer, Path("runs/x"), arrays, None, list(asked))

def run_steps(trainer, arrays, steps):
    trainer.options.steps, feed = 10**6, train.read_ahead(*arrays["train"], trainer)
    for _ in range(steps):
        trainer.train_step(feed)
    feed.close()

def micro_batch(options, images, labels, step, index):
    chosen = train.image_indices(step, index, len(labels), options)
    return torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])

def weights(path):
    state = model.read_checkpoint(path)
    return [*state["model"].values(), *(v for ema in state["ema"] for v in ema.values())]

# ---- One model, whoever computes it ----------------------------------------------------------------------------------
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_two_micro_batches_are_the_big_batch_at_once(work, amp):
    """fp16: the scaler's factor must be gone from the norm that the log shows, and from the step."""
    options, config, arrays = settings("--micro-batch", 4, "--steps", 5, "--warmup", 0, "--amp", amp)
    split = train.Trainer(options, config, torch.device("cpu"))
    run_steps(split, arrays, 5)
    options, config, arrays = settings("--micro-batch", 4, "--steps", 10**6, "--warmup", 0)
    whole, norms = train.Trainer(options, config, torch.device("cpu")), []
    for step in range(5):                                 # the same micro-batches drawn, then one forward pass over both
        batches = []
        for index in (0, 1):
            train.seed_everything(options.seed, step, index)
            batches.append(train.make_batch(*micro_batch(options, *arrays["train"], step, index), options, config))
        batch = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        whole.optimizer.zero_grad()
        train.jit_objective(whole, batch)[0].backward()
        norms.append(sum(p.grad.square().sum() for p in whole.parameters)**0.5)
        whole.optimizer.param_groups[0]["lr"] = whole.lr(step)
        whole.optimizer.step()
    for a, b in zip(split.net.parameters(), whole.net.parameters()):
        assert (a - b).abs().max() < (1e-5 if amp == "off" else 5e-3)
    assert split.log.sums[-1, 0] == pytest.approx(float(sum(norms)), rel=1e-4 if amp == "off" else 2e-2)

def torchrun(*args, cwd):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", ROOT / args[0],
                           *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})

def environments(processes):
    """What torchrun tells each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
            for rank in range(processes)]

def two_processes(*args, cwd):
    """Without torchrun, which takes as long to start as they do."""
    children = [subprocess.Popen([sys.executable, ROOT / args[0], *map(str, args[1:])], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                for env in environments(2)]
    for child in children:
        said = child.communicate(timeout=300)[1]
        assert child.returncode == 0, said

THREADS = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
model = importlib.import_module("02_model")
import torch
count = lambda: len(os.listdir("/proc/self/task"))
with model.device_and_processes("cpu"):
    alone = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    alone(torch.ones(1, 2)).sum().backward()
    within = count()
    del alone
print(within - count())
"""

@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="where threads can be counted")
def test_processes_end_their_threads(tmp_path):
    """Gloo has three.  One that is left, and frees a tensor while the interpreter ends, aborts the process, now and then."""
    done = subprocess.run([sys.executable, "-c", THREADS, ROOT], env=environments(1)[0], cwd=tmp_path, capture_output=True, text=True)
    assert int(done.stdout) >= 3, done.stderr

def test_two_processes_train_the_same_model_as_one(work):
    """Also in the README's words: --batch-size is global."""
    flags = [*TINY_FLAGS, "--steps", 5, "--micro-batch", 2, "--log-every", 2, "--aux", "time"]              # two micro-batches a process
    assert call(train, *flags, "--run", "one") == 0
    done = torchrun("03_train.py", *flags, "--run", "two", cwd=work)
    assert done.returncode == 0, done.stderr
    for a, b in zip(weights("runs/one/checkpoint.pt"), weights("runs/two/checkpoint.pt")):
        assert (a - b).abs().max() < 1e-5
    assert done.stdout.count("step 0 to 5") == 1          # one process speaks
    logs = [list(csv.DictReader(open(f"runs/{run}/log.csv"))) for run in ("one", "two")]
    assert all(abs(float(a["loss"]) - float(b["loss"])) < 1e-4 for a, b in zip(*logs, strict=True))
    done = torchrun("04_sample.py", "--run", "two", "--num", 30, "--batch-size", 4, "--steps", 2, "--amp", "off", cwd=work)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("runs/two/samples").glob("0*.png"))) == 30 and Path("runs/two/grid.png").exists()
    assert call(evaluate, "--run", "two", "--batch-size", 4) == 0                                      # trains and caches the classifier
    done = torchrun("04_sample.py", "--run", "two", "--num", 30, "--steps", 3, "--amp", "off", cwd=work)
    assert done.returncode and done.stderr.count("04_sample.py: error") == 1 and '04_sample.py", line' not in done.stderr
    assert done.stdout == ""
    two_processes("05_eval.py", "--run", "two", "--batch-size", 4, "--out", "two.json", cwd=work)
    more = ["--resume", "--steps", 8, "--save-minutes", 0]                     # a save after every step, asked of both
    assert call(train, *flags, *more, "--run", "one") == 0
    two_processes("03_train.py", *flags, *more, "--run", "two", cwd=work)
    for a, b in zip(weights("runs/one/checkpoint.pt"), weights("runs/two/checkpoint.pt")):
        assert (a - b).abs().max() < 1e-5
    sums = [model.read_checkpoint(f"runs/{run}/checkpoint.pt")["sums"] for run in ("one", "two")]
    assert torch.allclose(*sums, rtol=1e-4, atol=1e-5)
    one, two = (json.loads(Path(path).read_text()) for path in ("runs/two/metrics.json", "two.json"))
    assert two["fd"] == pytest.approx(one["fd"], rel=1e-6) and two["precision"] == one["precision"] and two["class_accuracy"] == one["class_accuracy"]

@pytest.mark.card
def test_a_gpu_learns_what_a_cpu_does(work):
    """As the scripts run there, with whatever they choose; a CPU and a GPU draw other numbers, so losses are compared, not bits."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    flags = [flag for flag in TINY_FLAGS if flag not in ("--amp", "off", "--no-compile")]
    for device in ("cpu", "cuda"):
        assert call(train, *flags, "--steps", 200, "--log-every", 50, "--warmup", 5, "--device", device, "--run", device) == 0
        assert call(train, *flags, "--steps", 220, "--warmup", 5, "--device", device, "--run", device, "--resume") == 0
    rows = [list(csv.DictReader(open(f"runs/{device}/log.csv"))) for device in ("cpu", "cuda")]
    assert float(rows[1][3]["loss"]) == pytest.approx(float(rows[0][3]["loss"]), rel=0.3)
    assert float(rows[1][-1]["held_out"]) == pytest.approx(float(rows[0][-1]["held_out"]), rel=0.2)

def test_a_process_that_fails_alone_speaks(work, monkeypatch, capsys):
    def main():
        raise ValueError("out of luck")
    slept = []
    for rank, local in ((8, 0), (3, 3)):
        monkeypatch.setattr(data, "RANK", str(rank)), monkeypatch.setenv("LOCAL_RANK", str(local)), monkeypatch.setattr(data.time, "sleep", slept.append)
        assert data.run(main) == 1 and slept == [3] and not slept.clear() and f"[rank {rank}] out of luck" in capsys.readouterr().err
    said = subprocess.run([sys.executable, ROOT / "03_train.py", "--steps", "0"], capture_output=True, text=True, env=os.environ | {"RANK": ""}).stderr
    assert said.startswith("03_train.py: error: --steps 0")                    # exported, but empty: there is one process

def test_data_order_visits_every_image_once_an_epoch(work):
    options, _, arrays = settings("--micro-batch", 4)
    epochs = np.concatenate([train.image_indices(step, index, 200, options) for step in range(50) for index in (0, 1)]).reshape(2, 200)
    assert all(sorted(e) == list(range(200)) for e in epochs) and (epochs[0] != epochs[1]).any()

def test_reading_ahead_delivers_every_micro_batch_in_order(work):
    options, config, arrays = settings("--micro-batch", 4, "--steps", 4)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        trainer = train.Trainer(options, config, torch.device("cpu"), rank, 1)
        trainer.world, trainer.step = world, 1
        jobs = [(step, index) for step in range(1, 4) for index in range(rank, 2, world)]
        for job, (images, labels) in zip(jobs, train.read_ahead(*arrays["train"], trainer), strict=True):
            wanted = micro_batch(options, *arrays["train"], *job)
            assert torch.equal(images, wanted[0]) and torch.equal(labels, wanted[1])

# ---- Surviving -------------------------------------------------------------------------------------------------------
def test_resume_is_bitwise_after_kill_9(work):
    """20 steps = 10 + kill -9 + resume, mid-epoch (25 steps an epoch), with accumulation, EMA, dropout and an auxiliary head."""
    flags = [*TINY_FLAGS, "--steps", 20, "--micro-batch", 4, "--aux", "rotation", "--dropout", "0.1", "--schedule", "cosine", "--ema", "0.9,0.5", "--save-minutes", 0]
    assert call(train, *flags, "--run", "whole") == 0
    child = subprocess.Popen([sys.executable, ROOT / "03_train.py", *map(str, flags), "--run", "killed", "--log-every", "1"], cwd=work,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path("runs/killed/log.csv")
    while child.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 11):
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert call(train, *flags, "--run", "killed", "--log-every", 1) == 0                  # the same command
    for a, b in zip(weights("runs/whole/checkpoint.pt"), weights("runs/killed/checkpoint.pt")):
        assert torch.equal(a, b)
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))

def test_the_log_goes_on_within_a_window(work):
    """A checkpoint between two lines of the log carries the sums since the last one; the state holds scaler and counts too."""
    options, config, arrays = settings("--steps", 20, "--aux", "time", "--amp", "fp16")
    first, second = (train.Trainer(options, config, torch.device("cpu")) for _ in range(2))
    run_steps(first, arrays, 3)
    assert not first.log.sums.requires_grad
    first.bad.fill_(2)
    first.skipped.fill_(4)
    first.scaler.update(8.0)
    first.log.rows = [{"step": 2}]
    train.restore(second, train.training_state(first), "a run")
    assert torch.equal(first.log.sums, second.log.sums) and first.log.sums[:, 1].sum() > 0 and first.log.sums[-2, 0] > 0 and second.log.rows == [{"step": 2}]
    assert all(torch.equal(a, b) for a, b in zip(first.head.parameters(), second.head.parameters(), strict=True)) and len(list(first.head.parameters())) == 4
    assert (second.bad, second.skipped, second.step, second.scaler.get_scale()) == (2, 4, 3, 8.0)
    other = train.Trainer(options, config, torch.device("cpu"), rank=1)
    train.restore(other, train.training_state(first), "a run")
    assert other.log.sums.abs().sum() == 0                    # they are those of all processes: one of them takes them

def test_a_kill_before_the_first_checkpoint_begins_again(work, capsys):
    child = subprocess.Popen([sys.executable, ROOT / "03_train.py", *TINY_FLAGS, "--steps", "100000", "--log-every", "1"], cwd=work,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    while child.poll() is None and not Path("runs/shapes/log.csv").exists():
        time.sleep(0.02)
    assert call(train, *TINY_FLAGS, "--steps", "100000") == 1                  # two at once
    said = capsys.readouterr().err
    child.kill()
    child.wait()
    assert said.count("\n") == 1 and "another process is writing to runs/shapes" in said
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 0       # it marks the folder as a run's
    with pytest.raises(ValueError, match="has not been trained"):
        model.load_network("runs/shapes/checkpoint.pt")
    assert call(train, *TINY_FLAGS, "--steps", 100000, "--resume", "--dry-run") == 0
    assert call(train, *TINY_FLAGS, "--steps", 6, "--resume") == 0
    assert [row["step"] for row in csv.DictReader(open("runs/shapes/log.csv"))] == ["5", "6"]

def test_the_first_checkpoint_comes_after_a_minute(work):
    options, config, arrays = settings("--steps", 9)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    recorder.trainer.step = 1
    for seconds, saved in ((58, False), (61, True)):
        recorder.saved_at = time.perf_counter() - seconds
        recorder.after_step()
        assert (model.read_checkpoint("runs/x/checkpoint.pt")["info"]["step"] == 1) == saved
    assert time.perf_counter() - recorder.saved_at < 5
    assert recorder.wait == options.save_minutes == 5
    assert recorder_of(train.Trainer(*settings("--steps", 9, "--save-minutes", "0.1")[:2], torch.device("cpu")), arrays).wait == 0.1

@pytest.mark.parametrize("content", [b"\0" * 1000, b"other,header\n1,2\n", b"\xef\xbb\xbfstep,loss\n"])
def test_the_log_is_written_and_never_read(work, content):
    """Its rows lie in the checkpoint: whatever became of the file, the next line is written with all before it."""
    assert call(train, *TINY_FLAGS, "--steps", 10) == 0
    before = list(csv.DictReader(open("runs/shapes/log.csv")))
    Path("runs/shapes/log.csv").write_bytes(content)
    assert call(train, "--resume", "--steps", 14) == 0
    rows = list(csv.DictReader(open("runs/shapes/log.csv")))
    assert [row["step"] for row in rows] == ["5", "10", "14"] and rows[:2] == before

def test_a_closed_pipe_does_not_stop_a_run(work):
    done = subprocess.run(f"{sys.executable} {ROOT / '03_train.py'} {' '.join(TINY_FLAGS)} --steps 60 | head -1", shell=True, cwd=work, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 60, done.stderr

def test_sigterm_leaves_a_checkpoint(work):
    child = subprocess.Popen([sys.executable, ROOT / "03_train.py", *TINY_FLAGS, "--steps", "100000", "--log-every", "1"], cwd=work,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not Path("runs/shapes/log.csv").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    child.terminate()
    start = time.time()
    assert child.wait(30) == 130 and time.time() - start < 10
    step = model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"]
    assert f"stopped at step {step}; the same command, without --overwrite, goes on there" in child.stderr.read() and step > 0
    wrong = shell("03_train.py", "--resume", "--batch-size", "16", cwd=work)
    assert wrong.returncode == 1 and "batch_size 8, now 16" in wrong.stderr
    assert call(train, "--resume", "--steps", step + 1) == 0 and model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == step + 1

def test_another_rate_or_precision_is_the_way_out(work):
    """Chance is a function of the step: what was not finite would be so again."""
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0
    assert call(train, "--resume", "--steps", 6, "--lr", "5e-4", "--amp", "fp16") == 0
    state = model.read_checkpoint("runs/shapes/checkpoint.pt")
    assert (state["options"]["lr"], state["options"]["amp"], state["info"]["step"]) == (5e-4, "fp16", 6) and state["scaler"]
    assert call(train, "--resume", "--preset", "shapes", "--steps", 8, "--amp", "off") == 0                # what it was begun with stands
    options = model.read_checkpoint("runs/shapes/checkpoint.pt")["options"]
    assert (options["lr"], options["batch_size"]) == (5e-4, 8)

def test_a_folder_that_is_in_use_is_not_taken(work, capsys):
    """An official checkpoint put where 04_sample.py reads it; pictures of the user's own in preview/."""
    Path("runs/keep/preview").mkdir(parents=True)
    torch.save({"model_ema1": {}, "args": argparse.Namespace()}, "runs/keep/checkpoint.pt")
    before = Path("runs/keep/checkpoint.pt").read_bytes()
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "keep") == 1 and "--run NAME" in capsys.readouterr().err
    assert Path("runs/keep/checkpoint.pt").read_bytes() == before
    Path("runs/keep/preview/holiday.png").write_bytes(b"mine")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "keep", "--overwrite") == 0 and Path("runs/keep.old/preview/holiday.png").exists()
    assert "what was runs/keep is runs/keep.old now" in capsys.readouterr().out
    Path("runs/lone.old").symlink_to("nowhere"), Path("runs/lone").mkdir(), Path("runs/lone/a").write_text("mine")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "lone", "--overwrite") == 0 and Path("runs/lone.old/a").exists() and Path("runs/lone.old.old").is_symlink()
    assert call(train, *TINY_FLAGS, "--steps", "1" + "0" * 340, "--run", "long") == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "keep", "--overwrite") == 0 and Path("runs/keep.old/config.json").exists() and Path("runs/keep.old.old/preview/holiday.png").exists()

def test_resume_does_not_overwrite(work):
    """A run begun with --overwrite goes on where it lies."""
    assert call(train, *TINY_FLAGS, "--steps", 5, "--overwrite") == 0 and call(train, "--resume", "--steps", 10) == 0
    assert not Path("runs/shapes.old").exists() and [row["step"] for row in csv.DictReader(open("runs/shapes/log.csv"))] == ["5", "10"]

def test_nohup_is_honoured():
    """A signal that was ignored at the start stays ignored; the others are noted, and their handlers come back at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with data.asked_to_stop() as asked:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert asked == [1]
        assert {number: signal.getsignal(number) for number in before} == before | {signal.SIGHUP: signal.SIG_IGN}
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])

def test_what_is_recorded_has_the_shapes_and_the_device_of_a_micro_batch(work, monkeypatch):
    """On meta: where there is no GPU nothing is recorded."""
    asked = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda net, args: asked.append((net, args)) or "recorded")
    monkeypatch.setattr(model, "autocast", lambda amp, device, cache: asked.append((amp, device.type, cache)) or nullcontext())
    options, config, _ = settings("--micro-batch", 4, "--amp", "bf16")
    assert train.recorded("net", options, config, torch.device("meta")) == "recorded"
    cast, (net, args) = asked
    assert cast == ("bf16", "meta", False) and net == "net" and {value.device.type for value in args} == {"meta"}
    assert [(tuple(value.shape), value.dtype) for value in args] == [((4, 3, 16, 16), torch.float32), ((4,), torch.float32), ((4,), torch.int64)]

def test_torchrun_restart_goes_on(work, monkeypatch, capsys):
    """torchrun --max-restarts starts the same command again: --overwrite is not repeated, and a refusal stays one."""
    flags = [*TINY_FLAGS, "--steps", 6]
    assert call(train, *flags) == 0
    before = Path("runs/shapes/checkpoint.pt").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(train, *flags, "--overwrite") == 0 and "nothing to do" in capsys.readouterr().out
    assert call(train, *flags, "--seed", 1) == 1 and Path("runs/shapes/checkpoint.pt").read_bytes() == before and not Path("runs/shapes.old").exists()

def test_random_kills(work):
    """The short form of tests/kill_test.py."""
    import kill_test
    assert kill_test.torture(work, kills=1, steps=70, seed=2) == 0

def test_non_finite_steps_are_skipped_and_counted(work, capsys, monkeypatch):
    options, config, arrays = settings("--steps", 10)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    before = [p.clone() for p in trainer.net.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "objective", lambda trainer, batch: (trainer.net.final_layer.linear.bias.sum() * float("nan"), torch.zeros(len(batch["t"]))))
        run_steps(trainer, arrays, 2)
    assert trainer.skipped == trainer.bad == 2 and trainer.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.net.parameters()))
    assert not trainer.optimizer.state or all(state["step"] == 0 for state in trainer.optimizer.state.values())
    for amp in ("bf16", "fp16"):
        assert call(train, *TINY_FLAGS, "--lr", "1e30", "--warmup", 0, "--steps", 30, "--amp", amp, "--run", amp) == 1
        error = capsys.readouterr().err
        assert re.search(r"no longer finite at step \d+ \(1\d gradients in a row\)", error) and len(error.strip().splitlines()) == 1 and "lower --lr than 1e+30, or with another --amp" in error, error
        assert model.read_checkpoint(f"runs/{amp}/checkpoint.pt")["info"]["step"] <= 1
        assert call(train, *TINY_FLAGS, "--lr", "1e-3", "--warmup", 0, "--steps", 30, "--run", amp, "--amp", amp, "--resume") == 0           # as it says
        assert float(list(csv.DictReader(open(f"runs/{amp}/log.csv")))[-1]["loss"]) < 10

def test_a_run_that_ends_in_numbers_that_are_none_says_so(work, capsys):
    """Its last step's gradient is finite, the weights that it makes are useless: nothing is saved, and that is no success."""
    assert call(train, *TINY_FLAGS, "--lr", "1e30", "--warmup", 0, "--steps", 1) == 1
    said = capsys.readouterr()
    assert "no longer finite at step 1 (0 gradients in a row)" in said.err and "after step 1" not in said.out
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 0

def test_weights_whose_loss_is_not_finite_are_not_saved(work, capsys):
    """One step of 1e30 has a gradient that is finite, and weights that are not to be gone on with."""
    assert call(train, *TINY_FLAGS, "--steps", 10) == 0 and call(train, *TINY_FLAGS, "--resume", "--steps", 60, "--lr", "1e30", "--save-minutes", 0) == 1
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 10
    assert call(train, *TINY_FLAGS, "--resume", "--steps", 20, "--lr", "1e-4") == 0

@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_one_micro_batch_that_is_not_finite_spoils_the_step_and_nothing_else(work, monkeypatch, amp):
    """Weights and the optimizer's moments stay as they are, to the bit; the next step is a good one."""
    options, config, arrays = settings("--steps", 10, "--micro-batch", 2, "--amp", amp)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    run_steps(trainer, arrays, 2)
    kept = [value.clone() for value in (*trainer.net.state_dict().values(), *(s["exp_avg"] for s in trainer.optimizer.state.values()))]
    now = lambda: (*trainer.net.state_dict().values(), *(s["exp_avg"] for s in trainer.optimizer.state.values()))
    real, calls, scale = trainer.objective, [], trainer.scaler.get_scale()

    def spoiled(trainer, batch):
        loss, of_each = real(trainer, batch)
        calls.append(1)
        return loss * (float("inf") if len(calls) == 2 else 1.0), of_each
    monkeypatch.setattr(trainer, "objective", spoiled)
    run_steps(trainer, arrays, 1)
    assert len(calls) == 4 and (trainer.skipped, trainer.bad) == (1, 1) and all(map(torch.equal, kept, now()))
    assert amp == "off" or trainer.scaler.get_scale() == scale / 2
    run_steps(trainer, arrays, 1)
    assert (trainer.skipped, trainer.bad) == (1, 0) and not all(map(torch.equal, kept, now()))
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {3}

def test_full_disk_keeps_the_old_checkpoint(work):
    path = Path("checkpoint.pt")
    model.save({"config": {}, "ema": [], "x": torch.zeros(10)}, path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(ValueError, match="make room"):
            model.save({"x": torch.randn(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and not Path("checkpoint.pt.jit-part").exists()

# ---- The pieces ------------------------------------------------------------------------------------------------------
def test_ema_and_learning_rate(work):
    options, config, arrays = settings("--steps", 100, "--ema", "0.9,0", "--schedule", "cosine", "--warmup", 10, "--lr", "1e-2")
    trainer = train.Trainer(options, config, torch.device("cpu"))
    expected = trainer.net.final_layer.linear.bias.detach().clone()
    assert trainer.lr(4) == pytest.approx(0.5e-2 * 0.5 * (1 + np.cos(np.pi * 4 / 100))) and trainer.lr(99) < 1e-5
    assert options.steps > 90                             # the average grows to its length by then
    for step, decay in ((0, 0.1), (1, 2 / 11), (2, 3 / 12), (500, 0.9)):
        trainer.step = step
        run_steps(trainer, arrays, 1)
        expected = decay * expected + (1 - decay) * trainer.net.final_layer.linear.bias.detach()
    assert torch.allclose(trainer.ema[0]["final_layer.linear.bias"], expected, atol=1e-7)
    assert torch.equal(trainer.ema[1]["final_layer.linear.bias"], trainer.net.final_layer.linear.bias)
    options.schedule = "constant"
    assert trainer.lr(50) == trainer.lr(99) == 1e-2

def test_defaults_are_the_papers(work):
    meta = {"size": 256, "classes": ["x"] * 1000, "counts": {"train": 1_281_167}, "id": "1"}
    options, config = settled(meta, "--preset", "imagenet-B", world=8)
    assert (options.lr, options.batch_size, options.schedule, options.label_drop, options.ema) == (2e-4, 1024, "constant", 0.1, (0.9999, 0.9996))
    assert (options.p_mean, options.p_std, options.warmup, options.weight_decay, options.steps) == (-0.8, 0.8, 6256, 0, 750684)
    assert config == model.JiTConfig(**model.MODELS["JiT-B/16"])
    tiny = settings()
    group, = train.Trainer(tiny[0], tiny[1], torch.device("cpu")).optimizer.param_groups
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0

@pytest.mark.parametrize("size,flags,patch", [(64, [], 16), (32, [], 8), (100, [], 25), (32, ["--patch-size", 16], 16), (256, ["--preset", "photos"], 16), (512, ["--preset", "photos"], 32), (160, ["--preset", "imagenette"], 16), (192, ["--preset", "photos"], 12), (8, ["--preset", "cifar10"], 1)])
def test_the_patch_follows_the_image_size(size, flags, patch):
    """As many tokens as the model's row has, unless the patch is given."""
    meta = {"size": size, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}
    options, config = settled(meta, *flags)
    assert config.patch_size == patch and config.noise_scale == (2.0 if size == 512 or options.preset == "shapes" else 1.0)

@pytest.mark.parametrize("batch,world,micro", [(32, 1, 32), (1024, 8, 128), (1200, 8, 150), (96, 1, 96), (257, 1, 257), (256, 2, 128), (7, 2, None)])
def test_micro_batches(batch, world, micro):
    meta = {"size": 64, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}
    if micro:
        assert settled(meta, "--batch-size", batch, world=world)[0].micro_batch == micro
    else:                                                 # a prime would mean passes of one image
        with pytest.raises(data.UsageError, match="give a multiple of 6"):
            settled(meta, "--batch-size", batch, world=world)
        with pytest.raises(data.UsageError, match="micro-batches of 16 for 1 process"):
            settled(meta | {"size": 256}, "--preset", "photos", "--batch-size", 257)

@pytest.mark.parametrize("size,next_size", [(178, 192), (94, 96), (127, 128), (218, 224), (58, 64), (81, 96)])
def test_sizes_that_make_no_good_patches_are_refused(size, next_size):
    meta = {"size": size, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}
    with pytest.raises(data.UsageError, match=f"pack them at --size {next_size}"):
        settled(meta, "--preset", "photos")
    assert settled(meta, "--preset", "photos", "--patch-size", size)[1].patch_size == size

def test_a_dry_run_says_all_and_writes_nothing(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2000, "--ema", "0.9,0.998,0.9999", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "step 0 to 2000, batch 8" in said and "micro-batches of 8" in said and "EMA over 10 and 223 and 223 steps" in said and "about 0.0 GiB" in said and not Path("runs").exists()
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "./lab", "--dry-run") == 0 and capsys.readouterr().out.startswith("lab: ")
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0 and call(train, "--resume", "--steps", 4, "--dry-run") == 0
    assert "context tokens, noise scale 2; 200 images, 100 held out; step 2 to 4, batch 8, lr 0.001, off, cpu; micro" in capsys.readouterr().out

def test_a_folder_that_is_no_runs_is_not_touched(work, capsys):
    Path("runs/shapes").mkdir(parents=True)
    Path("runs/shapes/config.json").write_text("mine")
    assert call(train, *TINY_FLAGS, "--steps", 2) == 1 and "holds files but no checkpoint.pt: pass --run NAME, or --overwrite to move it aside" in capsys.readouterr().err
    assert [path.name for path in Path("runs/shapes").iterdir()] == ["config.json"]
    assert call(train, *TINY_FLAGS, "--steps", 2, "--overwrite") == 0 and Path("runs/shapes.old/config.json").read_text() == "mine"
    Path("runs/killed").mkdir()
    Path("runs/killed/checkpoint.pt.jit-part").write_bytes(b"half")            # what a kill in the first save leaves
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "killed") == 0

def test_another_machines_precision_is_no_other_setting(work, monkeypatch):
    flags = [*TINY_FLAGS[:TINY_FLAGS.index("--amp")], "--no-compile", "--steps", 4]
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: amp or "bf16")
    assert call(train, *flags) == 0
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: amp or "off")
    assert call(train, *flags) == 0 and call(train, *flags[:-1], 6, "--resume") == 0
    assert json.loads(Path("runs/shapes/config.json").read_text())["options"]["amp"] == "bf16"

def test_a_damaged_checkpoint_is_one_line(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0
    whole = torch.load("runs/shapes/checkpoint.pt", weights_only=True)
    for change in ({"sums": torch.zeros(3, 2)}, {"model": {}}, {"info": None, "digest": None}, {"optimizer": {}}, {"model": 3}, {"optimizer": {"state": {}, "param_groups": []}}, {"optimizer": 3}):
        torch.save({k: v for k, v in (whole | change).items() if v is not None}, "runs/shapes/checkpoint.pt")
        assert call(train, *TINY_FLAGS, "--steps", 6, "--resume") == 1
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1 and ("damaged" in error or "not the state of a training run" in error), error
        assert change != {"model": {}} or "Missing key(s)" in error

@pytest.mark.parametrize("flags,size,device,micro", [(["--preset", "photos"], 256, "cpu", 16), (["--preset", "imagenet-B"], 256, "cpu", 8), (["--preset", "imagenet-B"], 256, "cuda", 128),
                                                     (["--preset", "imagenet-L"], 256, "cuda", 32), (["--preset", "cifar10"], 32, "cuda", 256), ([], 64, "cpu", 32)])
def test_the_micro_batch_fits_the_memory(monkeypatch, flags, size, device, micro):
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: "off")
    meta = {"size": size, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}
    options, _ = train.settle(gathered(*flags), meta, torch.device(device), 1)
    assert options.micro_batch == micro
    # only long passes are compiled; CUDA graphs take one micro-batch a step
    assert options.compile == (device == "cuda") and options.record == (device == "cuda" and options.batch_size == micro)

def test_what_the_log_counts(work, monkeypatch):
    """Ranges of t in their order; v-space whatever the loss; sums of all processes in a checkpoint; a save asks all processes."""
    options, config, arrays = settings("--loss", "x", "--pred", "v", "--steps", 9)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    trainer.log.add_losses(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0.1, 1.0, 0.1]))
    trainer.log.add("aux", torch.tensor(3.0)), trainer.log.add("aux", torch.tensor(math.inf))
    assert trainer.log.sums.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [2, 1], [3, 1], [0, 0]]
    for weight in [*trainer.ema[0].values(), *trainer.net.parameters()]:
        weight.data.add_(torch.randn_like(weight) * 0.05)
    batch = train.make_batch(*micro_batch(options, *arrays["train"], 0, 0), options, config)
    z, t = model.mix(batch["x"], batch["e"], batch["t"]), batch["t"]
    assert trainer.objective is train.grid_objective
    loss, v_loss = trainer.objective(trainer, batch)
    assert loss.requires_grad and not v_loss.requires_grad                     # else the log would keep every graph
    assert torch.allclose(v_loss, (trainer.net(z, t, batch["y"]) - (batch["x"] - batch["e"])).square().mean((1, 2, 3)), rtol=1e-4) and not torch.isclose(loss, v_loss.mean())
    net = model.JiT(config).eval()
    net.load_state_dict(trainer.ema[0])
    with torch.no_grad():
        assert torch.allclose(train.predict_clean(trainer, z, t, batch["y"]), z + (1 - t.view(-1, 1, 1, 1)) * net(z, t, batch["y"]), atol=1e-5)
    monkeypatch.setattr(train, "over_processes", lambda numbers, world: numbers * 0 + 7.0)
    assert (train.training_state(trainer)["sums"] == 7).all()

def test_ten_steps_written_a_second_time(work):
    """Draws, order of the data, loss, AdamW, averages and every number of the log, from their definitions."""
    flags = ["--steps", 10, "--log-every", 5, "--micro-batch", 4, "--weight-decay", 0.1, "--warmup", 3, "--schedule", "cosine", "--ema", "0.9,0.15", "--seed", 3,
             "--label-drop", 0.3, "--shift", 1.5, "--p-mean", -0.5, "--p-std", 0.7, "--noise-scale", 1.7, "--lr", 0.01, "--run", "again"]
    _, config, arrays = settings(*flags)
    seed = lambda *key: torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    images, labels = arrays["train"]
    order = np.concatenate([np.random.default_rng((3, 3, epoch)).permutation(200) for epoch in range(2)])
    seed(3)
    net, rows, sums = model.JiT(config), [], np.zeros((7, 2))
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    averages = [{name: p.detach().clone() for name, p in weights.items()} for _ in range(2)]
    for step in range(10):
        net.zero_grad()
        for micro in range(2):
            seed(3, step, micro)
            rows_of = order[step * 8 + micro * 4:][:4]
            x = torch.from_numpy(images[rows_of]).permute(0, 3, 1, 2).float() / 127.5 - 1
            mirrored = torch.rand(4, 1, 1, 1) < 0.5
            x = torch.where(mirrored, x.flip(3), x).contiguous()
            y = torch.where(torch.rand(4) < 0.3, 10, torch.from_numpy(labels[rows_of]))
            t = torch.sigmoid(torch.randn(4) * 0.7 - 0.5)
            t = t / (t + 1.5 * (1 - t))
            e = 1.7 * torch.randn_like(x)
            t4 = t.view(4, 1, 1, 1)
            z = t4 * x + (1 - t4) * e
            loss = (((net(z, t, y) - x) / (1 - t4).clamp(min=0.05))**2).mean((1, 2, 3))
            (loss.mean() / 2).backward()
            for value, time in zip(loss.tolist(), t.tolist()):
                sums[int(time * 5)] += value, 1
            sums[5] += 0, 1
        norm = sum((p.grad**2).sum() for p in weights.values()).sqrt().item()
        sums[6] += norm, 1
        lr = 0.01 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 10))
        with torch.no_grad():
            for name, p in weights.items():
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.95 * second[name] + 0.05 * p.grad**2
                p.mul_(1 - lr * 0.1)
                p -= lr * (first[name] / (1 - 0.9**(step + 1))) / ((second[name] / (1 - 0.95**(step + 1))).sqrt() + 1e-8)
                for decay, average in zip((0.9, 0.15), averages):
                    decay = min(decay, (1 + step) / (10 + step))
                    average[name] = decay * average[name] + (1 - decay) * p
        if step % 5 == 4:
            means = sums[:, 0] / np.maximum(sums[:, 1], 1)
            rows.append([step + 1, 8 * (step + 1), sums[:5, 0].sum() / sums[:5, 1].sum(), *means, lr])
            sums[:] = 0
    assert call(train, *TINY_FLAGS, *flags, "--snapshots", 3) == 0
    state = model.read_checkpoint("runs/again/checkpoint.pt")
    assert sorted(path.name for path in Path("runs/again/snapshots").iterdir()) == ["0000004.pt", "0000007.pt", "0000010.pt"]          # thirds
    for name, p in weights.items():
        assert torch.allclose(state["model"][name], p, atol=2e-4) and all(torch.allclose(a[name], b[name], atol=2e-4) for a, b in zip(state["ema"], averages)), name
    for row, expected in zip(csv.DictReader(open("runs/again/log.csv")), rows):
        assert [float(row[name] or 0) for name in ("step", "images", "loss", *train.SUMMED, "lr")] == pytest.approx(expected, rel=2e-3, abs=1e-9), row
        assert row["skipped"] == "0" and bool(row["held_out"]) == (row["step"] == "10")

def test_the_speed_in_the_log(work, monkeypatch):
    options, config, arrays = settings("--steps", 9, "--micro-batch", 4)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), {**arrays, "val": tuple(part[:0] for part in arrays["val"])})
    assert len(recorder.shown[1]) == 200                                       # nothing is held out: training images
    recorder.trainer.step, recorder.line_step, recorder.line_at = 7, 2, time.perf_counter() - 10
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    recorder.write_line(False)
    assert recorder.trainer.log.rows[-1]["images_per_s"] == pytest.approx(5 * 8 / 10, rel=0.05) and recorder.line_step == 7 and recorder.bar.postfix == "images_per_s=4, loss=nan"
    assert math.isnan(recorder.trainer.log.rows[-1]["loss"]) and recorder.trainer.log.rows[-1]["gpu_MiB"] == 3               # nothing was finite: no number, and never 0
    assert time.perf_counter() - recorder.line_at < 5 and recorder_of(recorder.trainer, arrays).line_step == 7             # the next line begins here
    recorder.write_line(True)
    assert recorder.trainer.log.rows[-1]["held_out"] == train.held_out_loss(recorder.trainer, *recorder.shown)

def test_an_older_checkpoint_lacks_a_setting(work, capsys):
    flags = [*TINY_FLAGS, "--run", "old"]
    assert call(train, *flags, "--steps", 4) == 0
    state = model.read_checkpoint("runs/old/checkpoint.pt")
    del state["options"]["weight_decay"], state["config"]["qk_norm"]
    model.save(state, Path("runs/old/checkpoint.pt"))
    assert call(train, *flags, "--steps", 4, "--weight-decay", 0.1) == 1 and "weight_decay 0.0, now 0.1" in capsys.readouterr().err
    assert call(train, *flags, "--steps", 6, "--resume") == 0 and model.read_checkpoint("runs/old/checkpoint.pt")["info"]["step"] == 6

def test_saving_asks_all_processes(work, monkeypatch):
    options, config, arrays = settings("--steps", 9)
    trainer, worlds = train.Trainer(options, config, torch.device("cpu")), []
    recorder = recorder_of(trainer, arrays)
    monkeypatch.setattr(train, "over_processes", lambda numbers, world: worlds.append(world) or torch.tensor([0, 0]))
    trainer.step, trainer.world = 1, 2
    recorder.after_step()
    assert worlds == [2] and model.choose_precision("fp16", torch.device("cpu")) == "fp16"
    with model.autocast("fp16", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16

def test_table_1_of_document_000():
    rows = {name: tuple(train.EXPERIMENTS[name].values()) for name in ("baseline", "exp1", "exp2", "exp3", "exp4", "exp5")}
    assert rows == {"baseline": ("linear", "swiglu", "none"), "exp1": ("nonlinear", "bottleneck", "none"), "exp2": ("nonlinear", "bottleneck", "time"),
                    "exp3": ("nonlinear", "swiglu", "none"), "exp4": ("nonlinear", "swiglu", "time"), "exp5": ("nonlinear", "swiglu", "rotation")}
    assert train.EXPERIMENTS["plain"] == {"rope": False, "qk_norm": False, "in_context_len": 0} and train.EXPERIMENTS["context"] == {"rope": True, "qk_norm": True}
    assert train.EXPERIMENTS["rope-qknorm"] == {"rope": True, "qk_norm": True, "in_context_len": 0} and len(train.EXPERIMENTS) == 9

def test_labels_are_dropped_and_images_mirrored():
    s = train.Options(flip=True, shift=1.0)
    config = model.JiTConfig(image_size=16, patch_size=8, num_classes=10)
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 16, 1).expand(4000, 16, 16, 3)
    torch.manual_seed(0)
    batch = train.make_batch(images, torch.full((4000,), 3), s, config)
    assert abs((batch["y"] == 10).float().mean() - 0.1) < 0.02 and ((batch["y"] == 10) | (batch["y"] == 3)).all()
    assert abs((batch["x"][:, 0, 0, 0] > batch["x"][:, 0, 0, 1]).float().mean() - 0.5) < 0.03
    assert torch.allclose(batch["x"].amin(), torch.tensor(-1.0)) and abs(batch["e"].std() - 1) < 0.01
    config.noise_scale = 2.0
    assert abs(train.make_batch(images, torch.full((4000,), 3), s, config)["e"].std() - 2) < 0.02

def test_rotation_turns_the_image_and_is_asked_for():
    s = train.Options(flip=False, shift=1.0)
    config = model.JiTConfig(image_size=16, patch_size=8, num_classes=10, aux="rotation")
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    torch.manual_seed(0)
    batch = model.RotationHead(config).prepare(train.make_batch(image.expand(64, 16, 16, 3), torch.zeros(64).long(), s, config))
    upright = image.permute(2, 0, 1).float() / 127.5 - 1
    for x, k in zip(batch["x"], batch["turns"]):
        assert torch.equal(x, torch.rot90(upright, int(k), (1, 2)))                     # the diffusion loss sees it turned
    assert set(batch["turns"].tolist()) == {0, 1, 2, 3}

def test_lambda_is_applied_and_the_time_head_learns(work):
    """The documents' own code parsed lambda and used 1.0: the head's gradient must scale with it."""
    grads = []
    assert settings("--aux", "time", "--aux-weight", 0)[0].aux_weight == 0
    for weight in (0.1, 0.3):
        options, config, arrays = settings("--aux", "time", "--aux-weight", weight)
        trainer = train.Trainer(options, config, torch.device("cpu"))
        trainer.loss(0, torch.from_numpy(arrays["train"][0][:8].copy()), torch.from_numpy(arrays["train"][1][:8])).backward()
        grads.append(trainer.head.mlp[2].weight.grad)
    assert torch.allclose(grads[1], 3 * grads[0], rtol=1e-4) and grads[0].abs().max() > 0
    assert call(train, *TINY_FLAGS, "--steps", 150, "--aux", "time", "--aux-weight", 1, "--log-every", 50, "--lr", "3e-3") == 0
    aux = [float(row["aux"]) for row in csv.DictReader(open("runs/shapes/log.csv"))]
    assert aux[-1] < 0.5 * aux[0]
    net, _ = model.load_network("runs/shapes/checkpoint.pt")
    assert net.config.aux == "none" and net.state_dict().keys() == model.JiT(net.config).state_dict().keys()

def test_checkpointing_changes_memory_and_nothing_else(work, monkeypatch):
    """Also with dropout: the block computed again draws the same numbers."""
    calls, states, forward = [], [], model.Block.forward
    monkeypatch.setattr(model.Block, "forward", lambda block, *inputs: calls.append(1) or forward(block, *inputs))
    for flags in ([], ["--checkpointing"]):
        options, config, arrays = settings("--warmup", 0, "--depth", 4, "--dropout", 0.5, *flags)               # of three blocks none has dropout
        trainer = train.Trainer(options, config, torch.device("cpu"))
        run_steps(trainer, arrays, 3)
        states.append([len(calls), *trainer.net.state_dict().values()])
    assert states[1][0] == 3 * states[0][0]               # twice as many in the second run
    assert all(torch.equal(a, b) for a, b in zip(states[0][1:], states[1][1:]))

def test_an_epoch_smaller_than_a_batch(work):
    """Five epochs within one micro-batch: every image five times, in five orders."""
    options, _, _ = settings("--batch-size", 50, "--micro-batch", 50)
    first = train.image_indices(0, 0, 10, options)
    assert (np.bincount(first) == 5).all() and len({tuple(part) for part in first.reshape(5, 10)}) == 5

def test_resume_on_a_data_set_packed_anew(there, capsys):
    pack = ["--count", 100, "--workers", 1, "--name", "d", "--size", 16]
    assert call(data, *pack) == 0 and call(train, *TINY_FLAGS, "--data", "d", "--run", "r", "--steps", 2) == 0
    assert call(data, *pack, "--overwrite") == 0 and call(train, "--run", "r", "--resume", "--steps", 4) == 1
    assert "data set d is another, or was packed anew, since runs/r was begun: pass --run NAME, or --overwrite" in capsys.readouterr().err

def test_another_experiment_is_another_run(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    assert call(train, "--run", "shapes", "--resume", "--steps", 4, "--experiment", "exp1") == 1 and "experiment" in capsys.readouterr().err

def test_a_data_set_that_was_moved_is_the_same(work):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    shutil.copytree("data/shapes", "moved")               # its id is the same
    assert call(train, "--run", "shapes", "--data", "./moved", "--resume", "--steps", 4) == 0
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 4

def test_held_out_images_are_of_all_classes(work):
    options, config, arrays = settings("--steps", 1)
    images, labels = np.arange(600, dtype=np.uint8)[:, None, None, None].repeat(3, 3), np.arange(600) // 200          # sorted, as packed folders are
    shown = recorder_of(train.Trainer(options, config, torch.device("cpu")), {"train": arrays["train"], "val": (images, labels)}).shown
    assert np.bincount(shown[1]).min() > 60 and len(shown[0]) == 256
    assert len(set(shown[1][:4])) > 1                                  # the four of the preview

def test_held_out_loss_by_definition(work):
    """Averaged weights, not the raw ones; the squared weight of the conversion; training goes on in training mode."""
    options, config, arrays = settings("--steps", 1)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    for weight in trainer.ema[0].values():
        weight.add_(torch.randn_like(weight) * 0.05)
    images, labels = arrays["val"][0][:70].copy(), arrays["val"][1][:70]
    found = train.held_out_loss(trainer, images, labels)
    assert trainer.net.training
    net = model.JiT(config).eval()
    net.load_state_dict(trainer.ema[0])
    quantile = torch.distributions.Normal(-0.8, 0.8).icdf((torch.arange(70) + 0.5) / 70)
    generator, total, t = torch.Generator().manual_seed(0), 0.0, torch.sigmoid(quantile)
    for part in (slice(0, 64), slice(64, 70)):
        x = torch.from_numpy(images[part].copy()).permute(0, 3, 1, 2) / 127.5 - 1
        e, t4 = torch.randn(x.shape, generator=generator) * config.noise_scale, t[part].view(-1, 1, 1, 1)
        z = t4 * x + (1 - t4) * e
        with torch.no_grad():
            v = (net(z, t[part], torch.from_numpy(labels[part])) - z) / (1 - t4).clamp_min(0.05)
        total += ((v - (x - z) / (1 - t4).clamp_min(0.05))**2).mean((1, 2, 3)).sum().item()
    assert found == pytest.approx(total / 70, rel=1e-4)

ROWS = [*(["--preset", name, "--data", "shapes"] for name in train.PRESETS), *(["--experiment", name] for name in train.EXPERIMENTS), ["--num-classes", 0], ["--in-context-len", 0, "--bottleneck-dim", 0], ["--pred", "v", "--loss", "e"],
        ["--pred", "e", "--loss", "x", "--shift", 2], ["--amp", "fp16"], ["--amp", "bf16"], ["--checkpointing"]]

@pytest.mark.card
@pytest.mark.parametrize("flags", ROWS, ids=lambda flags: " ".join(map(str, flags)))
def test_every_row_trains_and_samples(work, flags):
    from conftest import sample
    assert call(train, *TINY_FLAGS, "--steps", 20, "--run", "row", *flags) == 0
    rows = list(csv.DictReader(open("runs/row/log.csv")))
    assert float(rows[-1]["loss"]) > 0 and rows[-1]["held_out"]
    assert call(sample, "--run", "row", "--num", 4, "--steps", 3, "--amp", "off") == 0
    record = json.loads(Path("runs/row/samples/samples.json").read_text())
    wanted = {"solver": "heun", "cfg": 1.0, "interval": [0.0, 1.0], "shift": 2.0 if "--shift" in flags else 1.0, **gathered(*flags)["sampling"], "steps": 3}
    wanted["interval"] = list(wanted["interval"])
    wanted["cfg"] = 1.0 if "--num-classes" in flags else wanted["cfg"]
    assert {k: record[k] for k in wanted} == wanted and len(record["labels"]) == 4      # what the row says is stored and never asked again

def test_a_picture_of_yours_in_a_runs_folder_stays_and_training_goes_on(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0
    Image.new("RGB", (3, 3)).save("runs/shapes/loss.png")
    assert call(train, *TINY_FLAGS, "--steps", 6, "--resume") == 0 and Image.open("runs/shapes/loss.png").width == 3
    assert "was not drawn by these scripts" in capsys.readouterr().err and Path("runs/shapes/preview/0000006.png").exists()

def test_preview_log_and_snapshots(work):
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--log-every", 2) == 0
    assert sorted(p.name for p in Path("runs/shapes/preview").iterdir()) == ["0000004.png", "0000008.png"]
    assert sorted(p.name for p in Path("runs/shapes/snapshots").iterdir()) == ["0000004.pt", "0000008.pt"]
    assert model.read_checkpoint("runs/shapes/snapshots/0000004.pt").keys() == {"config", "info", "ema", "digest"}
    rows = list(csv.DictReader(open("runs/shapes/log.csv")))
    assert [row["images"] for row in rows] == ["16", "32", "48", "64"] and list(rows[0]) == train.COLUMNS and Image.open("runs/shapes/loss.png").width > 100
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--log-every", 2) == 0          # finished: nothing to do
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--overwrite") == 0

@pytest.mark.parametrize("settings,word", [({"schedule": "cosin"}, "slip.py: schedule 'cosin' is unknown"), ({"loss": "q"}, "'q'"), ({"label_drop": 2}, "[0, 1)"), ({"batch_size": 0}, "[1, 1000000]"),
                                           ({"ema": (2.0,)}, "[0, 1)"), ({"ema": ("a",)}, "slip.py: ema ('a',): it must be"), ({"ema": (None,)}, "slip.py: ema (None,): it must be"), ({"amp": "fp8"}, "fp8"), ({"stepz": 3}, "stepz"), ({"objective": "jitt"}, "SETTINGS: objective 'jitt' is unknown")], ids=str)
def test_a_slip_in_an_experiments_settings_is_said(work, capsys, settings, word):
    Path("slip.py").write_text(f"SETTINGS = {settings!r}\n")
    flags = TINY_FLAGS[:]                                 # flags would override the settings
    for name in ("--batch-size", "--amp"):
        place = flags.index(name)
        del flags[place:place + 2]
    assert call(train, *flags, "--steps", 2, "--experiment", "slip.py") == 2
    assert word in capsys.readouterr().err and not Path("runs").exists()

def test_an_experiment_that_ends_python_is_no_success(work, capsys):
    Path("ends.py").write_text("import sys\nsys.exit(0)\n")
    assert call(train, *TINY_FLAGS, "--experiment", "ends.py") == 1 and "SystemExit" in capsys.readouterr().err

def test_what_a_finished_run_answers(work, capsys, monkeypatch):
    assert call(train, *TINY_FLAGS, "--steps", 8) == 0
    capsys.readouterr()
    for flags, words, code in [([], "(steps 8, now 4600)", 1), (["--steps", 8], "(model JiT-T/8, now JiT-T/16)", 1), (["--steps", 8, *[f for f in TINY_FLAGS if f not in ("--depth", "3")]], "(depth 3, now 6)", 1),
                               ([*TINY_FLAGS, "--steps", 9], "epochs, lr or amp, --resume", 1), ([*TINY_FLAGS, "--steps", 8, "--seed", 3], "(seed 0, now 3)", 1), (["--resume", "--steps", 7], "at step 8 already", 2)]:
        assert call(train, *flags) == code
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1, error
    before = Path("runs/shapes/config.json").read_bytes()
    assert call(train, "--resume") == 0 and "nothing to do (longer: --resume --steps N; anew: --overwrite)" in capsys.readouterr().out and Path("runs/shapes/config.json").read_bytes() == before

@pytest.mark.parametrize("flags,words,code", [
    (["--times", "unifrom"], "one of logit-normal, uniform", 2),
    (["--steps", -1], "give a number in [1, 1e15]", 2), (["--lr", "nan"], "give a number", 2), (["--p-mean", "inf"], "give a number", 2), (["--num-classes", 5], "the data set has 10", 2), (["--preset", "nope"], "unknown", 2), (["--experiment", "exp9"], "there is no", 2), (["--model", "JiT-Z"], "unknown", 2),
    (["--batch-size", 10, "--micro-batch", 4], "give a multiple of 4", 2), (["--patch-size", 5], "not a multiple", 2), (["--ema", "fast"], "--ema", 2), (["--ema", "0.9,1"], "in [0, 1)", 2), (["--label-drop", 1], "label-drop", 2),
    (["--lr", 0], "(0, inf)", 2), (["--patch-embed", "nonlinear", "--bottleneck-dim", 0], "needs a bottleneck", 2), (["--pred", "y"], "one of x, e, v", 2), (["--steps", "many"], "invalid int", 2),
    (["--data", "nope"], "no data set at data/nope", 1), (["--resume"], "there is no", 1), (["--device", "cuda"], "this machine has 0", 2), (["--device", "gpu"], "give cuda or cpu", 2), (["--device", "meta"], "give cuda or cpu", 2), (["--device", "cpu:1"], "give cuda or cpu", 2), (["--nonsense"], "unrecognized", 2)])
def test_wrong_requests(work, capsys, flags, words, code):
    assert call(train, *TINY_FLAGS, *flags) == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not Path("runs").exists()

def test_resume_refuses_what_is_not_a_run(work, capsys):
    Path("runs/shapes").mkdir(parents=True)
    for content, words in ((b"", "is not a checkpoint"), (b"hello", "is not a checkpoint")):
        Path("runs/shapes/checkpoint.pt").write_bytes(content)
        assert call(train, "--resume") == 1 and words in capsys.readouterr().err
    torch.save({"config": {}, "ema": []}, "runs/shapes/checkpoint.pt")
    assert call(train, "--resume") == 1 and "not the state of a training run" in capsys.readouterr().err

def test_init_takes_the_averaged_weights(work):
    assert call(train, *TINY_FLAGS, "--steps", 5, "--run", "jit") == 0
    net, state = train.open_init("jit", None, "")[0], model.read_checkpoint("runs/jit/checkpoint.pt")
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(net[name], state["ema"][0][name]) and not torch.equal(net[name], state["model"][name])

def test_a_run_that_another_process_began_meanwhile_is_looked_at_again(work, capsys, monkeypatch):
    """Between the first look and the lock: in the first look nothing is there."""
    assert call(train, *TINY_FLAGS, "--steps", 3, "--seed", 1) == 0
    looks, look = [], train.checkpoint_of
    monkeypatch.setattr(train, "checkpoint_of", lambda *args: looks.append(1) or (look(*args) if len(looks) > 1 else None))
    assert call(train, *TINY_FLAGS, "--steps", 3, "--seed", 2) == 1 and "made with other settings (seed 1, now 2)" in capsys.readouterr().err

def test_another_file_of_the_same_name_is_another_experiment(work, capsys):
    for name in ("one/my.py", "two/my.py"):
        Path(name).parent.mkdir(), Path(name).write_text("SETTINGS = {'weight_decay': 0.1}")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--experiment", "one/my.py") == 0
    for more in ([], ["--resume"]):
        assert call(train, *TINY_FLAGS, "--steps", 4, "--experiment", "two/my.py", *more) == 1 and "made with other settings (experiment /" in capsys.readouterr().err

def test_init_goes_with_a_row_of_experiments(work, capsys):
    """And the advice when the other run had an experiment's network."""
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "a") == 0 == call(train, *TINY_FLAGS, "--steps", 2, "--run", "d", "--experiment", "ddt")
    assert call(train, "--init", "a", "--run", "b", "--experiment", "exp3,ddt", "--dry-run") == 0
    assert call(train, "--init", "d", "--run", "b", "--dry-run") == 2 and "another network's, whose --experiment is not given" in capsys.readouterr().err

def test_init_keeps_the_label_table_of_the_same_classes_only(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 5, "--run", "jit") == 0
    path = Path("data/shapes/meta.json")
    for name, anew in (("circle", False), ("disc", True)):
        path.write_text(path.read_text().replace('"circle"', f'"{name}"'))
        capsys.readouterr()
        assert call(train, *TINY_FLAGS, "--steps", 2, "--lr", "1e-9", "--init", "jit", "--run", name) == 0
        assert ("--init: y_embedder.embedding_table.weight begin anew: it has none, or of other classes or sizes" in capsys.readouterr().out) == anew
        table = [model.read_checkpoint(f"runs/{run}/checkpoint.pt")["ema"][0]["y_embedder.embedding_table.weight"] for run in ("jit", name)]
        assert ((table[0] - table[1]).abs().max() < 1e-6) != anew
    assert call(train, *TINY_FLAGS, "--num-classes", 0, "--steps", 2, "--run", "free") == 0
    path.write_text(path.read_text().replace('"disc"', '"circle"'))
    assert call(train, *TINY_FLAGS, "--num-classes", 0, "--steps", 2, "--init", "free", "--run", "again") == 0 and "begin anew" not in capsys.readouterr().out

def test_the_preview_has_its_titles(work, monkeypatch):
    options, config, arrays = settings("--steps", 9)
    trainer, drawn = train.Trainer(options, config, torch.device("cpu")), []
    monkeypatch.setattr(data, "picture", lambda rows, titles, names: drawn.append((rows, titles, names)))
    images, labels = np.array(arrays["val"][0][:2]), arrays["val"][1][:2]
    train.preview(trainer, images, labels, None)
    (rows, titles, names), = drawn
    assert titles == ["clean", "t = 0.1", "t = 0.3", "t = 0.5", "t = 0.7", "t = 0.9"] and names == ["z", "x_pred"] * 2 and len(rows) == 4
    assert all(np.array_equal(rows[k][0], images[k // 2]) for k in range(4))
    difference = [np.abs(rows[0][k].astype(int) - images[0]).mean() for k in range(1, 6)]
    assert difference == sorted(difference, reverse=True) and difference[-1] < 40         # z is nearer and nearer to the image

def test_every_tenth_line_has_the_held_out_loss(work):
    assert call(train, *TINY_FLAGS, "--steps", 25, "--log-every", 1) == 0
    assert [int(row["step"]) for row in csv.DictReader(open("runs/shapes/log.csv")) if row["held_out"]] == [10, 20, 25]

def test_a_log_that_cannot_be_written_is_the_one_before(work, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")
    assert call(train, *TINY_FLAGS, "--steps", 4, "--log-every", 2) == 0
    before = Path("runs/shapes/log.csv").read_bytes()
    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    assert call(train, "--resume", "--steps", 8) == 1 and Path("runs/shapes/log.csv").read_bytes() == before

def test_the_log_counts_every_step_that_was_skipped(work):
    options, config, arrays = settings("--steps", 9)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    recorder.trainer.step = 7
    recorder.trainer.skipped.fill_(3)                     # and the last one was a good one: bad is 0
    recorder.write_line(False)
    assert recorder.trainer.log.rows[-1]["skipped"] == 3
    recorder.trainer.step = 10                            # the second line of five steps
    recorder.write_line(False)
    assert "held_out" not in recorder.trainer.log.rows[-1]

def test_what_init_brings_comes_before_the_preset(work):
    """The noise scale of the preset would be another than the weights know; flags come before both."""
    init = {"noise_scale": 1.5, "pred": "v", "num_classes": 7}
    options = train.gather(train.read_flags(["--preset", "shapes"]), init=init)
    assert (options["noise_scale"], options["pred"]) == (1.5, "v") and "num_classes" not in options
    assert train.gather(train.read_flags(["--noise-scale", "1.2"]), init=init)["noise_scale"] == 1.2

def test_every_space_of_the_loss_has_an_effect(work):
    for flags, objective in (([], "jit"), (["--loss", "x"], "grid"), (["--loss", "e"], "grid"), (["--pred", "v"], "grid"), (["--experiment", "paths", "--path", "cosine"], "grid")):
        assert settings(*flags)[0].objective == objective

def test_what_is_watched_is_the_first_average(work):
    options, config, arrays = settings("--steps", 1, "--ema", "0.9,0.5")
    trainer = train.Trainer(options, config, torch.device("cpu"))
    trainer.ema[1] = {name: value * math.nan for name, value in trainer.ema[1].items()}
    assert math.isfinite(train.held_out_loss(trainer, np.array(arrays["val"][0][:4]), arrays["val"][1][:4]))

def test_a_closed_terminal_is_a_signal_to_stop():
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with data.asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert asked == [1]
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN)         # the handler of before
    finally:
        signal.signal(signal.SIGHUP, before)

def test_the_curves_run_over_steps(work, monkeypatch):
    """What is no number has no place on them."""
    options, config, arrays = settings("--steps", 9)
    recorder, drawn = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays), []
    monkeypatch.setattr(model, "chart", lambda *what, **how: drawn.append((*what, how)) or Image.new("RGB", (9, 9)))
    recorder.trainer.log.rows = [{"step": 5, "images": 40, "loss": 2.0, "held_out": 1.0}, {"step": 10, "images": 80, "loss": math.nan}]
    recorder.draw_loss()
    assert drawn == [("loss in v-space", "step", {"loss": [(5, 2.0)], "held_out": [(5, 1.0)]}, {"log": True})]

def test_latents_are_never_mirrored(work):
    meta = {"size": 4, "channels": 4, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1", "coder": {"id": "2"}}
    assert settled(meta, "--flip")[0].flip is False

def test_the_memory_that_is_announced(capsys, monkeypatch):
    """Six numbers for each parameter, and 130 bytes for each number that a pass keeps, 180 without mixed precision."""
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: amp or "bf16")
    meta = {"size": 256, "classes": ["a"] * 1000, "counts": {"train": 1000}, "id": "1"}
    options, config = settled(meta, "--preset", "imagenet-B")
    train.announce(options, config, Path("r"), 0, {"train": 1000, "val": 50}, torch.device("cpu"))
    assert f"about {(24 * 131_123_712 + 130 * 8 * 256 * 768 * 12) / 2**30:.1f} GiB" in capsys.readouterr().out
    options.amp = "off"
    train.announce(options, config, Path("r"), 0, {"train": 1000, "val": 50}, torch.device("cpu"))
    assert f"about {(24 * 131_123_712 + 180 * 8 * 256 * 768 * 12) / 2**30:.1f} GiB" in capsys.readouterr().out
    options.compile = options.record = True
    train.announce(options, config, Path("r"), 0, {"train": 1000, "val": 50}, torch.device("cpu"))
    assert f", cpu compiled as CUDA graphs; micro-batches of 8, about {(24 * 131_123_712 + 50 * 8 * 256 * 768 * 12) / 2**30:.1f} GiB" in capsys.readouterr().out
    options.record = False
    train.announce(options, config, Path("r"), 0, {"train": 1000, "val": 50}, torch.device("cpu"))
    assert ", cpu compiled; micro-batches" in capsys.readouterr().out

@pytest.mark.parametrize("flag", ["--preset", "--experiment", "--steps"])
def test_a_flag_without_a_value_is_one_line(there, capsys, flag):
    """Preset and experiments are looked for before the others."""
    assert call(train, flag) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.endswith(f": error: argument {flag}: expected one argument (see --help)")

def test_context_tokens_that_a_shallow_network_has_no_place_for_are_seen(work, capsys):
    """JiT-T begins with them in block 2."""
    for depth, tokens in ((2, 0), (3, 4)):
        assert call(train, *TINY_FLAGS, "--depth", depth, "--dry-run") == 0 and f" patch 8, {tokens} context tokens, noise scale 2; " in capsys.readouterr().out

def test_to_go_on_and_to_begin_anew_is_a_contradiction(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0 and call(train, "--resume", "--overwrite", "--steps", 4) == 1
    assert "--overwrite is given too; leave --resume out to begin" in capsys.readouterr().err and model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 2

def test_more_epochs_with_resume(work):
    """200 images in batches of 8: 25 steps an epoch."""
    assert call(train, *TINY_FLAGS, "--epochs", 0.2) == 0 and call(train, "--resume", "--epochs", 0.4) == 0
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 10
    assert settings("--epochs", 0.001)[0].steps == 1 and call(train, "--resume", "--steps", 12, "--warmup", 3) == 0

def test_another_batch_size_is_refused_as_such(work, capsys):
    """Not for the micro-batch of the run, which nobody can help."""
    assert call(train, *TINY_FLAGS, "--micro-batch", 4, "--steps", 2) == 0
    for flags in (["--batch-size", 6], ["--batch-size", 6, "--micro-batch", 4]):
        assert call(train, "--resume", "--steps", 4, *flags) == 1 + ("--micro-batch" in flags)
        assert ("(batch_size 8, now 6)" if len(flags) == 2 else "micro-batches of 4") in capsys.readouterr().err
    assert call(train, "--resume", "--steps", 4) == 0
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["options"]["micro_batch"] == 4

def test_what_is_watched_has_no_dropout(work):
    options, config, arrays = settings("--depth", 4, "--dropout", 0.5)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    for weight in trainer.ema[0].values():
        weight.add_(torch.randn_like(weight) * 0.1)
    shown = np.array(arrays["val"][0][:8]), arrays["val"][1][:8]
    assert train.held_out_loss(trainer, *shown) == train.held_out_loss(trainer, *shown)

def test_settings_of_sampling_are_merged_one_by_one():
    merged = train.merge({"sampling": {"solver": "ddpm", "cfg": 1.5}}, {"sampling": None}, {"sampling": {"cfg": 2.0}}, {"steps": 3})
    assert merged == {"sampling": {"solver": "ddpm", "cfg": 2.0}, "steps": 3}
    assert train.run_name({"preset": "photos", "experiment": "exp3,lab/my_head.py"}) == "photos-exp3-my_head"

def test_what_another_process_did_meanwhile_is_not_undone(work, monkeypatch):
    """Between the first look at the checkpoint and the lock."""
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0
    real = train.announce

    def meanwhile(*args):
        monkeypatch.setattr(train, "announce", real)
        assert call(train, "--resume", "--steps", 10) == 0
    monkeypatch.setattr(train, "announce", meanwhile)
    assert call(train, "--resume", "--steps", 8) == 2 and model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 10

def test_the_next_command_names_the_run(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "mine") == 0 and "then run 04_sample.py --run mine" in capsys.readouterr().out
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "my run") == 0 and "then run 04_sample.py --run 'my run'\n" in capsys.readouterr().out
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0 and "then run 04_sample.py --run shapes" in capsys.readouterr().out

def test_a_run_to_begin_with_is_named_by_its_folder_too(work):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    for name in ("runs/shapes", "runs/shapes/checkpoint.pt", "shapes"):
        assert call(train, *TINY_FLAGS, "--steps", 2, "--init", name, "--run", "next", "--dry-run") == 0

# ---- Mistakes that nothing had noticed -----------------------------------------------------------------------------------
def test_another_path_is_followed_in_training_and_in_watching(work):
    """A fresh network predicts v = 0."""
    options, config, arrays = settings("--experiment", "paths", "--path", "cosine", "--pred", "v")
    trainer, path, seen = train.Trainer(options, config, torch.device("cpu")), model.PATHS["cosine"], []
    trainer.forward = lambda z, t, y: seen.append(z) or trainer.net(z, t, y)
    batch = train.make_batch(*micro_batch(options, *arrays["train"], 0, 0), options, config)
    train.grid_objective(trainer, batch)
    assert torch.equal(seen[0], path.mix(batch["x"], batch["e"], batch["t"]))
    shown = np.array(arrays["val"][0][:6]), arrays["val"][1][:6]
    t = torch.sigmoid(torch.special.ndtri((torch.arange(6) + 0.5) / 6) * 0.8 - 0.8)
    x = model.to_float(shown[0])
    z = path.mix(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * config.noise_scale, t)
    error = (model.convert(0 * z, "v", "x", z, t, "cosine") - x).square().mean((1, 2, 3))
    assert train.held_out_loss(trainer, *shown) == pytest.approx((path.conversion("x", "v", t)[0]**2 * error).mean().item(), rel=1e-4)

def test_training_runs_in_the_precision_asked_for(work):
    for flags in ([], ["--loss", "x"]):
        options, config, arrays = settings("--amp", "bf16", *flags)
        trainer, seen = train.Trainer(options, config, torch.device("cpu")), []
        trainer.net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        run_steps(trainer, arrays, 1)
        train.held_out_loss(trainer, np.array(arrays["val"][0][:4]), arrays["val"][1][:4])
        assert seen == [True, True]

def test_a_gpu_draws_from_the_same_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", seen.append)
    train.seed_everything(1, 2, 3)
    assert seen == [int(np.random.SeedSequence((1, 2, 3)).generate_state(1)[0])]

def test_what_is_recorded_and_compiled_by_default_on_a_gpu(monkeypatch):
    """A small network is recorded and not compiled; heads, checkpointing and files of one's own are not recorded."""
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: "off")
    meta = {"size": 64, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}
    for flags, recorded in (([], True), (["--aux", "time"], False), (["--checkpointing"], False), (["--experiment", "td_norm"], False), (["--experiment", "exp3"], True), (["--preset", "cifar10", "--batch-size", 32], True)):
        options, _ = train.settle(gathered(*flags), meta, torch.device("cuda"), 1)
        assert options.record == recorded and not options.compile, flags
    assert train.settle(gathered("--preset", "cifar10", "--no-compile"), meta, torch.device("cuda"), 1)[0].compile is False

def test_other_processes_write_nothing(work, capsys):
    """Also with --overwrite: it is the first that moves the old run aside."""
    flags = [*TINY_FLAGS, "--steps", "2", "--micro-batch", "4", "--snapshots", "1", "--overwrite"]
    assert call(train, *flags) == 0
    files = lambda: {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    before, _ = files(), capsys.readouterr()
    train.train_run(train.read_flags(flags), torch.device("cpu"), 1, 1)
    train.train_run(train.read_flags(flags[:-1]), torch.device("cpu"), 1, 1)               # finished: the first says so
    assert files() == before and capsys.readouterr().out == ""

def test_a_gpu_is_not_waited_for_in_every_step(work):
    class OnAGpu:
        def __ge__(self, other):
            raise AssertionError("it is waited for")
    options, config, arrays = settings("--steps", 99)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    recorder.trainer.bad, recorder.trainer.step, recorder.trainer.device = OnAGpu(), 3, torch.device("meta")
    recorder.after_step()

def test_what_is_compiled_is_recorded_and_gets_the_head(work, monkeypatch):
    options, config, _ = settings("--compile", "--aux", "time")
    options.record, compiled = True, argparse.Namespace(config=config)
    monkeypatch.setattr(torch, "compile", lambda net: compiled)
    monkeypatch.setattr(train, "recorded", lambda net, *more: net)
    net, head = model.build(config), model.AUX_HEADS["time"](config)
    with torch._dynamo.config.patch(optimize_ddp=False):  # given back
        assert train.wrap(net, head, options, config, torch.device("cpu"), 1).net is compiled and torch._dynamo.config.optimize_ddp is True

def test_processes_average_their_gradients_once_a_step(work):
    options, config, _ = settings("--micro-batch", 4)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    trainer.world, trainer.forward = 2, argparse.Namespace(no_sync=lambda: "not now")
    assert trainer.summing(last=False) == "not now" and isinstance(trainer.summing(last=True), nullcontext)

def test_help_without_a_preset_shows_those_of_the_shapes(there, capsys):
    with pytest.raises(SystemExit):
        call(train, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "images per optimizer step (default: 32)" in text and "k, the noise's std (default: 2.0)" in text

def test_ten_bad_steps_end_a_run_and_one_is_not_saved(work):
    options, config, arrays = settings("--steps", 99)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    assert recorder.is_good()
    recorder.trainer.bad.fill_(1)
    assert not recorder.is_good()
    recorder.trainer.bad.fill_(10)
    recorder.trainer.step = 10
    with pytest.raises(ValueError, match=r"at step 10 \(10 gradients in a row\): runs/x/checkpoint.pt is from before; go on with --resume and a lower --lr than 0.001"):
        recorder.after_step()

def test_a_signal_in_the_last_step_finishes_the_run(work):
    options, config, arrays = settings("--steps", 9)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays, [1])
    recorder.trainer.step = 9
    recorder.after_step()
    assert model.read_checkpoint("runs/x/checkpoint.pt")["info"]["step"] == 9

def test_every_process_loads_the_experiments_of_the_run(work, monkeypatch):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--experiment", "td_norm") == 0
    loaded = []
    monkeypatch.setattr(model, "load_recorded", lambda names, *more: loaded.append(names))
    train.train_run(train.read_flags(["--run", "shapes-td_norm", "--resume"]), torch.device("cpu"), 1, 1)
    assert loaded == [["td_norm"]]

def test_the_head_moves_to_the_device(work, monkeypatch):
    moved = []

    class Head(model.AuxHead):
        def to(self, device):
            moved.append(device)
            return self
    options, config, _ = settings("--steps", 2)
    monkeypatch.setitem(model.AUX_HEADS, "none", Head)
    train.Trainer(options, config, torch.device("cpu"))
    assert moved == [torch.device("cpu")]

def test_the_first_checkpoint_is_read_at_once(work, monkeypatch):
    """What it may not hold would be noticed at the end otherwise."""
    read, real = [], model.read_checkpoint
    monkeypatch.setattr(model, "read_checkpoint", lambda path: read.append(path) or real(path))
    options, config, arrays = settings("--steps", 9)
    recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    assert read == [Path("runs/x/checkpoint.pt")]

# ---- What train_run hands on, and what settings become --------------------------------------------------------------
META = {"size": 64, "classes": ["a", "b"], "counts": {"train": 1000}, "id": "1"}

def test_every_process_goes_on_alike(work, monkeypatch, capsys):
    """Rank 1 of two restores the state, knows how many there are, and has its coder on the device."""
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    done, coder = [], argparse.Namespace(to=lambda device: f"coder on {device}")
    monkeypatch.setattr(model, "load_coder", lambda *_: coder)
    monkeypatch.setattr(train, "Trainer", lambda options, config, *args: done.append(args) or argparse.Namespace(step=2))
    monkeypatch.setattr(train, "restore", lambda trainer, state, folder: done.append(state["info"]["step"]))
    monkeypatch.setattr(train, "Recorder", lambda trainer, folder, arrays, coder, asked: done.append(coder))
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(train, "read_ahead", lambda *_: None)
    train.train_run(train.read_flags("--resume --steps 4 --micro-batch 4".split()), torch.device("cpu"), 1, 2)
    assert done == [(torch.device("cpu"), 1, 2, None), 2, "coder on cpu"]
    capsys.readouterr()
    for rank, said in ((1, ""), (0, "is finished")):      # and nothing is done twice
        train.train_run(train.read_flags("--resume --micro-batch 4 --steps 2".split()), torch.device("cpu"), rank, 2)
        assert said in (out := capsys.readouterr().out) and bool(out) == bool(said)
    assert len(done) == 3

def test_a_run_that_another_process_has_gone_on_with_is_not_ours(work, monkeypatch, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    real = data.locked
    def busy(path):
        monkeypatch.setattr(data, "locked", real)
        assert call(train, "--resume", "--steps", 4, "--lr", "1e-4") == 0
        return real(path)
    monkeypatch.setattr(data, "locked", busy)
    assert call(train, "--resume", "--steps", 4) == 1 and "another process has gone on with runs/shapes: look at what it made" in capsys.readouterr().err

def test_a_dry_run_is_dry_on_every_process(work, monkeypatch):
    monkeypatch.setattr(train, "Trainer", lambda *_: pytest.fail("it trains"))
    for rank in (0, 1):
        train.train_run(train.read_flags(list(map(str, [*TINY_FLAGS, "--steps", 2, "--dry-run"]))), torch.device("cpu"), rank, 2)
    assert not Path("runs").exists()

def test_two_processes_share_the_batch_by_default(work, capsys):
    train.train_run(train.read_flags(list(map(str, [*TINY_FLAGS, "--steps", 2, "--dry-run"]))), torch.device("cpu"), 0, 2)
    assert "micro-batches of 4" in capsys.readouterr().out

def test_weights_that_do_not_name_their_classes_are_a_beginning(work, monkeypatch):
    """As the official ones; and a network of an experiment may have no such table."""
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "jit") == 0
    state = torch.load("runs/jit/checkpoint.pt", weights_only=True)
    del state["info"]["classes"]
    model.save(state, "runs/jit/checkpoint.pt")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--init", "jit", "--run", "a") == 0
    monkeypatch.setattr(train, "open_init", lambda name, state, experiment: ({}, None, ["other"]))
    assert call(train, *TINY_FLAGS, "--steps", 2, "--init", "jit", "--run", "b") == 0

def test_micro_batches_at_the_limits():
    huge = model.JiTConfig(image_size=256, patch_size=8, hidden_size=1280, depth=32, num_heads=16)
    assert train.micro_batch_of(argparse.Namespace(micro_batch=None, batch_size=3), huge, torch.device("cpu"), 1) == 1
    assert settled(META | {"size": 256}, "--preset", "photos", "--batch-size", 35)[0].micro_batch == 7         # of 16 that memory holds

def test_latents_are_cut_into_single_places():
    options, config = settled(META | {"size": 16, "channels": 4, "coder": {"id": "x"}})
    assert (config.patch_size, config.bottleneck_dim, config.in_channels, options.flip) == (1, 0, 4, False)

@pytest.mark.parametrize("size,name,scale", [(512, "JiT-B/32", 2.0), (64, "JiT-S/4", 1.0), (384, "JiT-S/16", 1.5), (320, "JiT-S/16", 1.25)])
def test_the_noise_grows_with_the_image_alone(size, name, scale):
    assert settled(META | {"size": size}, "--preset", "cifar10", "--model", name)[1].noise_scale == scale

def test_rows_of_experiments_are_merged_in_order(monkeypatch, capsys):
    for name, row in {"one": {"network": "jit"}, "two": {"steps": 2400, "lr": 0.125}, "three": {"network": "jit"}}.items():
        monkeypatch.setitem(train.EXPERIMENTS, name, row)
    with pytest.raises(data.UsageError, match="three brings a network, and so does one before it"):
        list(train.experiment_settings("one,two,three"))
    assert settled(META, "--experiment", "two")[0].steps == 2400 and settled(META, "--experiment", "two", "--epochs", 3)[0].steps == round(3000 / 32)
    with pytest.raises(SystemExit):
        train.read_flags(["--experiment", "two", "--help"])
    assert "(default: 0.125)" in capsys.readouterr().out

def test_what_is_no_setting_of_a_file_and_what_init_does_not_bring():
    assert train.NOT_FOR_SETTINGS == {"preset", "experiment", "run", "init", "device", "resume", "overwrite", "record", "image_size", "in_channels", "classes", "data_id", "coder"}
    assert train.NOT_FROM_INIT == {"image_size", "in_channels", "num_classes", "aux", "network"}
    assert train.OF_SAMPLING == {"solver", "steps", "cfg", "interval", "t_eps", "shift"}

def test_an_older_checkpoint_of_another_network_lacks_a_setting():
    model.load_experiment("ddt")
    config = model.NETWORKS["ddt"][0](num_classes=2, network="ddt")
    options = train.Options(steps=3, data_id="1")
    state = {"info": {"step": 1, "data_id": "1"}, "options": dict(vars(options)), "config": dict(vars(config))}
    del state["config"]["reuse"]
    train.refuse_other_settings(state, options, config, "runs/r")
    with pytest.raises(ValueError, match="reuse 1, now 2"):
        train.refuse_other_settings(state, options, model.NETWORKS["ddt"][0](num_classes=2, network="ddt", reuse=2), "runs/r")

def test_the_first_line_comes_at_once_and_counts_the_parameters(work, monkeypatch, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--dry-run") == 0
    options, config, _ = settings("--steps", 2)
    count = sum(p.numel() for name, p in model.build(config).named_parameters() if name != "pos_embed")
    assert capsys.readouterr().out.startswith(f"runs/shapes: JiT-T/8 with {count:,} parameters, patch 8, {config.in_context_len} context tokens, noise scale 2; 200 images, 100 held out; step 0")
    flushed = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(1))
    train.announce(options, config, Path("runs/x"), 0, {"train": 200, "val": 100}, torch.device("cpu"))
    assert flushed

def test_an_objective_of_an_experiment_stays(monkeypatch):
    monkeypatch.setitem(train.OBJECTIVES, "mine", train.jit_objective)
    asked = gathered("--pred", "v") | {"objective": "mine"}
    assert train.settle(asked, META, torch.device("cpu"), 1)[0].objective == "mine"

def test_short_passes_are_not_compiled(monkeypatch):
    """It is the length of a pass that counts, not that of a step."""
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: "off")
    for micro, compiled in ((256, True), (16, False)):
        options, _ = train.settle(gathered("--preset", "cifar10", "--micro-batch", micro), META | {"size": 32}, torch.device("cuda"), 1)
        assert options.compile == compiled

def test_what_resume_cannot_change(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    capsys.readouterr()
    assert call(train, "--resume", "--steps", 4, "--weight-decay", 0.1) == 1 and "weight_decay 0.0, now 0.1" in capsys.readouterr().err
    assert train.gather({"resume": True}, {"options": {"run": "old"}, "config": {}})["run"] == "shapes"        # the folder was renamed
    state = model.read_checkpoint("runs/shapes/checkpoint.pt")
    for key in ("config", "info", "options", "sums", "rows", "skipped", "bad", "model", "head", "optimizer", "scaler"):
        model.save({name: value for name, value in state.items() if name != key}, Path("runs/shapes/checkpoint.pt"))
        assert call(train, *TINY_FLAGS, "--steps", 4, "--resume") == 1
        said = capsys.readouterr().err
        assert "of an older version" in said and "pass --run NAME, or --overwrite to move it aside" in said and key in said

def test_a_checkpoint_with_another_kind_of_entry_is_refused(work, capsys):
    """Edited by hand, say."""
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    path = Path("runs/shapes/checkpoint.pt")
    good = path.read_bytes()
    for (*places, last), value in (["info"], "x"), (["info", "step"], "x"), (["info", "step"], 1.5), (["info", "data_id"], None), (["info", "experiments"], 5), (["options"], [1]), (["config"], []), \
                                  (["rows"], 5), (["skipped"], "x"), (["sums"], [1]), (["ema"], {}), (["model"], []), (["optimizer"], []), \
                                  (["options", "amp"], None), (["options", "lr"], 1.0), (["config", "network"], "ddt"), (["rows", 0, "held_out"], "abc"), (["rows", 0, "step"], None), \
                                  (["optimizer", "state", 2, "exp_avg"], torch.zeros(3)), (["optimizer", "state", 2], {"step": torch.tensor(5.0)}):
        path.write_bytes(good)
        state = place = torch.load(path, weights_only=True)
        for name in places:
            place = place[name]
        place[last] = value
        torch.save(state, path)
        capsys.readouterr()
        assert call(train, *TINY_FLAGS, "--steps", 4, "--resume") == 1, (last, value)
        edited = {*places, last} & {"config", "info", "options", "rows"}
        assert ("edited since it was written" if edited else "or of an older version") in (error := capsys.readouterr().err) and error.count("\n") == 1, error
    path.write_bytes(good)
    slim = {name: value for name, value in torch.load(path, weights_only=True).items() if name in ("config", "info", "ema", "digest")}
    torch.save(slim, "slim.pt")                           # without what sampling does not need
    assert model.load_network("slim.pt")[1]["step"] == 2

def test_options_are_checked_wherever_they_come_from():
    with pytest.raises(data.UsageError, match="steps '3': it must be of the type int"):
        train.Options(steps="3")
    with pytest.raises(data.UsageError, match="label_drop 2"):
        train.Options(label_drop=2)

# ---- What only another machine would show ---------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [["--times", "uniform"], ["--aux", "time"], ["--aux", "rotation", "--num-classes", 0], ["--pred", "v", "--loss", "x"]], ids=lambda flags: flags[1])
def test_a_step_and_what_is_watched_stay_on_the_device(monkeypatch, flags):
    """On meta, whose tensors meet no others, and hold no number that one could wait for."""
    meta = torch.device("meta")
    monkeypatch.setattr(model, "autocast", lambda *_, **__: nullcontext())
    options, config = settled(META | {"size": 16}, *TINY_FLAGS, "--steps", 9, *flags)
    trainer = train.Trainer(options, config, meta)
    trainer.optimizer.step = lambda: None                 # fused AdamW knows no meta
    images, labels = torch.zeros(8, 16, 16, 3, dtype=torch.uint8, device=meta), torch.zeros(8, dtype=torch.int64, device=meta)
    trainer.train_step(iter([(images, labels)]))
    assert trainer.step == 1 and {value.device.type for value in (trainer.bad, trainer.skipped, trainer.log.sums, trainer.gradient_norm())} == {"meta"}
    drawn = train.make_batch(images, labels, options, config)
    assert {value.device.type for value in drawn.values()} == {"meta"}
    made = train.noise_and_predict(trainer, np.zeros((4, 16, 16, 3), np.uint8), np.zeros(4, np.int64), torch.rand(4), torch.Generator().manual_seed(0))
    assert {value.device.type for value in made} == {"meta"}

def test_the_held_out_loss_is_a_number_wherever_the_network_is(work, monkeypatch):
    """What comes from the device is brought to the CPU before it meets the weights of t."""
    options, config, arrays = settings("--steps", 9)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    brought, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: brought.append(tuple(value.shape)) or real(value))
    train.held_out_loss(trainer, *(np.array(part[:5]) for part in arrays["val"]))
    assert (5,) in brought

def test_what_is_recorded_of_latents(work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda net, args: args[0].shape)
    monkeypatch.setattr(model, "autocast", lambda amp, device, cache: nullcontext())
    options, config = settled(META | {"size": 16, "channels": 4, "coder": {"id": "x"}}, *TINY_FLAGS)
    assert train.recorded("net", options, config, torch.device("meta")) == (8, 4, 16, 16)
    assert any(about and about.match("The AccumulateGrad node's stream does not match") for _, about, *_ in train.warnings.filters)

def test_what_wraps_the_network(work, monkeypatch):
    """Compiled, then recorded, then averaged over processes; each GPU's own number is torch's to know."""
    options, config, _ = settings("--compile", "--checkpointing")
    options.record = True
    monkeypatch.setattr(torch, "compile", lambda net: "compiled")
    monkeypatch.setattr(train, "recorded", lambda net, *_: f"{net}, recorded")
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda *args, **more: (args, more))
    with torch._dynamo.config.patch(optimize_ddp=True):   # given back
        wrapped = train.wrap(model.build(config), None, options, config, torch.device("cuda", 1), 2)
        assert wrapped == (("compiled, recorded",), {}) and torch._dynamo.config.optimize_ddp is False

def test_a_mac_draws_anew_in_every_step(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "manual_seed", seen.append)
    train.seed_everything(0, 1, 0), train.seed_everything(0, 2, 0)
    assert seen == [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in ((0, 1, 0), (0, 2, 0))]

def test_four_micro_batches_are_read_ahead_and_pinned_for_a_gpu(work, monkeypatch):
    options, config, arrays = settings("--steps", 9)
    asked = []
    monkeypatch.setattr(model, "ahead", lambda load, work, count: asked.append((load, count)) or [])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: "pinned")
    for kind, pinned in (("cuda", True), ("cpu", False)):
        trainer = argparse.Namespace(options=options, device=argparse.Namespace(type=kind), step=0, indices=lambda: [0])
        assert list(train.read_ahead(*arrays["train"], trainer)) == []
        load, count = asked.pop()
        assert count == 4 and (load((0, 0)) == ["pinned"] * 2) == pinned

def test_each_epoch_has_its_order_and_few_are_kept():
    for seed, epoch in ((0, 0), (0, 1), (2, 5)):
        assert (train.epoch_order(10, seed, epoch) == np.random.default_rng((seed, 3, epoch)).permutation(10)).all()
    assert train.epoch_order.cache_parameters()["maxsize"] == 4

def test_the_state_asks_all_processes_for_their_sums(work, monkeypatch):
    options, config, _ = settings("--steps", 9)
    trainer, asked = train.Trainer(options, config, torch.device("cpu"), rank=1, world=1), []
    trainer.world = 3
    monkeypatch.setattr(train, "over_processes", lambda numbers, world: asked.append(world) or numbers)
    train.training_state(trainer)
    assert asked == [3]

def test_the_head_is_part_of_what_is_trained(work):
    """Its gradient is measured, its loss is logged as it is, and a resumed run has it on every process."""
    options, config, arrays = settings("--aux", "time", "--aux-weight", 0.5, "--steps", 9)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    assert {id(p) for p in trainer.head.parameters()} <= {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainer.head.loss = lambda answer, batch: answer.sum() * 0 + 2.0
    images, labels = micro_batch(options, *arrays["train"], 0, 0)
    base = trainer.objective(trainer, (train.seed_everything(0, 0, 0), train.make_batch(images, labels, options, config))[1])[0]
    loss = trainer.loss(0, images, labels)
    assert loss.item() == pytest.approx(base.item() + 1.0, rel=1e-5) and trainer.log.sums[train.SUMMED.index("aux")].tolist() == [2, 1]
    loss.backward()
    trainer.head.mlp[2].bias.grad.fill_(math.nan)
    assert math.isnan(trainer.gradient_norm())
    run_steps(first := train.Trainer(options, config, torch.device("cpu")), arrays, 2)
    other = train.Trainer(options, config, torch.device("cpu"), rank=1)
    train.restore(other, train.training_state(first), "a run")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, other.parameters, strict=True)) and other.optimizer.state_dict()["state"][0]["step"] == 2

def test_runs_of_other_seeds_are_watched_alike(work):
    """The same held-out images, each with its own label, and the same noise, in every step."""
    shown, losses, rows = [], [], []
    for seed in (0, 5):
        options, config, arrays = settings("--steps", 9, "--seed", seed)
        arrays["val"] = arrays["train"]                   # more to choose from
        trainer = train.Trainer(options, config, torch.device("cpu"))
        recorder = recorder_of(trainer, arrays)
        shown.append(recorder.shown)
        for image, label in zip(*recorder.shown):
            assert arrays["val"][1][np.flatnonzero((arrays["val"][0] == image).all((1, 2, 3)))[0]] == label
        chance = torch.Generator().manual_seed(0)         # a network that looks at the noise
        trainer.ema = [{name: torch.randn(value.shape, generator=chance) * 0.1 for name, value in trainer.ema[0].items()}]
        losses.append(train.held_out_loss(trainer, *recorder.shown))
    assert all(np.array_equal(a, b) for a, b in zip(*shown)) and losses[0] == losses[1]
    for trainer.step in (0, 7):
        generator_noise = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "picture", lambda picture_rows, *_: generator_noise.append(picture_rows))
            train.preview(trainer, *recorder.four, None)
        rows.append(np.stack([np.stack(row) for row in generator_noise[0]]))
    assert np.array_equal(*rows)

def test_one_clock_is_read(work, monkeypatch):
    """That of time.perf_counter, which no clock's change and no other place's start can mislead."""
    monkeypatch.setattr(train, "time", argparse.Namespace(perf_counter=time.perf_counter))
    assert call(train, *TINY_FLAGS, "--steps", 10, "--save-minutes", 0) == 0
    rows = model.read_checkpoint("runs/shapes/checkpoint.pt")["rows"]
    assert all(row["images_per_s"] > 0 for row in rows)

def test_a_resumed_run_says_its_new_settings(work):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    shutil.rmtree("runs/shapes/preview"), shutil.rmtree("runs/shapes/snapshots")
    assert call(train, "--resume", "--steps", 4, "--snapshots", 1) == 0
    assert json.loads(Path("runs/shapes/config.json").read_text())["options"]["steps"] == 4 and Path("runs/shapes/snapshots/0000004.pt").exists()

def test_four_images_say_whether_a_save_is_good(work, monkeypatch):
    options, config, arrays = settings("--steps", 9)
    recorder, asked = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays), []
    monkeypatch.setattr(train, "held_out_loss", lambda trainer, images, labels: asked.append(len(images)) or 1.0)
    assert recorder.is_good() and asked == [4]

def test_the_bar_of_a_stopped_run_is_closed(work):
    options, config, arrays = settings("--steps", 99)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays, [1])
    recorder.trainer.step = 1
    assert not recorder.bar.disable
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1"):
        recorder.after_step()
    assert recorder.bar.disable                           # tqdm's word for closed

@pytest.mark.parametrize("bad,where", [(0, "there"), (1, "from before numbers ceased to be finite")])
def test_a_stopped_run_says_where_it_goes_on(work, bad, where):
    options, config, arrays = settings("--steps", 99)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays, [1])
    recorder.trainer.step = 1
    recorder.trainer.bad.fill_(bad)
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step 1; the same command, without --overwrite, goes on {where}$"):
        recorder.after_step()
    assert model.read_checkpoint("runs/x/checkpoint.pt")["info"]["step"] == 1 - bad

def test_the_log_has_no_empty_lines_on_any_system(work, monkeypatch):
    """csv writes its own line ends."""
    opened = []
    monkeypatch.setattr(train, "open", lambda path, mode, **how: opened.append(how) or open(path, mode, **how), raising=False)
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0 and opened == [{"newline": ""}]

def test_processes_save_and_stop_together(work, monkeypatch):
    """What is due to the first, and a signal to any of them, is so for all."""
    options, config, arrays = settings("--steps", 99)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu"), rank=1, world=1), arrays)
    recorder.trainer.world, recorder.trainer.step = 3, 7
    sent, saved, answers = [], [], [[0, 0], [1, 0], [0, 1]]
    monkeypatch.setattr(train, "over_processes", lambda numbers, world: sent.append((numbers.tolist(), world)) or torch.tensor(answers.pop(0)))
    monkeypatch.setattr(recorder, "save", lambda: saved.append(1))
    recorder.after_step()
    assert not saved
    recorder.after_step()
    assert len(saved) == 1
    recorder.asked.append(1)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 7"):
        recorder.after_step()
    assert len(saved) == 2 and sent == [([0, 0], 3), ([0, 0], 3), ([0, 1], 3)]

def test_the_first_start_by_torchrun_begins_anew(monkeypatch):
    for count, kept in (("0", True), ("2", False)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert ("overwrite" in train.read_flags(["--overwrite"])) == kept

def test_a_run_at_a_path_is_named_by_it(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "./lab") == 0 and capsys.readouterr().out.endswith("then run 04_sample.py --run ./lab\n")

def test_what_a_trainer_is_made_of(work, monkeypatch):
    """A scaler for fp16 alone; parameters that a step does not use; the device, also where no flag named it; blocks recomputed without warnings."""
    for amp, scaled in (("off", False), ("bf16", False), ("fp16", True)):
        options, config, _ = settings("--steps", 9, "--amp", amp)
        trainer = train.Trainer(options, config, torch.device("cpu"))
        assert trainer.scaler.is_enabled() == scaled
    trainer.parameters[0].grad = torch.full_like(trainer.parameters[0], 2.0)
    assert trainer.gradient_norm() == pytest.approx(2 * math.sqrt(trainer.parameters[0].numel()))
    net = model.build(config)
    options.checkpointing = True
    train.wrap(net, None, options, config, torch.device("cpu"), 1)
    assert all(block.forward.keywords == {"use_reentrant": False} for block in net.blocks)
    asked = []
    monkeypatch.setattr(train, "wrap", lambda net, head, options, config, device, world: asked.append((device, world)) or net)
    train.Trainer(options, config, torch.device("cpu"), 0, 2)
    assert options.device is None and asked == [(torch.device("cpu"), 2)]

def test_what_is_read_ahead_goes_to_the_device(work):
    options, _, arrays = settings("--steps", 1)
    trainer = argparse.Namespace(options=options, device=torch.device("meta"), step=0, indices=lambda: [0])
    assert [{part.device.type for part in pair} for pair in train.read_ahead(*arrays["train"], trainer)] == [{"meta"}]

def test_the_bar_of_a_finished_run_is_closed_before_the_last_line(work):
    options, config, arrays = settings("--steps", 1)
    recorder = recorder_of(train.Trainer(options, config, torch.device("cpu")), arrays)
    recorder.trainer.step = 1
    recorder.after_step()
    assert recorder.bar.disable

def test_a_bare_name_to_begin_with_is_a_run_before_it_is_a_file(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "base") == 0
    Path("base").write_text("notes")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--init", "base", "--run", "a") == 0
    assert call(train, *TINY_FLAGS, "--steps", 2, "--init", "./base", "--run", "b") == 1 and "base is not a checkpoint" in capsys.readouterr().err

def test_a_run_with_an_experiment_of_ones_own_can_be_gone_on_from(work, capsys):
    Path("head.py").write_text('SETTINGS = {"p_mean": -0.5}')
    assert call(train, *TINY_FLAGS, "--steps", 2, "--experiment", "head.py", "--run", "a") == 0 and ": JiT-T/8 with " in capsys.readouterr().out
    assert call(train, *TINY_FLAGS, "--steps", 2, "--experiment", "head.py", "--init", "a", "--run", "b") == 0 and ": sizes as --init with " in capsys.readouterr().out
    assert call(train, *TINY_FLAGS, "--steps", 2, "--init", "a", "--run", "c") == 2 and "head.py' again" in capsys.readouterr().err

# ---- What refusals say, whole ----------------------------------------------------------------------------------------
def test_whole_lines_about_settings(there):
    Path("none.py").write_text("x = 1"), Path("bad.py").write_text("SETTINGS = {'run': 'x'}"), Path("odd.py").write_text("SETTINGS = {'lr': -1}")
    for last, words in (("none.py", "--experiment none.py: the file has no dict SETTINGS"), ("bad.py", "--experiment bad.py: SETTINGS cannot say run: it is a flag, or known from the data"),
                        ("odd.py", "--experiment odd.py: lr -1: give a number in (0, inf)")):
        assert said(lambda: list(train.experiment_settings(f"exp3,{last}"))) == words
    assert said(settled, META, "--num-classes", 5) == "--num-classes 5: the data set has 2 (is it another, or was it packed anew?); 0: without classes"
    assert said(settled, META | {"size": 16, "channels": 4, "coder": {}}, "--aux", "rotation") == "--aux rotation is for images, not for latents"
    assert said(settled, META | {"size": 58}, "--preset", "photos") == "images of 58 pixels cannot be cut into about 16 x 16 patches: pack them at --size 64, or give a --patch-size"
    assert said(settled, META | {"size": 256}, "--preset", "photos", "--batch-size", 257) == "--batch-size 257 cannot be cut into micro-batches of 16 for 1 process(es): give a multiple of 16, or another --micro-batch"
    assert said(settled, META, "--batch-size", 7, world=2) == "--batch-size 7 cannot be cut into micro-batches of 3 for 2 process(es): give a multiple of 6, or another --micro-batch"

def test_whole_lines_about_runs(work, capsys):
    assert said(train.checkpoint_of, Path("runs/r"), True, False) == "--resume: there is no runs/r/checkpoint.pt, or --overwrite is given too; leave --resume out to begin"
    Path("runs/r").mkdir(parents=True), Path("runs/r/notes").touch()
    assert said(train.checkpoint_of, Path("runs/r"), False, False) == "runs/r holds files but no checkpoint.pt: pass --run NAME, or --overwrite to move it aside"
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "./lab/a") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "lab/a/checkpoint.pt after step 2; look at lab/a/preview and loss.png, then run 04_sample.py --run ./lab/a"
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "./lab/a") == 0
    assert capsys.readouterr().out == "lab/a is finished (step 2); nothing to do (longer: --resume --steps N; anew: --overwrite)\n"
    for flags, words in ((["--resume", "--steps", 1], "1 steps: the run in lab/a is at step 2 already"),
                         ([*TINY_FLAGS, "--steps", 2, "--seed", 7], "lab/a was made with other settings (seed 0, now 7): pass --run NAME for a new run, --overwrite, or, to go on with other steps, epochs, lr or amp, --resume")):
        assert call(train, *flags, "--run", "./lab/a") in (1, 2) and capsys.readouterr().err.endswith(f"error: {words}\n")
    options, config, arrays = settings("--steps", 99)
    trainer = train.Trainer(options, config, torch.device("cpu"))
    assert said(train.restore, trainer, train.training_state(trainer) | {"rows": None, "skipped": "x"}, "runs/r").startswith("runs/r cannot be used: TypeError ")
    state = train.training_state(trainer)                 # an average more, or less
    assert "used: zip() argument" in said(train.restore, trainer, state | {"ema": []}, "runs/r") and "used: zip() argument" in said(train.restore, trainer, state | {"ema": state["ema"] * 2}, "runs/r")
    short = [{name: value.flatten()[:1] for name, value in state["ema"][0].items()}]                     # it would fill any shape
    assert "used: one of its tensors has the shape (1,), not (1, 4, 32)" in said(train.restore, trainer, state | {"ema": short * len(state["ema"])}, "runs/r")
    recorder = recorder_of(trainer, arrays)
    trainer.bad.fill_(10)
    trainer.step = 10
    assert said(recorder.after_step) == ("numbers are no longer finite at step 10 (10 gradients in a row): runs/x/checkpoint.pt is from before; go on with --resume and a lower --lr than 0.001, "
                                         "or with another --amp; if that ends so, too, it was too late: --overwrite")

def test_every_average_is_saved_and_restored(work):
    options, config, arrays = settings("--steps", 99, "--ema", "0.5,0.9,0.99")
    first, second = (train.Trainer(options, config, torch.device("cpu")) for _ in range(2))
    run_steps(first, arrays, 12)
    train.restore(second, train.training_state(first), "a run")
    assert len(second.ema) == 3 and all(torch.equal(a, b) for one, two in zip(first.ema, second.ema) for a, b in zip(one.values(), two.values()))
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(second.ema[0][name], second.ema[1][name]) and len(train.sampling_state(first)["ema"]) == 3

def test_files_in_a_list_of_experiments_become_absolute(there):
    Path("lab").mkdir(), Path("lab/plain.py").write_text("SETTINGS = {}\n")
    assert train.read_flags(["--experiment", "lab/plain.py,exp3"])["experiment"] == f"{there.resolve()}/lab/plain.py,exp3"

def test_a_shift_of_nothing_is_one(work):
    shutil.copytree(Path("data/shapes").resolve(), "set")
    meta = json.loads(Path("set/meta.json").read_text())
    Path("set/meta.json").write_text(json.dumps(meta | {"shift": None}))
    assert call(train, *TINY_FLAGS, "--steps", 1, "--data", "./set") == 0
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["options"]["shift"] == 1.0

def test_a_full_disk_under_what_is_said_ends_nothing(work):
    """A warning, a refusal: said or not, the work is done, and the exit code is right."""
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    Path("runs/shapes/loss.png").write_bytes(b"mine")
    for flags, code in ((["--resume", "--steps", "8"], 0), (["--foo"], 2)):
        full = os.open("/dev/full", os.O_WRONLY)
        assert subprocess.run([sys.executable, ROOT / "03_train.py", *flags], stderr=full).returncode == code
        os.close(full)
    assert model.read_checkpoint(Path("runs/shapes/checkpoint.pt"))["info"]["step"] == 8

def test_advice_under_resume_leads_out(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    assert call(train, "--resume", "--steps", 4, "--seed", 3) == 1 and "pass without --resume --run NAME for a new run, --overwrite, or" in capsys.readouterr().err
    assert call(train, *TINY_FLAGS, "--steps", 2, "--seed", 3) == 1 and "pass --run NAME for a new run, --overwrite, or" in capsys.readouterr().err
    assert call(train, *TINY_FLAGS, "--steps", 2, "--seed", 3, "--run", "new") == 0 == call(train, *TINY_FLAGS, "--steps", 2, "--seed", 3, "--overwrite")
