"""Training: the same model however the work is split, bit for bit the same after a kill, and nothing lost."""
import argparse
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY_FLAGS, call, data, evaluate, model, shell, train


def settings(*flags):
    """Flags -> complete settings and configuration, as the script would have them for data/shapes."""
    s = train.resolve(train.parse_args([*TINY_FLAGS, *map(str, flags)]))
    meta, arrays = data.open_data("data/shapes")
    return s, train.complete(s, meta, torch.device("cpu"), 1), arrays


def run_steps(trainer, arrays, steps, micro):
    feed = train.Feed(*arrays["train"], trainer.s, trainer.device)
    slots = range(trainer.s["batch-size"] // micro)
    for _ in range(steps):
        trainer.train_step((slot, *feed.load(trainer.step, slot, micro)) for slot in slots)


def weights(path):
    state = model.read_checkpoint(path)
    return [*state["model"].values(), *(v for ema in state["ema"] for v in ema.values())]


# ---------------------------------------------------------------------------------------------------------------------
# One model, whoever computes it
# ---------------------------------------------------------------------------------------------------------------------

def test_two_micro_batches_are_the_big_batch_at_once(work):
    s, config, arrays = settings("--micro-batch", 4, "--steps", 5)
    split = train.Trainer(s, config, torch.device("cpu"), 1)
    run_steps(split, arrays, 5, 4)
    whole = train.Trainer(s, config, torch.device("cpu"), 1)
    feed = train.Feed(*arrays["train"], s, torch.device("cpu"))
    for step in range(5):                                 # the same slots drawn, then one forward pass over both
        batches = []
        for slot in (0, 1):
            images, labels = feed.load(step, slot, 4)
            train.seed_everything(s["seed"], step, slot)
            batches.append(train.draw(images, labels, s, config))
        batch = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        whole.optimizer.zero_grad()
        train.training_loss(whole.net, batch, s, config, whole.autocast)[0].backward()
        whole.optimizer.param_groups[0]["lr"] = whole.lr(step)
        whole.optimizer.step()
    for a, b in zip(split.net.parameters(), whole.net.parameters()):
        assert (a - b).abs().max() < 1e-5


def torchrun(*args, cwd, processes=2):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--", ROOT / args[0],
                           *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_the_same_model_as_one(work):
    """Also in the README's words: --batch-size is global."""
    flags = [*TINY_FLAGS, "--steps", 5, "--micro-batch", 4, "--aux", "time"]
    assert shell("03_train.py", *flags, "--run", "one", cwd=work).returncode == 0
    done = torchrun("03_train.py", *flags, "--run", "two", cwd=work)
    assert done.returncode == 0, done.stderr
    for a, b in zip(weights("runs/one/checkpoint.pt"), weights("runs/two/checkpoint.pt")):
        assert (a - b).abs().max() < 1e-5
    assert done.stdout.count("step 0 to 5") == 1          # one process speaks
    logs = [list(csv.DictReader(open(f"runs/{run}/log.csv"))) for run in ("one", "two")]
    assert abs(float(logs[0][-1]["loss"]) - float(logs[1][-1]["loss"])) < 1e-4
    done = torchrun("04_sample.py", "--run", "two", "--num", 6, "--batch-size", 2, "--steps", 2, "--amp", "off", cwd=work)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("runs/two/samples").glob("0*.png"))) == 6 and Path("runs/two/grid.png").exists()
    assert call(evaluate, "--run", "two", "--batch-size", 4) == 0                                      # trains and caches the classifier
    done = torchrun("04_sample.py", "--run", "two", "--num", 6, "--steps", 3, "--amp", "off", cwd=work)
    assert done.returncode and done.stderr.count("04_sample.py: error") == 1 and '04_sample.py", line' not in done.stderr
    done = torchrun("05_eval.py", "--run", "two", "--batch-size", 4, "--out", "two.json", cwd=work)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(path).read_text()) for path in ("runs/two/metrics.json", "two.json"))
    assert two["fd"] == pytest.approx(one["fd"], rel=1e-6) and two["precision"] == one["precision"] and two["class_accuracy"] == one["class_accuracy"]


