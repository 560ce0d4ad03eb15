"""04_sample.py -- sampling: follow the velocity from noise to an image, guided towards a class

What this stage teaches: Euler and Heun on dz/dt = v, DDIM and DDPM for comparison, and classifier-free guidance inside an
interval of time.  Reads runs/<name>/checkpoint.pt (ours or the official release's).
Writes runs/<name>/samples/ (PNG files and samples.json; samples.npz with --npz) and runs/<name>/grid.png.
Run it:   python 04_sample.py                                   1,000 images from the shapes run, 40 s on two CPU cores
          python 04_sample.py --labels star,3 --num 16 --cfg 4 --out stars
          torchrun --nproc_per_node 8 -- 04_sample.py --checkpoint jit-b-16.pth --num 50000 --cfg 2.9 --interval 0.1,1 --npz

t = 0 is noise, t = 1 is data.  Guidance: v = v_uncond + w (v_class - v_uncond); w = 1 is off, and the pass without class is
then skipped.  Every image has its own random numbers, a function of (seed, index): the same picture whatever the batch
size, the number of processes, the order, or where a run was interrupted.  A killed run goes on where it was.

The clamp: v = (x_pred - z) / max(1-t, t_eps).  At t_eps = 0.05 and 50 steps the last steps are shortened, and even a perfect
network leaves noise of std 0.017, about 2 grey levels; --t-eps 0.02 (any value up to 1/steps) ends exactly on x_pred.  The
paper's FID is measured with the clamp, and is better with it, so it is the default.  Users take the grain for a fault.
"""
import argparse
import json
import os
import signal
import sys
import time
import zlib
from datetime import timedelta
from importlib import import_module
from pathlib import Path

