"""04_sample.py -- sampling: follow the velocity from noise to an image, guided towards a class

What this stage teaches: Euler and Heun on dz/dt = v, DDIM and DDPM, and classifier-free guidance inside an interval.
Reads runs/<name>/checkpoint.pt (ours or the official release's).
Writes runs/<name>/samples/ (PNG files and samples.json; samples.npz with --npz) and runs/<name>/grid.png.
Run it:   python 04_sample.py                               1,000 images of the shapes run, 53 s on two CPU cores
          torchrun --nproc_per_node 8 -- 04_sample.py --checkpoint jit-b-16.pth --num 50000 --cfg 2.9 --interval 0.1,1

t = 0 is noise, t = 1 is data.  Image i is a function of (seed, i), whatever the batches, processes or interruptions.

The clamp makes the last steps of euler and heun too short: noise of std 0.017 k is left (Heun 50); --t-eps 0.02: none.
"""
import csv
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    for name in "02_model", "04_sample":                  # %run again: forget what the last run's experiments added
        sys.modules.pop(name, None)
data = import_module("01_data")
model = import_module("02_model")                         # before torch: it sets GOMP_SPINCOUNT, which torch reads
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

option, refuse = data.option, data.refuse

# ---- Guided velocity: one or two predictions, turned into the direction to go --------- (JiT Algorithm 2; CFG on v) --
def predict(net, z, t, labels, to="v", t_eps=model.T_EPS):
    """The prediction for z (B,C,H,W) at the time t, a float, in fp32: the velocity, or the image if to is "x"."""
    config = config_of(net)
    times = torch.full((len(z),), t, device=z.device)
    out = net(z, times, labels).float()                   # the image, x_pred
    if (config.pred, config.path) != ("x", "linear"):     # unless --pred or the path says otherwise
        return model.convert(out, config.pred, to, z, times, config.path, t_eps)
    return out if to == "x" else (out - z) / max(1 - t, t_eps)

def guided(net, z, t, labels, cfg=1.0, interval=(0.0, 1.0), to="v", t_eps=model.T_EPS):
    """The guided velocity, v_null + w (v_class - v_null): w = cfg inside the interval, 1 outside.      (JiT appendix A)

    z: (B,C,H,W) state.  t: float.  labels: (B,) class ids; num_classes stands for "no class", whose velocity is v_null.
    The interval is open, low < t < high, but low = 0 includes t = 0.  Both halves go through the network as one batch;
    where w is 1 the null half is skipped, where w is 0 the class half.  Images (to="x") mix as velocities do.
    """
    low, high = interval
    # subtle: grid points such as 6/20 land a rounding error beside the ends 0.3 and 0.7; the margin says "outside"
    inside = (low == 0 or t > low + 1e-6) and t < high - 1e-6
    w = cfg if inside else 1.0
    if w == 1:
        return predict(net, z, t, labels, to, t_eps)
    null = torch.full_like(labels, config_of(net).num_classes)
    if w == 0:
        return predict(net, z, t, null, to, t_eps)
    both = predict(net, torch.cat([z, z]), t, torch.cat([labels, null]), to, t_eps)
    v_class, v_null = both.chunk(2)
    return v_null + w * (v_class - v_null)

# ---- One step from t to t_next; velocity(z, t) is the guided one; *_ takes what only ddim and ddpm need --------------
def euler_step(z, t, t_next, velocity, *_):
    """One step along the velocity, z + (t_next - t) velocity(z, t): first order.                  (JiT Algorithm 2)"""
    return z + (t_next - t) * velocity(z, t)

def heun_step(z, t, t_next, velocity, *_):
    """The mean of the velocities at both ends: second order.  The last step, to t = 1, is Euler's.  (JiT sec. 3.1)"""
    first = velocity(z, t)
    ahead = z + (t_next - t) * first
    if t_next == 1:
        return ahead
    second = velocity(ahead, t_next)
    return z + (t_next - t) * (first + second) / 2

