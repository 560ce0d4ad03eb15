"""03_train.py -- training: noise an image, let the network predict it, weigh the error as an error of velocity

What this stage teaches: the JiT loss, and around it everything a real run needs: mixed precision, any number of GPUs,
gradient accumulation, averaged weights (EMA), checkpoints that survive a kill, and a log in which trouble shows early.
Reads data/<name>/ (01_data.py).   Writes runs/<name>/: config.json, log.csv, checkpoint.pt, snapshots/, preview/
Run it:   python 03_train.py                                   the shapes preset, seven minutes on two CPU cores
          python 03_train.py --resume                          go on after a kill
          torchrun --nproc_per_node 8 -- 03_train.py --preset imagenet-B  the same model on 8 GPUs as on one
          python 03_train.py --benchmark --model JiT-B/16      images/s and utilisation, no data needed

One step, in the letters of 02_model.py (t = 0 noise, t = 1 data; JiT Algorithm 1):
    t = sigmoid(N(p_mean, p_std^2)),  e ~ N(0, k^2),  z = t x + (1-t) e        draw a time, mix image and noise
    x_pred = net(z, t, y)                                                      one in ten labels replaced by "no class"
    loss = || v_pred - v ||^2  with  v = (x - z) / max(1-t, 0.05)              the same clamp for prediction and target
Chance is a function of (seed, step, slot): a slot is one micro-batch within the global batch, whoever computes it.  So
a resumed run repeats what an undisturbed one does (bit for bit on a CPU; a GPU's sums vary in the last digits) and, at
the same --micro-batch, two processes train the same model as one.
"""
import argparse
import csv
import math
import os
import resource
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Settings: the defaults are the paper's; a preset, an experiment and the flags given override them, in this order
# ---------------------------------------------------------------------------------------------------------------------

AUTO = None                                               # worked out from the data, the hardware or the other settings
SETTINGS = {  # group: {name: (default, kind or choices, help)}; the flag is the name with dashes
    "what to train on": {
        "preset": ("shapes", str, "shapes cifar10 cifar10-cpu imagenette photos imagenet-B imagenet-L imagenet-H 1percent"),
        "experiment": ("", str, "row of EXPERIMENTS: baseline exp1..exp5 plain rope-qknorm context dit sd3"),
        "data": (AUTO, str, "data set: data/NAME, or a folder"), "run": (AUTO, str, "runs/NAME, or a folder (default: the preset)"),
        "steps": (AUTO, int, "optimizer steps; overrides --epochs"), "epochs": (600.0, float, "passes over the data"),
        "seed": (0, int, "of weights, data order and noise")},
    "network": {
        "model": ("JiT-B/16", str, "row of MODELS in 02_model.py; the flags below override parts of it"),
        "patch-size": (AUTO, int, "pixels"), "hidden-size": (AUTO, int, "width"), "depth": (AUTO, int, "blocks"),
        "num-heads": (AUTO, int, "heads"), "bottleneck-dim": (AUTO, int, "patch embedding's bottleneck, 0 = none"),
        "patch-embed": ("linear", ("linear", "nonlinear"), ""), "ffn": ("swiglu", ("swiglu", "gelu", "bottleneck"), ""),
        "norm": ("rmsnorm", ("rmsnorm", "layernorm"), ""), "rope": (True, bool, "rotary embedding"),
        "qk-norm": (True, bool, "norm of q and k"), "context": (True, bool, "class tokens"), "dropout": (AUTO, float, ""),
        "unconditional": (False, bool, "train without classes"), "freeze-patch-embed": (False, bool, "as document 001 has it")},
    "objective": {
        "pred": ("x", ("x", "e", "v"), "what the network predicts"), "loss": ("v", ("x", "e", "v"), "space of the squared error"),
        "path": ("linear", ("linear", "cosine", "ddpm-linear", "ddpm-cosine"), ""),
        "times": ("logit-normal", ("logit-normal", "uniform"), "distribution of t"),
        "p-mean": (-0.8, float, ""), "p-std": (0.8, float, ""), "shift": (1.0, float, "t -> t/(t + A(1-t))"),
        "noise-scale": (AUTO, float, "k (default: size/256, at least 1)"), "label-drop": (0.1, float, "for guidance"),
        "flip": (True, bool, "mirror half of the images"), "aux": ("none", ("none", "time", "rotation"), "auxiliary head"),
        "aux-weight": (0.1, float, "lambda")},
    "optimizer": {
        "batch-size": (1024, int, "GLOBAL: images per optimizer step"), "micro-batch": (AUTO, int, "images per pass and process"),
        "lr": (AUTO, float, "(default: 5e-5 x batch/256)"), "schedule": ("constant", ("constant", "cosine"), "after warm-up"),
        "warmup": (AUTO, int, "steps (default: 5 epochs, at most 1/20 of the run)"), "weight-decay": (0.0, float, ""),
        "ema": ("0.9999,0.9996", str, "decays of the averaged weights")},
    "hardware": {
        "amp": (AUTO, ("bf16", "fp16", "off"), "mixed precision (default: bf16 where it is fast)"),
        "compile": (AUTO, bool, "torch.compile (default: on CUDA)"), "checkpointing": (False, bool, "recompute blocks: less memory"),
        "device": (AUTO, str, "cuda or cpu"), "attention": ("auto", ("auto", "plain"), "plain: written out in fp32")},
    "keeping": {
        "resume": (False, bool, "go on from runs/NAME/checkpoint.pt"), "overwrite": (False, bool, "start the run again"),
        "log-every": (50, int, "steps"), "preview-every": (1000, int, "steps, 0 = never"), "save-every": (0, int, "steps, 0 = by time"),
        "save-minutes": (10.0, float, ""), "snapshots": (8, int, "copies of the EMA kept over the run"),
        "max-skipped": (10, int, "stop after so many non-finite steps in a row"), "benchmark": (False, bool, "time it and stop")},
}
TABLE = {name: row for group in SETTINGS.values() for name, row in group.items()}
# may differ when a run is resumed; another micro-batch draws other noise, from the same distribution
FREE = {"run", "resume", "overwrite", "steps", "epochs", "micro-batch", "compile", "device", "log-every", "preview-every", "save-every",
        "save-minutes", "snapshots", "max-skipped", "checkpointing", "benchmark"}