def test_a_rank_that_fails_ends_the_run(work):
    done = torchrun("03_train.py", *TINY_FLAGS, "--steps", 5, "--data", "nowhere", cwd=work)
    assert done.returncode != 0 and done.stderr.count("no data set at data/nowhere") == 1
    done = torchrun("03_train.py", "--benchmark", *TINY_FLAGS, cwd=work)                             # all stop at the same step, one speaks
    assert done.returncode == 0 and done.stdout.count("images/s") == 1, done.stderr


def test_the_first_process_of_every_machine_speaks(work, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "8"), monkeypatch.setenv("LOCAL_RANK", "0")
    assert train.fail("x") == 1 and "[rank 8] x" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.fail("x") == 1 and capsys.readouterr().err == ""


def test_data_order_visits_every_image_once_an_epoch(work):
    s, _, arrays = settings()
    feed = train.Feed(*arrays["train"], s, torch.device("cpu"))
    epochs = np.concatenate([feed.indices(step, slot, 4) for step in range(50) for slot in (0, 1)]).reshape(2, 200)
    assert all(sorted(e) == list(range(200)) for e in epochs) and (epochs[0] != epochs[1]).any()


def test_reading_ahead_delivers_the_same_batches(work):
    s, _, arrays = settings()
    near, far = (train.Feed(*arrays["train"], s, torch.device("cpu")) for _ in range(2))
    far.resident = None
    jobs = [(step, slot) for step in range(4) for slot in range(2)]
    for (a, la), (b, lb) in zip(near.run(iter(jobs), 4), far.run(iter(jobs), 4), strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)


# ---------------------------------------------------------------------------------------------------------------------
# Surviving
# ---------------------------------------------------------------------------------------------------------------------

def test_resume_is_bitwise_after_kill_9(work):
    """20 steps = 10 + kill -9 + resume, mid-epoch (25 steps an epoch), with accumulation, EMA, dropout and an auxiliary head."""
    flags = [*TINY_FLAGS, "--steps", 20, "--micro-batch", 4, "--aux", "rotation", "--dropout", "0.1", "--schedule", "cosine", "--ema", "0.9,0.5", "--save-every", 5]
    assert call(train, *flags, "--run", "whole") == 0
    child = subprocess.Popen([sys.executable, ROOT / "03_train.py", *map(str, flags), "--run", "killed", "--log-every", "1"], cwd=work,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path("runs/killed/log.csv")
    while child.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 11):
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert call(train, "--run", "killed", "--resume") == 0
    for a, b in zip(weights("runs/whole/checkpoint.pt"), weights("runs/killed/checkpoint.pt")):
        assert torch.equal(a, b)
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))


def test_the_log_goes_on_within_a_window(work):
    """A checkpoint between two lines of the log carries the sums since the last one."""
    s, config, arrays = settings("--steps", 20, "--aux", "time")
    first, second = (train.Trainer(s, config, torch.device("cpu"), 1) for _ in range(2))
    run_steps(first, arrays, 3, 8)
    second.load(first.state())
    a, b = train.log_row(first, 1.0), train.log_row(second, 1.0)
    assert a["loss"] == b["loss"] > 0 and a["aux"] == b["aux"] > 0 and a["grad_norm"] == b["grad_norm"] > 0


def test_sigterm_leaves_a_checkpoint(work):
    child = subprocess.Popen([sys.executable, ROOT / "03_train.py", *TINY_FLAGS, "--steps", "100000", "--log-every", "1"], cwd=work,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not Path("runs/shapes/log.csv").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    child.terminate()
    start = time.time()
    assert child.wait(30) == 128 + signal.SIGTERM and time.time() - start < 10
    assert "go on with --resume" in child.stderr.read() and model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] > 0
    assert "unfinished run" in shell("03_train.py", *TINY_FLAGS, cwd=work).stderr
    wrong = shell("03_train.py", "--resume", "--batch-size", "16", cwd=work)
    assert wrong.returncode == 1 and "started with --batch-size 8, not 16" in wrong.stderr


def test_another_rate_or_precision_is_the_way_out(work):
    """Chance is a function of the step: what was not finite would be so again."""
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0
    assert call(train, "--resume", "--steps", 6, "--lr", "5e-4", "--amp", "fp16") == 0
    state = model.read_checkpoint("runs/shapes/checkpoint.pt")
    assert (state["settings"]["lr"], state["settings"]["amp"], state["info"]["step"]) == (5e-4, "fp16", 6) and state["scaler"]
    assert call(train, "--resume", "--steps", 8, "--amp", "off") == 0


