"""04_sample.py -- sampling: follow the velocity from noise to an image, guided towards a class

What this stage teaches: Euler and Heun on dz/dt = v, DDIM and DDPM for comparison, and classifier-free guidance inside
an interval of time.  Reads runs/<name>/checkpoint.pt (ours or the official release's).
Writes runs/<name>/samples/ (PNG files and samples.json; samples.npz with --npz) and runs/<name>/grid.png.
Run it:   python 04_sample.py                               1,000 images of the shapes run, 26 s on two CPU cores
          python 04_sample.py --labels star,7 --num 16 --cfg 2 --out stars
          torchrun --nproc_per_node 8 -- 04_sample.py --checkpoint jit-b-16.pth --num 50000 --cfg 2.9 --interval 0.1,1

t = 0 is noise, t = 1 is data.  Guidance: v = v_uncond + w (v_class - v_uncond); w = 1 is off, and the pass without
class is then skipped.  Every image has its own random numbers, a function of (seed, index): the same picture whatever
the batch size, the number of processes, the order, or where a run was interrupted.  A killed run goes on where it was.

The clamp: v = (x_pred - z) / max(1-t, t_eps).  At t_eps = 0.05 the last steps of 50 are shortened, and even a perfect
network leaves noise: std 0.017 k (Heun, even grid; Euler 0.014 k), two grey levels at k = 1.  --t-eps 0.02 (any value
up to 1/steps) ends exactly on x_pred.  The paper's FID is measured with the clamp, and is better with it.
"""
import sys
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

data, model = import_module("01_data"), import_module("02_model")
option = data.option

# ---- Guided velocity: one or two predictions, turned into the direction to go --------- (JiT Algorithm 2; CFG on v) --
def velocity(net, z, t, labels, t_eps):
    """v (B,C,H,W) in fp32 at the time t, a float, from whatever the network predicts."""
    config, times = getattr(net, "config", None), torch.full((len(z),), t, device=z.device)
    pred, path = (config.pred, config.path) if config else ("x", "linear")
    return model.convert(net(z, times, labels), pred, "v", z, times, path, t_eps)

def guided_velocity(net, z, t, labels, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05):
    """The guided velocity, v_uncond + w (v_class - v_uncond): w = cfg inside the interval, 1 outside. (JiT appendix A)

    z: (B,C,H,W) state.  t: float.  labels: (B,) class ids; num_classes stands for "no class".  Both halves go through
    the network as one batch; where w is 1 the unconditional half is skipped, where w is 0 the other.  Inside is
    low < t < high; low = 0 includes t = 0.
    """
    low, high = interval
    # subtle: grid points such as 6/20 land a rounding error beside the ends 0.3 and 0.7; the margin says "outside"
    w = cfg if t < high - 1e-6 and (low == 0 or t > low + 1e-6) else 1.0
    if w == 1:
        return velocity(net, z, t, labels, t_eps)
    null = torch.full_like(labels, net.config.num_classes)
    if w == 0:
        return velocity(net, z, t, null, t_eps)
    v_class, v_null = velocity(net, torch.cat([z, z]), t, torch.cat([labels, null]), t_eps).chunk(2)
    return v_null + w * (v_class - v_null)

# ---- Solvers: one step from t to t_next, where v(z, t) is the guided velocity ----------------------------------------
def euler_step(z, t, t_next, v):
    """One step along the velocity, z + (t_next - t) v(z, t): first order.                         (JiT Algorithm 2)"""
    return z + (t_next - t) * v(z, t)

def heun_step(z, t, t_next, v):
    """The mean of the velocities at both ends: second order.  The last step, to t = 1, is Euler's.  (JiT sec. 3.1)"""
    first = v(z, t)
    ahead = z + (t_next - t) * first
    return ahead if t_next == 1 else z + (t_next - t) * (first + v(ahead, t_next)) / 2

def ddim_step(z, t, t_next, v, path="linear"):
    """Mix the current estimates of x and e anew: z_next = alpha_next x + sigma_next e.                  (DDIM eq. 12)

    Exact when the estimates are right.  On the linear path this is Euler's step.
    """
    return model.mix(path, *estimates(z, t, v, path), torch.full((len(z),), t_next, device=z.device))