AMENDABLE = FREE | {"lr", "amp"}                          # the way out when steps are not finite: chance would repeat them

IMAGENET = {"data": "imagenet", "model": "JiT-B/16", "preview-every": 5000, "sampling": {"cfg": 2.9, "interval": [0.1, 1.0]}}
PRESETS = {
    "shapes": {"data": "shapes", "model": "JiT-T/16", "batch-size": 32, "steps": 4600, "lr": 7e-3, "schedule": "cosine", "ema": "0.998",
               "noise-scale": 2.0, "p-mean": -0.9, "p-std": 1.0, "sampling": {"solver": "ddpm", "cfg": 1.5, "steps": 25, "shift": 3.0}},
    "cifar10": {"data": "cifar10", "model": "JiT-S/4", "batch-size": 256, "epochs": 200, "lr": 4e-4, "ema": "0.9999,0.999",
                "sampling": {"cfg": 2.0, "interval": [0.1, 1.0]}},
    "cifar10-cpu": {"data": "cifar10", "model": "JiT-T/8", "batch-size": 32, "steps": 1000, "lr": 3e-3, "schedule": "cosine", "ema": "0.998",
                    "preview-every": 0, "sampling": {"cfg": 2.0, "steps": 8}},            # two minutes on two cores: for comparisons
    "imagenette": {"data": "imagenette-160", "model": "JiT-S/16", "batch-size": 256, "epochs": 600, "lr": 4e-4,
                   "ema": "0.9999,0.999", "sampling": {"cfg": 2.5, "interval": [0.1, 1.0]}},
    "photos": {"data": "photos", "model": "JiT-S/16", "batch-size": 128, "epochs": 600, "ema": "0.9999,0.999"},
    "imagenet-B": IMAGENET, "imagenet-L": dict(IMAGENET, model="JiT-L/16"),
    "imagenet-H": dict(IMAGENET, model="JiT-H/16", sampling={"cfg": 2.3, "interval": [0.1, 1.0]}),
    "1percent": dict(IMAGENET, data="imagenet-1percent", epochs=1000, ema="0.999", sampling={"solver": "euler", "steps": 25, "cfg": 2.9}) |
                {"batch-size": 1200},                     # document 000, section 4.1
}
DIT = {"norm": "layernorm", "ffn": "gelu", "rope": False, "qk-norm": False, "context": False, "bottleneck-dim": 0}
EXPERIMENTS = {  # combine with any preset
    # document 000, Table 1            patch embedding            FFN                  auxiliary loss
    "baseline": {"patch-embed": "linear",    "ffn": "swiglu",     "aux": "none"},
    "exp1":     {"patch-embed": "nonlinear", "ffn": "bottleneck", "aux": "none"},
    "exp2":     {"patch-embed": "nonlinear", "ffn": "bottleneck", "aux": "time"},
    "exp3":     {"patch-embed": "nonlinear", "ffn": "swiglu",     "aux": "none"},
    "exp4":     {"patch-embed": "nonlinear", "ffn": "swiglu",     "aux": "time"},
    "exp5":     {"patch-embed": "nonlinear", "ffn": "swiglu",     "aux": "rotation"},
    # the ladder of JiT Table 4: each row adds to the one above it
    "plain":       {"rope": False, "qk-norm": False, "context": False},
    "rope-qknorm": {"rope": True,  "qk-norm": True,  "context": False},
    "context":     {"rope": True,  "qk-norm": True,  "context": True},
    # the neighbours; departure: DiT also learns the variance of its ancestral sampler, this one takes the posterior's
    "dit": {**DIT, "pred": "e", "loss": "e", "path": "ddpm-linear", "times": "uniform", "sampling": {"solver": "ddpm", "steps": 250}},
    "sd3": {**DIT, "pred": "v", "loss": "v", "path": "linear", "p-mean": 0.0, "p-std": 1.0},
}


def parse_args(argv=None):
    """Flags given -> {name: value}, only those given.  Wrong ones end the script with one line and exit code 2."""
    parser, page = argparse.ArgumentParser(allow_abbrev=False), ["usage: 03_train.py [options]     (defaults in brackets; the preset comes before them)"]
    for title, rows in SETTINGS.items():
        entries = []
        for name, (default, kind, text) in rows.items():
            if kind is bool:
                parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction if default is not False else "store_true", default=argparse.SUPPRESS)
            else:
                parser.add_argument(f"--{name}", **({"choices": kind} if isinstance(kind, tuple) else {"type": kind}), default=argparse.SUPPRESS)
            value = "" if kind is bool else " " + ("|".join(kind) if isinstance(kind, tuple) else "NAME" if kind is str else "N")
            shown = "" if default in (AUTO, "") or isinstance(default, bool) else f" [{default}]"
            entries.append(f"--{'[no-]' if kind is bool and default is not False else ''}{name}{value}{shown}{': ' if text else ''}{text}")
        page += ["", title, *textwrap.wrap(";  ".join(entries), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)]
    parser.format_help = lambda: "\n".join(page) + "\n"
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)", 2))
    return {name.replace("_", "-"): value for name, value in vars(parser.parse_args(argv)).items()}


