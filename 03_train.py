"""03_train.py -- training: noise an image, let the network predict it, weigh the error as an error of velocity

What this stage teaches: the JiT loss, and around it what a real run needs: mixed precision, any number of GPUs,
gradient accumulation, averaged weights (EMA), checkpoints that survive a kill, a log in which trouble shows early.
Reads data/<name>/.   Writes runs/<name>/: config.json, log.csv, loss.png, checkpoint.pt, snapshots/, preview/
Run it:   python 03_train.py                     the shapes preset, eight minutes on two CPU cores
          python 03_train.py --experiment my_head.py      with a head, a layer or a loss of your own (README)
          torchrun --nproc_per_node 8 -- 03_train.py --preset imagenet-B       the same model on 8 GPUs as on one

One step, in the letters of 02_model.py (t = 0 noise, t = 1 data; JiT Algorithm 1):
    t = sigmoid(N(p_mean, p_std^2)),  e ~ N(0, k^2),  z = t x + (1-t) e        draw a time, mix image and noise
    x_pred = net(z, t, y)                                                      one in ten labels replaced by "no class"
    v_pred = (x_pred - z) / max(1-t, 0.05),  v = (x - z) / max(1-t, 0.05)      the same clamp for prediction and target
    loss = mean over pixels of (v_pred - v)^2
Stopped or killed, the same command goes on; --resume: with other steps, lr or amp.  All randomness is a function of
(seed, step, micro-batch): a resumed run repeats an undisturbed one (on a CPU bit for bit), two processes train as one.
"""
import argparse
import csv
import math
import os
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    for name in "02_model", "03_train":                   # %run again: forget what the last run's experiments added
        sys.modules.pop(name, None)
data = import_module("01_data")
model = import_module("02_model")                         # before torch: it sets GOMP_SPINCOUNT, which torch reads
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

option, refuse = data.option, data.refuse

# ---- What chance decides about a micro-batch ------------------------------------------------- (JiT Algorithm 1) ----
def sample_times(n, options, device):
    """t (n,) in (0,1): sigmoid(N(p_mean, p_std^2)), the paper's -0.8 and 0.8, or uniform; then the shift.  (JiT 3.1)"""
    if options.times == "uniform":
        t = torch.rand(n, device=device)
    else:
        t = torch.sigmoid(torch.randn(n, device=device) * options.p_std + options.p_mean)
    return model.shift_time(t, options.shift)

def make_batch(images, labels, options, config):
    """Pixels uint8 or latents (B,H,W,C), and labels (B,) -> what one pass needs: {"x", "y", "t", "e"}.

    x: (B,C,H,W), pixels in [-1,1], mirrored by chance.  y: labels, some replaced by the null class.  e: noise, std k.
    """
    B = len(images)
    device = images.device
    if options.flip:
        mirrored = torch.rand(B, 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(2), images)
    x = model.to_float(images, device)                                                             # B C H W
    dropped = torch.rand(B, device=device) < options.label_drop
    y = torch.where(dropped, config.num_classes, labels)                                           # B
    t = sample_times(B, options, device)                                                           # B
    e = torch.randn_like(x) * config.noise_scale                                                   # B C H W
    return {"x": x, "y": y, "t": t, "e": e}

# ---- The loss ------------------------------------------------------------------------- (JiT eq. 6, Algorithm 1) ----
def diffusion_loss(x_pred, x, z, t):
    """The loss of each image (B,): the squared error of the velocity, mean over its pixels, in fp32.

    x_pred: the prediction of the image x from the mixture z, each (B,C,H,W).  t: (B,).  Prediction and truth are
    divided by the same clamped 1-t, so a perfect prediction has loss zero at every t.
    """
    time_left = model.expand(1 - t, x).clamp_min(model.T_EPS)                                      # B 1 1 1
    v = (x - z) / time_left
    v_pred = (x_pred - z) / time_left                     # z is fp32, and so is all that follows
    return (v_pred - v).square().flatten(1).mean(dim=1)

def jit_objective(trainer, batch):
    """Mix, predict, compare: (loss to differentiate, loss of each image (B,) for the log)."""
    z = model.mix(batch["x"], batch["e"], batch["t"])
    with trainer.autocast:
        x_pred = trainer.forward(z, batch["t"], batch["y"])
    loss = diffusion_loss(x_pred, batch["x"], z, batch["t"])
    return loss.mean(), loss.detach()

# ---- The loop and the step: draw, predict, loss, gradient, step, average ---------------------------------------------
def train(trainer, feed, recorder):
    """Step after step; the recorder writes down what is due."""
    while trainer.step < trainer.options.steps:
        trainer.train_step(feed)
        recorder.after_step()