# ---- The walk from noise to data -------------------------------------------------------------------------------------
@torch.no_grad()
def walk(net, noise, labels, *, solver="heun", steps=50, cfg=1.0, interval=(0.0, 1.0), t_eps=model.T_EPS, shift=1.0,
         step_noise=None):
    """Yield (t, z) at every point of the time grid, from (0.0, noise) to (1.0, images).  See generate()."""
    # a network may know fewer solvers
    refuse(solver not in getattr(net, "solvers", SOLVERS) or steps < 1, f"solver {solver!r}, {steps} steps: give one "
           f"of {', '.join(getattr(net, 'solvers', SOLVERS))}, and at least 1 step")
    asked_for, step = SOLVERS[solver]                     # "v" or "x", and the function
    config = config_of(net)

    def ask(z, t):
        return guided(net, z, t, labels, cfg, interval, asked_for, t_eps)

    def fresh_noise():                                    # for ddpm; i and z are those of the loop below
        return step_noise(i) if step_noise else torch.randn_like(z) * config.noise_scale

    z = noise.float()
    grid = model.shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        yield t, z
        if hasattr(net, "begin_step"):                    # experiment: a network that wants to know where the step ends
            net.begin_step(i, t, t_next)
        z = step(z, t, t_next, ask, fresh_noise, model.PATHS[config.path].scales)
    yield 1.0, z

def generate(net, noise, labels, **settings):
    """Images (N,C,H,W), float in about [-1,1], from noise (N,C,H,W) with std k and labels (N,) int64.

    settings, see walk(): solver; steps of the time grid (Heun-50 costs 99 network evaluations); cfg and the interval of
    t in which it acts; t_eps; shift of the grid; step_noise(i), what ddpm adds in step i, shaped as noise (default:
    drawn by torch).  Raises UsageError.
    """
    for _, images in walk(net, noise, labels, **settings):
        pass                                              # the last are wanted
    return images

# ---- The same step in the language of diffusion; x_at(z, t) is the guided image, scales(t) = (alpha, sigma) of a path
def ddim_step(z, t, t_next, x_at, fresh_noise, scales):
    """Split z into image and noise, and mix them anew: z_next = alpha_next x + sigma_next e.           (DDIM eq. 12)

    With the true image it stays on the path.  On the linear path it is Euler's step without the clamp.
    """
    alpha, sigma = scales(t)
    alpha_next, sigma_next = scales(t_next)
    x = x_at(z, t)
    e = (z - alpha * x) / sigma
    return alpha_next * x + sigma_next * e

def ddpm_step(z, t, t_next, x_at, fresh_noise, scales):
    """Draw z_next given z and the image: ancestral sampling.                                 (DDPM eq. 7, for any path)

    Two normal distributions constrain z_next.  Given the image, z_next ~ N(alpha_next x, sigma_next^2).  And z is a
    noisier z_next: z = r z_next + N(0, added), with r = alpha / alpha_next and added = sigma^2 - r^2 sigma_next^2.
    The product of two Gaussians is a Gaussian.  Inverse variances add: 1/sigma_next^2 + r^2/added = sigma^2 /
    (sigma_next^2 added).  Its mean is theirs, weighted by inverse variance.  All variances are in units of k^2, which
    cancels in the mean; fresh_noise(), of std k, brings it back.
    """
    alpha, sigma = scales(t)
    alpha_next, sigma_next = scales(t_next)
    x = x_at(z, t)
    r = alpha / alpha_next
    added = max(0.0, sigma**2 - r**2 * sigma_next**2)
    variance = sigma_next**2 * added / sigma**2
    mean = (added * alpha_next * x + sigma_next**2 * r * z) / sigma**2
    return mean + variance**0.5 * fresh_noise()

SOLVERS = {"heun": ("v", heun_step), "euler": ("v", euler_step),               # experiment: (what it asks for, step)
           "ddim": ("x", ddim_step), "ddpm": ("x", ddpm_step)}

# ======================================================================================================================
# first reading ends here: what follows gives every image its own noise, and writes files
# ======================================================================================================================

def config_of(net):
    """A function without a configuration is taken for a JiT's forward."""
    return getattr(net, "config", model.JiTConfig())

# ---- One seed per image ----------------------------------------------------------------------------------------------
def noise_for(indices, shape, seed, scale, step=-1):
    """Noise (len(indices), *shape), std scale: image i's depends on (seed, i) alone, and for ddpm on the step.

    subtle: numpy mixes a whole tuple into its seed (torch's CPU generator keeps 32 bits) but ignores zeros at its end,
    (s, i) being (s, i, 0): so the noise at the start, step -1, has 0 in the step's place, and step j has j + 1.
    """
    def of_image(i):
        return np.random.default_rng((seed, i, step + 1)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.stack(list(THREADS.map(of_image, indices)))) * scale