def fail(message, code=1):
    """Print one line on stderr (the first process of every machine only) and return the exit code: 1 failure, 2 wrong usage."""
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: error: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr)
    return code


class UsageError(ValueError):
    """A wrong flag or value: exit code 2."""


def resolve(given):
    """Flags given -> all settings: defaults, then preset, then experiment, then flags.  Raises UsageError."""
    for table, name in ((PRESETS, given.get("preset", "shapes")), (EXPERIMENTS, given.get("experiment", ""))):
        if name and name not in table:
            raise UsageError(f"{name!r} is unknown: one of {', '.join(table)}")
    layers = [{name: row[0] for name, row in TABLE.items()}, {"sampling": {}}, PRESETS[given.get("preset", "shapes")],
              EXPERIMENTS.get(given.get("experiment", ""), {}), given]
    s = {name: value for layer in layers for name, value in layer.items()}
    if "epochs" in given and "steps" not in given:
        s["steps"] = AUTO
    s["run"] = s["run"] or "-".join(filter(None, (s["preset"], s["experiment"])))
    for name in ("steps", "epochs", "batch-size", "micro-batch", "depth", "log-every", "max-skipped", "lr", "shift", "p-std"):
        if s[name] is not AUTO and not s[name] > 0:
            raise UsageError(f"--{name} {s[name]}: give a number above 0")
    for name in ("seed", "warmup", "save-every", "preview-every", "snapshots", "aux-weight", "weight-decay", "save-minutes"):
        if s[name] is not AUTO and not s[name] >= 0:
            raise UsageError(f"--{name} {s[name]}: give a number from 0 on")
    if not 0 <= s["label-drop"] < 1:
        raise UsageError(f"--label-drop {s['label-drop']}: give a number from 0 to below 1")
    try:
        decays = [float(d) for d in str(s["ema"]).split(",")]
    except ValueError:
        decays = [-1.0]
    if not all(0 <= d < 1 for d in decays):
        raise UsageError(f"--ema {s['ema']}: give decays from 0 to below 1, separated by commas")
    return s


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C while torch is imported: no traceback
    GIVEN = parse_args()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

data, model = import_module("01_data"), import_module("02_model")          # names that begin with a digit cannot follow `import`
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
BINS = 5                                                  # the log splits the loss into so many equal ranges of t


# ---------------------------------------------------------------------------------------------------------------------
# The loss: everything chance decides about a micro-batch, then prediction against truth     (JiT Algorithm 1, eq. 6)
# ---------------------------------------------------------------------------------------------------------------------