def test_a_folder_that_is_in_use_is_not_taken(work, capsys):
    """An official checkpoint put where 04_sample.py reads it; pictures of the user's own in preview/."""
    Path("runs/keep/preview").mkdir(parents=True)
    torch.save({"model_ema1": {}, "args": argparse.Namespace()}, "runs/keep/checkpoint.pt")
    before = Path("runs/keep/checkpoint.pt").read_bytes()
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "keep") == 1 and "--run NAME" in capsys.readouterr().err
    assert Path("runs/keep/checkpoint.pt").read_bytes() == before
    Path("runs/keep/preview/holiday.png").write_bytes(b"mine")
    assert call(train, *TINY_FLAGS, "--steps", 2, "--run", "keep", "--overwrite") == 0 and Path("runs/keep/preview/holiday.png").exists()


def test_no_compiler_is_said_in_one_line(work):
    done = shell("03_train.py", *TINY_FLAGS, "--steps", 2, "--compile", cwd=work, env={"CXX": "/nonexistent", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})
    assert done.returncode == 1 and "pass --no-compile" in done.stderr and "Traceback" not in done.stderr


def test_torchrun_restart_goes_on(work, monkeypatch):
    """torchrun --max-restarts starts the same command again; it must resume, or begin anew if nothing was saved."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = [*TINY_FLAGS, "--steps", 6, "--save-every", 3]
    assert call(train, *flags) == 0
    state = model.read_checkpoint("runs/shapes/checkpoint.pt")
    state["info"]["step"] = 3
    torch.save({k: v for k, v in state.items()}, "again.pt")
    os.replace("again.pt", "runs/shapes/checkpoint.pt")
    assert call(train, *flags) == 0 and model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 6


def test_random_kills(work):
    """The short form of tests/kill_test.py."""
    import kill_test
    assert kill_test.torture(work, kills=2, steps=40, seed=1) == 0


def test_non_finite_steps_are_skipped_and_counted(work, capsys, monkeypatch):
    s, config, arrays = settings("--steps", 10)
    trainer = train.Trainer(s, config, torch.device("cpu"), 1)
    before = [p.clone() for p in trainer.net.parameters()]
    broken = lambda net, batch, *rest: (net.final_layer.linear.bias.sum() * float("nan"), torch.zeros(len(batch["t"])), torch.zeros(()))
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_loss", broken)
        run_steps(trainer, arrays, 2, 8)
    assert trainer.skipped == trainer.bad == 2 and trainer.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.net.parameters()))
    assert call(train, *TINY_FLAGS, "--lr", "1e30", "--warmup", 0, "--steps", 30, "--max-skipped", 3) == 1
    error = capsys.readouterr().err
    assert "steps in a row had a non-finite gradient" in error and len(error.strip().splitlines()) == 1


def test_full_disk_keeps_the_old_checkpoint(work):
    path = Path("checkpoint.pt")
    train.save({"config": {}, "ema": [], "x": torch.zeros(10)}, path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(ValueError, match="make room"):
            train.save({"x": torch.randn(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and not Path("checkpoint.pt.part").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The pieces
# ---------------------------------------------------------------------------------------------------------------------

def test_ema_and_learning_rate(work):
    s, config, arrays = settings("--steps", 100, "--ema", "0.9,0", "--schedule", "cosine", "--warmup", 10, "--lr", "1e-2")
    trainer = train.Trainer(s, config, torch.device("cpu"), 1)
    start = trainer.net.final_layer.linear.bias.detach().clone()
    expected = start.clone()
    for _ in range(3):
        run_steps(trainer, arrays, 1, 8)
        expected = 0.9 * expected + 0.1 * trainer.net.final_layer.linear.bias.detach()
    assert torch.allclose(trainer.ema[0]["final_layer.linear.bias"], expected, atol=1e-7)
    assert torch.equal(trainer.ema[1]["final_layer.linear.bias"], trainer.net.final_layer.linear.bias)
    assert trainer.lr(4) == pytest.approx(0.5e-2 * 0.5 * (1 + np.cos(np.pi * 4 / 100))) and trainer.lr(99) < 1e-5
    s["schedule"] = "constant"
    assert trainer.lr(50) == trainer.lr(99) == 1e-2


def test_defaults_are_the_papers():
    s = train.resolve({"preset": "imagenet-B"})
    meta = {"size": 256, "classes": ["x"] * 1000, "counts": {"train": 1_281_167}}
    config = train.complete(s, meta, torch.device("cpu"), 8)
    assert (s["lr"], s["batch-size"], s["schedule"], s["label-drop"], s["ema"]) == (2e-4, 1024, "constant", 0.1, "0.9999,0.9996")
    assert (s["p-mean"], s["p-std"], s["warmup"], s["weight-decay"]) == (-0.8, 0.8, 6256, 0) and s["steps"] == 750684
    assert config == model.JiTConfig(**model.MODELS["JiT-B/16"])


def test_table_1_of_document_000():
    rows = {name: tuple(train.EXPERIMENTS[name].values()) for name in ("baseline", "exp1", "exp2", "exp3", "exp4", "exp5")}
    assert rows == {"baseline": ("linear", "swiglu", "none"), "exp1": ("nonlinear", "bottleneck", "none"), "exp2": ("nonlinear", "bottleneck", "time"),
                    "exp3": ("nonlinear", "swiglu", "none"), "exp4": ("nonlinear", "swiglu", "time"), "exp5": ("nonlinear", "swiglu", "rotation")}


def test_labels_are_dropped_and_images_mirrored():
    s = train.resolve({"flip": True})
    config = model.JiTConfig(image_size=16, patch_size=8, num_classes=10)
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 16, 1).expand(4000, 16, 16, 3)
    torch.manual_seed(0)
    batch = train.draw(images, torch.full((4000,), 3), s, config)
    assert abs((batch["y"] == 10).float().mean() - 0.1) < 0.02 and ((batch["y"] == 10) | (batch["y"] == 3)).all()
    assert abs((batch["x"][:, 0, 0, 0] > batch["x"][:, 0, 0, 1]).float().mean() - 0.5) < 0.03
    assert torch.allclose(batch["x"].amin(), torch.tensor(-1.0)) and abs(batch["e"].std() - 1) < 0.01


def test_rotation_turns_the_image_and_is_asked_for():
    s = train.resolve({"flip": False})
    config = model.JiTConfig(image_size=16, patch_size=8, num_classes=10, aux="rotation")
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    torch.manual_seed(0)
    batch = train.draw(image.expand(64, 16, 16, 3), torch.zeros(64).long(), s, config)
    upright = image.permute(2, 0, 1).float() / 127.5 - 1
    for x, k in zip(batch["x"], batch["turns"]):
        assert torch.equal(x, torch.rot90(upright, int(k), (1, 2)))                     # the diffusion loss sees it turned
    assert set(batch["turns"].tolist()) == {0, 1, 2, 3}


def test_lambda_is_applied_and_the_time_head_learns(work):
    """The documents' own code parsed lambda and used 1.0: the head's gradient must scale with it."""
    grads = []
    for weight in (0.1, 0.3):
        s, config, arrays = settings("--aux", "time", "--aux-weight", weight)
        trainer = train.Trainer(s, config, torch.device("cpu"), 1)
        train.seed_everything(0)
        batch = train.draw(torch.from_numpy(arrays["train"][0][:8].copy()), torch.from_numpy(arrays["train"][1][:8]), s, config)
        train.training_loss(trainer.net, batch, s, config, trainer.autocast)[0].backward()
        grads.append(trainer.net.aux_head.mlp[2].weight.grad)
    assert torch.allclose(grads[1], 3 * grads[0], rtol=1e-4) and grads[0].abs().max() > 0
    assert call(train, *TINY_FLAGS, "--steps", 150, "--aux", "time", "--aux-weight", 1, "--log-every", 50, "--lr", "3e-3") == 0
    aux = [float(row["aux"]) for row in csv.DictReader(open("runs/shapes/log.csv"))]
    assert aux[-1] < 0.5 * aux[0]
    net, _ = model.load_network("runs/shapes/checkpoint.pt")
    assert net.aux_head is None


def test_frozen_patch_embedding_does_not_move(work):
    assert call(train, *TINY_FLAGS, "--steps", 3, "--freeze-patch-embed", "--seed", 5) == 0
    state = model.read_checkpoint("runs/shapes/checkpoint.pt")
    train.seed_everything(5)
    fresh = model.JiT(model.JiTConfig(**state["config"])).state_dict()
    moved = {k for k in fresh if not torch.equal(fresh[k], state["model"][k])}
    assert moved and not any(k.startswith("x_embedder") for k in moved)


def test_an_epoch_smaller_than_a_batch(work):
    """Five epochs within one micro-batch: every image five times, in five orders."""
    s, config, arrays = settings("--batch-size", 50, "--micro-batch", 50)
    feed = train.Feed(arrays["train"][0][:10], arrays["train"][1][:10], s, torch.device("cpu"))
    first = feed.indices(0, 0, 50)
    assert (np.bincount(first) == 5).all() and len({tuple(part) for part in first.reshape(5, 10)}) == 5
    assert (feed.indices(7, 0, 50) == train.Feed(arrays["train"][0][:10], arrays["train"][1][:10], s, torch.device("cpu")).indices(7, 0, 50)).all()


def test_tensorboard_gets_numbers_only(work, monkeypatch):
    log, seen = train.Log(work, 0), []
    log.board = type("Board", (), {"add_scalar": lambda self, name, value, step: seen.append((name, value, step))})()
    log.write({**dict.fromkeys(log.COLUMNS, 1.0), "step": 3, "held_out": ""})
    assert len(seen) == len(log.COLUMNS) - 1 and {step for _, _, step in seen} == {3}


def test_resume_on_a_data_set_packed_anew(there, capsys):
    pack = ["--count", 100, "--workers", 1, "--name", "d"]
    assert call(data, *pack, "--size", 16) == 0 and call(train, *TINY_FLAGS, "--data", "d", "--run", "r", "--steps", 2) == 0
    assert call(data, *pack, "--size", 24, "--overwrite") == 0 and call(train, "--run", "r", "--resume", "--steps", 4) == 1
    assert "another image size" in capsys.readouterr().err


def test_held_out_images_are_of_all_classes(work, monkeypatch):
    s, config, arrays = settings("--steps", 1)
    images, labels = np.arange(600, dtype=np.uint8)[:, None, None, None].repeat(3, 3), np.arange(600) // 200          # sorted, as packed folders are
    seen = []
    monkeypatch.setattr(train, "Keeper", lambda trainer, folder, shown, first: seen.append(shown) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(train.Trainer(s, config, torch.device("cpu"), 1), {"train": arrays["train"], "val": (images, labels)}, Path("."), 0)
    assert np.bincount(seen[0][1]).min() > 60 and len(seen[0][0]) == 256
    assert len(set(seen[0][1][:4])) > 1                                # the four of the preview


ROWS = [*(["--preset", name, "--data", "shapes"] for name in train.PRESETS), *(["--experiment", name] for name in train.EXPERIMENTS), ["--unconditional"], ["--no-context", "--bottleneck-dim", 0], ["--path", "cosine", "--pred", "v", "--loss", "e"],
        ["--path", "ddpm-cosine", "--pred", "e", "--loss", "x", "--shift", 2], ["--amp", "fp16"], ["--amp", "bf16"], ["--checkpointing"], ["--attention", "plain"]]


@pytest.mark.parametrize("flags", ROWS, ids=lambda flags: " ".join(map(str, flags)))
def test_every_row_trains_and_samples(work, flags):
    from conftest import sample
    assert call(train, *TINY_FLAGS, "--steps", 20, "--run", "row", *flags) == 0
    rows = list(csv.DictReader(open("runs/row/log.csv")))
    assert float(rows[-1]["loss"]) > 0 and rows[-1]["held_out"]
    assert call(sample, "--run", "row", "--num", 4, "--steps", 3, "--amp", "off") == 0
    record = json.loads(Path("runs/row/samples/samples.json").read_text())
    wanted = {"solver": "heun", "cfg": 1.0, "interval": [0.0, 1.0], **train.resolve(train.parse_args(list(map(str, flags))))["sampling"], "steps": 3}
    wanted["cfg"] = 1.0 if "--unconditional" in flags else wanted["cfg"]
    assert {k: record[k] for k in wanted} == wanted and len(record["labels"]) == 4      # what the row says is stored and never asked again


def test_experiments_of_the_neighbours():
    dit, sd3 = (train.resolve({"preset": "cifar10", "experiment": name}) for name in ("dit", "sd3"))
    assert (dit["pred"], dit["path"], dit["times"], dit["norm"], dit["ffn"], dit["rope"]) == ("e", "ddpm-linear", "uniform", "layernorm", "gelu", False)
    assert (sd3["pred"], sd3["loss"], sd3["p-mean"], sd3["p-std"]) == ("v", "v", 0.0, 1.0)


def test_benchmark_needs_no_data(there, capsys):
    assert call(train, "--benchmark", *TINY_FLAGS) == 0
    out = capsys.readouterr().out
    assert "images/s" in out and "utilisation" in out and "TFLOP/s" in out


def test_preview_log_and_snapshots(work):
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--log-every", 2) == 0
    assert sorted(p.name for p in Path("runs/shapes/preview").iterdir()) == ["0000004.png", "0000008.png"]
    assert sorted(p.name for p in Path("runs/shapes/snapshots").iterdir()) == ["0000004.pt", "0000008.pt"]
    rows = list(csv.DictReader(open("runs/shapes/log.csv")))
    assert [row["images"] for row in rows] == ["16", "32", "48", "64"] and list(rows[0]) == train.Log.COLUMNS
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--log-every", 2) == 0          # finished: nothing to do
    assert call(train, *TINY_FLAGS, "--steps", 8, "--preview-every", 4, "--snapshots", 2, "--overwrite") == 0


def test_what_a_finished_run_answers(work, capsys, monkeypatch):
    assert call(train, *TINY_FLAGS, "--steps", 8) == 0
    capsys.readouterr()
    for flags, words, code in [([], "(--model JiT-T/8, now JiT-T/16)", 1), (["--steps", 8, *[f for f in TINY_FLAGS if f not in ("--depth", "3")]], "(--depth 3, now None)", 1), ([*TINY_FLAGS, "--steps", 9], "pass --resume --steps 9", 1), (["--steps", 8, "--seed", 3], "other settings (--", 1),
                               ([*TINY_FLAGS, "--steps", 8, "--seed", 3], "(--seed 0, now 3)", 1), (["--resume", "--steps", 7], "at step 8 already", 2)]:
        assert call(train, *flags) == code
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1, error
    before = Path("runs/shapes/config.json").read_bytes()
    assert call(train, "--resume") == 0 and "nothing to do" in capsys.readouterr().out and Path("runs/shapes/config.json").read_bytes() == before
    monkeypatch.setattr(train.Trainer, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):                             # a new run that fails before its first step leaves the old one
        call(train, *TINY_FLAGS, "--steps", 8, "--seed", 3, "--overwrite")
    assert model.read_checkpoint("runs/shapes/checkpoint.pt")["info"]["step"] == 8 and Path("runs/shapes/config.json").read_bytes() == before


@pytest.mark.parametrize("flags,words,code", [
    (["--steps", -1], "give a number above 0", 2), (["--preset", "nope"], "unknown", 2), (["--experiment", "exp9"], "unknown", 2), (["--model", "JiT-Z"], "unknown", 2),
    (["--batch-size", 10, "--micro-batch", 4], "nearest: 8 or 12", 2), (["--patch-size", 5], "no multiple", 2), (["--ema", "fast"], "decays", 2), (["--label-drop", 1], "label-drop", 2),
    (["--lr", 0], "above 0", 2), (["--patch-embed", "nonlinear", "--bottleneck-dim", 0], "needs a bottleneck", 2), (["--pred", "y"], "choice", 2), (["--steps", "many"], "invalid int", 2),
    (["--data", "nope"], "no data set at data/nope", 1), (["--resume"], "there is no", 1), (["--device", "cuda"], "no CUDA", 2), (["--device", "gpu"], "give cuda or cpu", 2), (["--device", "meta"], "give cuda or cpu", 2), (["--nonsense"], "unrecognized", 2)])
def test_wrong_requests(work, capsys, flags, words, code):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert call(train, *TINY_FLAGS, *flags) == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not Path("runs").exists()


def test_resume_refuses_what_is_not_a_run(work, capsys):
    Path("runs/shapes").mkdir(parents=True)
    for content, words in ((b"", "no readable checkpoint"), (b"hello", "no readable checkpoint")):
        Path("runs/shapes/checkpoint.pt").write_bytes(content)
        assert call(train, "--resume") == 1 and words in capsys.readouterr().err
    torch.save({"config": {}, "ema": []}, "runs/shapes/checkpoint.pt")
    assert call(train, "--resume") == 1 and "not the state of a training run" in capsys.readouterr().err