THREADS = ThreadPoolExecutor()                            # numpy lets others run while it draws numbers

class Sampler:
    """A network, the labels that are asked of it, and the settings of walk()."""

    def __init__(self, net, labels, seed, settings, amp, device, coder=None):
        self.net = net.to(device)
        self.config = net.config
        self.labels = labels
        self.seed = seed
        self.settings = settings
        self.device = device
        self.autocast = model.autocast(amp, device)
        self.coder = coder and coder.to(device)

    def labels_of(self, indices):
        """The labels take turns."""
        return torch.tensor([self.labels[i % len(self.labels)] for i in indices], device=self.device)

    def states(self, indices):
        """(t, z) along the way, z (B,C,H,W); the last are the images, in about [-1,1], or latents."""
        shape = (self.config.in_channels, self.config.image_size, self.config.image_size)

        def noise(step=-1):
            return noise_for(indices, shape, self.seed, self.config.noise_scale, step).to(self.device)
        with self.autocast:
            yield from walk(self.net, noise(), self.labels_of(indices), step_noise=noise, **self.settings)

    def images(self, indices):
        for _, images in self.states(indices):
            pass
        return images

    def pictures(self, x):
        """Images or latents -> uint8 (B,H,W,3).  Raises ValueError if a number in them is none."""
        if not torch.isfinite(x).all():
            raise ValueError("the network, with these settings, makes numbers that are not finite: no picture is made")
        return model.to_pictures(x, self.coder)

def parse_labels(text, num, classes, num_classes):
    """--labels and --num -> one class id per image; ids and names take turns.  Raises UsageError.

    The whole text may be one class's name; in a list, names with commas stand in quotes.  A number is an id, but where
    classes are called by numbers it is a name; id:3 is always an id.

    >>> parse_labels("star,2", 3, ["ring", "star", "dot"], 3)
    [1, 2, 1]
    """
    if text is None or text == "all" and text not in classes:
        return [i % max(1, num_classes) for i in range(num)]
    refuse(not num_classes, f"--labels {text}: this network was trained without classes")
    ids = []
    rows = csv.reader(text.splitlines(True), skipinitialspace=True)
    for name in [text] if text in classes else sum(rows, []) or [text]:
        number = name.removeprefix("id:")
        as_id = number.isdecimal() and (number != name or not any(map(str.isdecimal, classes)))
        label = classes.index(name) if name in classes else int(number) if as_id else -1
        refuse(not 0 <= label < num_classes, f"--labels: {name!r} is not a class; ids: id:0 to id:{num_classes - 1}, "
               f"names are {', '.join(classes[:12]) + ' (one with a comma in quotes)' if classes else 'not known'}")
        ids.append(label)
    return [ids[i % len(ids)] for i in range(num)]

# ---- Writing: a folder of PNG files that knows its settings ----------------------------------------------------------
SAMPLE_FILES = """[0-9][0-9][0-9][0-9][0-9][0-9][0-9].png samples.json samples.npz*
                  .DS_Store .*.lock *.jit-part""".split()

def file_of(out, i):
    return out / f"{i:07d}.png"

def is_whole(path):
    """A PNG file that is there, whose parts fit their checksums."""
    try:
        with Image.open(path) as image:
            image.verify()
        return True
    except Exception:                                     # Pillow raises many kinds
        return False

def image_of(out, i):
    return np.asarray(data.read_image(file_of(out, i)))

def check_folder(out, record, overwrite):
    """Raise ValueError if the folder holds anything but samples made with these settings, or others to overwrite.

    Returns how many images are to be cleared away: those of its record, and where the new ones will lie.
    """
    ours = (out / "samples.json").exists()
    data.only_ours(out, SAMPLE_FILES if ours else ("*.jit-part", ".*.lock"), "choose another --out")
    if not ours:
        return 0
    old = asdict(Settings()) | data.load_json(out / "samples.json", weights=str, labels=list)  # may lack a setting
    if overwrite:
        return max(len(old["labels"]), record["num"])
    data.refuse_other(old, record, out, "pass --overwrite to replace them, or --out")
    return 0