def seed_everything(*key):
    """Make all of torch's random numbers a function of these integers: here (seed, step, slot)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def sample_times(n, s, device):
    """t (n,) in (0,1): logit-normal or uniform, then the shift.     (JiT section 3.1; SD3 eq. 19 and 23)"""
    if s["times"] == "uniform":
        t = torch.rand(n, device=device)
    else:
        t = torch.sigmoid(torch.randn(n, device=device) * s["p-std"] + s["p-mean"])
    return model.shift_time(t, s["shift"])


def draw(images, labels, s, config):
    """Pixels (B,H,W,C) uint8 and labels (B,) -> the batch a network sees: x, e, t, y and, for rotation, turns.

    x: (B,C,H,W) in [-1,1], mirrored by chance.  e: noise, std k.  t: (B,) times.  y: labels, some replaced by the null
    class.  departure: the code of document 000 rotates only the input of a second pass; we follow its text, in which the
    diffusion loss is taken on the rotated images too.
    """
    B, device = len(images), images.device
    if s["flip"]:
        images = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, images.flip(2), images)
    # subtle: without contiguous() x keeps the strides of NHWC, and so does its noise, drawn ten times slower on a CPU
    x = images.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)                        # B C H W
    turns = torch.zeros(B, dtype=torch.long, device=device)
    if config.aux == "rotation":
        turns = torch.randint(4, (B,), device=device)
        x = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])[turns, torch.arange(B, device=device)]
    y = torch.where(torch.rand(B, device=device) < s["label-drop"], config.num_classes, labels)
    return {"x": x, "y": y, "turns": turns, "t": sample_times(B, s, device), "e": torch.randn_like(x).mul_(config.noise_scale)}


def diffusion_loss(out, batch, config, *spaces):
    """Squared error per image, one (B,) for each of the spaces "x", "e", "v" asked for, in fp32.     (JiT eq. 6, Table 1)

    Prediction and truth go through the same affine map (02_model.conversion), so their difference is only scaled by it:
    a perfect prediction has loss zero at every t, and the space of the loss is a weight over t.
    """
    truth = batch[config.pred] if config.pred != "v" else model.velocity_target(config.path, batch["x"], batch["e"], batch["t"])
    error = F.mse_loss(out.float(), truth, reduction="none").flatten(1).mean(dim=1)                # B
    return [model.conversion(config.pred, space, batch["t"], config.path)[0]**2 * error for space in spaces]


def training_loss(net, batch, s, config, autocast):
    """Forward pass of one micro-batch -> (loss to differentiate, v-space loss per image (B,), auxiliary loss)."""
    with autocast:
        out = net(model.mix(config.path, batch["x"], batch["e"], batch["t"]), batch["t"], batch["y"], with_aux=config.aux != "none")
    out, answer = out if config.aux != "none" else (out, None)
    loss, v_loss = diffusion_loss(out, batch, config, s["loss"], "v")
    aux = model.AUX_HEADS[config.aux].loss(answer, batch) if answer is not None else torch.zeros((), device=loss.device)
    return loss.mean() + s["aux-weight"] * aux, v_loss.detach(), aux.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Feeding: which images belong to which step, and how they get onto the device
# ---------------------------------------------------------------------------------------------------------------------

class Feed:
    """Micro-batches as uint8 on the device.  Small sets live there; large ones are read ahead from the memory map."""
    RESIDENT = 4 << 30                                    # bytes

    def __init__(self, images, labels, s, device):
        self.images, self.labels, self.seed, self.batch, self.device = images, labels, s["seed"], s["batch-size"], device
        self.resident = torch.from_numpy(np.array(images)).to(device) if images.nbytes <= self.RESIDENT else None
        self.orders, self.pool = {}, ThreadPoolExecutor(4)

    def indices(self, step, slot, micro):
        """Places in the data set of one slot: epoch after epoch without a gap, each in an order of (seed, epoch)."""
        places, n = np.arange(micro) + step * self.batch + slot * micro, len(self.images)
        known, epochs = self.orders, np.unique(places // n).tolist()
        orders = {e: known[e] if e in known else np.random.default_rng((self.seed, 3, e)).permutation(n) for e in epochs}
        self.orders = {e: order for e, order in known.items() if e >= epochs[0] - 1} | orders      # subtle: a new dict, four threads read it
        return np.array([orders[p // n][p % n] for p in places])

    def load(self, step, slot, micro):
        """(images (B,H,W,C) uint8, labels (B,) int64), both on the device."""
        chosen = self.indices(step, slot, micro)
        labels = torch.from_numpy(self.labels[chosen]).to(self.device)
        if self.resident is not None:
            return self.resident[torch.from_numpy(chosen).to(self.device)], labels
        images = torch.from_numpy(np.ascontiguousarray(self.images[chosen]))
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        return images, labels

    def run(self, work, micro):
        """Yield load(step, slot) for each (step, slot) of an iterator, four ahead of the one in use."""
        if self.resident is not None:
            for step, slot in work:
                yield self.load(step, slot, micro)
            return
        ahead = []
        for step, slot in work:
            ahead.append(self.pool.submit(self.load, step, slot, micro))
            if len(ahead) > 4:
                yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer: network, optimizer, averaged weights, and the state that a checkpoint holds
# ---------------------------------------------------------------------------------------------------------------------

class Trainer:
    """Everything that changes during training.  state() lists it all; load() puts it back."""

    def __init__(self, s, config, device, world):
        self.s, self.config, self.device, self.world = s, config, device, world
        seed_everything(s["seed"])
        self.net = model.JiT(config).to(device)
        self.net.checkpointing = s["checkpointing"]
        self.net.plain_attention(s["attention"] == "plain")
        if s["freeze-patch-embed"]:
            self.net.x_embedder.requires_grad_(False)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.decays = [float(d) for d in str(s["ema"]).split(",")]
        self.ema = [{name: value.detach().clone() for name, value in self.net.state_dict().items()} for _ in self.decays]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=s["weight-decay"], fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s["amp"] == "fp16")
        self.autocast = torch.autocast(device.type, PRECISION[s["amp"]], enabled=s["amp"] != "off")
        self.forward = torch.compile(self.net) if s["compile"] else self.net
        if dist.is_initialized():
            DDP = torch.nn.parallel.DistributedDataParallel
            sync = "forward_sync_buffers" if "forward_sync_buffers" in signature(DDP).parameters else "broadcast_buffers"   # renamed in torch 2.13
            self.forward = DDP(self.forward, device_ids=[device.index] if device.type == "cuda" else None, **{sync: False})
        self.step, self.skipped, self.bad = 0, 0, 0       # steps done; non-finite ones so far; and in a row
        self.sums = torch.zeros(2 * BINS + 4, dtype=torch.float64, device=device)       # since the last line of the log

    def lr(self, step):
        """Warm-up, then constant or half a cosine down to zero."""
        s = self.s
        rate = s["lr"] * min(1.0, (step + 1) / max(1, s["warmup"]))
        return rate * 0.5 * (1 + math.cos(math.pi * step / s["steps"])) if s["schedule"] == "cosine" else rate

    def train_step(self, batches):
        """One optimizer step over this process's share of the global batch; batches yields (slot, images, labels)."""
        s = self.s
        share = s["batch-size"] // s["micro-batch"] // self.world
        self.optimizer.zero_grad(set_to_none=True)
        for k, (slot, images, labels) in enumerate(batches):
            seed_everything(s["seed"], self.step, slot)
            batch = draw(images, labels, s, self.config)
            last = k == share - 1                         # gradients are summed over processes once, with the last micro-batch
            with nullcontext() if last or self.world == 1 else self.forward.no_sync():
                loss, v_loss, aux = training_loss(self.forward, batch, s, self.config, self.autocast)
                self.scaler.scale(loss / share).backward()
            self.collect(v_loss, batch["t"], aux)
        self.scaler.unscale_(self.optimizer)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])))
        finite = math.isfinite(norm.item())               # the same on every process: gradients are summed by now
        self.bad = 0 if finite else self.bad + 1
        self.skipped += not finite
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        if finite:
            self.scaler.step(self.optimizer)
            self.update_ema()
            self.sums[-2:] += torch.stack([norm.double(), torch.ones_like(norm, dtype=torch.float64)])
        self.scaler.update()
        self.step += 1

    @torch.no_grad()
    def update_ema(self):
        """ema += (1 - decay) (weights - ema), all tensors in one call.  Every weight is averaged, also biases and norms."""
        weights = list(self.net.state_dict().values())
        for decay, average in zip(self.decays, self.ema):
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)

    def collect(self, v_loss, t, aux):
        """Add to the sums of the log: v-loss and count in each range of t, auxiliary loss and its count."""
        place = (t * BINS).long().clamp(0, BINS - 1)
        good = torch.isfinite(v_loss)
        self.sums.index_add_(0, place, torch.where(good, v_loss, 0).double())
        self.sums.index_add_(0, place + BINS, good.double())
        self.sums[2 * BINS:2 * BINS + 2] += torch.stack([aux.double(), torch.ones_like(aux, dtype=torch.float64)])

    def state(self):
        """All that resuming needs and all that sampling needs: tensors and plain Python values."""
        s = {k: v for k, v in self.s.items() if k not in ("resume", "overwrite", "benchmark")}
        info = {"step": self.step, "images": self.step * s["batch-size"], "decays": self.decays, "classes": s["classes"],
                "data": s["data"], "preset": s["preset"], "experiment": s["experiment"], "sampling": {"shift": s["shift"], **s["sampling"]}}
        return {"config": asdict(self.config), "info": info, "settings": s, "model": self.net.state_dict(), "ema": self.ema,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "sums": self.sums.cpu(),
                "skipped": self.skipped, "bad": self.bad}

    def load(self, state):
        """The inverse of state()."""
        self.net.load_state_dict(state["model"])
        for average, saved in zip(self.ema, state["ema"]):
            for name in average:
                average[name].copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                               # empty unless the run was an fp16 one up to here
            self.scaler.load_state_dict(state["scaler"])
        self.sums.copy_(state["sums"])
        self.step, self.skipped, self.bad = state["info"]["step"], state["skipped"], state["bad"]

    @torch.no_grad()
    def predict(self, z, t, y):
        """Clean images predicted by the first set of averaged weights, without touching the weights in training."""
        self.net.eval()
        with self.autocast:
            out = torch.func.functional_call(self.net, self.ema[0], (z, t, y))
        self.net.train()
        return model.convert(out, self.config.pred, "x", z, t, self.config.path)


