"""03_train.py -- training: noise an image, let the network predict it, weigh the error as an error of velocity

What this stage teaches: the JiT loss, and around it what a real run needs: mixed precision, any number of GPUs,
gradient accumulation, averaged weights (EMA), checkpoints that survive a kill, a log in which trouble shows early.
Reads data/<name>/.   Writes runs/<name>/: config.json, log.csv, loss.png, checkpoint.pt, snapshots/, preview/
Run it:   python 03_train.py                     the shapes preset, five minutes on two CPU cores
          torchrun --nproc_per_node 8 -- 03_train.py --preset imagenet-B       the same model on 8 GPUs as on one
Stopped or killed, the same command goes on from the last checkpoint (written when stopped, after the first minute and
then every five); --resume goes on with other steps, epochs, lr or amp.

One step, in the letters of 02_model.py (t = 0 noise, t = 1 data; JiT Algorithm 1):
    t = sigmoid(N(p_mean, p_std^2)),  e ~ N(0, k^2),  z = t x + (1-t) e        draw a time, mix image and noise
    x_pred = net(z, t, y)                                                      one in ten labels replaced by "no class"
    v_pred = (x_pred - z) / max(1-t, 0.05),  v = (x - z) / max(1-t, 0.05)      the same clamp for prediction and target
    loss = mean over pixels of (v_pred - v)^2
All randomness is a function of (seed, step, micro-batch), whoever computes it.  So a resumed run repeats what an
undisturbed one does (bit for bit on a CPU; a GPU's sums vary in the last digits) and, at the same --micro-batch, two
processes train the same model as one.
"""
import csv
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

data, model = import_module("01_data"), import_module("02_model")
option = data.option