def sample_all(sampler, out, batch_size, rank, world):
    """Generate what is missing, and return its batches, which are the same whoever computes them."""
    batches = data.in_parts(range(len(sampler.labels)), batch_size)[rank::world]
    todo = [batch for batch in batches if not all(is_whole(file_of(out, i)) for i in batch)]

    def write(i, image):
        with data.whole(file_of(out, i)) as part:
            Image.fromarray(image).save(part, "png", compress_level=1)
    writing = []
    with ThreadPoolExecutor() as pool, data.Progress(sum(map(len, todo)), "sampling", " images") as bar:
        for batch in todo:
            images = sampler.pictures(sampler.images(batch))
            list(writing)                                 # waits for the files of the batch before
            writing = pool.map(write, batch, images)
            bar.update(len(batch))
        list(writing)
    return todo

def save_npz(out, labels, size):
    """samples.npz as ADM's evaluator reads it: arr_0 uint8 (N,H,W,3), arr_1 labels; memory holds an image at a time."""
    with data.whole(out / "arr_0.jit-part") as rows:
        data.save_rows(rows, (image_of(out, i) for i in range(len(labels))), (size, size, 3))
        with data.whole(out / "samples.npz") as part, open(part, "wb") as file:
            np.savez(file, arr_0=np.load(rows, mmap_mode="r"), arr_1=labels)
    (out / "arr_0.jit-part").unlink()

def write_samples(options, sampler, record, folder, rank, world):
    """Fill the folder of samples, then draw the grid."""
    out = options.out or folder / "samples"
    wait = dist.barrier if world > 1 else lambda: None
    with data.locked(out) if rank == 0 else nullcontext():
        old = check_folder(out, record, options.overwrite)
        wait()                                            # all have looked before the first writes
        if rank == 0:
            out.mkdir(exist_ok=True)
            if old:
                sampler.pictures(sampler.images([0]))     # is it finite?  If not, the others are not lost
                (out / "samples.npz").unlink(missing_ok=True)
            for i in range(old):
                file_of(out, i).unlink(missing_ok=True)
            data.save_json(out / "samples.json", record)
        wait()
        made = sample_all(sampler, out, options.batch_size, rank, world)
        wait()
        if rank == 0:
            grid = Path(f"{out}-grid.png") if options.out else folder / "grid.png"
            model.save_picture(grid, data.class_picture(sampler.labels, record["classes"], lambda i: image_of(out, i)))
            if options.npz:
                save_npz(out, sampler.labels, record["size"])
            drawn = [record["classes"][label] for label in dict.fromkeys(sampler.labels) if record["classes"]]
            names = textwrap.shorten(", ".join(drawn), 90)
            print(f"{out}: {record['num']} images{names and f' ({names})'}, {record['solver']} {record['steps']} "
                  f"steps, shift {record['shift']:g}, w {record['cfg']}, seed {options.seed}: {grid}"
                  f"{'' if made or world > 1 else ' (nothing was missing; --overwrite makes all anew)'}")