def save(state, path):
    """Write beside, then move there: the old file is whole until the new one is.  Raises ValueError when the disk is full."""
    part = path.with_name(path.name + ".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:              # subtle: torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path} ({str(error).splitlines()[0][:100]}); what was there is intact: make room, then --resume") from None


# ---------------------------------------------------------------------------------------------------------------------
# Seeing: held-out loss, the picture of what the network predicts, the log
# ---------------------------------------------------------------------------------------------------------------------

def held_out(trainer, images, labels):
    """v-space loss of the averaged weights on fixed held-out images, times and noise: comparable between all steps and runs.

    The times are quantiles of the paper's logit-normal (-0.8, 0.8), whatever the run itself draws.
    """
    generator, n, total = torch.Generator().manual_seed(0), len(images), 0.0
    t_all = torch.sigmoid(torch.special.ndtri((torch.arange(n) + 0.5) / n) * 0.8 - 0.8)
    for i in range(0, n, 64):
        x = torch.from_numpy(np.array(images[i:i + 64])).permute(0, 3, 1, 2).float() / 127.5 - 1
        e = torch.randn(x.shape, generator=generator) * trainer.config.noise_scale
        x, e, t = x.to(trainer.device), e.to(trainer.device), t_all[i:i + 64].to(trainer.device)
        y = torch.from_numpy(labels[i:i + 64]).to(trainer.device)
        z = model.mix(trainer.config.path, x, e, t)
        error = (trainer.predict(z, t, y) - x).square().mean(dim=(1, 2, 3))
        total += float((model.conversion("x", "v", t, trainer.config.path)[0]**2 * error).sum())
    return total / n


def preview(trainer, images, labels, path):
    """A picture, two rows for each of four images, clean in front: noised at five times, and what the network makes of it."""
    times, cells = (0.1, 0.3, 0.5, 0.7, 0.9), []
    generator = torch.Generator().manual_seed(1)
    for i in range(min(4, len(images))):
        x = torch.from_numpy(np.array(images[i:i + 1])).permute(0, 3, 1, 2).float() / 127.5 - 1
        e = torch.randn(x.shape, generator=generator) * trainer.config.noise_scale
        x, e, t = x.to(trainer.device).repeat(5, 1, 1, 1), e.to(trainer.device).repeat(5, 1, 1, 1), torch.tensor(times, device=trainer.device)
        y = torch.from_numpy(labels[i:i + 1]).to(trainer.device).repeat(5)
        z = model.mix(trainer.config.path, x, e, t)
        cells += [[x[0]] + list(z), [x[0]] + list(trainer.predict(z, t, y))]
    part = path.with_name(path.name + ".part")
    model.picture(cells, ["clean", *(f"t = {t}" for t in times)]).save(part, "png")
    os.replace(part, path)