# ---- The loss: everything chance decides about a micro-batch, then prediction against truth ------- (JiT Algorithm 1)
def seed_everything(*key):
    """Make all of torch's random numbers a function of these integers: here (seed, step, micro-batch)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def sample_times(n, options, device):
    """t (n,) in (0,1): logit-normal or uniform, then the shift.               (JiT section 3.1; SD3 eq. 19 and 23)"""
    if options.times == "uniform":
        t = torch.rand(n, device=device)
    else:
        t = torch.sigmoid(torch.randn(n, device=device) * options.p_std + options.p_mean)
    return model.shift_time(t, options.shift)

def draw(images, labels, options, config):
    """Pixels uint8 or latents (B,H,W,C), and labels (B,) -> the batch a network sees: x, e, t, y; for rotation, turns.

    x: (B,C,H,W), pixels in [-1,1] and mirrored by chance.  e: noise, std k.  t: (B,).  y: labels, some replaced by the
    null class.  departure: Improved JiT's code rotates only the input of a second pass; we follow its text, in which
    the diffusion loss is taken on the rotated images too.
    """
    B, device = len(images), images.device
    if options.flip:
        images = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, images.flip(2), images)
    x, turns = model.to_float(images, device), torch.zeros(B, dtype=torch.long, device=device)     # B C H W, B
    if config.aux == "rotation":                          # variant: Improved JiT
        turns = torch.randint(4, (B,), device=device)
        x = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])[turns, torch.arange(B, device=device)]
    y = torch.where(torch.rand(B, device=device) < options.label_drop, config.num_classes, labels)
    t = sample_times(B, options, device)
    return {"x": x, "y": y, "turns": turns, "t": t, "e": torch.randn_like(x).mul_(config.noise_scale)}

def diffusion_loss(out, batch, config, *spaces):
    """Mean squared error of each image: a list, one (B,) in fp32 for each of the spaces "x", "e", "v" asked for.

    out: (B,C,H,W), the network's output, a config.pred.  Prediction and truth go through the same affine map
    (02_model.conversion), so their difference is only scaled by it: a perfect prediction has loss zero at every t, and
    the space of the loss is a weight over t.                                                       (JiT eq. 6, Table 1)
    """
    path, t = config.path, batch["t"]
    truth = batch[config.pred] if config.pred != "v" else model.velocity_target(path, batch["x"], batch["e"], t)
    # by the book: convert both, square the difference.  With to = u * value + w * z that is
    #     (u out + w z - (u truth + w z))^2  =  u^2 (out - truth)^2:  z drops out, and one error serves every space
    error = F.mse_loss(out.float(), truth, reduction="none").flatten(1).mean(dim=1)                # B
    return [model.conversion(config.pred, space, t, path)[0]**2 * error for space in spaces]

def training_loss(net, batch, options, config, autocast):
    """Forward pass of one micro-batch -> (loss to differentiate, v-space loss per image (B,), auxiliary loss)."""
    z, heads = model.mix(config.path, batch["x"], batch["e"], batch["t"]), config.aux != "none"
    with autocast:
        out = net(z, batch["t"], batch["y"], with_aux=heads)
    out, answer = out if heads else (out, None)           # variant: an auxiliary head
    loss, v_loss = diffusion_loss(out, batch, config, options.loss, "v")
    aux = model.AUX_HEADS[config.aux].loss(answer, batch) if heads else torch.zeros((), device=loss.device)
    return loss.mean() + options.aux_weight * aux, v_loss.detach(), aux.detach()

# ---- The loop and the step: draw, predict, loss, gradient, step, average ---------------------------------------------
BINS, MAX_BAD = 5, 10              # ranges of t that the log keeps apart; non-finite steps in a row that end a run

def train(trainer, feed, recorder):
    """The loop: step after step; recorder writes down what is due.  Raises ValueError when steps stop being finite."""
    while trainer.step < trainer.options.steps:
        start = time.perf_counter()
        trainer.train_step(feed)
        recorder.seconds += time.perf_counter() - start
        if trainer.bad >= MAX_BAD:
            raise ValueError(recorder.advice())
        recorder.after_step()

class Trainer:
    """Network, optimizer, averaged weights: train_step() changes them, state() lists them, load() puts them back."""

    def __init__(self, options, config, device, rank=0, world=1, start=None):
        """start: weights to begin with, those of another run.  Raises ValueError if they do not fit."""
        self.options, self.config, self.device, self.rank, self.world = options, config, device, rank, world
        seed_everything(options.seed)
        self.net = model.build(config)
        if start:
            begin_with(self.net, start)
        self.forward = self.net.to(device)
        coder = model.load_coder(data.folder_of(options.data, "data"), options.coder)
        self.coder, self.teacher = coder and coder.to(device), None
        if options.teacher:                               # variant: REPA
            folder = data.folder_of(options.teacher, "data")
            self.teacher = model.load_coder(folder, model.teacher_of(folder)["coder"]).to(device)
        for part in self.net.modules():                   # a wide head is a network in the network
            part.checkpointing = options.checkpointing
        self.ema = [{k: v.detach().clone() for k, v in self.net.state_dict().items()} for _ in options.ema]
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), fused=True,
                                           weight_decay=options.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self.autocast = model.autocast(options.amp, device)
        if options.compile:
            torch._dynamo.config.optimize_ddp = not options.checkpointing      # older torch cannot do both
            self.forward = torch.compile(self.net)
        if world > 1:
            self.forward = torch.nn.parallel.DistributedDataParallel(self.forward)
        self.step, self.skipped, self.bad = 0, 0, 0       # steps done; non-finite ones so far; and in a row
        # of the log, (sum, count) a row: v-loss in BINS ranges of t, auxiliary loss, gradient norm
        self.sums = torch.zeros(BINS + 2, 2, dtype=torch.float64, device=device)

    def train_step(self, feed):
        """One optimizer step: every micro-batch forward and backward, then AdamW, then the averages.

        feed yields (images, labels), a pair for each of this process's micro-batches, step after step.  Their losses
        count as a mean.  Every step is counted in `step`; one whose gradient is not finite leaves weights and averages
        as they are, and is counted in `skipped`, and in `bad`, those in a row.
        """
        indices = self.indices()
        self.optimizer.zero_grad(set_to_none=True)
        for index in indices:
            with self.summing(last=index == indices[-1]):
                loss = self.loss(index, *next(feed))
                self.scaler.scale(loss / len(indices)).backward()
        self.scaler.unscale_(self.optimizer)
        self.optimizer.param_groups[0]["lr"] = self.lr(self.step)
        if finite := math.isfinite(self.gradient_norm()):  # the same on every process: gradients are averaged
            self.scaler.step(self.optimizer)
            self.update_ema()
        self.scaler.update()
        self.bad, self.skipped, self.step = (0 if finite else self.bad + 1), self.skipped + (not finite), self.step + 1

    def loss(self, index, images, labels):
        """The loss of micro-batch `index` of this step, to differentiate.  What the log keeps is added up here."""
        seed_everything(self.options.seed, self.step, index)
        batch = draw(images, labels, self.options, self.config)
        if self.teacher:                                  # variant: REPA
            batch["features"] = self.teacher.features(batch["x"])
        loss, v_loss, aux = OBJECTIVES[self.options.objective](self.forward, batch, self.options, self.config,
                                                               self.autocast)
        self.add_to_log(v_loss, batch["t"], aux)
        return loss

    def gradient_norm(self):
        """The norm of all gradients taken together, a float; the log gets it if it is finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if math.isfinite(value := norm.item()):
            self.sums[-1] += torch.stack([norm, torch.ones_like(norm)])
        return value

    def summing(self, last):
        """Context of a backward pass: processes average their gradients once a step, with the last micro-batch."""
        return nullcontext() if last or self.world == 1 else self.forward.no_sync()

    @torch.no_grad()
    def update_ema(self):
        """Move every average towards the weights: ema += (1 - decay) (weights - ema).  Biases and norms, too.

        The weights of m steps ago count decay^m: 0.998 averages over about 1 / (1 - 0.998) = 500 steps.
        """
        weights = list(self.net.state_dict().values())
        for decay, average in zip(self.options.ema, self.ema):
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)

    def lr(self, step):
        """Warm-up times the schedule: constant, or half a cosine from 1 at the first step down to 0."""
        rate = self.options.lr * min(1.0, (step + 1) / max(1, self.options.warmup))
        done = step / self.options.steps
        return rate * 0.5 * (1 + math.cos(math.pi * done)) if self.options.schedule == "cosine" else rate

    def indices(self):
        """This process's micro-batches within the global batch."""
        return range(self.rank, self.options.batch_size // self.options.micro_batch, self.world)

    def add_to_log(self, v_loss, t, aux):
        """Add to the sums of the log: v-loss in each range of t, and the auxiliary loss, each with its count."""
        good, row = torch.isfinite(v_loss), (t * BINS).long().clamp(0, BINS - 1)
        self.sums.index_add_(0, row, torch.stack([torch.where(good, v_loss, 0), good], dim=1).double())
        self.sums[BINS] += torch.stack([aux, torch.ones_like(aux)])

    def summed(self):
        """The sums of the log, over all processes."""
        sums = self.sums.clone()
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def state(self):
        """All that resuming and sampling need: tensors and plain Python values.  Processes must call it together."""
        return self.weights() | {"options": asdict(self.options), "model": self.net.state_dict(),
                                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                                 "sums": self.summed().cpu(), "skipped": self.skipped, "bad": self.bad}

    def weights(self):
        """What sampling needs."""
        options = self.options
        info = {"step": self.step, "decays": list(options.ema), "classes": options.classes, "data": options.data,
                "coder": options.coder, "sampling": {"shift": options.shift, **options.sampling}}
        return {"config": asdict(self.config), "info": info, "ema": self.ema}

    def load(self, state):
        """The inverse of state()."""
        self.net.load_state_dict(state["model"])
        for average, saved in zip(self.ema, state["ema"]):
            torch._foreach_copy_([average[k] for k in average], [saved[k].to(self.device) for k in average])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:                               # empty unless the run was an fp16 one up to here
            self.scaler.load_state_dict(state["scaler"])
        if self.rank == 0:                                # they are those of all processes
            self.sums.copy_(state["sums"])
        self.step, self.skipped, self.bad = state["info"]["step"], state["skipped"], state["bad"]

    @torch.no_grad()
    def predict(self, z, t, y):
        """Clean images predicted by the first averaged weights, without touching the weights in training."""
        self.net.eval()
        with self.autocast:
            out = torch.func.functional_call(self.net, self.ema[0], (z, t, y))
        self.net.train()
        return model.convert(out, self.config.pred, "x", z, t, self.config.path)

# ---- One-step generation: a JiT learns where the path will lead ----------- (pMF: Lu et al. 2026, with time reversed)
def average_velocity(net, z, t, r, y, config):
    """u (B,C,H,W) in fp32: the mean of v from t to r >= t, each (B,), along the path through z; at r = t it is v."""
    return model.convert(net(z, torch.stack([t, r], dim=1), y), config.pred, "v", z, t)

def mean_flow_target(u, z, t, r, v, tangent, cap=1.5):
    """v + (r-t) du/dt, the derivative taken along the path, dz/dt = tangent.                          (MeanFlow eq. 6)

    Where u(z, t, r) equals it, (r-t) u is the integral of v: differentiate that by t.  departure: the second term's rms
    is capped; at the solution it is u - v, about the data's std.  subtle: fused attention has no forward derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        _, du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (tangent, torch.ones_like(t)))
    correction = model.expand(r - t, z) * du
    rms = correction.square().flatten(1).mean(dim=1).sqrt()
    return v + correction * model.expand((cap / rms).clamp_max(1.0), z)

def draw_spans(t):
    """Times t (B,) -> (t, r): half have r = t, as JiT; of the rest half end at 1.

    15 % of the rest begin at 0, the others at t moved towards the noise.
    """
    n, chance = len(t) // 2, torch.rand(3, len(t) // 2, device=t.device)
    begin = torch.where(chance[0] < 0.15, 0.0, model.shift_time(t[:n], 2.0))
    end = begin + (1 - begin) * torch.where(chance[1] < 0.5, 1.0, chance[2])
    return torch.cat([begin, t[n:]]), torch.cat([end, t[n:]])

def mean_flow_loss(net, batch, options, config, autocast):
    """training_loss of --objective meanflow: |u - target|^2 over about itself, guidance built into v.    (pMF eq. 9)"""
    batch["t"], r = draw_spans(batch["t"])
    x, e, t, y, n = *(batch[key] for key in "xety"), len(r) // 2
    z = model.mix("linear", x, e, t)
    plain = next(part for part in net.modules() if type(part) in (model.JiT, model.WideHeadJiT, model.Cascade))
    with torch.no_grad():                                 # without DDP and compile, in fp32
        v = model.convert(x, "x", "v", z, t)
        v_null = average_velocity(plain, z, t, t, torch.full_like(y, config.num_classes), config)
        v += model.expand(y != config.num_classes, x) * (options.guidance - 1) * (v - v_null)
        own = average_velocity(plain, z[:n], t[:n], t[:n], y[:n], config)
        v[:n] = mean_flow_target(lambda z, t, r: average_velocity(plain, z, t, r, y[:n], config), z[:n], t[:n], r[:n],
                                 v[:n], own)
    with autocast:
        error = (average_velocity(net, z, t, r, y, config) - v).square().flatten(1).mean(dim=1)
    loss = error / (error.detach() + 0.01)                # MeanFlow's adaptive weight
    return loss.mean(), error.detach(), torch.zeros((), device=x.device)

OBJECTIVES = {"flow": training_loss, "meanflow": mean_flow_loss}

# ---- Feeding: which images belong to which micro-batch, read ahead from the memory map -------------------------------
@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n images."""
    return np.random.default_rng((seed, 3, epoch)).permutation(n)

def image_indices(step, index, n, options):
    """The images of one micro-batch: epoch follows epoch without a gap."""
    places = np.arange(options.micro_batch) + step * options.batch_size + index * options.micro_batch
    return np.concatenate([epoch_order(n, options.seed, epoch)[places[places // n == epoch] % n]
                           for epoch in np.unique(places // n).tolist()])

def read_ahead(images, labels, trainer):
    """Yield (images (B,H,W,C) uint8, labels (B,) int64) on the device, four micro-batches ahead of the one in use."""
    def load(step, index):
        chosen = image_indices(step, index, len(images), trainer.options)
        pair = torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
        return [part.pin_memory() for part in pair] if trainer.device.type == "cuda" else pair
    work = ((step, index) for step in range(trainer.step, trainer.options.steps) for index in trainer.indices())
    with ThreadPoolExecutor(2) as pool:
        ahead = deque(pool.submit(load, *job) for job in islice(work, 4))
        while ahead:
            pair = ahead.popleft().result()
            ahead.extend(pool.submit(load, *job) for job in islice(work, 1))
            yield [part.to(trainer.device, non_blocking=True) for part in pair]

# ---- Watching: held-out loss, preview, log, checkpoint ---------------------------------------------------------------
def watch(trainer, images, labels, t, generator):
    """Noise held-out images at fixed times: (x, z, the averaged network's x_pred), each (B,C,H,W)."""
    x = model.to_float(images)
    e = torch.randn(x.shape, generator=generator) * trainer.config.noise_scale
    x, e, t, y = (value.to(trainer.device) for value in (x, e, t, torch.from_numpy(labels)))
    z = model.mix(trainer.config.path, x, e, t)
    return x, z, trainer.predict(z, t, y)

def held_out_loss(trainer, images, labels):
    """v-space loss of the averaged weights on fixed held-out images, times and noise.

    The times are quantiles of the paper's logit-normal (-0.8, 0.8), whatever the run itself draws: runs on the same
    data, path and noise scale can be compared.
    """
    generator, n, total = torch.Generator().manual_seed(0), len(images), 0.0
    times = torch.sigmoid(torch.special.ndtri((torch.arange(n) + 0.5) / n) * 0.8 - 0.8)
    for part in (slice(i, i + 64) for i in range(0, n, 64)):
        x, _, x_pred = watch(trainer, images[part], labels[part], times[part], generator)
        batch = {"x": x, "t": times[part].to(x.device)}
        total += diffusion_loss(x_pred, batch, replace(trainer.config, pred="x"), "v")[0].sum().item()
    return total / n

def preview(trainer, images, labels):
    """A picture, two rows for each of four images: noised at five times, and what the network makes of it."""
    times, rows, n = (0.1, 0.3, 0.5, 0.7, 0.9), [], min(4, len(images))
    columns = [watch(trainer, images[:n], labels[:n], torch.full((n,), t), torch.Generator().manual_seed(1))
               for t in times]
    clean, *shown = [[model.to_pictures(column[k], trainer.coder) for column in columns] for k in range(3)]
    for i in range(n):
        rows += [[clean[0][i], *(column[i] for column in kind)] for kind in shown]                 # z, x_pred
    return data.picture(rows, ["clean", *(f"t = {t}" for t in times)], ["z", "x_pred"] * n)

class Recorder:
    """What is written down between steps, by the first process: log, pictures, snapshots, checkpoint.

    log.csv has a line every log_every steps.  Losses are means since the line before, in v-space whatever --loss is;
    loss_t0.2 is that of 0.2 <= t < 0.4.  Every tenth line has the held-out loss.  With --objective meanflow the losses
    are |u - target|^2 and not comparable with those of flow.
    """
    COLUMNS = ["step", "images", "loss", *(f"loss_t{k / BINS:.1f}" for k in range(BINS)), "aux", "grad_norm", "lr",
               "held_out", "skipped", "images_per_s", "gpu_MiB"]

    def __init__(self, trainer, folder, arrays):
        self.trainer, self.folder, self.signals, options = trainer, folder, [], trainer.options
        images, labels = arrays["val"] if len(arrays["val"][1]) else arrays["train"]               # nothing held out
        chosen = np.random.default_rng(0).permutation(len(labels))[:256]           # subtle: they lie sorted by class
        self.shown = np.array(images[chosen]), labels[chosen]
        self.seconds, self.lap, self.saved_at = 0.0, trainer.step, time.perf_counter()
        self.wait = min(1, options.save_minutes)          # minutes until the next checkpoint
        self.marks = {round(options.steps * (k + 1) / options.snapshots) for k in range(options.snapshots)}
        self.bar = tqdm(total=options.steps, initial=trainer.step, desc=folder.name, unit=" steps",
                        disable=trainer.rank > 0 or not sys.stderr.isatty())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:                             # as nohup has it
                signal.signal(number, lambda *_: self.signals.append(1))
        if trainer.rank == 0:
            for name in ("snapshots", "preview"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            data.save_json(folder / "config.json", {"options": asdict(options), "config": asdict(trainer.config)})
            self.rows = self.read_log(folder / "log.csv")

    def read_log(self, path):
        """The lines of an earlier start, up to the step of its checkpoint; what is not a line of numbers is dropped."""
        rows, text = [], path.read_text(errors="replace").replace("\0", "") if path.exists() else ""
        for row in csv.DictReader(text.splitlines()):
            row = {name: row.get(name) or "" for name in self.COLUMNS}
            try:
                if int(row["step"]) <= self.trainer.step and [float(value) for value in row.values() if value]:
                    rows.append(row)
            except ValueError:
                continue
        return rows

    def after_step(self):
        """Write whatever is due after this step.  Raises KeyboardInterrupt, with all saved, after a signal to stop."""
        trainer, options, first = self.trainer, self.trainer.options, self.trainer.rank == 0
        done, name = trainer.step == options.steps, f"{trainer.step:07d}"
        self.bar.update()
        if trainer.step % options.log_every == 0 or done:
            self.write_line(trainer.summed().tolist(), done)
        if first and (done or options.preview_every and trainer.step % options.preview_every == 0):
            data.save_picture(self.folder / "preview" / f"{name}.png", preview(trainer, *self.shown))
            if self.rows:
                self.draw_loss()
        if first and trainer.step in self.marks:
            model.save(trainer.weights(), self.folder / "snapshots" / f"{name}.pt")
        due = done or first and time.perf_counter() - self.saved_at > 60 * self.wait
        due, stop = largest([due, len(self.signals)], trainer.world)                   # the same on all processes
        if due or stop:
            state = trainer.state()
            if first:
                model.save(state, self.folder / "checkpoint.pt")
            self.saved_at, self.wait = time.perf_counter(), options.save_minutes
        if done or stop:
            self.bar.close()
        if stop and not done:
            raise KeyboardInterrupt

    def write_line(self, sums, done):
        """One line of the log, on the screen too where no bar is shown."""
        trainer, step, options = self.trainer, self.trainer.step, self.trainer.options
        trainer.sums.zero_()
        speed, self.seconds, self.lap = (step - self.lap) * options.batch_size / self.seconds, 0.0, step
        if trainer.rank:
            return
        means = [total / count if count else "" for total, count in sums]
        loss = sum(total for total, _ in sums[:BINS]) / (sum(count for _, count in sums[:BINS]) or math.nan)
        held_out = held_out_loss(trainer, *self.shown) if done or step // options.log_every % 10 == 0 else ""
        memory = torch.cuda.max_memory_allocated() / 2**20 if trainer.device.type == "cuda" else 0
        row = [step, step * options.batch_size, loss, *means[:BINS], means[BINS] or 0.0, means[-1],
               trainer.lr(step - 1), held_out, trainer.skipped, speed, memory]
        row = (f"{value:.6g}" if isinstance(value, float) else value for value in row)
        self.rows.append(dict(zip(self.COLUMNS, row)))
        with data.whole(self.folder / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
        if self.bar.disable:
            left = (options.steps - step) * options.batch_size / speed / 60
            try:
                print(f"step {step} of {options.steps}, loss {loss:.4f}, {speed:.0f} images/s, {left:.1f} min left",
                      flush=True)
            except BrokenPipeError:                       # nobody reads any more: no reason to stop
                sys.stdout = open(os.devnull, "w")

    def advice(self):
        """What to say when no step is finite any more."""
        options, checkpoint = self.trainer.options, self.folder / "checkpoint.pt"
        other = ", or with --amp bf16" if options.amp == "fp16" else ""
        return (f"{MAX_BAD} steps in a row had a non-finite gradient, the last is step {self.trainer.step}: " +
                (f"{checkpoint} is good; go on with --resume and a lower --lr{other}" if checkpoint.exists() else
                 f"start again with a lower --lr than {options.lr:g}{other}"))

    def draw_loss(self):
        """loss.png: training and held-out loss over the steps."""
        lines = {name: [(int(row["step"]), float(row[name])) for row in self.rows if row[name] not in ("", "nan")]
                 for name in ("loss", "held_out")}
        lines = {name: points for name, points in lines.items() if points}
        data.save_picture(self.folder / "loss.png", data.chart("loss in v-space", "step", lines))

def largest(numbers, world):
    """The largest of the processes' integers, place by place; all of them get it."""
    numbers = torch.tensor([int(number) for number in numbers])
    if world > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()

# ---- Settings: the defaults are the paper's; a preset, an experiment and the flags given override them, in this order
IMAGENET = {"data": "imagenet", "model": "JiT-B/16", "preview_every": 5000,
            "sampling": {"cfg": 2.9, "interval": (0.1, 1.0)}}
# found by trials, for minutes on two cores.  k = 2 hides the large flat shapes for longer; ancestral sampling and more
# steps near the noise forgive the early mistakes, which are about colour
SHAPES = {"data": "shapes", "model": "JiT-T/16", "batch_size": 32, "steps": 4600, "lr": 7e-3, "schedule": "cosine",
          "ema": (0.998,), "noise_scale": 2.0, "p_mean": -0.9, "p_std": 1.0,
          "sampling": {"solver": "ddpm", "cfg": 1.5, "steps": 25, "shift": 3.0}}
# latents of 64 px shapes: fewer numbers a token, so fewer blocks
LATENT = SHAPES | {"depth": 4, "in_context_start": 1, "steps": 1600, "noise_scale": 1.0}
PRESETS = {
    "shapes": SHAPES,
    # the cascades of DiMR and DICE, in pixels and small (02_model.py)
    "dice": SHAPES | {"model": "DICE-T/8", "steps": 1600}, "dimr": SHAPES | {"model": "DiMR-T/8", "steps": 1600},
    # shapes again, as latents (01_data.py --source latents)
    "shapes-vae": LATENT | {"data": "shapes-vae", "patch_size": 2, "hidden_size": 96, "steps": 2400, "lr": 4e-3},
    "shapes-rae": LATENT | {"data": "shapes-rae"},
    "cifar10": {"data": "cifar10", "model": "JiT-S/4", "batch_size": 256, "epochs": 200.0, "lr": 4e-4,
                "ema": (0.9999, 0.999), "sampling": {"cfg": 2.0, "interval": (0.1, 1.0)}},
    "cifar10-cpu": {"data": "cifar10", "model": "JiT-T/8", "batch_size": 32, "steps": 1000, "lr": 3e-3,
                    "schedule": "cosine", "ema": (0.998,), "sampling": {"cfg": 2.0, "steps": 8}},      # for comparisons
    "imagenette": {"data": "imagenette-160", "model": "JiT-S/16", "patch_size": 16, "batch_size": 256, "lr": 4e-4,
                   "ema": (0.9999, 0.999), "sampling": {"cfg": 2.5, "interval": (0.1, 1.0)}},
    "photos": {"data": "photos", "model": "JiT-S/16", "batch_size": 128, "ema": (0.9999, 0.999)},
    "imagenet-B": IMAGENET,                                                        # guidance as in the official release
    "imagenet-L": IMAGENET | {"model": "JiT-L/16", "sampling": {"cfg": 2.4, "interval": (0.1, 1.0)}},
    "imagenet-H": IMAGENET | {"model": "JiT-H/16", "sampling": {"cfg": 2.2, "interval": (0.1, 1.0)}},
    "1percent": IMAGENET | {"data": "imagenet-1percent", "epochs": 1000.0, "ema": (0.999,), "batch_size": 1200,
                            "sampling": {"solver": "euler", "steps": 25, "cfg": 2.9}},       # Improved JiT, section 4.1
}
DIT = {"norm": "layernorm", "ffn": "gelu", "rope": False, "qk_norm": False, "in_context_len": 0, "bottleneck_dim": 0}
# --objective meanflow: settings for fine-tuning a trained network (--init)
MEAN_FLOW = {"steps": 1000, "lr": 1.2e-3, "schedule": "cosine", "ema": (0.995,),
             "sampling": {"solver": "euler", "cfg": 1.0, "steps": 1, "shift": 1.0}}
EXPERIMENTS = {  # combine with any preset
    # Improved JiT, Table 1            patch embedding            FFN                  auxiliary loss
    "baseline": {"patch_embed": "linear",    "ffn": "swiglu",     "aux": "none"},
    "exp1":     {"patch_embed": "nonlinear", "ffn": "bottleneck", "aux": "none"},
    "exp2":     {"patch_embed": "nonlinear", "ffn": "bottleneck", "aux": "time"},
    "exp3":     {"patch_embed": "nonlinear", "ffn": "swiglu",     "aux": "none"},
    "exp4":     {"patch_embed": "nonlinear", "ffn": "swiglu",     "aux": "time"},
    "exp5":     {"patch_embed": "nonlinear", "ffn": "swiglu",     "aux": "rotation"},
    # the ladder of JiT Table 4: each row adds to the one above it; the last is the default
    "plain":       {"rope": False, "qk_norm": False, "in_context_len": 0},
    "rope-qknorm": {"rope": True,  "qk_norm": True,  "in_context_len": 0},
    "context":     {"rope": True,  "qk_norm": True},
    # the neighbours; departure: DiT also learns the variance of its ancestral sampler, this one takes the posterior's
    "dit": DIT | {"pred": "e", "loss": "e", "path": "ddpm-linear", "times": "uniform",
                  "sampling": {"solver": "ddpm", "steps": 250}},
    "sd3": DIT | {"pred": "v", "loss": "v", "path": "linear", "p_mean": 0.0, "p_std": 1.0},
}

@dataclass
class Options:
    preset: str = option("shapes", "row of PRESETS", choices=tuple(PRESETS), group="what to train on")
    experiment: str = option("", "row of EXPERIMENTS (default: none)", choices=("", *EXPERIMENTS))
    data: str = option("shapes", "data set: data/NAME, or a folder")
    run: str = option(None, "runs/NAME, or a folder (default: PRESET, or PRESET-EXPERIMENT)", free=True)
    steps: int = option(None, "optimizer steps; they take precedence over --epochs", "[1, inf)")
    epochs: float = option(600.0, "passes over the data", "(0, inf)")
    seed: int = option(0, "of weights, data order and noise", "[0, inf)")
    init: str = option(None, "begin with network and averaged weights of runs/NAME, a folder, or a checkpoint file")
    model: str = option("JiT-B/16", "row of MODELS in 02_model.py; the flags under `network` override parts of it",
                             choices=tuple(model.MODELS))
    loss: str = option("v", "space of the squared error", choices=("x", "e", "v"), group="objective")
    times: str = option("logit-normal", "distribution of t", choices=("logit-normal", "uniform"))
    p_mean: float = option(-0.8, "mean of the normal")
    p_std: float = option(0.8, "its standard deviation", "(0, inf)")
    shift: float = option(None, "t -> t/(t + A(1-t)): above 1, more time near the noise (default: 1; latents of RAE "
                          "and DINOv2: the root of their numbers / 4096)", "(0, inf)")
    label_drop: float = option(0.1, "share of labels replaced by the null class, for guidance", "[0, 1)")
    flip: bool = option(True, "mirror half of the images, but never latents")
    aux_weight: float = option(None, "lambda, the weight of the auxiliary head (default: 0.1; repa, dispersive 0.5; "
                               "multiscale 1)", "[0, inf)")
    teacher_id: str = option(None, "the teacher's id", flag=False)
    teacher: str = option(None, "--aux repa: a latent set, data/NAME, whose RAE or DINOv2 encoder is imitated")
    objective: str = option("flow", "meanflow: learn to sample in one step (pMF)", choices=tuple(OBJECTIVES))
    guidance: float = option(1.5, "meanflow: w of the guidance that the network learns", "[1, inf)")
    batch_size: int = option(1024, "GLOBAL: images per optimizer step", "[1, inf)", group="optimizer")
    micro_batch: int = option(None, "images per pass and process (default: all, at most 128)", "[1, inf)", free=True)
    lr: float = option(None, "learning rate (default: 5e-5 x batch size / 256)", "(0, inf)")
    schedule: str = option("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup: int = option(None, "steps (default: 5 epochs, at most 1/20 of the run)", "[0, inf)")
    weight_decay: float = option(0.0, "of AdamW", "[0, inf)")
    ema: tuple = option((0.9999, 0.9996), "decays of the averaged weights", "[0, 1)")
    amp: str = option(None, "mixed precision (default: bf16 where it is fast)", choices=("bf16", "fp16", "off"),
                           group="hardware")
    compile: bool = option(None, "torch.compile (default: on CUDA)", free=True)
    checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory", free=True)
    device: str = option(None, "cuda or cpu", free=True)
    resume: bool = option(False, "go on with a run that exists; steps, epochs, lr and amp may change", group="keeping",
                               free=True)
    overwrite: bool = option(False, "start the run anew; the old one is moved aside, to NAME.old", free=True)
    log_every: int = option(50, "steps between two lines of the log", "[1, inf)", free=True)
    preview_every: int = option(1000, "steps between two previews; 0: only at the end", "[0, inf)", free=True)
    save_minutes: float = option(5.0, "between checkpoints; the first after one minute at most", "[0, inf)", free=True)
    snapshots: int = option(8, "copies of the averaged weights kept over the run", "[0, inf)", free=True)
    sampling: dict = option(None, "what 04_sample.py takes by default", flag=False, free=True)
    classes: list = option(None, "names of the data set's classes", flag=False)
    data_id: str = option(None, "the data set's id", flag=False)
    coder: dict = option(None, "latents: what made them of which images", flag=False)

def fill_defaults(options, network, meta, device, world):
    """Work out what depends on data and hardware, in place; returns the network's JiTConfig.  Raises UsageError.

    network: {field of JiTConfig: value} of preset, experiment and flags; they override the row of MODELS.
    """
    row, size, count, classes = model.MODELS[options.model], meta["size"], meta["counts"]["train"], len(meta["classes"])
    found = dict(image_size=size, num_classes=classes, patch_size=nearest_patch(row, size),
                 noise_scale=max(1.0, size / 256))
    if coder := meta.get("coder"):
        found |= dict(patch_size=1, bottleneck_dim=0, in_channels=meta["channels"])
        options.flip = False                              # the mirror image of a latent is not a latent
    network = network | {"two_times": options.objective == "meanflow"}
    teacher = model.teacher_of(data.folder_of(options.teacher, "data")) if options.teacher else None
    if teacher:
        network["aux_dim"], options.teacher_id = teacher["channels"], teacher["id"]
    try:
        config = model.JiTConfig(**row | found | network)
        refuse_pairs(options, config, meta, teacher)
    except ValueError as error:
        raise data.UsageError(str(error)) from None
    batch, share = options.batch_size, options.batch_size // world
    sizes = [m for m in range(1, min(share, 128) + 1) if batch % (m * world) == 0]
    micro = options.micro_batch or max(sizes, default=0)
    if not micro or batch % (micro * world) or not options.micro_batch and micro < min(share, 128) / 4:
        unit = (options.micro_batch or min(max(share, 1), 128)) * world
        raise data.UsageError(f"--batch-size {batch} cannot be cut into micro-batches of {unit // world} for {world} "
                              f"process(es); nearest: {max(1, round(batch / unit)) * unit}, or pass --micro-batch")
    if config.two_times and micro % 2:
        raise data.UsageError(f"--objective meanflow halves its micro-batches: {micro} is odd, pass --micro-batch")
    options.micro_batch, epoch = micro, count / batch
    options.steps = options.steps or max(1, round(options.epochs * epoch))
    options.warmup = min(round(5 * epoch), options.steps // 20) if options.warmup is None else options.warmup
    options.lr = options.lr or 5e-5 * batch / 256
    options.amp = model.choose_precision(options.amp, device)
    options.compile = device.type == "cuda" if options.compile is None else options.compile
    if options.aux_weight is None:
        options.aux_weight = getattr(model.AUX_HEADS[config.aux], "weight", 0.1)
    options.shift = options.shift or model.latent_shift(coder, config.in_channels * size**2)
    options.classes, options.data_id, options.coder = meta["classes"], meta["id"], coder
    return config

def nearest_patch(row, size):
    """The patch size that gives as many tokens as a row of MODELS has, or nearly."""
    patches = [p for p in range(1, size + 1) if size % p == 0]
    return min(patches, key=lambda p: abs(p - row["patch_size"] * size / row["image_size"]))

def refuse_pairs(options, config, meta, teacher):
    """Raise ValueError for settings that make no sense together."""
    for bad, message in (
            (config.num_classes not in (0, len(meta["classes"])), f"--num-classes {config.num_classes}: the data set "
             f"has {len(meta['classes'])}; 0: without classes"),
            ("coder" in meta and config.aux in ("rotation", "repa"), f"--aux {config.aux} is for images, not for "
             "latents"),
            ((config.aux == "repa") != bool(teacher), "--aux repa and --teacher go together"),
            (teacher and teacher["coder"]["kind"] == "rae" and teacher["coder"]["size"] != meta["size"],
             f"--teacher: its encoder is for images of another size than {meta['size']}"),
            (config.cascade == "additive" and config.aux == "none", "--cascade additive needs --aux multiscale"),
            (config.two_times and (config.aux != "none" or config.cascade == "additive"), "--objective meanflow "
             "takes no auxiliary head, and an additive cascade needs one"),
            (config.two_times and options.loss != "v", "--objective meanflow has its loss on velocities: --loss v"),
            (config.two_times and config.num_classes and options.guidance > 1 and not options.label_drop,
             "--guidance above 1 needs --label-drop above 0"),
            (options.init and (config.image_size, config.in_channels) != (meta["size"], meta.get("channels", 3)),
             f"--init: its network is for {config.image_size} pixels and {config.in_channels} channels, {options.data} "
             "has others")):
        if bad:
            raise ValueError(message)

# ---- Running it ------------------------------------------------------------------------------------------------------
def resolve(given, saved=None, start=None):
    """Flags given -> (Options, {field of JiTConfig: value}).

    saved: the checkpoint of the run to --resume.  start: the configuration of the network that --init names.
    """
    start = {k: v for k, v in (start or {}).items() if k not in ("aux", "aux_dim", "two_times")}
    odd = [k for k in given if k in ("experiment", "model") and start or start.get(k, given[k]) != given[k]]
    if odd:
        raise data.UsageError(f"--init brings its network along: leave out --{odd[0].replace('_', '-')}")
    layers = [saved["options"] | {"overwrite": False}, saved["config"]] if saved else [
        {"sampling": {}}, PRESETS[given.get("preset", "shapes")], EXPERIMENTS.get(given.get("experiment"), {}),
        MEAN_FLOW if given.get("objective") == "meanflow" else {}, start]
    layers = layers + [{"steps": None}] * ("epochs" in given) + [given]
    merged, names = {k: v for layer in layers for k, v in layer.items()}, {entry.name for entry in fields(Options)}
    options = Options(**{k: v for k, v in merged.items() if k in names})
    options.run = options.run or "-".join(filter(None, (options.preset, options.experiment)))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        options.overwrite = False                         # torchrun started us again: go on with what we made
    return options, {k: v for k, v in merged.items() if k not in names}

def checkpoint_of(folder, options):
    """The state to go on from, or None for a new run.  Raises ValueError."""
    path = folder / "checkpoint.pt"
    if options.resume and (options.overwrite or not path.exists()):
        raise ValueError(f"--resume: there is no {path}, or --overwrite is given too; leave --resume out to begin")
    if options.overwrite or not path.exists():
        return None
    state = model.read_checkpoint(path)
    if not {"options", "model", "optimizer", "scaler", "sums", "skipped", "bad"} <= state.keys():
        raise ValueError(f"{path} is not the state of a training run, or of an older version: pass --run NAME, or "
                         "--overwrite to move it aside")
    return state

def refuse_other_settings(state, options, config, folder):
    """Raise ValueError if the run in the folder was made with other settings, naming the first that differs."""
    old = asdict(Options()) | asdict(model.JiTConfig()) | state["options"] | state["config"]       # it may be older
    new, step = asdict(options) | asdict(config), state["info"]["step"]
    if old.get("data_id") != new["data_id"]:
        raise ValueError(f"data set {options.data} is another, or was packed anew, since {folder} was begun: pass "
                         "--run NAME, or --overwrite")
    if step > options.steps:
        raise data.UsageError(f"--steps {options.steps}: the run in {folder} is at step {step} already")
    free = {entry.name for entry in fields(Options) if entry.metadata["free"]}
    amendable = {"steps", "epochs", "lr", "amp"}
    free |= amendable | {"warmup"} if options.resume else set()
    odd = next((k for k in new if k not in free and old.get(k) != new[k]), None)
    if odd:
        way = f"--resume --{odd} {new[odd]} to go on with it, " if odd in amendable else ""
        raise ValueError(f"{folder} holds a run with other settings (--{odd.replace('_', '-')} {old.get(odd)}, now "
                         f"{new[odd]}): pass {way}--run NAME for a new run, or --overwrite")

def main(argv=None):
    given = data.parse(argv, "Train a JiT.  Defaults shown are the paper's: the model's row, the preset, the "
                       "experiment and then your flags override them.", Options, model.JiTConfig)
    with model.machine(given.get("device")) as (device, rank, world):
        options, network = resolve(given)
        folder, start = data.folder_of(options.run, "runs"), None
        state = checkpoint_of(folder, options)
        if options.resume:
            options, network = resolve(given, state)
        elif options.init is not None:
            start = None if state else open_start(options.init)
            options, network = resolve(given, start=state["config"] if state else asdict(start.config))
        meta, arrays = data.open_data(data.folder_of(options.data, "data"))
        config = fill_defaults(options, network, meta, device, world)
        if state:
            refuse_other_settings(state, options, config, folder)
            if state["info"]["step"] == options.steps:
                if rank == 0:
                    print(f"{folder} is finished (step {options.steps}); nothing to do. Train longer with --resume "
                          "--steps N, anew with --overwrite")
                return
        if not config.num_classes:
            arrays = {split: (images, labels * 0) for split, (images, labels) in arrays.items()}
        with data.locked(folder) if rank == 0 else nullcontext():
            trainer = Trainer(options, config, device, rank, world, start and start.state_dict())
            if state:
                trainer.load(state)
            if rank == 0:
                if options.overwrite and folder.exists():
                    move_aside(folder)
                announce(trainer, folder, len(arrays["train"][1]))
            train(trainer, read_ahead(*arrays["train"], trainer), Recorder(trainer, folder, arrays))
        if rank == 0:
            name = "" if folder == Path("runs/shapes") else f" --run {options.run}"
            print(f"{folder / 'checkpoint.pt'} after step {trainer.step}; look at {folder / 'preview'} and loss.png, "
                  f"then run 04_sample.py{name}")

def open_start(name):
    """The network that --init names, with its first averaged weights.  Raises ValueError."""
    path = Path(name) if Path(name).is_file() else data.folder_of(name, "runs") / "checkpoint.pt"
    return model.load_network(path)[0]

def begin_with(net, weights):
    """Copy the weights of another run into net; an auxiliary head and the length of a step may be new."""
    try:
        missing, odd = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        missing, odd = [], [str(error).splitlines()[-1].strip()]
    odd += [name for name in missing if not any(part in name for part in ("aux_head.", "t_embedder.span"))]
    if odd:
        raise ValueError(f"--init: its weights do not fit this network ({odd[0]}): leave out the flags that change it")

def announce(trainer, folder, count):
    """Say what begins."""
    options, config = trainer.options, trainer.config
    print(f"{folder}: {options.model} with {model.count_parameters(config):,} parameters, patch {config.patch_size}, "
          f"on {count} images; step {trainer.step} to {options.steps}, batch {options.batch_size}, "
          f"lr {options.lr:.2g}, {options.amp}, {trainer.device}; all settings in config.json", flush=True)

def move_aside(folder):
    """NAME -> NAME.old, or NAME.old.old where that exists: nothing is ever deleted."""
    aside = Path(f"{folder}.old")
    if aside.exists():
        move_aside(aside)
    os.replace(folder, aside)

if __name__ == "__main__":
    sys.exit(data.run(main))