# ---- A picture of the way from noise to image ------------------------------------------------------------------------
def draw_trajectory(sampler, path):
    """For four images the state z_t, scaled, in a row, below it the predicted image: nine steps at most, the result."""
    *way, (_, result) = sampler.states(range(4))
    shown = way[::-(-len(way) // 9)]                      # every n-th, nine at most
    columns = []
    how = sampler.settings
    for t, z in shown:
        with sampler.autocast, torch.no_grad():
            x = guided(sampler.net, z, t, sampler.labels_of(range(4)), how["cfg"], how["interval"], "x", how["t_eps"])
        columns.append([sampler.pictures(z / max(1, sampler.config.noise_scale)), sampler.pictures(x)])
    columns.append([sampler.pictures(result)] * 2)
    titles = [*(f"t = {t:.2f}" for t, _ in shown), "result"]
    model.save_picture(path, data.picture(model.interleaved(columns), titles, ["z", "x_pred"] * 4))
    print(f"look at {path}")

# ---- Running it ------------------------------------------------------------------------------------------------------
@dataclass
class Settings:
    """Of walk().  What the checkpoint's preset recommends comes before these defaults."""
    solver: str = option("heun", f"{' | '.join(SOLVERS)}, or of an experiment; heun asks for two velocities a step",
                         group="how (what the checkpoint's preset recommends comes before these defaults)")
    steps: int = option(50, "of the time grid", "[1, 100000]")
    cfg: float = option(1.0, "guidance, 1 = off")
    interval: tuple = option((0.0, 1.0), "times between which guidance acts; the paper: 0.1,1", "[0, 1]")
    t_eps: float = option(model.T_EPS, "clamp of 1-t in euler and heun, see the head of this file", "(0, 1)")
    shift: float = option(1.0, "t -> t/(t + A(1-t)): above 1, more steps near the noise", "[0.001, 1000]")
    __post_init__ = model.check_fields

@dataclass
class Options:
    run: str = option("shapes", "runs/NAME, or a folder", group="what")
    checkpoint: Path = option(None, "a checkpoint file instead; also the official release's")
    experiment: str = option("", "of a run with an experiment file of your own: its path")
    ema: int = option(0, "which averaged weights, 0 = the first; -1 = the raw ones", "[-1, inf)")
    num: int = option(1000, "number of images", "[1, 10000000]")
    labels: str = option(None, "ids, names (which come first), or id:3, and take turns: 3,7 or star (default: all)")
    seed: int = option(0, "image i is a function of (seed, i)", "[0, 1e18]")
    out: Path = option(None, "folder of images; of --trajectory the PNG picture (default: in the run's folder)",
                       group="output")
    npz: bool = option(False, "also pack samples.npz (arr_0 uint8 NHWC, arr_1 labels), as ADM's evaluator reads it")
    trajectory: bool = option(False, "only draw z_t over time and what the network predicts")
    overwrite: bool = option(False, "replace samples made with other settings")
    batch_size: int = option(100, "images at a time and process", "[1, inf)", group="hardware")
    device: str = option(None, "cuda or cpu")
    amp: str = option(None, "precision of the network; the state is fp32 (default: bf16 where it is fast)",
                      choices=lambda: ("bf16", "fp16", "off"))
    compile: bool = option(False, "torch.compile the network")

def settings_of(given, info, net):
    """Settings of walk(): flags, then what the checkpoint recommends, then the paper's.  Raises UsageError."""
    flags = model.settings_for(Settings, given)
    settings = asdict(Settings(**model.settings_for(Settings, info["sampling"]) | flags))
    refuse(len(settings["interval"]) != 2 or settings["interval"][0] >= settings["interval"][1],
           "--interval: give two times from 0 to 1, the lower first, as in 0.1,1")
    data.check("--solver", settings["solver"], choices=lambda: getattr(net, "solvers", SOLVERS))
    unguided = not (net.config.num_classes and info.get("label_drop", True))
    refuse(flags.get("cfg", 1) != 1 and unguided, "--cfg: trained without classes, or with --label-drop 0, it has "
           "nothing to guide away from")
    return settings | {"cfg": 1.0} if unguided else settings

def main(argv=None):
    given = data.parse(argv, "Sample images from a trained JiT.", Options, Settings)
    options = Options(**model.settings_for(Options, given))
    with model.device_and_processes(options.device) as (device, rank, world):
        path = options.checkpoint or model.folder_of(options.run, "runs") / "checkpoint.pt"
        net, info = model.load_network(path, options.ema, options.experiment)
        classes = info["classes"] if net.config.num_classes else []            # an unconditional one has none
        labels = parse_labels(options.labels, options.num, classes, net.config.num_classes)
        settings = settings_of(given, info, net)
        amp = model.choose_precision(options.amp, device)
        made_by = info.get("coder")
        source = info.get("data")
        coder = made_by and model.load_coder(model.folder_of(source, "data"), made_by)  # of latents, else None
        if options.compile:
            net.compile()
        sampler = Sampler(net, labels, options.seed, settings, amp, device, coder)
        if options.trajectory:
            return draw_trajectory(sampler, options.out or path.parent / "trajectory.png") if rank == 0 else None
        record = settings | {
            "interval": list(settings["interval"]),       # as JSON gives it back
            "seed": options.seed, "amp": amp, "num": len(labels), "step": info.get("step"),
            "ema": options.ema, "weights": model.fingerprint(net.state_dict()), "data": source,
            "data_id": info.get("data_id"), "size": net.config.image_size, "classes": classes, "labels": labels}
        if made_by:                                       # scored against the pixels that the latents were made of
            record |= {"data": made_by["pixels"], "data_id": made_by["pixels_id"], "size": made_by["size"],
                       "coder": made_by["id"]}
        write_samples(options, sampler, record, path.parent, rank, world)

if __name__ == "__main__":
    sys.exit(data.run(import_module("04_sample").main))   # subtle: experiments import this module, too: one for all