def ddpm_step(z, t, t_next, v, path="linear", noise=0.0):
    """Draw from q(z_next | z, x) with x the current estimate: ancestral sampling.            (DDPM eq. 7, for any path)

    Read towards the noise, z = r z_next + sqrt(var) n with r = alpha / alpha_next, var = sigma^2 - r^2 sigma_next^2;
    Bayes' rule turns it round: a normal distribution about
        (r sigma_next^2 z + var alpha_next x) / sigma^2    with the variance    var sigma_next^2 / sigma^2.
    That is for k = 1; else both variances are k^2 times as large, and noise (B,C,H,W) comes with the std k.
    """
    x, _ = estimates(z, t, v, path)
    (alpha, sigma), (alpha_next, sigma_next) = (
        [c.item() for c in model.path_coefficients(path, torch.tensor(time))[:2]] for time in (t, t_next))
    ratio = alpha / alpha_next
    var = sigma**2 - ratio**2 * sigma_next**2             # of z_t given z_next
    mean = (ratio * sigma_next**2 * z + var * alpha_next * x) / sigma**2
    return mean + max(0.0, var)**0.5 * sigma_next / sigma * noise

def estimates(z, t, v, path):
    """Estimates of (x, e) from the guided velocity at the time t."""
    value, times = v(z, t), torch.full((len(z),), t, device=z.device)
    return tuple(model.convert(value, "v", to, z, times, path) for to in ("x", "e"))

SOLVERS = {"heun": heun_step, "euler": euler_step, "ddim": ddim_step, "ddpm": ddpm_step}

@torch.no_grad()
def generate(net, noise, labels, *, solver="heun", steps=50, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05, shift=1.0,
             reuse=1, step_noise=None, trace=None):
    """Images (N,C,H,W), float in about [-1,1], from noise (N,C,H,W) with std k and labels (N,) int64.

    steps: of the time grid from 0 to 1; Heun-50 costs 99 network evaluations.  reuse: a network with a wide head runs
    its backbone only every `reuse` steps.  step_noise(i) -> like noise, fresh for step i (ddpm; else torch.randn_like).
    trace: a dict that gets t -> (z, guided x).  Raises ValueError.
    """
    if solver not in SOLVERS or steps < 1:
        raise ValueError(f"solver {solver!r}, {steps} steps: give one of {', '.join(SOLVERS)}, and at least 1 step")
    config = getattr(net, "config", None)
    path, k = (config.path, config.noise_scale) if config else ("linear", 1.0)

    def step_aware(z, t, labels):                         # variant: pMF is told where the step ends, too
        return net(z, torch.stack([t, torch.full_like(t, t_next)], dim=1), labels)     # t_next: the loop's, below
    step_aware.config = config

    def v(z, t):
        asked = step_aware if getattr(config, "two_times", False) else net
        value = guided_velocity(asked, z, t, labels, cfg, interval, t_eps)
        if trace is not None:                             # heun's look ahead to t comes first and is overwritten
            trace[t] = z, model.convert(value, "v", "x", z, torch.full((len(z),), t, device=z.device), path)
        return value

    z = noise.float()
    grid = model.shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        if hasattr(net, "reuse"):                         # variant: a wide head
            net.reuse = i % reuse > 0
        more = {"path": path} if solver in ("ddim", "ddpm") else {}
        if solver == "ddpm":
            more["noise"] = step_noise(i) if step_noise else torch.randn_like(z) * k
        z = SOLVERS[solver](z, t, t_next, v, **more)
    return z