class Log:
    """log.csv, one line every log-every steps, written by the first process; TensorBoard too where it is installed.

    Losses are means since the line before, in v-space whatever --loss is; loss_t0.2 is that of 0.2 <= t < 0.4.
    """
    COLUMNS = ["step", "images", "loss", *(f"loss_t{k / BINS:.1f}" for k in range(BINS)), "aux", "grad_norm", "lr", "held_out",
               "skipped", "images_per_s", "memory_MiB", "utilisation"]

    def __init__(self, folder, start):
        self.path, self.board = folder / "log.csv", None
        rows = list(csv.DictReader(self.path.open())) if self.path.exists() else []
        part = self.path.with_name("log.csv.part")        # lines after the checkpoint will be written again
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["step"] and int(row["step"]) <= start)
        os.replace(part, self.path)
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "tensorboard", purge_step=start)

    def write(self, row):
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for name, value in row.items() if self.board else ():
            if value != "":
                self.board.add_scalar(name, float(value), row["step"])


def log_row(trainer, images_per_s):
    """Take the sums since the last line, over all processes, and turn them into a line of the log."""
    sums = trainer.sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    trainer.sums.zero_()
    sums = sums.tolist()
    losses, counts = sums[:BINS], sums[BINS:2 * BINS]
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:                                                 # subtle: in KiB on Linux, in bytes on macOS
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"step": trainer.step, "images": trainer.step * trainer.s["batch-size"], "loss": sum(losses) / max(1, sum(counts)),
            **{f"loss_t{k / BINS:.1f}": losses[k] / counts[k] if counts[k] else "" for k in range(BINS)},
            "aux": sums[2 * BINS] / max(1, sums[2 * BINS + 1]), "grad_norm": sums[-2] / max(1, sums[-1]), "lr": trainer.lr(trainer.step - 1),
            "skipped": trainer.skipped, "images_per_s": round(images_per_s, 1), "memory_MiB": round(memory)}


# ---------------------------------------------------------------------------------------------------------------------
# From settings to a run
# ---------------------------------------------------------------------------------------------------------------------

def folder_of(name, parent):
    """A bare name means parent/name, anything with a slash is taken as it is."""
    return Path(name) if "/" in str(name) else Path(parent) / name