class Trainer:
    """Network, optimizer and averaged weights; train_step() changes them."""

    def __init__(self, options, config, device, rank=0, world=1, init=None):
        """init: the weights of another run, to begin with.  Raises UsageError if they do not fit."""
        self.options = options
        self.config = config
        self.device = device
        self.rank = rank
        self.world = world
        seed_everything(options.seed)
        self.net = model.build(config).to(device)
        self.head = model.AUX_HEADS[config.aux](config).to(device)                                 # JiT: none
        if init:
            fill_in(self.net, init)
        self.forward = wrap(self.net, self.head, options, config, device, world)               # compiled, DDP
        self.autocast = model.autocast(options.amp, device)
        self.weights = self.net.state_dict()              # the tensors themselves, changed by every step
        self.ema = [{name: value.clone() for name, value in self.weights.items()} for _ in options.ema]
        self.parameters = [p for p in (*self.net.parameters(), *self.head.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.lr, betas=(0.9, 0.95),
                                           weight_decay=options.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self.objective = OBJECTIVES[options.objective]                                             # jit_objective
        self.log = Log(device)
        self.step = 0                                                  # steps done,
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)       # those whose gradient was not finite,
        self.bad = torch.zeros_like(self.skipped)                      # and how many such steps in a row came last

    def train_step(self, feed):
        """One optimizer step: every micro-batch forward and backward, then AdamW, then the averages.

        feed yields (images, labels), a pair for each of this process's micro-batches; the loss is the mean of theirs.
        A step whose gradient is not finite counts, but leaves the weights as they are.
        """
        indices = self.indices()
        self.optimizer.zero_grad()
        for index in indices:
            images, labels = next(feed)
            with self.summing(last=index == indices[-1]):
                loss = self.loss(index, images, labels)
                self.scaler.scale(loss / len(indices)).backward()
        self.scaler.unscale_(self.optimizer)
        self.optimizer.param_groups[0]["lr"] = self.lr(self.step)
        mark_if_not_finite(self, self.gradient_norm())
        self.optimizer.step()                             # changes nothing where it is marked, so not scaler.step()
        self.scaler.update()
        self.update_ema()
        self.step += 1

    def indices(self):
        """This process's micro-batches within the global batch."""
        return range(self.rank, self.options.batch_size // self.options.micro_batch, self.world)

    def loss(self, index, images, labels):
        """Draw what chance decides, seeded with (seed, step, index), and return this micro-batch's loss."""
        seed_everything(self.options.seed, self.step, index)
        batch = self.head.prepare(make_batch(images, labels, self.options, self.config))
        loss, of_each = self.objective(self, batch)
        aux = self.head.loss(self.head.answer, batch)     # JiT: 0; else self.forward, a WithHead, kept the answer
        self.log.add_losses(of_each, batch["t"])
        self.log.add("aux", aux.detach())
        return loss + self.options.aux_weight * aux

    def summing(self, last):
        """Context of a backward pass: a process sums up gradients; with the last micro-batch DDP averages the sums."""
        return nullcontext() if last or self.world == 1 else self.forward.no_sync()

    def gradient_norm(self):
        """The norm of all gradients taken together, a tensor: measured for the log, and to see what is not finite.

        As in the paper, it is not clipped: Adam divides by the size of past gradients anyway.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log.add("grad_norm", norm)
        return norm

    def lr(self, step):
        """Warm-up times the schedule: constant, or half a cosine from 1 at the first step down to 0."""
        rate = self.options.lr * min(1.0, (step + 1) / max(1, self.options.warmup))
        if self.options.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.options.steps))
        return rate

    @torch.no_grad()
    def update_ema(self):
        """Move every average towards the weights: ema += (1 - decay) (weights - ema).  Biases and norms, too.

        0.998 averages over about 1 / (1 - 0.998) = 500 steps, but over a ninth of those done as long as that is less:
        until step 4,490 of the shapes' 4,600.
        """
        for decay, average in zip(self.options.ema, self.ema):
            decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(average.values()), list(self.weights.values()), 1 - decay)

# ======================================================================================================================
# first reading ends here: what follows are other losses, then feeding, watching, settings and survival
# ======================================================================================================================

# ---- Three predictions, three losses: nine cells of one table ---------------------------------------- (JiT Table 1)
def grid_loss(out, batch, config, space):
    """Squared error of each image (B,) in the space "x", "e" or "v", of an output that is a config.pred, on any path.

    By the book: convert prediction and truth, square the difference.  With to = u * value + b * z that is
    (u out + b z - (u truth + b z))^2 = u^2 (out - truth)^2: z drops out, and the space is a weight over t.
    """
    path = model.PATHS[config.path]
    t = batch["t"]
    truth = batch[config.pred] if config.pred != "v" else path.velocity_target(batch["x"], batch["e"], t)
    u, _ = path.conversion(config.pred, space, t)
    return u**2 * (out - truth).square().flatten(1).mean(dim=1)

def grid_objective(trainer, batch):
    """As jit_objective, for the prediction, loss and path of the settings; the log has its losses in v-space."""
    config = trainer.config
    t = batch["t"]
    z = model.PATHS[config.path].mix(batch["x"], batch["e"], t)
    with trainer.autocast:
        out = trainer.forward(z, t, batch["y"])
    loss = grid_loss(out, batch, config, trainer.options.loss)
    return loss.mean(), grid_loss(out, batch, config, "v").detach()

OBJECTIVES = {"jit": jit_objective, "grid": grid_objective}                    # experiment: f(trainer, batch)

# ---- Around the step: chance, numbers that are not finite, compiling, processes, the state ---------------------------
def seed_everything(*key):
    """Make torch's random numbers, on CPU and GPU, a function of these integers: here (seed, step, micro-batch)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)             # torch.manual_seed does more, and takes half a millisecond
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)

def mark_if_not_finite(trainer, norm):
    """Count a gradient that is not finite, the same on every process; the optimizer's step then changes nothing.

    Decided on the device: a GPU whose answer the step waited for would then itself wait for the next step.
    """
    bad = ~torch.isfinite(norm)
    trainer.optimizer.found_inf = bad.float()             # where it is 1, fused AdamW changes nothing
    trainer.skipped += bad
    trainer.bad = (trainer.bad + 1) * bad

def wrap(net, head, options, config, device, world):
    """What the step calls: the network, compiled or recorded, with its head if it has one, averaged by DDP."""
    for block in net.modules():
        if options.checkpointing and isinstance(block, model.Block):           # keep its inputs, compute the rest again
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    forward = net
    if options.compile:
        torch._dynamo.config.optimize_ddp = not options.checkpointing          # older torch cannot do both
        forward = torch.compile(net)
    if options.record:
        forward = recorded(forward, options, config, device)
    if config.aux != "none":
        forward = model.WithHead(forward, head)
    return torch.nn.parallel.DistributedDataParallel(forward) if world > 1 else forward

def recorded(net, options, config, device):
    """net, its forward and backward pass recorded as CUDA graphs, each of which every call replays as a whole.

    A small network computes for a shorter time than it takes to launch its many kernels one by one.
    """
    z = torch.zeros(options.micro_batch, config.in_channels, config.image_size, config.image_size, device=device)
    t = torch.zeros(len(z), device=device)
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")      # the recording's, which is no more
    with model.autocast(options.amp, device, cache=False):
        return torch.cuda.make_graphed_callables(net, (z, t, t.long()))

def fill_in(net, weights):
    """Copy the weights of another run into net, and say which parts begin anew, of other classes, say."""
    own = net.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    foreign = {name for name in weights.keys() - fitting.keys()
               if not name.endswith(("y_embedder.embedding_table.weight", "pos_embed"))}
    refuse(foreign, f"--init: its weights do not fit this network ({', '.join(sorted(foreign)[:1])}): is it of "
           "another size, or are the images?")
    net.load_state_dict(fitting, strict=False)
    anew = own.keys() - fitting.keys()
    if anew:
        print(f"--init: {', '.join(sorted(anew))} begin anew: it has none, or of other classes or sizes")

def sampling_state(trainer):
    """What sampling needs of a run: tensors and plain Python values."""
    options = trainer.options
    sampling = {"shift": options.shift} | {k: v for k, v in options.sampling.items() if v is not None}
    info = {"step": trainer.step, "sampling": sampling, "experiments": files_of(options.experiment)}
    info |= {name: getattr(options, name) for name in "classes data data_id coder label_drop".split()}
    return {"config": asdict(trainer.config), "info": info, "ema": trainer.ema}

def training_state(trainer):
    """What resuming needs as well.  Processes must call it together."""
    parts = {key: getattr(trainer, name).state_dict() for key, name in STATEFUL.items()}
    return sampling_state(trainer) | parts | {
        "options": asdict(trainer.options), "skipped": int(trainer.skipped), "bad": int(trainer.bad),
        "rows": trainer.log.rows, "sums": over_processes(trainer.log.sums, trainer.world)}

# key in the checkpoint: attribute of the Trainer
STATEFUL = {"model": "net", "head": "head", "optimizer": "optimizer", "scaler": "scaler"}

def restore(trainer, state, folder):
    """The inverse of training_state().  Raises ValueError if it does not fit."""
    refuse_other_settings(state, trainer.options, trainer.config, folder)
    with model.reading(folder, OTHER_RUN):
        for key, name in STATEFUL.items():
            if state[key] or key != "scaler":             # empty unless the run was an fp16 one
                getattr(trainer, name).load_state_dict(state[key])
        for average, saved in zip(trainer.ema, state["ema"], strict=True):
            for name, value in average.items():
                value.copy_(same_shape(saved[name], value))
        for weight, moments in trainer.optimizer.state.items():
            same_shape(moments["exp_avg"], weight)
            same_shape(moments["exp_avg_sq"], weight)
        if trainer.rank == 0:                             # they are of all processes together: one takes them
            trainer.log.sums.copy_(state["sums"])
        trainer.log.rows = state["rows"]
        trainer.step = state["info"]["step"]
        trainer.skipped.fill_(state["skipped"])
        trainer.bad.fill_(state["bad"])

def same_shape(saved, own):
    """A saved tensor, if it has the shape of one's own: neither copy_() nor AdamW look."""
    if saved.shape != own.shape:
        raise ValueError(f"one of its tensors has the shape {(*saved.shape,)}, not {(*own.shape,)}")
    return saved

OTHER_RUN = (": is it damaged, or of an older version, or not the state of a training run?  Then pass --run NAME, or "
             "--overwrite to move it aside")

@torch.no_grad()
def predict_clean(trainer, z, t, y):
    """Clean images predicted by the first averaged weights, without touching the weights in training."""
    trainer.net.eval()
    with trainer.autocast:
        out = torch.func.functional_call(trainer.net, trainer.ema[0], (z, t, y))
    trainer.net.train()
    return model.convert(out, trainer.config.pred, "x", z, t, trainer.config.path)

# ---- Feeding: which images belong to which micro-batch, read ahead from the memory map -------------------------------
@lru_cache(4)
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n images."""
    return np.random.default_rng((seed, 3, epoch)).permutation(n)

def image_indices(step, index, n, options):
    """The images of one micro-batch: epoch follows epoch without a gap."""
    first = step * options.batch_size + index * options.micro_batch
    places = range(first, first + options.micro_batch)
    return np.array([epoch_order(n, options.seed, place // n)[place % n] for place in places])

def read_ahead(images, labels, trainer):
    """Yield (images or latents (B,H,W,C), labels (B,)) on the device, four micro-batches ahead of the one in use."""
    def load(job):
        chosen = image_indices(*job, len(images), trainer.options)
        pair = torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
        return [part.pin_memory() for part in pair] if trainer.device.type == "cuda" else pair
    work = ((step, index) for step in range(trainer.step, trainer.options.steps) for index in trainer.indices())
    for pair in model.ahead(load, work, 4):
        yield [part.to(trainer.device, non_blocking=True) for part in pair]

# ---- Watching: log, held-out loss, preview, checkpoint ---------------------------------------------------------------
BINS = 5                           # ranges of t that the log keeps apart
MAX_BAD = 10                       # non-finite steps in a row that end a run; a GPU would wait if we looked more often
SUMMED = [*(f"loss_t{k / BINS:.1f}" for k in range(BINS)), "aux", "grad_norm"]
COLUMNS = ["step", "images", "loss", *SUMMED, "lr", "held_out", "skipped", "images_per_s", "gpu_MiB"]

class Log:
    """Rows of log.csv, and what the next one adds up: (sum, count) of each of SUMMED, of what is finite."""

    def __init__(self, device):
        self.rows = []
        self.sums = torch.zeros(len(SUMMED), 2, device=device)

    def add_losses(self, loss, t):
        """loss, t: (B,)."""
        self.add((t * BINS).long().clamp(0, BINS - 1), loss)

    def add(self, rows, values):
        """rows: the name of one of SUMMED, or a number for each of the values (B,)."""
        if isinstance(rows, str):
            values = values.reshape(1)
            rows = torch.full((1,), SUMMED.index(rows), device=values.device)
        good = torch.isfinite(values)
        self.sums.index_add_(0, rows, torch.stack([torch.where(good, values, 0), good], dim=1))

def noise_and_predict(trainer, images, labels, t, generator):
    """Noise held-out images at fixed times: (x, z, the averaged network's x_pred), each (B,C,H,W)."""
    x = model.to_float(images)
    e = torch.randn(x.shape, generator=generator) * trainer.config.noise_scale
    x, e, t, y = (value.to(trainer.device) for value in (x, e, t, torch.from_numpy(labels)))
    z = model.PATHS[trainer.config.path].mix(x, e, t)
    return x, z, predict_clean(trainer, z, t, y)

def held_out_loss(trainer, images, labels):
    """v-space loss of the averaged weights on fixed held-out images, times and noise.

    The times are quantiles of the paper's logit-normal (-0.8, 0.8), whatever the run itself draws: runs on the same
    data, path and noise scale can be compared.
    """
    generator = torch.Generator().manual_seed(0)
    n = len(images)
    total = 0.0
    times = torch.sigmoid(torch.special.ndtri((torch.arange(n) + 0.5) / n) * 0.8 - 0.8)
    u, _ = model.PATHS[trainer.config.path].conversion("x", "v", times)
    for rows in data.in_parts(np.arange(n), 64):
        x, _, x_pred = noise_and_predict(trainer, images[rows], labels[rows], times[rows], generator)
        error = ((x_pred - x)**2).flatten(1).mean(dim=1).cpu()
        total += (u[rows]**2 * error).sum().item()
    return total / n

def preview(trainer, images, labels, coder):
    """A picture, two rows for each of four images: noised at five times, and what the network makes of it."""
    times = (0.1, 0.3, 0.5, 0.7, 0.9)
    columns = []
    for t in times:
        generator = torch.Generator().manual_seed(1)
        t = torch.full((len(labels),), t)
        x, *pair = noise_and_predict(trainer, images, labels, t, generator)
        columns.append([model.to_pictures(image, coder) for image in pair])
    columns.insert(0, [model.to_pictures(x, coder)] * 2)
    titles = ["clean", *(f"t = {t}" for t in times)]
    return data.picture(model.interleaved(columns), titles, ["z", "x_pred"] * len(labels))

class Recorder:
    """What is written down between steps, by the first process: log, pictures, snapshots, checkpoint.

    log.csv has a line every log_every steps; it is written from the rows that the checkpoint holds, and never read.
    Losses are means since the line before, in v-space whatever --loss is; loss_t0.2 is that of 0.2 <= t < 0.4.  Every
    tenth line has the held-out loss; where nothing is held out, it is that of training images.  An objective of an
    experiment may log another loss.
    """

    def __init__(self, trainer, folder, arrays, coder, asked):
        """asked: a list that is no longer empty when a signal to stop has come."""
        self.trainer = trainer
        self.folder = folder
        self.coder = coder
        self.asked = asked
        images, labels = arrays["val"] if len(arrays["val"][1]) else arrays["train"]               # nothing held out
        chosen = np.random.default_rng(0).permutation(len(labels))[:256]           # subtle: they lie sorted by class
        self.shown = images[chosen], labels[chosen]
        self.four = [part[:4] for part in self.shown]
        self.line_at = self.saved_at = time.perf_counter()
        self.line_step = trainer.step
        self.wait = min(1, trainer.options.save_minutes)  # minutes until the next checkpoint
        self.bar = data.Progress(trainer.options.steps, folder.name, " steps", initial=trainer.step)
        if not trainer.step:
            self.save()                                   # first of all: what has it is a run's folder
        if trainer.rank == 0:
            model.read_checkpoint(folder / "checkpoint.pt")                    # odd types in SETTINGS would show here
            for name in ("snapshots", "preview"):
                (folder / name).mkdir(exist_ok=True)
            data.save_json(folder / "config.json",
                           {"options": asdict(trainer.options), "config": asdict(trainer.config)})

    def after_step(self):
        """Write whatever is due after this step.

        Raises ValueError when steps stop being finite, KeyboardInterrupt, with all saved, after a signal to stop.
        """
        trainer = self.trainer
        options = trainer.options
        step = trainer.step
        first = trainer.rank == 0
        done = step == options.steps
        self.bar.update()
        if step % MAX_BAD == 0 and trainer.bad >= MAX_BAD or done and not self.is_good():
            raise ValueError(
                f"numbers are no longer finite at step {step} ({trainer.bad} gradients in a row): "
                f"{self.folder / 'checkpoint.pt'} is from before; go on with --resume and a lower --lr than "
                f"{options.lr:g}, or with another --amp; if that ends so, too, it was too late: --overwrite")
        if done or step % options.log_every == 0:
            self.write_line(done)
        if first and (done or options.preview_every and step % options.preview_every == 0):
            self.draw(f"preview/{step:07d}.png", preview(trainer, *self.four, self.coder))
            self.draw_loss()
        if first and step * options.snapshots % options.steps < options.snapshots:     # so often, at equal distances
            model.save(sampling_state(trainer), self.folder / "snapshots" / f"{step:07d}.pt")
        due = done or first and time.perf_counter() - self.saved_at > 60 * self.wait
        due, stop = over_processes(torch.tensor([due, len(self.asked)]), trainer.world).tolist()       # all do the same
        if (due or stop) and self.is_good():
            self.save()
            self.saved_at = time.perf_counter()
            self.wait = options.save_minutes
        if done or stop:
            self.bar.close()
        if stop and not done:
            raise KeyboardInterrupt(f"stopped at step {step}; the same command, without --overwrite, goes on "
                                    f"{'there' if self.is_good() else 'from before numbers ceased to be finite'}")

    def is_good(self):
        """What is saved is good: a step that was finite came last, and the weights that it made have a finite loss."""
        return not self.trainer.bad and math.isfinite(held_out_loss(self.trainer, *self.four))

    def save(self):
        """checkpoint.pt."""
        state = training_state(self.trainer)
        if self.trainer.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            model.save(state, self.folder / "checkpoint.pt")

    def write_line(self, done):
        """One line of the log."""
        trainer = self.trainer
        options = trainer.options
        step = trainer.step
        sums = over_processes(trainer.log.sums, trainer.world)
        trainer.log.sums.zero_()
        speed = (step - self.line_step) * options.batch_size / (time.perf_counter() - self.line_at)
        self.line_at = time.perf_counter()
        self.line_step = step
        if trainer.rank:
            return
        loss_sum, count = sums[:BINS].sum(dim=0)
        means = {name: total / n for name, (total, n) in zip(SUMMED, sums.tolist()) if n}
        row = {"step": step, "images": step * options.batch_size, "loss": (loss_sum / count).item(), **means,
               "lr": trainer.lr(step - 1), "skipped": int(trainer.skipped), "images_per_s": speed,
               "gpu_MiB": torch.cuda.max_memory_allocated() / 2**20}
        if done or step // options.log_every % 10 == 0:
            row["held_out"] = held_out_loss(trainer, *self.shown)
        trainer.log.rows.append(row)
        with data.whole(self.folder / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(trainer.log.rows)
        self.bar.set_postfix(refresh=False, loss=f"{row['loss']:.4f}", images_per_s=f"{speed:.0f}")

    def draw_loss(self):
        """loss.png: training and held-out loss over the steps."""
        rows = self.trainer.log.rows
        lines = {name: [(row["step"], row[name]) for row in rows if row.get(name, 0) > 0]
                 for name in ("loss", "held_out")}
        if all(lines.values()):
            self.draw("loss.png", model.chart("loss in v-space", "step", lines, log=True))

    def draw(self, name, picture):
        """Write a picture into the run's folder, but not over one of yours: that is no reason to stop."""
        try:
            model.save_picture(self.folder / name, picture)
        except ValueError as error:
            model.warn(error)

def over_processes(numbers, world):
    """The sum of the processes' tensors, on the CPU; all of them get it."""
    numbers = numbers.clone()
    if world > 1:
        dist.all_reduce(numbers)
    return numbers.cpu()

# ---- Settings: the defaults are the paper's; a preset, experiments and the flags given override them, in this order --
# shapes: found by trials, for minutes on two cores.  k = 2 hides the large flat shapes for longer; ancestral sampling
# and more steps near the noise forgive early mistakes, as in the colours.  cifar10-cpu: for comparisons.
# 1percent: Improved JiT, section 4.1 (its text: a batch of 1024).  Guidance of it and imagenet-*: as in their scripts
PRESETS = model.table("""
preset       data               model     patch  batch_size  epochs steps lr   schedule ema            k   p_mean p_std
shapes       shapes             JiT-T/16  -      32          -      4600  7e-3 cosine   [0.998]        2.0 -0.9   1.0
cifar10      cifar10            JiT-S/4   -      256         200    -     4e-4 -        [0.9999,0.999] -   -      -
cifar10-cpu  cifar10            JiT-T/8   -      32          -      1000  3e-3 cosine   [0.998]        -   -      -
imagenette   imagenette-160     JiT-S/16  16     256         -      -     4e-4 -        [0.9999,0.999] -   -      -
photos       photos             JiT-S/16  -      128         -      -     -    -        [0.9999,0.999] -   -      -
imagenet-B   imagenet           JiT-B/16  -      -           -      -     -    -        -              -   -      -
imagenet-L   imagenet           JiT-L/16  -      -           -      -     -    -        -              -   -      -
imagenet-H   imagenet           JiT-H/16  -      -           -      -     -    -        -              -   -      -
1percent     imagenet-1percent  JiT-B/16  -      1200        1000   -     -    -        [0.999]        -   -      -
""", patch="patch_size", k="noise_scale")
# what 04_sample.py does by default with a run of the preset
SAMPLING = model.table("""
preset       solver  steps  cfg  interval   shift
shapes       ddpm    25     1.5  -          3.0
cifar10      -       -      2.0  [0.1,1.0]  -
cifar10-cpu  -       8      2.0  -          -
imagenette   -       -      2.5  [0.1,1.0]  -
imagenet-B   -       -      2.9  [0.1,1.0]  -
imagenet-L   -       -      2.4  [0.1,1.0]  -
imagenet-H   -       -      2.2  [0.1,1.0]  -
1percent     euler   25     2.9  [0.1,1.0]  -
""")
OF_SAMPLING = {*"solver steps cfg interval t_eps shift".split()}
# combine with any preset; further ones are files of tests/experiments/, or your own.  Improved JiT's Table 1, and the
# ladder of JiT Table 4, where each row adds to the one above it.  baseline and context are the defaults themselves
EXPERIMENTS = model.table("""
name       patch_embed  ffn         aux
baseline   linear       swiglu      none
exp1       nonlinear    bottleneck  none
exp2       nonlinear    bottleneck  time
exp3       nonlinear    swiglu      none
exp4       nonlinear    swiglu      time
exp5       nonlinear    swiglu      rotation
""") | model.table("""
name         rope   qk_norm  in_context_len
plain        false  false    0
rope-qknorm  true   true     0
context      true   true     -
""")

@dataclass
class Options:
    __post_init__ = model.check_fields                    # subtle: stands first, since below `model` is a field
    preset: str = option("shapes", "row of PRESETS", choices=lambda: PRESETS, group="what to train on")
    experiment: str = option("", "rows of EXPERIMENTS, files of tests/experiments/ or paths of your own, with commas "
                             f"between: {', '.join(EXPERIMENTS)}, ... (default: none)")
    data: str = option("shapes", "data set: data/NAME, or a folder")
    run: str = option(None, "runs/NAME, or a folder (default: PRESET, or PRESET-EXPERIMENT)")
    steps: int = option(None, "optimizer steps; they take precedence over --epochs", "[1, 1e15]")
    epochs: float = option(600.0, "passes over the data", "(0, 1e9]")
    seed: int = option(0, "of weights, data order and noise", "[0, 1e18]")
    init: str = option(None, "begin with the averaged weights, and sizes, of runs/NAME, a folder, or a checkpoint file")
    model: str = option("JiT-B/16", "row of MODELS in 02_model.py; the flags under `network` override parts of it",
                        choices=lambda: model.MODELS)
    loss: str = option("v", "space of the squared error", choices=lambda: ("x", "e", "v"), group="objective")
    times: str = option("logit-normal", "distribution of t", choices=lambda: ("logit-normal", "uniform"))
    p_mean: float = option(-0.8, "mean of the normal")
    p_std: float = option(0.8, "its standard deviation", "(0, 100]")
    shift: float = option(None, "t -> t/(t + A(1-t)): above 1, more time near the noise (default: 1, or what the data "
                          "set recommends)", "[0.001, 1000]")
    label_drop: float = option(0.1, "share of labels replaced by the null class, for guidance", "[0, 1)")
    flip: bool = option(True, "mirror half of the images, but never latents")
    aux_weight: float = option(None, "lambda, the weight of the auxiliary head (default: the head's own)", "[0, 10000]")
    objective: str = "jit"                                # one of OBJECTIVES
    batch_size: int = option(1024, "GLOBAL: images per optimizer step", "[1, 1000000]", group="optimizer")
    micro_batch: int = option(None, "images per pass and process (default: by memory)", "[1, inf)")
    lr: float = option(None, "learning rate (default: 5e-5 x batch size / 256)", "(0, inf)")
    schedule: str = option("constant", "after the warm-up", choices=lambda: ("constant", "cosine"))
    warmup: int = option(None, "steps (default: 5 epochs, at most 1/20 of the run)", "[0, 1e15]")
    weight_decay: float = option(0.0, "of AdamW", "[0, 1000]")
    ema: tuple = option((0.9999, 0.9996), "decays of the averaged weights", "[0, 1)")
    amp: str = option(None, "mixed precision (default: bf16 where it is fast)", choices=lambda: ("bf16", "fp16", "off"),
                      group="hardware")
    compile: bool = option(None, "torch.compile (default: on CUDA, but for small networks)")
    record: bool = False                                  # replay each pass as a CUDA graph
    checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory")
    device: str = option(None, "cuda or cpu")
    resume: bool = option(False, "go on with a run that exists; steps, epochs, lr and amp may change", group="keeping")
    dry_run: bool = option(False, "only say what would be done")
    overwrite: bool = option(False, "start the run anew; the old one is moved aside, to NAME.old")
    log_every: int = option(50, "steps between two lines of the log", "[1, inf)")
    preview_every: int = option(1000, "steps between two previews; 0: only at the end", "[0, inf)")
    save_minutes: float = option(5.0, "between checkpoints; the first after one minute at most", "[0, inf)")
    snapshots: int = option(8, "copies of the averaged weights kept over the run", "[0, inf)")
    # no flags
    sampling: dict = None                                 # what 04_sample.py takes by default
    classes: list = None                                  # names of the data set's classes
    data_id: str = None
    coder: dict = None                                    # latents: what made them of which images

def files_of(names):
    """Of --experiment those that are files."""
    return [name for name in names.split(",") if name and name not in EXPERIMENTS]

NOT_FOR_SETTINGS = {*"preset experiment run init device resume overwrite record image_size in_channels "
                     "classes data_id coder".split()}

def experiment_settings(names):
    """--experiment NAME[,NAME] -> settings of each: a row of EXPERIMENTS, or SETTINGS of a file.  Raises UsageError."""
    brought = set()
    for name in filter(None, names.split(",")):
        settings = EXPERIMENTS.get(name) or getattr(model.load_experiment(name), "SETTINGS", None)
        refuse(not isinstance(settings, dict), f"--experiment {name}: the file has no dict SETTINGS")
        refuse(NOT_FOR_SETTINGS & settings.keys(), f"--experiment {name}: SETTINGS cannot say "
               f"{', '.join(NOT_FOR_SETTINGS & settings.keys())}: it is a flag, or known from the data")
        for kind in (Options, model.JiTConfig):
            model.check_fields(kind, settings, f"--experiment {name}: ")
        refuse("network" in brought & settings.keys(), f"--experiment {names}: {name} brings a network, and so does "
               "one before it: pass one of them")
        brought |= settings.keys()
        yield settings

def merge(*layers):
    """One dict of several; later ones override earlier ones, also within `sampling`."""
    merged = {"sampling": {}}
    for layer in layers:
        merged |= layer | {"sampling": merged["sampling"] | (layer.get("sampling") or {})}
    return merged

def run_name(given):
    """runs/NAME if --run does not say."""
    parts = [given.get("preset", "shapes"), *given.get("experiment", "").split(",")]
    return given.get("run") or "-".join(Path(part).stem for part in parts if part)

NOT_FROM_INIT = {*"image_size in_channels num_classes aux network".split()}      # known from the data, or chosen anew

def gather(given, saved=None, init=None):
    """All settings that preset, experiments and flags make, {name: value}.

    saved: the checkpoint of the run to --resume.  init: the configuration of the network that --init names.
    """
    brought = {name: value for name, value in (init or {}).items() if name not in NOT_FROM_INIT}
    preset = given.get("preset", "shapes")
    layers = [PRESETS[preset], {"sampling": SAMPLING.get(preset)}, brought,
              *experiment_settings(given.get("experiment", ""))]
    if saved:
        layers = [saved["options"], saved["config"], {"overwrite": False}]
    if "epochs" in given:
        layers.append({"steps": None})
    if "batch_size" in given:
        layers.append({"micro_batch": None})
    return merge(*layers, {"run": run_name(given)}, given)

def settle(settings, meta, device, world):
    """Settings gathered -> (Options, configuration): what they leave open is worked out from model, data and hardware.

    meta: the data set's.  Raises UsageError.
    """
    row = model.MODELS[settings.get("model", Options.model)]
    size = meta["size"]
    found = {"image_size": size, "in_channels": meta.get("channels", 3), "num_classes": len(meta["classes"]),
             "noise_scale": max(1.0, size / 256)}
    if "coder" in meta:                                   # a latent, mirrored or turned, is not a latent
        found |= {"patch_size": 1, "bottleneck_dim": 0}
        settings = settings | {"flip": False}
        refuse(settings.get("aux") == "rotation", "--aux rotation is for images, not for latents")
    elif "patch_size" not in settings:
        found["patch_size"] = nearest_patch(row, size)
    settings = row | found | settings | {"shift": settings.get("shift") or meta.get("shift") or 1.0,
                                         "classes": meta["classes"], "data_id": meta["id"], "coder": meta.get("coder")}
    kind, _ = model.NETWORKS[settings.get("network", "jit")]
    training = model.settings_for(Options, settings)
    network = model.settings_for(kind, settings)
    unknown = settings.keys() - training.keys() - network.keys() | settings["sampling"].keys() - OF_SAMPLING
    refuse(unknown, f"there is no setting {', '.join(map(str, unknown))}: is it misspelt, or another network's, whose "
           "--experiment is not given?")
    options = Options(**training)
    config = kind(**network)
    refuse(config.num_classes not in (0, found["num_classes"]), f"--num-classes {config.num_classes}: the data set "
                f"has {found['num_classes']} (is it another, or was it packed anew?); 0: without classes")
    options.micro_batch = micro_batch_of(options, config, device, world)
    epoch = meta["counts"]["train"] / options.batch_size  # in steps
    options.steps = options.steps or max(1, round(options.epochs * epoch))
    if options.warmup is None:
        options.warmup = min(round(5 * epoch), options.steps // 20)
    options.lr = options.lr or 5e-5 * options.batch_size / 256
    settle_speed(options, config, device)
    if options.aux_weight is None:
        options.aux_weight = model.AUX_HEADS[config.aux].weight
    refuse(options.objective not in OBJECTIVES, f"SETTINGS: objective {options.objective!r} is unknown: "
           f"one of {', '.join(OBJECTIVES)}")
    if options.objective == "jit" and (config.pred, options.loss, config.path) != ("x", "v", "linear"):
        options.objective = "grid"
    return options, config

def settle_speed(options, config, device):
    """Precision, compiling and recording, where the settings leave them open.  Raises UsageError."""
    options.amp = model.choose_precision(options.amp, device)
    if options.compile is None:                           # it takes half a minute or more, and pays in long passes
        tokens = (config.image_size // config.patch_size)**2
        work = model.count_parameters(config) * tokens * options.micro_batch   # multiply-adds of a forward pass
        options.compile = device.type == "cuda" and work > 1e11
    one_pass = options.micro_batch == options.batch_size                       # then there is one process, too
    plain = config.aux == "none" and not options.checkpointing and not files_of(options.experiment)
    options.record = device.type == "cuda" and one_pass and plain

def nearest_patch(row, size):
    """The patch size that gives as many tokens as a row of MODELS has, at least half and at most twice as many."""
    side = row["image_size"] // row["patch_size"]
    patches = [p for p in range(1, size + 1) if size % p == 0 and side**2 / 2 <= (size // p)**2 <= 2 * side**2]
    refuse(not patches, f"images of {size} pixels cannot be cut into about {side} x {side} patches: pack them at "
           f"--size {-(-size // side) * side}, or give a --patch-size")
    return min(patches, key=lambda p: abs(size / p - side))

def size_of(config):
    """Numbers a pass has to keep for one image, about: tokens times width times depth."""
    return (config.image_size // config.patch_size)**2 * config.hidden_size * config.depth

def micro_batch_of(options, config, device, world):
    """Images per pass and process: --micro-batch, or as large a part of the batch as memory should hold.

    By default a GPU takes 128 images of JiT-B/16, 17 GiB, a CPU 16 of JiT-S/16.  Raises UsageError.
    """
    most = (310_000_000 if device.type == "cuda" else 20_000_000) // size_of(config)
    largest = options.micro_batch or max(1, min(most, options.batch_size // world))
    candidates = [largest] if options.micro_batch else range(largest, largest // 4, -1)
    micro = next((m for m in candidates if options.batch_size % (m * world) == 0), None)
    refuse(micro is None, f"--batch-size {options.batch_size} cannot be cut into micro-batches of {largest} for "
                f"{world} process(es): give a multiple of {largest * world}, or another --micro-batch")
    return micro

# ---- Running it ------------------------------------------------------------------------------------------------------
def read_flags(argv):
    """The flags given; --preset and --experiment are looked for first, since they bring defaults and flags along."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", nargs="?", default="shapes")                # without a value: left to the real one
    early.add_argument("--experiment", nargs="?", default="", const="")
    first, _ = early.parse_known_args(argv)
    shown = merge(PRESETS.get(first.preset, {}), *experiment_settings(first.experiment))
    shown = model.MODELS.get(shown.get("model"), {}) | shown
    kind, _ = model.NETWORKS[shown.get("network", "jit")]
    given = data.parse(argv, "Train a JiT.  Defaults shown are the paper's, or those of --preset and --experiment.",
                       Options, kind, shown=shown)
    if "experiment" in given:
        given["experiment"] = ",".join(map(model.experiment_name, given["experiment"].split(",")))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        given.pop("overwrite", None)                      # torchrun started us again: go on with what we made
    return given

def checkpoint_of(folder, resume, overwrite):
    """The state to go on from, or None for a new run.  Raises ValueError."""
    path = folder / "checkpoint.pt"
    begin = overwrite or not path.exists()
    if resume and begin:
        raise ValueError(f"--resume: there is no {path}, or --overwrite is given too; leave --resume out to begin")
    others = [file for file in folder.glob("*") if file.suffix != ".jit-part"]           # of a kill in the first save
    if begin and others and not overwrite:
        raise ValueError(f"{folder} holds files but no checkpoint.pt: pass --run NAME, or --overwrite to move it aside")
    if begin:
        return None
    state = model.read_checkpoint(path)
    with model.reading(path, OTHER_RUN):
        data.expect(state, config=dict, info=dict, options=dict, rows=list)
    return state

# what may differ from the run that goes on (its data's place, too: the id is compared), and what else with --resume
MAY_DIFFER = {*"""data run micro_batch compile record checkpointing device resume dry_run overwrite log_every
                   preview_every save_minutes snapshots sampling""".split()}
WITH_RESUME = MAY_DIFFER | {*"steps epochs lr amp warmup".split()}

def refuse_other_settings(state, options, config, folder):
    """Raise ValueError if the run in the folder was made with other settings, naming the first that differs."""
    step = state["info"]["step"]
    refuse(step > options.steps, f"{options.steps} steps: the run in {folder} is at step {step} already")
    if state["info"]["data_id"] != options.data_id:
        raise ValueError(f"data set {options.data} is another, or was packed anew, since {folder} was begun: pass "
                         "--run NAME, or --overwrite, without --resume")
    free = WITH_RESUME if options.resume else MAY_DIFFER
    new = {name: value for name, value in (asdict(options) | asdict(config)).items() if name not in free}
    old = asdict(Options()) | asdict(type(config)()) | state["options"] | state["config"]      # it may lack a setting
    data.refuse_other(old, new, folder, f"pass {'without --resume ' * options.resume}--run NAME for a new run, "
                      "--overwrite, or, to go on with other steps, epochs, lr or amp, --resume")

def open_init(name, state, experiment):
    """(Averaged weights, configuration, classes) of what --init names; without it None each.

    A run that exists goes on from its own weights, and needs the configuration alone.
    """
    if not name or state:
        return None, name and state["config"], None
    path = model.folder_of(name, "runs") / "checkpoint.pt"
    net, info = model.load_network(path if path.exists() else name, experiment=",".join(files_of(experiment)))
    return net.state_dict(), asdict(net.config), info["classes"]

def announce(options, config, folder, step, counts, device):
    """Say what begins."""
    windows = [f"{min(1 / (1 - d), (10 + options.steps) / 9):.0f}" for d in options.ema]
    need = 24 * model.count_parameters(config)            # weights, gradients, two moments, two averages
    kept = 50 if options.compile else 180 if options.amp == "off" else 130     # bytes, as measured
    need += kept * options.micro_batch * size_of(config)
    print(f"{folder}: {'sizes as --init' if options.init else options.model} with {model.count_parameters(config):,} "
          f"parameters, patch {config.patch_size}, {config.in_context_len} context tokens, noise scale "
          f"{config.noise_scale:g}; {counts['train']} images, "
          f"{counts['val']} held out; step {step} to {options.steps}, batch {options.batch_size}, "
          f"lr {options.lr:.2g}, {options.amp}, {device}{' compiled' * options.compile}"
          f"{' as CUDA graphs' * options.record}; micro-batches of {options.micro_batch}, "
          f"about {need / 2**30:.1f} GiB; EMA over {' and '.join(windows)} steps", flush=True)

def next_command(options):
    """What samples the run; an experiment that lies elsewhere has to be given again."""
    own = ",".join(name for name in files_of(options.experiment) if "/" in name)
    return f"04_sample.py --run {shlex.quote(options.run)}{own and ' --experiment ' + shlex.quote(own)}"

def move_aside(folder):
    """NAME -> NAME.old, or NAME.old.old where that exists: nothing is ever deleted."""
    aside = Path(f"{folder}.old")
    if os.path.lexists(aside):
        move_aside(aside)
    folder.replace(aside)
    print(f"what was {folder} is {aside} now")

def train_run(given, device, rank, world):
    """Begin a run, or go on with it."""
    folder, resume = model.folder_of(run_name(given), "runs"), given.get("resume")
    state = checkpoint_of(folder, resume, given.get("overwrite", False))
    if resume:
        model.load_recorded(state["info"]["experiments"], folder, given.get("experiment", ""))
    weights, init, classes = open_init(given.get("init"), state, given.get("experiment", ""))
    settings = gather(given, state if resume else None, init)
    if state:
        settings.setdefault("amp", state["options"]["amp"])            # another machine's default is no other setting
    place = model.folder_of(settings.get("data", "shapes"), "data")
    meta, arrays = data.open_data(place)
    options, config = settle(settings, meta, device, world)
    step = state["info"]["step"] if state else 0
    if state:
        refuse_other_settings(state, options, config, folder)
    if step == options.steps:
        return None if rank else print(f"{folder} is finished (step {step}); nothing to do (longer: --resume "
                                       "--steps N; anew: --overwrite)")
    if config.num_classes and classes and classes != options.classes:          # official weights do not name theirs
        weights.pop("y_embedder.embedding_table.weight", None)
    if not config.num_classes:
        arrays = {split: (images, labels * 0) for split, (images, labels) in arrays.items()}
    coder = model.load_coder(place, options.coder)
    if rank == 0:
        announce(options, config, folder, step, meta["counts"], device)
    if options.dry_run:
        return
    with data.locked(folder) if rank == 0 else nullcontext(), data.asked_to_stop() as asked:
        state = checkpoint_of(folder, resume, options.overwrite)               # another process may have gone on
        trainer = Trainer(options, config, device, rank, world, weights)
        if state:
            restore(trainer, state, folder)
        refuse(trainer.step != step, f"another process has gone on with {folder}: look at what it made", ValueError)
        if rank == 0 and options.overwrite and folder.exists():
            move_aside(folder)
        recorder = Recorder(trainer, folder, arrays, coder and coder.to(device), asked)
        train(trainer, read_ahead(*arrays["train"], trainer), recorder)
    if rank == 0:
        print(f"{folder / 'checkpoint.pt'} after step {trainer.step}; look at {folder / 'preview'} and loss.png, "
              f"then run {next_command(options)}")

def main(argv=None):
    given = read_flags(argv)
    with model.device_and_processes(given.get("device")) as (device, rank, world):
        train_run(given, device, rank, world)

if __name__ == "__main__":
    sys.exit(data.run(import_module("03_train").main))    # subtle: experiments import this module, too: one for all