# ---- One seed per image ----------------------------------------------------------------------------------------------
def noise_for(indices, shape, seed, scale, step=None):
    """Noise (len(indices), *shape), std scale: image i's depends on (seed, i) alone, and for ddpm on the step.

    subtle: numpy mixes a whole tuple into its seed (torch's CPU generator keeps 32 bits) but ignores zeros at its end,
    (s, i) being (s, i, 0): so the noise at the start has 0 in the step's place, and step j has j + 1.
    """
    last = 0 if step is None else step + 1
    rows = [np.random.default_rng((seed, int(i), last)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) * scale

class Sampler:
    """draw(indices) -> images or latents: a network, what is asked of it, and the settings of generate()."""

    def __init__(self, net, labels, seed, how, amp, device, compiled=False, coder=None):
        self.net = torch.compile(net.to(device)) if compiled else net.to(device)
        self.config, self.labels, self.seed, self.how = net.config, labels, seed, how
        self.device, self.autocast, self.coder = device, model.autocast(amp, device), coder and coder.to(device)

    def pictures(self, x):
        """What draw() returns -> uint8 (B,H,W,3), latents decoded."""
        return model.to_pictures(x, self.coder)

    def draw(self, indices, trace=None):
        """Images (B,C,H,W) in about [-1,1] of the given indices; the labels take turns."""
        config = self.config

        def noise(step=None):
            shape = (config.in_channels, config.image_size, config.image_size)
            return noise_for(indices, shape, self.seed, config.noise_scale, step).to(self.device)
        labels = torch.tensor([self.labels[i % len(self.labels)] for i in indices], device=self.device)
        with self.autocast:
            return generate(self.net, noise(), labels, step_noise=noise, trace=trace, **self.how)

def parse_labels(text, num, classes, num_classes):
    """--labels and --num -> one class id per image; ids and names take turns.  Raises UsageError.

    >>> parse_labels("star,2", 3, ["ring", "star", "dot"], 3)
    [1, 2, 1]
    """
    if text == "all":
        return [i % max(1, num_classes) for i in range(num)]
    if not num_classes:
        raise data.UsageError(f"--labels {text}: this network was trained without classes")
    ids = []
    for name in map(str.strip, text.split(",")):
        ids.append(classes.index(name) if name in classes else int(name) if name.isdecimal() else -1)
        if not 0 <= ids[-1] < num_classes:
            names = f", names are {', '.join(classes[:12])}{' ...' if len(classes) > 12 else ''}" if classes else ""
            raise data.UsageError(f"--labels: {name!r} is not a class; ids go from 0 to {num_classes - 1}{names}")
    return [ids[i % len(ids)] for i in range(num)]

# ---- Writing: a folder of PNG files that knows its settings ----------------------------------------------------------
def file_of(out, i):
    return out / f"{i:07d}.png"

def check_folder(out, record, overwrite):
    """Raise ValueError if the folder holds anything but samples made with these settings."""
    path = out / "samples.json"
    old = data.load_json(path) if path.exists() and not overwrite else record
    if not path.exists() and (out.is_file() or out.is_dir() and any(file.name[0] != "." for file in out.iterdir())):
        raise ValueError(f"{out} holds files that this script did not write: choose another --out")
    odd = next((k for k in record if old.get(k, HOW.get(k)) != record[k]), None)       # it may be older than a setting
    if odd:
        raise ValueError(f"{out} holds samples made with other settings ({odd}: {str(old.get(odd))[:40]}, now "
                         f"{str(record[odd])[:40]}): pass --overwrite to replace them, or --out")

def sample_all(sampler, out, batch_size, rank, world):
    """Generate what is missing; batches are the same whoever computes them.  Returns how many images were made."""
    num = len(sampler.labels)
    batches = [range(i, min(i + batch_size, num)) for i in range(0, num, batch_size)][rank::world]
    todo = [batch for batch in batches if not all(file_of(out, i).exists() for i in batch)]
    made, share = sum(map(len, todo)), sum(map(len, batches))
    with data.Progress(share, "sampling", " images", initial=share - made) as bar:
        for batch in todo:
            for i, image in zip(batch, sampler.pictures(sampler.draw(batch))):
                with data.whole(file_of(out, i)) as part:
                    Image.fromarray(image).save(part, "png", compress_level=1)
            bar.update(len(batch))
    return made

def save_grid(out, path, labels, classes, rows=8, columns=10):
    """A picture with a column per class and its name above; a single class fills the sheet."""
    shown = sorted(set(labels))[:columns]
    places = [[i for i, label in enumerate(labels) if label == c][:rows] for c in shown]
    if len(shown) == 1:
        places = [list(range(min(len(labels), rows * columns)))[i::columns] for i in range(min(columns, len(labels)))]
    titles = [classes[c] if c < len(classes) else c for c in shown] if len(shown) > 1 else []
    cells = [[data.read_image(file_of(out, place[y])) for place in places] for y in range(min(map(len, places)))]
    data.save_picture(path, data.picture(cells, titles))

def save_npz(out, labels, size):
    """samples.npz as ADM's evaluator reads it, written image by image: arr_0 uint8 (N,H,W,3), arr_1 labels."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), size, size, 3)}
    with data.whole(out / "samples.npz") as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for path in (file_of(out, i) for i in range(len(labels))):
                image = data.read_image(path)
                if image.shape != header["shape"][1:]:
                    raise ValueError(f"{path} is not of {size} x {size} pixels: remove it, and give the command again")
                file.write(image.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(labels))

def write_samples(options, sampler, record, folder, rank, world):
    """Fill the folder of samples, then draw the grid."""
    out, wait = options.out or folder / "samples", dist.barrier if world > 1 else lambda: None
    with data.locked(out) if rank == 0 else nullcontext():
        check_folder(out, record, options.overwrite)
        wait()                                            # all have looked before the first writes
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            for file in [*out.glob("[0-9]*.png"), *out.glob("samples.npz")] if options.overwrite else ():
                file.unlink()
            data.save_json(out / "samples.json", record)
        wait()
        made = sample_all(sampler, out, options.batch_size, rank, world)
        wait()
        if rank == 0:
            grid = out.with_name(f"{out.name}-grid.png") if options.out else folder / "grid.png"
            save_grid(out, grid, sampler.labels, record["classes"])
            if options.npz:
                save_npz(out, sampler.labels, record["size"])
            print(f"{out}: {record['num']} images ({made if world == 1 else 'all'} new), {record['solver']} "
                  f"{record['steps']} steps, shift {record['shift']:g}, w {record['cfg']}, seed {options.seed}: {grid}")

# ---- Pictures of the process: over time within one sample, and over training -----------------------------------------
def draw_trajectory(sampler):
    """For four images the state z_t in one row, the network's clean image in the next: nine steps and the result."""
    trace = {}
    final = sampler.pictures(sampler.draw(range(4), trace))
    shown = [list(trace.items())[i] for i in np.linspace(0, len(trace) - 1, min(9, len(trace))).round().astype(int)]
    states = [sampler.pictures(z / max(1, sampler.config.noise_scale)) for _, (z, _) in shown] + [final]
    clean = [sampler.pictures(x) for _, (_, x) in shown] + [final]
    rows = [[step[i] for step in kind] for i in range(4) for kind in (states, clean)]
    return data.picture(rows, [*(f"t = {t:.2f}" for t, _ in shown), "result"], ["z", "x_pred"] * 4)

def draw_evolution(sampler, files, ema):
    """The same seeds from every snapshot of a run: a row per snapshot."""
    rows, classes = [], []
    for file in files:
        net, info = model.load_network(file, ema)
        sampler.net, classes = net.to(sampler.device), info.get("classes") if net.config.num_classes else []
        rows.append(list(sampler.pictures(sampler.draw(range(10)))))
    names = [classes[sampler.labels[i % len(sampler.labels)]] for i in range(10)] if classes else []
    return data.picture(rows, names, [f"step {int(file.stem)}" for file in files])

# ---- Running it ------------------------------------------------------------------------------------------------------
HOW = {"solver": "heun", "steps": 50, "cfg": 1.0, "interval": (0.0, 1.0), "t_eps": 0.05, "shift": 1.0, "reuse": 1}

@dataclass
class Options:
    run: str = option("shapes", "runs/NAME, or a folder", group="what")
    checkpoint: Path = option(None, "a checkpoint file instead; also the official release's")
    ema: int = option(0, "which averaged weights, 0 = the first; -1 = the raw ones", "[-1, inf)")
    num: int = option(1000, "number of images", "[1, 10000000]")
    labels: str = option("all", "ids or names, which take turns: all | 3,7 | star")
    seed: int = option(0, "image i is a function of (seed, i)", "[0, inf)")
    solver: str = option(None, "heun: two velocities a step, one in the last (default: heun)", choices=tuple(SOLVERS),
                         group="how (what the checkpoint's preset recommends comes before these defaults)")
    steps: int = option(None, "of the time grid (default: 50)", "[1, 100000]")
    cfg: float = option(None, "guidance, 1 = off (default: 1)")
    interval: tuple = option(None, "times at which guidance acts (default: 0,1; the paper: 0.1,1)", "[0, 1]")
    t_eps: float = option(None, "clamp of 1-t, see the head of this file (default: 0.05)", "(0, 1)")
    shift: float = option(None, "t -> t/(t + A(1-t)): above 1, more steps near the noise (default: 1)", "(0, inf)")
    reuse: int = option(None, "wide head: run the backbone only every N-th step (default: 1)", "[1, inf)")
    out: Path = option(None, "folder of images (default: samples, in the run's folder)", group="output")
    npz: bool = option(False, "also pack samples.npz (arr_0 uint8 NHWC, arr_1 labels), as ADM's evaluator reads it")
    trajectory: bool = option(False, "only draw z_t over time and what the network predicts")
    evolution: bool = option(False, "only draw the same seeds from all snapshots of the run")
    overwrite: bool = option(False, "replace samples made with other settings")
    batch_size: int = option(100, "images at a time and process", "[1, inf)", group="hardware")
    device: str = option(None, "cuda or cpu")
    amp: str = option(None, "network in bf16, state in fp32 (default: bf16 where it is fast)", choices=("bf16", "off"))
    compile: bool = option(False, "torch.compile the network")

def settings_of(options, info, config):
    """Settings of generate(): flags, then what the checkpoint recommends, then the paper's.  Raises UsageError."""
    how = HOW | info.get("sampling", {}) | {k: getattr(options, k) for k in HOW if getattr(options, k) is not None}
    if len(how["interval"]) != 2 or not how["interval"][0] < how["interval"][1]:
        raise data.UsageError("--interval: give two times from 0 to 1, the lower first, as in 0.1,1")
    if options.cfg not in (None, 1) and not config.num_classes:
        raise data.UsageError(f"--cfg {options.cfg}: trained without classes, it has nothing to guide towards")
    if how["reuse"] > 1 and (options.compile or not config.head_depth):
        raise data.UsageError("--reuse is for networks with a wide head (03_train.py --head-depth), without --compile")
    if config.two_times and how["solver"] != "euler":
        raise data.UsageError("a network trained by --objective meanflow knows mean velocities: use --solver euler")
    return how if config.num_classes else how | {"cfg": 1.0}

def fingerprint(net):
    """Eight hex digits of a network's weights: samples of other weights are other samples."""
    crc = 0
    for value in net.state_dict().values():
        crc = zlib.crc32(value.cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"

def main(argv=None):
    options = Options(**data.parse(argv, "Sample images from a trained JiT.", Options))
    with model.machine(options.device) as (device, rank, world):
        path = options.checkpoint or data.folder_of(options.run, "runs") / "checkpoint.pt"
        net, info = model.load_network(path, options.ema)
        classes = info.get("classes", []) if net.config.num_classes else []            # an unconditional one has none
        labels = parse_labels(options.labels, options.num, classes, net.config.num_classes)
        how, amp = settings_of(options, info, net.config), model.choose_precision(options.amp, device)
        made_by, source = info.get("coder"), info.get("data")
        coder = made_by and model.load_coder(data.folder_of(source, "data"), made_by)  # of latents, else None
        sampler = Sampler(net, labels, options.seed, how, amp, device, options.compile, coder)
        if options.trajectory or options.evolution:
            return draw_process(options, sampler, path.parent) if rank == 0 else None
        record = {**how, "seed": options.seed, "amp": amp, "num": len(labels), "checkpoint": str(path),
                  "step": info.get("step"), "ema": options.ema, "weights": fingerprint(net),
                  "data": source, "size": net.config.image_size, "classes": classes, "labels": labels}
        if made_by:                                       # scored against the pixels that the latents were made of
            record |= {"data": made_by["pixels"], "size": made_by["size"], "coder": made_by["id"]}
        record["interval"] = list(how["interval"])        # as JSON gives it back
        write_samples(options, sampler, record, path.parent, rank, world)

def draw_process(options, sampler, folder):
    """--trajectory and --evolution."""
    name, files = "trajectory" if options.trajectory else "evolution", sorted((folder / "snapshots").glob("*.pt"))
    path = options.out.with_name(f"{options.out.name}-{name}.png") if options.out else folder / f"{name}.png"
    if not options.trajectory and not files:
        raise ValueError(f"no snapshots in {folder / 'snapshots'}: train with 03_train.py --snapshots 8")
    picture = draw_trajectory(sampler) if options.trajectory else draw_evolution(sampler, files, options.ema)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_picture(path, picture)
    print(f"look at {path}")

if __name__ == "__main__":
    sys.exit(data.run(main))