def complete(s, meta, device, world):
    """Fill in what depends on data and hardware, and check that the numbers fit together.  Returns JiTConfig.  Raises UsageError."""
    if s["model"] not in model.MODELS:
        raise UsageError(f"--model {s['model']} is unknown: one of {', '.join(model.MODELS)}")
    base = dict(model.MODELS[s["model"]])
    if meta:
        base.update(image_size=meta["size"], num_classes=len(meta["classes"]))
    base["noise_scale"] = max(1.0, base["image_size"] / 256)
    if s["unconditional"]:
        base["num_classes"] = 0
    if not s["context"]:
        base["in_context_len"] = 0
    names = {field.name.replace("_", "-"): field.name for field in fields(model.JiTConfig)}
    base.update({field: s[name] for name, field in names.items() if s.get(name) is not AUTO and name in s})
    try:
        config = model.JiTConfig(**base)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if s["micro-batch"] is AUTO:                          # the largest that divides every process's share, 128 images at most
        share = min(s["batch-size"] // world, 128)
        s["micro-batch"] = next((m for m in range(share, 0, -1) if s["batch-size"] % (m * world) == 0), 1)
    unit = s["micro-batch"] * world
    if s["batch-size"] % unit:
        low = s["batch-size"] // unit * unit
        raise UsageError(f"--batch-size {s['batch-size']} is no multiple of {s['micro-batch']} images x {world} processes; nearest: "
                         f"{f'{low} or ' if low else ''}{low + unit}, or pass another --micro-batch")
    count = meta["counts"]["train"] if meta else 10**6
    s["steps"] = s["steps"] or max(1, round(s["epochs"] * count / s["batch-size"]))
    s["warmup"] = s["warmup"] if s["warmup"] is not AUTO else min(round(5 * count / s["batch-size"]), s["steps"] // 20)
    s["lr"] = s["lr"] or 5e-5 * s["batch-size"] / 256
    s["amp"] = s["amp"] or ("bf16" if model.bf16_is_fast(device) else "off")
    s["compile"] = s["compile"] if s["compile"] is not AUTO else device.type == "cuda"
    s["classes"] = meta["classes"] if meta else []
    return config


def check_labels(labels, config, name):
    """Labels are checked here, in words, before a kernel meets one that is out of range.  Raises ValueError."""
    if config.num_classes and len(labels) and not 0 <= labels.min() <= labels.max() < config.num_classes:
        raise ValueError(f"{name}: labels go from {labels.min()} to {labels.max()}, the network has classes 0 to {config.num_classes - 1}")
    return labels if config.num_classes else np.zeros_like(labels)


def previous(given, folder):
    """The checkpoint to resume from, checked against the flags given.  Raises ValueError."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"--resume: there is no {path}; leave --resume out to start this run")
    state = model.read_checkpoint(path)
    if "settings" not in state:
        raise ValueError(f"--resume: {path} holds weights to sample from, but not the state of a training run")
    for name, value in given.items():
        if name not in AMENDABLE and state["settings"].get(name) != value:
            raise ValueError(f"--resume: the run was started with --{name} {state['settings'].get(name)}, not {value}")
    return state


def agree(stop, device):
    """The signal to stop at, or None; all processes learn of it at the same step."""
    if dist.is_initialized():
        flag = torch.tensor([float(max(stop, default=0))], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = [int(flag.item())] if flag.item() else []
    return signal.Signals(stop[0]) if stop else None


class Keeper:
    """What the first process writes down between steps: log, preview, snapshots, checkpoint."""

    def __init__(self, trainer, folder, shown, first):
        self.trainer, self.folder, self.shown, s = trainer, folder, shown, trainer.s
        for name in ("snapshots", "preview"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if first == 0:
            for old in (folder / "checkpoint.pt", folder / "log.csv", *folder.glob("snapshots/[0-9]*.pt"), *folder.glob("preview/[0-9]*.png")):
                old.unlink(missing_ok=True)
        data.write_json(folder / "config.json", {"settings": s, "config": asdict(trainer.config)})
        self.log, self.flops = Log(folder, first), 6 * model.count_macs(trainer.config)     # 2 a multiply-add, forward and twice that backward
        self.rate = model.matmul_rate(trainer.device, PRECISION[s["amp"]], quick=True)
        self.marks = {round(s["steps"] * (k + 1) / s["snapshots"]) for k in range(s["snapshots"])}
        self.saved_at = time.perf_counter()

    def line(self, row):
        """One line of the log, every tenth with the held-out loss."""
        s, step = self.trainer.s, self.trainer.step
        row["utilisation"] = round(row["images_per_s"] * self.flops / self.rate / self.trainer.world, 3)
        seen = (step // s["log-every"]) % 10 == 0 or step == s["steps"]
        self.log.write({**row, "held_out": held_out(self.trainer, *self.shown) if seen else ""})

    def files(self, stop):
        """Whatever is due after this step."""
        trainer, s, done = self.trainer, self.trainer.s, self.trainer.step == self.trainer.s["steps"]
        if done or (s["preview-every"] and trainer.step % s["preview-every"] == 0):
            preview(trainer, *self.shown, self.folder / "preview" / f"{trainer.step:07d}.png")
        if trainer.step in self.marks:
            save({k: v for k, v in trainer.state().items() if k in ("config", "info", "ema")}, self.folder / "snapshots" / f"{trainer.step:07d}.pt")
        due = s["save-every"] and trainer.step % s["save-every"] == 0
        if done or stop or due or time.perf_counter() - self.saved_at > 60 * s["save-minutes"]:
            save(trainer.state(), self.folder / "checkpoint.pt")
            self.saved_at = time.perf_counter()


def train(trainer, arrays, folder, rank):
    """The loop.  Returns the exit code.  Raises ValueError when too many steps in a row are not finite."""
    s, stop, (images, labels) = trainer.s, [], arrays["train"]
    labels = check_labels(labels, trainer.config, s["data"])
    shown = arrays["val"] if len(arrays["val"][1]) else arrays["train"]                            # nothing held out: training images
    some = np.random.default_rng(0).permutation(len(shown[1]))[:256]                               # subtle: they lie sorted by class
    shown = np.array(shown[0][some]), check_labels(shown[1], trainer.config, s["data"])[some]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    keeper, first = None, trainer.step
    slots = range(rank, s["batch-size"] // s["micro-batch"], trainer.world)
    loader = Feed(images, labels, s, trainer.device).run(((step, slot) for step in range(trainer.step, s["steps"]) for slot in slots), s["micro-batch"])
    bar = tqdm(total=s["steps"], initial=trainer.step, desc=folder.name, unit=" steps", disable=None if rank == 0 else True)
    lap, lap_step = time.perf_counter(), trainer.step
    while trainer.step < s["steps"]:
        trainer.train_step((slot, *next(loader)) for slot in slots)
        bar.update()
        if rank == 0 and keeper is None:                  # only now, when a step has succeeded, is an old run replaced
            keeper = Keeper(trainer, folder, shown, first)
        if trainer.bad >= s["max-skipped"]:
            kept = f"; the last good checkpoint is {folder / 'checkpoint.pt'}" if (folder / "checkpoint.pt").exists() else ""
            raise ValueError(f"{trainer.bad} steps in a row had a non-finite gradient, the last is step {trainer.step}: --resume with a lower --lr, or with --amp bf16{kept}")
        signalled, done = agree(stop, trainer.device), trainer.step == s["steps"]
        if trainer.step % s["log-every"] == 0 or done:
            row = log_row(trainer, (trainer.step - lap_step) * s["batch-size"] / (time.perf_counter() - lap))
            bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{row['images_per_s']:.0f}")
            if keeper:
                keeper.line(row)
            lap, lap_step = time.perf_counter(), trainer.step
        if keeper:
            keeper.files(signalled)
        if signalled and not done:
            bar.close()
            return fail(f"stopped by {signalled.name} at step {trainer.step}, saved; go on with --resume", 128 + signalled)
    bar.close()
    return 0


def benchmark(trainer, rank):
    """Time training steps on random images; print images/s, ms, peak memory and utilisation of the matrix product's rate."""
    s, config, device = trainer.s, trainer.config, trainer.device
    share = s["batch-size"] // s["micro-batch"] // trainer.world
    images = torch.randint(0, 256, (s["micro-batch"], config.image_size, config.image_size, 3), dtype=torch.uint8, device=device)
    labels = torch.zeros(s["micro-batch"], dtype=torch.long, device=device)
    rate, times = model.matmul_rate(device, PRECISION[s["amp"]]), []
    while not agree([1] * (len(times) >= 5 and (sum(times) >= 10 or len(times) >= 50)), device):      # all processes stop at the same step
        start = time.perf_counter()
        trainer.train_step((k, images, labels) for k in range(share))           # reads the gradient norm: synchronises
        if device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.step > 3:
            times.append(time.perf_counter() - start)
    step = sorted(times)[len(times) // 2]
    row, used = log_row(trainer, s["batch-size"] / step), 6 * model.count_macs(config) * s["batch-size"] / step / rate / trainer.world
    if rank:
        return 0
    print(f"{s['model']} {config.image_size} px, {s['amp']}, {'compiled' if s['compile'] else 'eager'}, attention {s['attention']}, "
          f"{'recomputed, ' if s['checkpointing'] else ''}batch {s['batch-size']} in micro-batches of {s['micro-batch']}, {trainer.world} process(es) on "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}\n"
          f"{s['batch-size'] / step:.1f} images/s, {step * 1e3:.1f} ms per step (median of {len(times)}), peak memory {row['memory_MiB']} MiB, "
          f"matrix product {rate / 1e12:.3f} TFLOP/s, utilisation {used * 100:.1f} %")
    return 0


def start(given, device, rank, world):
    """Settings, data, trainer; then train or benchmark.  Returns the exit code."""
    s = resolve(given)
    folder = folder_of(s["run"], "runs")
    if s["benchmark"]:
        trainer = Trainer(s, complete(s, None, device, world), device, world)
        return benchmark(trainer, rank)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):                            # torchrun --max-restarts brought us back
        s["resume"], s["overwrite"] = (folder / "checkpoint.pt").exists(), True
    state = previous(given, folder) if s["resume"] else None
    if state:
        s = {**s, **state["settings"], **{k: v for k, v in given.items() if k in AMENDABLE}}
        if "epochs" in given and "steps" not in given:
            s["steps"] = AUTO
    elif any((folder / name).exists() for name in ("config.json", "checkpoint.pt", "log.csv")) and not s["overwrite"]:
        return taken(folder, given)
    meta, arrays = data.open_data(folder_of(s["data"], "data"))
    trainer = Trainer(s, complete(s, meta, device, world), device, world)
    if state and (trainer.config.image_size, s["classes"]) != (state["config"]["image_size"], state["settings"]["classes"]):
        raise ValueError(f"--resume: data set {s['data']} has other classes or another image size than when this run was started")
    if state:
        trainer.load(state)
        if trainer.step > s["steps"]:
            raise UsageError(f"--resume: the run is at step {trainer.step} already: pass --steps above it")
        if trainer.step == s["steps"]:
            return finished(folder, trainer.step) if rank == 0 else 0
    if rank == 0:
        print(f"{folder}: {s['model']} with {model.count_parameters(trainer.net):,} parameters on {meta['counts']['train']} images; step "
              f"{trainer.step} to {s['steps']}, batch {s['batch-size']}, lr {s['lr']:.2g}, {s['amp']}, {device}; all settings in config.json")
    code = train(trainer, arrays, folder, rank)
    if rank == 0 and not code:
        flag = "" if folder == Path("runs/shapes") else f" --run {s['run']}"
        print(f"{folder / 'checkpoint.pt'} after step {trainer.step}; look at {folder / 'preview'}, then run 04_sample.py{flag}")
    return code


def taken(folder, given):
    """What to say when the run's folder is in use: finished with these flags, unfinished, or another run."""
    state = model.read_checkpoint(folder / "checkpoint.pt") if (folder / "checkpoint.pt").exists() else None
    if not state:
        return fail(f"{folder} holds a run that never saved a checkpoint: pass --overwrite to start it again, or --run NAME")
    if "settings" not in state:
        return fail(f"{folder / 'checkpoint.pt'} was not written by this script: pass --run NAME, or --overwrite to replace it")
    step, steps, wanted = state["info"]["step"], state["settings"]["steps"], resolve(given)
    if step < steps:
        return fail(f"{folder} holds an unfinished run (step {step} of {steps}): pass --resume to go on, --overwrite to start again, or --run NAME")
    unset = {k for k in ("lr", "warmup", "amp") if wanted[k] is AUTO}                   # worked out when the run was started
    other = [k for k in wanted if k not in {*FREE, *unset, "sampling"} and wanted[k] != state["settings"].get(k)]
    if other:
        return fail(f"{folder} holds a finished run with other settings (--{other[0]} {state['settings'].get(other[0])}, now {wanted[other[0]]}): "
                    "pass --run NAME for a new one, or --overwrite")
    if wanted["steps"] is not AUTO and wanted["steps"] != step:
        return fail(f"{folder} holds a finished run of {step} steps, now {wanted['steps']}: pass --resume --steps {wanted['steps']} to train longer, "
                    "--overwrite to start again, or --run NAME")
    return finished(folder, step)


def finished(folder, step):
    """Say that there is nothing to do.  Returns the exit code."""
    print(f"{folder} is finished (step {step}); nothing to do. Train longer with --resume --steps N, anew with --overwrite")
    return 0


def main(given):
    """Set up the processes, run, and turn expected errors into one line and an exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = model.pick_device(given.get("device"))
    except ValueError as error:
        return fail(str(error), 2)
    model.keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))     # a big checkpoint takes its time
        return start(given, device, rank, world)
    except UsageError as error:
        return fail(str(error), 2)
    except (ValueError, OSError) as error:
        return fail(str(error))
    except torch.cuda.OutOfMemoryError:
        return fail("out of GPU memory: pass a smaller --micro-batch (the batch stays), or --checkpointing")
    except torch._dynamo.exc.TorchDynamoException as error:
        return fail(f"torch.compile failed ({str(error).strip().splitlines()[0][:120]}): pass --no-compile")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(GIVEN))