SOLVERS = ("heun", "euler", "ddim", "ddpm")


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Options of this script; wrong ones end it with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Sample images from a trained JiT.", usage="%(prog)s [options]", allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=120))
    add = parser.add_argument_group("what").add_argument
    add("--run", default="shapes", metavar="NAME", help="runs/NAME, or a folder (default: shapes)")
    add("--checkpoint", type=Path, metavar="FILE", help="a checkpoint file instead; also the official release's")
    add("--ema", type=int, default=0, metavar="K", help="which averaged weights, 0 = the first; -1 = the raw ones (default: 0)")
    add("--num", type=int, metavar="N", help="number of images (default: 1000)")
    add("--labels", default="all", help="ids, names, or both times a count: all | 3,7 | star | 207x16 (default: all, in turn)")
    add("--seed", type=int, default=0, metavar="N", help="image i is a function of (seed, i) (default: 0)")
    add = parser.add_argument_group("how (what the checkpoint's preset recommends comes before these defaults)").add_argument
    add("--solver", choices=SOLVERS, help="heun: two slopes a step, one in the last (default: heun)")
    add("--steps", type=int, metavar="N", help="(default: 50)")
    add("--cfg", type=float, metavar="W", help="guidance, 1 = off (default: 1)")
    add("--interval", metavar="LOW,HIGH", help="times at which guidance acts (default: 0,1; the paper: 0.1,1)")
    add("--t-eps", type=float, metavar="X", help="clamp of 1-t, see the head of this file (default: 0.05)")
    add("--shift", type=float, metavar="A", help="t -> t/(t + A(1-t)): above 1, more of the steps near the noise (default: 1)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="folder of images (default: samples, in the run's folder)")
    add("--npz", action="store_true", help="also pack samples.npz (arr_0 uint8 NHWC, arr_1 labels), as ADM's evaluator reads it")
    add("--trajectory", action="store_true", help="only draw z_t over time and what the network predicts, PNG and GIF")
    add("--evolution", action="store_true", help="only draw the same seeds from all snapshots of the run, PNG and GIF")
    add("--overwrite", action="store_true", help="replace samples made with other settings")
    add = parser.add_argument_group("hardware").add_argument
    add("--batch-size", type=int, default=100, metavar="N", help="images at a time and process (default: 100)")
    add("--device", metavar="NAME", help="cuda or cpu")
    add("--amp", choices=("bf16", "off"), help="network in bf16, state in fp32 (default: bf16 where it is fast)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--benchmark", action="store_true", help="time one batch, against a loop that always runs two separate passes")
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)", 2))
    return checked(parser.parse_args(argv), parser)


def checked(args, parser):
    """The options with the interval as two numbers, once their values make sense."""
    if args.interval is not None:
        try:
            args.interval = [float(v) for v in args.interval.split(",")]
            assert len(args.interval) == 2 and 0 <= args.interval[0] < args.interval[1] <= 1
        except (ValueError, AssertionError):
            parser.error(f"--interval {args.interval}: give two times from 0 to 1, as in 0.1,1")
    for name in ("num", "steps", "t_eps", "shift", "batch_size"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: give a number from 0 on")
    return args


def fail(message, code=1):
    """Print one line on stderr (the first process of every machine only) and return the exit code: 1 failure, 2 wrong usage."""
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: error: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C while torch is imported: no traceback
    ARGS = parse_args()

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

model = import_module("02_model")                         # a name that begins with a digit cannot follow `import`


# ---------------------------------------------------------------------------------------------------------------------
# Guided velocity: one or two predictions, turned into the direction to go                    (JiT Algorithm 2; CFG on v)
# ---------------------------------------------------------------------------------------------------------------------

def velocity(net, z, t, labels, t_eps):
    """v (B,C,H,W) in fp32 at the time t, a float, from whatever the network predicts."""
    config, times = getattr(net, "config", None), torch.full((len(z),), t, device=z.device)
    pred, path = (config.pred, config.path) if config else ("x", "linear")
    return model.convert(net(z, times, labels), pred, "v", z, times, path, t_eps)


def guidance_at(t, cfg, interval):
    """w at the time t: cfg for low < t < high, else 1; a low end of 0 includes t = 0.

    subtle: grid points such as 6/20 land a rounding error beside the ends 0.3 and 0.7; the margin decides for "outside".
    """
    low, high = interval
    return cfg if t < high - 1e-6 and (low == 0 or t > low + 1e-6) else 1.0


def guided_velocity(net, z, t, labels, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05):
    """v_uncond + w (v_class - v_uncond), with w = cfg inside the interval of time and 1 outside.     (JiT appendix A)

    z: (B,C,H,W) state.  t: float.  labels: (B,) class ids.  Both halves go through the network as one batch; where w is 1
    the unconditional half is skipped, where w is 0 the other.
    """
    w = guidance_at(t, cfg, interval)
    if w == 1:
        return velocity(net, z, t, labels, t_eps)
    null = torch.full_like(labels, net.config.num_classes)
    if w == 0:
        return velocity(net, z, t, null, t_eps)
    v_class, v_null = velocity(net, torch.cat([z, z]), t, torch.cat([labels, null]), t_eps).chunk(2)
    return v_null + w * (v_class - v_null)


def two_passes(net, z, t, labels, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05):
    """The plain way, for --benchmark only: always both passes, one after the other."""
    w = guidance_at(t, cfg, interval)
    v_class, v_null = velocity(net, z, t, labels, t_eps), velocity(net, z, t, torch.full_like(labels, net.config.num_classes), t_eps)
    return v_null + w * (v_class - v_null)


# ---------------------------------------------------------------------------------------------------------------------
# Solvers: one step from t to s, where slope(z, t) is the guided velocity
# ---------------------------------------------------------------------------------------------------------------------

def euler_step(z, t, s, slope):
    """z + (s-t) v(z, t): first order.  (JiT Algorithm 2)"""
    return z + (s - t) * slope(z, t)


def heun_step(z, t, s, slope):
    """The mean of the slopes at both ends: second order.  The last step, s = 1, is Euler's.       (JiT section 3.1)"""
    first = slope(z, t)
    ahead = z + (s - t) * first
    return ahead if s == 1 else z + (s - t) * (first + slope(ahead, s)) / 2


def ddim_step(z, t, s, slope, path="linear"):
    """Take the current estimates of x and e and mix them anew for the time s: exact when they are right (DDIM eq. 12)."""
    x, e = denoised(z, t, slope, path)
    a_s, s_s, _, _ = model.path_coefficients(path, torch.tensor(s))
    return a_s.item() * x + s_s.item() * e


def ddpm_step(z, t, s, slope, path="linear", noise=0.0):
    """Draw from q(z_s | z_t, x) with x the current estimate: ancestral sampling (DDPM eq. 7, for any path a, s).

    noise: (B,C,H,W) with the std of the path's noise, k.
    """
    x, _ = denoised(z, t, slope, path)
    (a_t, s_t), (a_s, s_s) = ((c.item() for c in model.path_coefficients(path, torch.tensor(time))[:2]) for time in (t, s))
    ratio = a_t / a_s
    var = s_t**2 - ratio**2 * s_s**2                      # of z_t given z_s
    mean = (ratio * s_s**2 * z + var * a_s * x) / s_t**2
    return mean + max(0.0, var)**0.5 * s_s / s_t * noise


def denoised(z, t, slope, path):
    """Estimates of (x, e) from the guided velocity at the time t."""
    v, times = slope(z, t), torch.full((len(z),), t, device=z.device)
    return model.convert(v, "v", "x", z, times, path), model.convert(v, "v", "e", z, times, path)


@torch.no_grad()
def generate(net, noise, labels, *, solver="heun", steps=50, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05, shift=1.0,
             step_noise=None, guide=guided_velocity, trace=None):
    """Images (N,C,H,W), float in about [-1,1], from noise (N,C,H,W) with std k and labels (N,) int64.

    steps: of the time grid from 0 to 1; Heun-50 costs 99 network evaluations.  step_noise(i) -> like noise, fresh for step i
    (ddpm only; torch.randn_like otherwise).  trace: a dict that receives t -> (z, x_pred) of every step.  Raises ValueError.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown: one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    config = getattr(net, "config", None)
    path, k = (config.path, config.noise_scale) if config else ("linear", 1.0)
    grid = model.shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()
    z = noise.float()

    def slope(z, t):
        v = guide(net, z, t, labels, cfg, interval, t_eps)
        if trace is not None:                             # heun's look ahead to t comes first and is overwritten
            trace[t] = z, model.convert(v, "v", "x", z, torch.full((len(z),), t, device=z.device), path)
        return v

    for i, (t, s) in enumerate(zip(grid, grid[1:])):
        if solver == "heun":
            z = heun_step(z, t, s, slope)
        elif solver == "euler":
            z = euler_step(z, t, s, slope)
        elif solver == "ddim":
            z = ddim_step(z, t, s, slope, path)
        elif solver == "ddpm":
            z = ddpm_step(z, t, s, slope, path, step_noise(i) if step_noise else torch.randn_like(z) * k)
    return z


# ---------------------------------------------------------------------------------------------------------------------
# One seed per image
# ---------------------------------------------------------------------------------------------------------------------

def noise_for(indices, shape, seed, scale, step=None):
    """Noise (len(indices), *shape), std scale: image i's numbers depend on (seed, i) alone, and on the step for ddpm."""
    # subtle: torch's CPU generator keeps 32 bits of a seed, numpy's mixes any tuple, so (seed, i) pairs never collide
    key = (seed,) if step is None else (seed, step + 1)
    rows = [np.random.default_rng((*key, int(i))).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) * scale


def parse_labels(text, num, classes, num_classes):
    """--labels and --num -> one class id per image; without counts the ids take turns.  Raises ValueError.

    >>> parse_labels("star,2x3", None, ["ring", "star", "dot"], 3)
    [1, 2, 2, 2]
    """
    if text != "all" and not num_classes:
        raise ValueError(f"--labels {text}: this network was trained without classes")
    if text == "all":
        return [i % max(1, num_classes) for i in range(num or 1000)]
    ids, counted = [], False
    for part in text.split(","):
        name, times, count = part.strip().rpartition("x")                  # "207x16" -> "207", "x", "16"
        if part.strip() in classes or not (name and count.isdigit()):      # "star", or a name with an x in it, as "box" and "x2"
            name, times, count = part.strip(), "", "1"
        counted |= bool(times)
        if count == "0":
            raise ValueError(f"--labels {part.strip()}: a count of 0 asks for no image")
        label = classes.index(name) if name in classes else int(name) if name.isdigit() else -1
        if not 0 <= label < num_classes:
            raise ValueError(f"--labels: {name!r} is no class; ids go from 0 to {num_classes - 1}"
                             f"{', names are ' + ', '.join(classes[:12]) if classes else ''}{' ...' if len(classes) > 12 else ''}")
        ids += [label] * int(count)
    return [ids[i % len(ids)] for i in range(num or (len(ids) if counted else 1000))]


# ---------------------------------------------------------------------------------------------------------------------
# Writing: a folder of PNG files that knows its settings
# ---------------------------------------------------------------------------------------------------------------------

def write_whole(path, write):
    """Call write(temporary path) and move the result to its place: never half a file."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    write(part)
    os.replace(part, path)


def prepare(out, record, overwrite):
    """Make the folder, or check that what it holds was made with these settings.  Raises ValueError."""
    path = out / "samples.json"
    old = json.loads(path.read_text()) if path.exists() else None
    if old and old != record:
        changed = [k for k in record if old.get(k) != record[k] and k != "labels"] or ["labels"]
        if not overwrite:
            raise ValueError(f"{out} holds samples made with other settings ({changed[0]}: {str(old.get(changed[0]))[:40]}, now "
                             f"{str(record[changed[0]])[:40]}): pass --overwrite to replace them, or --out")
    if not old and out.exists() and (out.is_file() or any(not file.name.startswith(".") for file in out.iterdir())):
        raise ValueError(f"{out} holds files that this script did not write: choose another --out")
    if overwrite:
        for file in [*out.glob("[0-9]" * 6 + ".png"), out / "samples.npz"]:
            file.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(json.dumps(record)))


def sample_all(net, run, labels, out, s, args, device, autocast, rank, world):
    """Generate what is missing in the folder; batches are the same whoever computes them.  Returns how many were made."""
    config, made = net.config, 0
    batches = [range(i, min(i + args.batch_size, len(labels))) for i in range(0, len(labels), args.batch_size)][rank::world]
    todo = [batch for batch in batches if not all((out / f"{i:06d}.png").exists() for i in batch)]
    bar = tqdm(total=sum(map(len, batches)), initial=sum(map(len, batches)) - sum(map(len, todo)), desc="sampling", unit=" images",
               disable=None if rank == 0 else True)
    for batch in todo:
        images = model.to_uint8(draw_batch(run, config, batch, [labels[i] for i in batch], s, device, autocast))
        for i, image in zip(batch, images.permute(0, 2, 3, 1).cpu().numpy()):
            path = out / f"{i:06d}.png"
            if not path.exists():
                write_whole(path, lambda part: Image.fromarray(image).save(part, "png", compress_level=1))
        made += len(batch)
        bar.update(len(batch))
    bar.close()
    return made


def draw_batch(run, config, indices, labels, s, device, autocast, **more):
    """Images (B,C,H,W) in about [-1,1] of the given indices and labels; s: solver, steps, cfg, interval, t_eps, shift, seed."""
    shape = (config.in_channels, config.image_size, config.image_size)

    def noise(step=None):
        return noise_for(indices, shape, s["seed"], config.noise_scale, step).to(device)
    options = {k: s[k] for k in ("solver", "steps", "cfg", "interval", "t_eps", "shift")}
    with autocast:
        return generate(run, noise(), torch.tensor(labels, device=device), step_noise=noise, **options, **more)


def class_grid(load, labels, classes, rows=8, columns=10):
    """A picture with a column per class and its name above; load(i) -> image (C,H,W) in [-1,1]."""
    shown = sorted(set(labels))[:columns]
    places = [[i for i, label in enumerate(labels) if label == c][:rows] for c in shown]
    if len(shown) == 1:                                   # one class: fill the sheet with it
        places = [list(range(min(len(labels), rows * columns)))[i::columns] for i in range(columns)]
    depth = min(map(len, places)) or 1
    titles = [classes[c] if c < len(classes) else str(c) for c in shown] if len(shown) > 1 else []
    return model.picture([[load(column[y]) for column in places if y < len(column)] for y in range(depth)], titles)


def save_gif(frames, path):
    """Pictures of one size as a moving one; the last frame stays."""
    frames[0].save(path, "gif", save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500], loop=0)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the process: over time within one sample, and over training
# ---------------------------------------------------------------------------------------------------------------------

def trajectory(net, folder, labels, s, device, autocast):
    """Draw, for four images, the state z_t in one row and the network's clean image in the next."""
    trace, config = {}, net.config
    final = draw_batch(net, config, range(4), [labels[i % len(labels)] for i in range(4)], s, device, autocast, trace=trace)
    scale, steps = max(1, config.noise_scale), list(trace.items())
    shown = steps[::max(1, len(steps) // 9)][:9]
    rows = []
    for i in range(4):
        rows += [[z[i] / scale for _, (z, _) in shown] + [final[i]], [x[i] for _, (_, x) in shown] + [final[i]]]
    write_whole(folder / "trajectory.png", lambda part: model.picture(rows, [f"t={t:.2f}" for t, _ in shown] + ["result"]).save(part, "png"))
    frames = [model.picture([list(z / scale), list(x)]) for _, (z, x) in steps] + [model.picture([list(final), list(final)])]
    write_whole(folder / "trajectory.gif", lambda part: save_gif(frames, part))
    print(f"{folder / 'trajectory.png'}: z_t above, the prediction below, {len(shown)} of {len(steps)} times; also as .gif")


def evolution(folder, labels, s, args, device, autocast):
    """Draw the same seeds from every snapshot of a run: a row per snapshot."""
    files, rows = sorted((folder / "snapshots").glob("*.pt")), []
    if not files:
        raise ValueError(f"no snapshots in {folder / 'snapshots'}: train with 03_train.py --snapshots 8")
    for file in tqdm(files, desc="snapshots", disable=None):
        net, info = model.load_network(file, args.ema)
        rows.append(list(draw_batch(net.to(device), net.config, range(10), [labels[i % len(labels)] for i in range(10)], s, device, autocast)))
    titles = [info["classes"][labels[i % len(labels)]] if info.get("classes") and net.config.num_classes else "" for i in range(10)]
    write_whole(folder / "evolution.png", lambda part: model.picture(rows, titles).save(part, "png"))
    write_whole(folder / "evolution.gif", lambda part: save_gif([model.picture([row], titles) for row in rows], part))
    print(f"{folder / 'evolution.png'}: a row per snapshot, {files[0].stem} to {files[-1].stem} steps; also as .gif")


def benchmark(net, run, labels, s, args, device, autocast):
    """Images/s of one batch, against a loop that always runs two separate passes, in the same process."""
    config, batch, seconds = net.config, range(args.batch_size), {}
    labels = [labels[i % len(labels)] for i in batch]
    for name, guide in (("warm-up", guided_velocity), ("this", guided_velocity), ("two passes", two_passes), ("this", guided_velocity), ("two passes", two_passes)):
        start = time.perf_counter()
        draw_batch(run, config, batch, labels, {**s, "steps": 2} if name == "warm-up" else s, device, autocast, guide=guide).cpu()
        seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - start)
    calls = []
    counter = net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    draw_batch(net, config, batch, labels, s, device, autocast)
    counter.remove()
    rate = model.matmul_rate(device, torch.bfloat16 if args.amp == "bf16" else torch.float32)
    used = sum(calls) * 2 * model.count_macs(config) / seconds["this"] / rate
    print(f"{config.image_size} px, {s['solver']} {s['steps']} steps, w {s['cfg']} in {s['interval']}, {args.amp}, batch {args.batch_size}: "
          f"{len(batch) / seconds['this']:.2f} images/s, {sum(calls) / len(batch):.0f} network evaluations per image, utilisation "
          f"{used * 100:.1f} % of {rate / 1e12:.3f} TFLOP/s, {seconds['two passes'] / seconds['this']:.2f} times as fast as two separate passes")


# ---------------------------------------------------------------------------------------------------------------------
# As a script
# ---------------------------------------------------------------------------------------------------------------------

def settle(args, info, config):
    """Sampling settings: flags first, then what the checkpoint recommends, then the paper's.  Raises ValueError."""
    s = {"solver": "heun", "steps": 50, "cfg": 1.0, "interval": [0.0, 1.0], "t_eps": 0.05, "shift": 1.0, **info.get("sampling", {})}
    s.update({k: getattr(args, k) for k in s if getattr(args, k) is not None}, seed=args.seed)
    if not config.num_classes and s["cfg"] != 1:
        if args.cfg is not None:
            raise ValueError(f"--cfg {args.cfg}: this network was trained without classes, there is nothing to guide towards")
        s["cfg"] = 1.0
    return s


def fingerprint(net):
    """Eight hex digits of a network's weights: samples of other weights are other samples."""
    crc = 0
    for value in net.state_dict().values():
        crc = zlib.crc32(value.cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


def collect(out, grid, labels, classes, npz):
    """From the finished folder, the grid and, for npz = the size of an image, ADM's samples.npz."""
    def load(i):
        return np.array(Image.open(out / f"{i:06d}.png"))
    sheet = class_grid(lambda i: torch.from_numpy(load(i)).permute(2, 0, 1) / 127.5 - 1, labels, classes)
    write_whole(grid, lambda part: sheet.save(part, "png"))
    if npz:
        images = np.empty((len(labels), npz, npz, 3), np.uint8)
        for i in range(len(labels)):
            images[i] = load(i)
        write_whole(out / "samples.npz", lambda part: np.savez(part.open("wb"), arr_0=images, arr_1=np.array(labels)))


def run(args, device, rank, world):
    """Load, sample, write.  Returns the exit code."""
    folder = Path(args.run) if "/" in args.run else Path("runs") / args.run
    path = args.checkpoint or folder / "checkpoint.pt"
    folder = path.parent if args.checkpoint else folder
    net, info = model.load_network(path, args.ema)
    classes = info.get("classes", []) if net.config.num_classes else []                # trained without: the data's names say nothing
    s = settle(args, info, net.config)
    labels = parse_labels(args.labels, args.num, classes, net.config.num_classes)
    net = net.to(device)
    network = torch.compile(net) if args.compile else net
    args.amp = args.amp or ("bf16" if model.bf16_is_fast(device) else "off")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")
    if args.benchmark:
        return benchmark(net, network, labels, s, args, device, autocast)
    if args.trajectory:
        return trajectory(net, folder, labels, s, device, autocast)
    if args.evolution:
        return evolution(folder, labels, s, args, device, autocast)
    record = {**s, "interval": list(s["interval"]), "amp": args.amp, "num": len(labels), "checkpoint": str(path), "step": info.get("step"), "ema": args.ema,
              "decays": info.get("decays"), "weights": fingerprint(net), "data": info.get("data"), "size": net.config.image_size, "classes": classes, "labels": labels}
    out = args.out or folder / "samples"
    problem = [None]
    if rank == 0:
        try:
            prepare(out, record, args.overwrite)
        except (ValueError, OSError) as error:
            problem = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)               # all stop together, or all go on
    if problem[0]:
        raise ValueError(problem[0])
    made = sample_all(net, network, labels, out, s, args, device, autocast, rank, world)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        grid = folder / "grid.png" if args.out is None else out.with_name(out.name + "-grid.png")
        collect(out, grid, labels, classes, args.npz and net.config.image_size)
        print(f"{out}: {len(labels)} images ({made if world == 1 else 'all'} new), "
              f"{s['solver']} {s['steps']} steps, shift {s['shift']:g}, w {s['cfg']}, seed {s['seed']}; look at {grid}")
    return 0


def main(args):
    """Set up the device and the processes, and turn expected errors into one line and an exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model.keep_freed_memory()
    try:
        device = model.pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return run(args, device, rank, world) or 0
    except (ValueError, OSError) as error:
        return fail(str(error), 2 if str(error).startswith("--") else 1)
    except torch.cuda.OutOfMemoryError:
        return fail("out of GPU memory: pass a smaller --batch-size (the images stay the same)")
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where it was")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(ARGS))
