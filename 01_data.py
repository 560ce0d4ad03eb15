"""01_data.py -- images: from a source to arrays that every later stage reads without decoding anything again

What this stage teaches: training reads each image hundreds of times.  So it is decoded, cropped and scaled once and
kept as raw bytes, one file a split, that the operating system maps into memory.  An epoch then costs a memory copy.
Reads a source:   shapes       ten named shapes, drawn here; a function of (seed, index), nothing to download
                  folder       your own images: class folders under train/ and val/ (or test/), class folders alone
                               (a part is held out), or images without class folders
                  cifar10, imagenette-160, imagenette-320     downloaded, checked by their checksum
                  latents      a packed data set again, as the latents of a VAE, an RAE or DINOv2 (networks in 02)
Writes data/<name>/:   train_images.npy (N,H,W,3) uint8, train_labels.npy (N,) int64, val_*.npy, meta.json, preview.png
                       latents: (N,h,w,C) float16, and the network that made them and turns them back, coder.pt
Run it:   python 01_data.py          about 3 seconds on two cores; look at data/shapes/preview.png
          python 01_data.py --source folder --root PHOTOS --size 256 --name photos
          python 01_data.py --source latents --root data/shapes --coder vae --name shapes-vae

Everything is written to data/<name>.partial, which is renamed at the end.  Killed half way, the same command goes on
where it was (only a coder's training begins anew).  Pixels stay uint8 0..255 on disk; 03_train.py scales them to
[-1, 1] on the device.
"""
import argparse
import colorsys
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.request
import uuid
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ---- One image ------------------------------------------------------------------------ (the crop of ADM, DiT, JiT)
def center_crop(image, size):
    """ADM's crop: halve with BOX while possible, scale the short side to `size` with BICUBIC, cut out the centre.

    image: PIL, any mode that convert("RGB") knows.  Returns (size,size,3) uint8.  Published ImageNet scores use it.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

# ---- Source "shapes": outlines in about the unit circle, y pointing down, all symmetric left to right ---
def arc(radius, start=0.0, stop=2.0, y=0.0):
    """64 points on a circle around (0, y); angles in units of pi, 0 = right, 0.5 = down."""
    angles = np.pi * np.linspace(start, stop, 64)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles) + y], axis=1)

def spikes(count, inner):
    """A star with `count` spikes, the first one up; inner = radius between them."""
    angles = np.pi * (np.arange(2 * count) / count - 0.5)
    radius = np.where(np.arange(2 * count) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)

def heart():
    """The well-known heart curve, scaled to the unit circle."""
    a = np.linspace(0, 2 * np.pi, 64)
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) - 2.5
    return np.stack([16 * np.sin(a)**3, y], axis=1) / 15.5

def mirrored(points):
    """Close an outline given for x >= 0, top to bottom, with its mirror image."""
    points = np.array(points)
    return np.concatenate([points, points[::-1] * [-1, 1]])

SHAPES = {  # name: (outline, hole or None)
    "circle": (arc(0.88), None),
    "square": (mirrored([(0.8, -0.8), (0.8, 0.8)]), None),
    "triangle": (mirrored([(0, -0.85), (0.87, 0.65)]), None),
    "star": (spikes(5, 0.45), None),
    "heart": (heart(), None),
    "cross": (mirrored([(0.31, -0.95), (0.31, -0.31), (0.95, -0.31), (0.95, 0.31), (0.31, 0.31), (0.31, 0.95)]), None),
    "moon": (arc(1.0), arc(0.8, y=-0.5)),
    "arrow": (mirrored([(0, -1), (0.85, 0), (0.35, 0), (0.35, 1)]), None),
    "ring": (arc(0.92), arc(0.5)),
    "drop": (np.concatenate([[(0, -1.1)], arc(0.68, -0.2, 1.2, y=0.35)]), None),
}

def draw_shape(job):
    """job (seed, index, size) -> (size,size,3) uint8, of class index % 10: a function of (seed, index) alone."""
    seed, index, size = job
    rng = np.random.default_rng((seed, index))
    outline, hole = list(SHAPES.values())[index % len(SHAPES)]
    radius, turn = size * rng.uniform(0.34, 0.42), math.radians(rng.uniform(-8, 8))
    centre = size * (0.5 + rng.uniform(-0.05, 0.05, 2))
    contrast = 0
    while contrast <= 0.3:                                # two colours whose brightness differs enough to see the shape
        hues = rng.random(2)
        foreground = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
        background = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0, 0.25), rng.uniform(0.05, 1)))
        contrast = abs((foreground - background) @ (0.299, 0.587, 0.114))
    fine = 4                                              # drawn four times larger, then averaged: smooth edges
    mask = Image.new("L", (size * fine, size * fine))
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    for points, level in ((outline, 255), (hole, 0)):
        if points is not None:
            ImageDraw.Draw(mask).polygon([tuple(p) for p in (points @ rotation * radius + centre) * fine], fill=level)
    cover = np.asarray(mask.reduce(fine), dtype=np.float32)[..., None] / 255
    return ((background * (1 - cover) + foreground * cover) * 255 + 0.5).clip(0, 255).astype(np.uint8)

# ---- Packing: rows of one file; the labels file is the record of progress --------------------------------------------
BLOCK, TODO = 1024, -1             # images between two entries into the record; the label of a row not packed yet

def pack(split, make, jobs, labels, shape, dtype, folder, workers):
    """Turn jobs into rows of <split>_images.npy by make(jobs); returns a line for each that is unreadable.

    make yields for each job an array of this shape, or a string: why not.  Called again, it goes on where it was;
    unreadable rows stay TODO, and are tried again.
    """
    images_path, labels_path, skipped = folder / f"{split}_images.npy", folder / f"{split}_labels.npy", []
    if not labels_path.exists():
        np.lib.format.open_memmap(images_path, "w+", dtype, (len(jobs), *shape))
        save_array(labels_path, np.full(len(jobs), TODO))
    images, record = (np.lib.format.open_memmap(path, "r+") for path in (images_path, labels_path))
    todo = np.flatnonzero(record == TODO)
    with ProcessPoolExecutor(max(1, workers), initializer=start_worker, initargs=[os.getpid()]) as pool, \
            Progress(len(jobs), split, " images", initial=len(jobs) - len(todo)) as bar:
        fill = partial(fill_rows, make, images_path)
        for block in in_parts(todo, BLOCK):
            parts, reasons = in_parts(block, 16) if workers > 1 else [block], {}
            for found in (pool.map if workers > 1 else map)(fill, parts, [[jobs[i] for i in part] for part in parts]):
                reasons |= found
            skipped += [f"{jobs[i][0]}: {reason}\n" for i, reason in reasons.items()]
            done = [i for i in block if i not in reasons]
            images.flush()                                # subtle: images first, so no label vouches for an empty row
            record[done] = [labels[i] for i in done]
            record.flush()
            bar.update(len(block))
    return skipped

def fill_rows(make, path, rows, jobs):
    """Write what make(jobs) yields to these rows of an array file; returns {row: why not} of the unreadable.

    subtle: images do not go through the pool's pipe; a worker killed while it sends one would leave everyone waiting.
    """
    images, reasons = np.lib.format.open_memmap(path, "r+"), {}
    for row, image in zip(rows.tolist(), make(jobs)):
        if isinstance(image, str):
            reasons[row] = image
        else:
            images[row] = image
    return reasons

def in_parts(rows, size=100):
    return np.split(rows, range(size, len(rows), size))

def start_worker(parent):
    """A worker leaves signals to its parent, by a process group of its own, and ends when the parent is gone."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()

def fill_holes(images, labels):
    """Move the last good rows into the places of unreadable ones; returns the labels of the rows to keep."""
    good = np.flatnonzero(labels != TODO)
    for hole, row in zip(np.flatnonzero(labels[:len(good)] == TODO), good[good >= len(good)]):
        images[hole], labels[hole] = images[row], labels[row]
    return labels[:len(good)]

def open_data(folder):
    """A packed data set -> (meta, {"train": (images, labels), "val": ...}); images are memory maps.

    images: (N,H,W,3) uint8, latents (N,h,w,C) float16.  labels: (N,) int64.  Raises ValueError with one line that says
    what to run.
    """
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise ValueError(f"no data set at {folder}: make it first (python 01_data.py --name {folder.name} ...; "
                         "python 01_data.py alone draws data/shapes)")
    try:
        meta, arrays = load_json(folder / "meta.json"), {}
        size, classes, _ = meta["size"], len(meta["classes"]), (meta["id"], meta["recipe"], meta["found"])
        if "coder" in meta and not {"id", "kind", "pixels", "size"} <= dict(meta["coder"]).keys():
            raise ValueError("meta.json does not say what made these latents")
        for split in ("train", "val"):
            labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
            images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)[:len(labels)]
            shape, dtype = (meta["counts"][split], size, size, meta.get("channels", 3)), images.dtype
            if images.shape != shape or dtype != (np.float16 if "coder" in meta else np.uint8):
                raise ValueError(f"{split} arrays do not fit meta.json")
            if len(labels) and not 0 <= labels.min() <= labels.max() < max(1, classes):
                raise ValueError(f"a label in {split}_labels.npy is outside 0..{classes - 1}")
            arrays[split] = images, labels
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        raise ValueError(f"the data set at {folder} is damaged or outdated ({error}): pack it again") from None
    return meta, arrays

# ---- Source "folder": find the files, and read them as the eye would see them ----------------------------------------
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

def to_rgb(image):
    """A PIL image of any mode -> RGB: turned as its EXIF says, 16 bits scaled to 8, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                        # 16-bit grey; subtle: convert("RGB") would cut it off at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257 + 0.5).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")                           # ImageNet holds grey and CMYK files

def decode(job):
    """Read and crop one file.  job: (path, size) -> (size,size,3) uint8, or a string that says why not."""
    path, size = job
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)     # a header that claims a huge picture
            with Image.open(path) as image:
                if max(image.size) > 100 * min(image.size):
                    return f"{image.width} x {image.height} is too long and thin"
                return center_crop(to_rgb(image), size)
    except Exception as error:                            # subtle: Pillow raises many kinds, also SyntaxError
        return f"{type(error).__name__}: {error}".splitlines()[0]

def find_images(folder):
    """Yield the image files of a folder and of those below it, but for hidden ones; the name decides."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (os.path.join(parent, name) for name in files if name.lower().endswith(SUFFIXES) and name[0] != ".")

def list_images(folder):
    return sorted(find_images(folder))

def list_classes(folder):
    """Class folders -> (names, files, labels).  A folder without sub-folders is unlabelled: no names, label 0."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    inside = [list_images(folder / name) for name in names] or [list_images(folder)]
    loose = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(SUFFIXES) and name[0] != "."]
    if names and loose:
        raise ValueError(f"{folder} holds class folders and {len(loose)} loose images ({loose[0]}, ...): "
                         "put them into a class, or elsewhere")
    if [] in inside and names:
        raise ValueError(f"class folder {folder / names[inside.index([])]} holds no images: fill it or remove it")
    return names, [file for files in inside for file in files], [k for k, files in enumerate(inside) for _ in files]

def list_folder(root, val_fraction, seed):
    """A folder of images -> (class names, {"train": (files, labels), "val": (files, labels)}).  Raises ValueError."""
    if not root.is_dir() or not any(find_images(root)):
        raise UsageError(f"--root {root} {'holds no images' if root.is_dir() else 'is not a folder'}")
    held_out = next((root / name for name in ("val", "test", "validation") if (root / name).is_dir()), None)
    names, files, labels = list_classes(root / "train" if (root / "train").is_dir() else root)
    if (root / "train").is_dir() and held_out:
        val_names, *val = list_classes(held_out)
        if names != val_names:
            odd = min(set(names) ^ set(val_names))
            raise ValueError(f"{root / 'train'} and {held_out} must hold the same class folders: {odd} is in one only")
        return names, {"train": (files, labels), "val": val}
    spare = np.flatnonzero(np.diff(labels, prepend=-1) == 0)               # all but the first of each class
    drawn = np.random.default_rng((seed, 1)).permutation(spare)[:max(1, round(len(files) * val_fraction))]
    rows = {"train": np.setdiff1d(np.arange(len(files)), drawn), "val": np.sort(drawn)}
    return names, {split: ([files[i] for i in places], [labels[i] for i in places]) for split, places in rows.items()}

# ---- Source "latents": a coder, trained where it needs training, then what it makes of a packed data set -------------
# The networks stand in 02, which imports this file: so 02 and torch are imported inside, here and nowhere else.
def train_coder(networks, coder, images, labels, seed, steps, device):
    """Train a coder of 02_model.py: its encoder, then, with mean and std of the latents measured, its decoder."""
    import torch
    random, autocast = np.random.default_rng(seed), networks.autocast(networks.choose_precision(None, device), device)
    torch.manual_seed(seed)
    for part, batch in (("encoder", 64), ("decoder", 32)):
        if part == "decoder":
            measure(networks, coder, images, np.sort(random.permutation(len(images))[:10_000]), device)
        loss, optimizer = getattr(coder, f"{part}_loss"), torch.optim.AdamW(coder.parameters(), lr=0.0)
        if not loss:                                      # DINOv2's encoder is ready, a VAE's parts are trained as one
            continue
        with Progress(steps, f"training the {part}", " steps") as bar:
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
                chosen = np.sort(random.integers(0, len(images), batch))
                x, y = networks.to_float(images[chosen], device), torch.from_numpy(labels[chosen]).to(device)
                with autocast:
                    value = loss(x.flip(3) if step % 2 else x, y)
                optimizer.zero_grad()                     # None where a part is frozen: AdamW leaves it alone
                value.backward()
                optimizer.step()
                bar.update()

def measure(networks, coder, images, rows, device):
    """Set the mean and std of the coder's latents, per channel, to those over some images."""
    import torch
    n, total, squares = 0, 0, 0
    for part in in_parts(rows):
        with torch.no_grad():
            f = coder.features(networks.to_float(images[part], device)).double()
        n, total, squares = n + len(f), total + f.sum(dim=0), squares + f.square().sum(dim=0)
    mean, square = ((s / n).mean(dim=(1, 2))[None, :, None, None] for s in (total, squares))
    coder.mean.copy_(mean), coder.std.copy_((square - mean**2 + 1e-5).sqrt())

class LatentSet:
    """The coder of the unfinished data set `part`, trained now if that is not done, and what build() wants of it."""

    def __init__(self, options, part, key):
        sys.modules["01_data"] = sys.modules[__name__]    # subtle: as a script we are "__main__", and 02 imports us
        self.networks = networks = import_module("02_model")
        import torch
        pixels, self.arrays = open_data(options.root)
        with networks.machine() as (self.device, _, _):
            if not (part / "coder.pt").exists():
                sizes, weights = networks.read_dinov2(options.weights) if options.weights else ({}, None)
                arguments = {"size": pixels["size"], "classes": len(pixels["classes"]), **sizes}
                torch.manual_seed(options.seed + 1)       # the network of the scores has seed 0
                coder = networks.CODERS[options.coder](**arguments).to(self.device)
                if weights:
                    coder.encoder.load_state_dict(weights)
                train_coder(networks, coder, *self.arrays["train"], options.seed + 1, options.coder_steps, self.device)
                networks.save({"id": key, "kind": options.coder, "arguments": arguments,
                               "weights": coder.state_dict()}, part / "coder.pt")
            self.coder = networks.load_coder(part, {"id": key}).to(self.device)
        self.shape = (self.coder.side, self.coder.side, self.coder.channels)
        self.facts = {"size": self.shape[0], "channels": self.shape[2],
                      "mean": self.coder.mean.flatten().tolist(), "std": self.coder.std.flatten().tolist(),
                      "coder": {"kind": options.coder, "id": key, "pixels": str(options.root), "size": pixels["size"]}}

    def encode(self, jobs):
        """[(split, place)] -> the latents (h,w,C) float16, one by one."""
        images = self.arrays[jobs[0][0]][0]
        for part in in_parts([place for _, place in jobs]):
            x = self.networks.to_float(images[part], self.device)
            yield from self.coder.encode(x).permute(0, 2, 3, 1).half().cpu().numpy()

    def show(self, part):
        """preview.png: images, what is decoded from their latents, and from noise; reconstructions.npz, for 05_eval.py.

        Returns the PSNR in dB, for pixels of 0..255, over at most 2,000 held-out images.
        """
        networks, (images, labels) = self.networks, self.arrays["val" if len(self.arrays["val"][1]) else "train"]
        chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:2000])
        latents = (self.coder.encode(networks.to_float(images[rows], self.device)) for rows in in_parts(chosen))
        real, made = images[chosen], np.concatenate([networks.to_pictures(z, self.coder) for z in latents])
        with whole(part / "reconstructions.npz") as file, open(file, "wb") as stream:
            np.savez(stream, arr_0=made, arr_1=labels[chosen])
        noise = np.random.default_rng(0).standard_normal((10, *self.shape)).astype(np.float16)
        few = np.random.default_rng(1).permutation(len(real))[:40]
        rows = [kind[few[i::4]] for i in range(4) for kind in (real, made)]
        rows.append(networks.to_pictures(networks.to_float(noise, self.device), self.coder))
        save_picture(part / "preview.png", picture(rows, names=["image", "decoded"] * 4 + ["noise"]))
        return 10 * math.log10(255**2 / ((real.astype(np.float32) - made)**2).mean())

# ---- Downloads: whole and with the right checksum, or not there at all -----------------------------------------------
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGENETTE_CLASSES = {"n01440764": "tench", "n02102040": "springer", "n02979186": "cassette", "n03000684": "chainsaw",
                      "n03028079": "church", "n03394916": "horn", "n03417042": "truck", "n03425413": "pump",
                      "n03445777": "golf", "n03888257": "parachute"}
FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {  # source: size in pixels, address, md5
    "cifar10": (32, "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "imagenette-160": (160, FAST_AI + "imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagenette-320": (320, FAST_AI + "imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
}

def file_hash(path, kind):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

def fetch(source, folder):
    """Path of the source's archive in `folder`, downloaded if it is not there.  Raises ValueError."""
    _, url, md5 = ARCHIVES[source]
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with whole(path) as part:
                with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file, \
                        Progress(int(answer.headers.get("Content-Length", 0)), path.name, "B", unit_scale=True) as bar:
                    while piece := answer.read(1 << 20):
                        bar.update(file.write(piece))
                if file_hash(part, "md5") != md5:
                    raise OSError(f"its md5 is not {md5}")
        except OSError as error:
            raise ValueError(f"cannot download {url} ({error}): fetch it yourself and put it into {folder}") from None
    if file_hash(path, "md5") != md5:
        raise ValueError(f"{path} is damaged: its md5 is not {md5}; remove it and run again")
    return path

def unpack(archive, folder):
    """Extract a tar file, once and whole; the "data" filter refuses paths that lead out of the folder."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        os.replace(part, folder)
    return folder

def read_cifar10(archive):
    """The binary version -> {"train": (images, labels), "val": ...}; a record is a label and three 32x32 planes."""
    def read(names):
        with tarfile.open(archive) as tar:
            raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
        return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)
    return {"train": read([f"data_batch_{i}" for i in range(1, 6)]), "val": read(["test_batch"])}

# ---- Plumbing of all five scripts (skip it on a first reading; it needs no torch): flags and errors ------------------
class UsageError(ValueError):
    """A wrong flag or value: exit code 2."""

def option(default, text, within=None, choices=None, group=None, flag=True, free=False):
    """A dataclass field that is also a command-line flag.  None as default: worked out later, as the text says.

    within: an interval for its numbers, as "(0, 1]".  group: title of the flags from here on.  free: may change later.
    """
    return field(default=default, metadata={k: v for k, v in locals().items() if k != "default"})

def check(name, value, within=None, choices=None, **_):
    """Raise UsageError unless value is one of the choices and its numbers are finite and in the interval."""
    if choices and value not in choices:
        raise UsageError(f"{name} {value!r} is unknown: one of {', '.join(choices)}")
    within = within or "(-inf, inf)"
    low, high = map(float, within[1:-1].split(","))
    for number in value if isinstance(value, tuple) else [value] if isinstance(value, (int, float)) else ():
        if not (low < number < high or (number, within[0]) == (low, "[") or (number, within[-1]) == (high, "]")):
            raise UsageError(f"{name} {value}: give a number in {within}")

def numbers(text):
    """"0.1,1" -> (0.1, 1.0)"""
    return tuple(map(float, text.split(",")))

def parse(argv, description, *classes):
    """The flags given -> {name: value}; there is one for each field of the dataclasses.  Raises UsageError."""
    parser = group = argparse.ArgumentParser(
        description=description, usage="%(prog)s [options]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))

    def error(message):
        raise UsageError(f"{message} (see --help)")
    parser.error = error
    options = {entry.name: entry for cls in classes for entry in fields(cls) if entry.metadata["flag"]}
    for name, entry in options.items():
        about, default, kind = entry.metadata, entry.default, dict(type=entry.type, metavar=entry.type.__name__.upper())
        group = parser.add_argument_group(about["group"]) if about["group"] else group
        if entry.type is bool:
            kind = dict(action="store_true" if default is False else argparse.BooleanOptionalAction)
        elif entry.type is tuple:
            kind, default = dict(type=numbers, metavar="X,Y"), default and ",".join(map(str, default))
        elif entry.type is list:
            kind = dict(nargs="+", metavar="FILE")
        text = about["text"] + ("; " + "|".join(filter(None, about["choices"])) if about["choices"] else "")
        if default not in (None, "", False) and "(default" not in text:
            text += f" (default: {'on' if default is True else default})"
        group.add_argument("--" + name.replace("_", "-"), help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        check("--" + name.replace("_", "-"), value, **options[name].metadata)
    return given

def run(main):
    """Call main() and return the exit code.  Expected errors become one line on stderr; bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")              # a terminal without the letters of a class name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main() or 0
    except KeyboardInterrupt:
        again = " without --overwrite" if "--overwrite" in sys.argv else ""
        code, message = 130, f"stopped; the same command{again} goes on where it was"
    except (ValueError, OSError, NotImplementedError) as error:
        code, message = 2 if isinstance(error, UsageError) else 1, error
    except (RuntimeError, MemoryError) as error:          # torch's own are known by name: this file does without torch
        code, message = 1, f"torch.compile failed ({str(error).strip().splitlines()[0][:100]}): pass --no-compile"
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error):
            message = "out of memory: pass a smaller --micro-batch or --batch-size"
        elif type(error).__name__ == "BrokenProcessPool":
            message = "a worker process was killed (out of memory?): give the same command again, with fewer --workers"
        elif not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("LOCAL_RANK", rank)):           # if all processes fail alike, the first speaks and torchrun
        signal.signal(signal.SIGTERM, signal.SIG_DFL)     # ends the others in this time; one that fails alone speaks
        time.sleep(3)
    print(f"{os.path.basename(sys.argv[0])}: error: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr)
    return code

# ---- Plumbing: files and progress ------------------------------------------------------------------------------------
@contextmanager
def whole(path):
    """with whole(path) as part: write the file `part`.  At the end it is moved to its place: never half a file."""
    part = Path(f"{path}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def save_picture(path, image):
    with whole(path) as part:
        image.save(part, "png")

def load_json(path):
    """The dict in a JSON file.  Raises ValueError."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and give the command again") from None

def save_json(path, value):
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1))

def save_array(path, array):
    with whole(path) as part, open(part, "wb") as file:
        np.save(file, array)

@contextmanager
def locked(path):
    """Keep other processes of this machine from writing to the same path.  Raises ValueError if one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:          # freed by the system, whatever ends us
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {path}: wait for it, or stop it") from None
        yield

def folder_of(name, parent):
    """A bare name means parent/name; anything with a slash is taken as it is."""
    return Path(name) if "/" in str(name) else Path(parent) / name

class Progress(tqdm):
    """A tqdm bar on a terminal, elsewhere a line every half minute; the first process alone shows it."""

    def __init__(self, total, title, unit, **more):
        self.lines = not sys.stderr.isatty()
        if self.lines:
            shown = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
            more |= dict(mininterval=30, delay=29, bar_format=shown)
        super().__init__(total=total, desc=title, unit=unit, disable=os.environ.get("RANK", "0") != "0", **more)

    def display(self, *args, **more):
        return print(self, file=sys.stderr, flush=True) if self.lines else super().display(*args, **more)

# ---- Plumbing: pictures ----------------------------------------------------------------------------------------------
def read_image(path):
    """An image file as uint8 (H,W,3).  Raises ValueError."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:                            # Pillow raises many kinds
        raise ValueError(f"{path} is not a readable image ({error})") from None

def write(draw, place, text, width, anchor="la"):
    """Draw text; what does not fit into `width` pixels is cut, and two dots say so."""
    font, text = ImageFont.load_default(12), str(text)
    while draw.textlength(text, font) > width and text.strip("."):
        text = text.removesuffix("..")[:-1] + ".."
    draw.text(place, text, fill="black", font=font, anchor=anchor)

def picture(rows, titles=(), names=(), cell=64):
    """Rows of images (H,W,3) uint8 -> one PIL picture: a title above each column, a name left of each row."""
    small = len(rows[0][0])
    side = max(small, cell // small * small)              # small images are enlarged
    left, top = (80 if names else 0), (16 if titles else 0)
    sheet = Image.new("RGB", (left + side * max(map(len, rows)), top + side * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        write(draw, (left + x * side + 3, 1), title, side - 4)
    for y, row in enumerate(rows):
        write(draw, (3, top + y * side + side // 2), names[y] if names else "", left - 6, "lm")
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (left + x * side, top + y * side))
    return sheet

def chart(title, label, lines, width=480, height=320):
    """Curves {name: [(x, y), ...]} over one axis, called `label`, as a PIL picture."""
    sheet = Image.new("RGB", (width, height), "white")
    draw, left, top, right, bottom = ImageDraw.Draw(sheet), 50, 30, width - 15, height - 35
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*(point for points in lines.values() for point in points)))
    draw.rectangle((left, top, right, bottom), outline="gray")
    for row, (name, points) in enumerate(lines.items()):
        colour, y = ("navy", "firebrick", "seagreen", "darkorange", "purple", "gray")[row % 6], top + 5 + 15 * row
        draw.line([(left + (a - x0) / ((x1 - x0) or 1) * (right - left),
                    bottom - (b - y0) / ((y1 - y0) or 1) * (bottom - top)) for a, b in points], fill=colour, width=2)
        draw.rectangle((right - 112, y + 5, right - 104, y + 9), fill=colour)
        write(draw, (right - 100, y), name, 96)
    for text, place, anchor in ((title, (left, 8), "la"), (label, ((left + right) // 2, bottom + 5), "ma"),
                                (f"{x0:.4g}", (left, bottom + 5), "la"), (f"{x1:.4g}", (right, bottom + 5), "ra"),
                                (f"{y0:.4g}", (left - 4, bottom - 12), "ra"), (f"{y1:.4g}", (left - 4, top), "ra")):
        write(draw, place, text, right - left, anchor)
    return sheet

# ---- Running it ------------------------------------------------------------------------------------------------------
@dataclass
class Options:
    source: str = option("shapes", "where the images come from", choices=("shapes", "folder", "latents", *ARCHIVES),
                         group="what")
    root: Path = option(None, "folder: your images; latents: a packed data set; others: where the archive is kept "
                        "(default: OUT/downloads)")
    size: int = option(None, "height and width in pixels (default: 64; cifar10 32; imagenette 160, 320)", "[8, 4096]")
    count: int = option(None, "shapes: number of training images (default: 20000)", "[100, 10000000]")
    fraction: float = option(1.0, "keep this part of the training images, drawn with --seed", "(0, 1]")
    val_fraction: float = option(None, "folder without val/ or test/: part held out (default: 0.1)", "(0, 1)")
    seed: int = option(0, "of drawing, --fraction and hold-out", "[0, inf)")
    coder: str = option(None, "latents: what makes them", choices=("vae", "rae", "dinov2"))
    coder_steps: int = option(None, "latents: training of each part of the coder (default: 800)", "[1, inf)")
    weights: Path = option(None, "latents: the official weights file that --coder dinov2 needs, with registers")
    name: str = option(None, "the data set's name (default: the source)", group="where and how")
    out: Path = option(Path("data"), "folder of data sets; 03_train.py then needs --data OUT/NAME")
    workers: int = option(os.cpu_count(), "processes that draw or decode", "[1, inf)")
    overwrite: bool = option(False, "replace a data set of this name")

    def __post_init__(self):
        for bad, message in ((self.count and self.source != "shapes", "--count is for --source shapes"),
                             (self.val_fraction and self.source != "folder", "--val-fraction is for --source folder"),
                             (self.root and self.source == "shapes", "--root: shapes are drawn, they have no folder"),
                             (self.source == "latents" and not (self.root and self.coder and self.name),
                              "--source latents needs --root, a packed data set, --coder and --name"),
                             (self.source == "latents" and self.root and self.name and
                              (self.out / self.name).resolve() == self.root.resolve(),
                              f"--name {self.name} is the data set of --root: latents need a name of their own"),
                             (self.source == "latents" and (self.size or self.fraction < 1),
                              "--size, --fraction: latents have those of their images"),
                             ((self.coder or self.coder_steps) and self.source != "latents",
                              "--coder, --coder-steps are for --source latents"),
                             ((self.coder == "dinov2") != bool(self.weights), "--coder dinov2 needs --weights FILE, "
                              "and nothing else does"),
                             (not self.root and self.source == "folder", "--source folder needs --root, its folder"),
                             (self.source == "cifar10" and self.size not in (None, 32), "--size: cifar10 is 32 pixels"),
                             ("/" in (self.name or ""), f"--name {self.name}: give a name, not a path")):
            if bad:
                raise UsageError(message)
        self.size, self.name = self.size or ARCHIVES.get(self.source, (64,))[0], self.name or self.source
        self.count, self.val_fraction = self.count or 20000, self.val_fraction or 0.1
        self.coder_steps = self.coder_steps or (800 if self.coder else None)

    def recipe(self):
        """What decides the content."""
        names = ("source", "size", "count", "fraction", "val_fraction", "seed", "coder", "coder_steps")
        paths = {k: getattr(self, k) and str(getattr(self, k).resolve()) for k in ("root", "weights")}
        return {k: getattr(self, k) for k in names} | paths

def plan(options):
    """The source as (summary for meta.json, make, {split: (jobs, labels)}); nothing is decoded.  Raises ValueError."""
    root, make, summary = options.root or options.out / "downloads", decode, {}
    if options.source == "shapes":                        # held out: indices that training never reaches
        spans = {"train": range(options.count), "val": range(10**7, 10**7 + max(100, options.count // 10))}
        splits = {split: ([(options.seed, i, options.size) for i in span], [i % len(SHAPES) for i in span])
                  for split, span in spans.items()}
        names, make = list(SHAPES), draw_shape
    elif options.source == "latents":
        meta, arrays = open_data(root)
        names, summary = meta["classes"], {"pixels": meta["id"]}
        if "coder" in meta:
            raise ValueError(f"{root} holds latents: give the data set that they were made from")
        splits = {split: ([(split, i) for i in range(len(labels))], labels) for split, (_, labels) in arrays.items()}
    elif options.source == "cifar10":
        names, make, splits = CIFAR_CLASSES, np.asarray, read_cifar10(fetch("cifar10", root))
    else:
        if options.source in ARCHIVES:
            archive = fetch(options.source, root)
            root = unpack(archive, root / options.source) / archive.stem
        names, splits = list_folder(root, options.val_fraction, options.seed)
        splits = {split: ([(file, options.size) for file in jobs], labels) for split, (jobs, labels) in splits.items()}
        names = [IMAGENETTE_CLASSES.get(name, name) for name in names]
    splits["train"] = keep_fraction(*splits["train"], options.fraction, options.seed)
    found = {split: len(jobs) for split, (jobs, _) in splits.items()}
    return {"recipe": options.recipe(), "classes": names, "found": found, **summary}, make, splits

def keep_fraction(jobs, labels, fraction, seed):
    """A seeded random part of the training images, in order: 1 % of ImageNet is 12,811.         (Improved JiT, 4.1)"""
    kept = np.sort(np.random.default_rng((seed, 2)).permutation(len(jobs))[:max(1, int(len(jobs) * fraction))])
    return (jobs, labels) if fraction == 1 else ([jobs[i] for i in kept], [labels[i] for i in kept])

def already_packed(options, folder):
    """True if the folder holds what is asked for.  Raises ValueError if it holds anything else."""
    if folder.exists() and not (folder / "meta.json").exists():
        raise ValueError(f"{folder} exists and is not a packed data set: nothing is touched; choose --name or --out")
    if not folder.exists() or options.overwrite:
        return False
    meta, recipe = open_data(folder)[0], options.recipe()
    odd = [f"{k} {meta['recipe'].get(k)}, now {recipe[k]}" for k in recipe if meta["recipe"].get(k) != recipe[k]]
    if not odd and options.source in ("folder", "latents") and any(meta[k] != v for k, v in plan(options)[0].items()):
        odd = [f"{options.root} has changed since, it held {meta['found']} images in {len(meta['classes'])} classes"]
    if odd:
        raise ValueError(f"{folder} holds another data set ({odd[0]}): choose --name, or replace it with --overwrite")
    return True

def build(options, folder):
    """Pack all splits into <folder>.partial, check them, draw the preview, and move the folder to its place."""
    summary, make, splits = plan(options)
    part = folder.with_name(folder.name + ".partial")
    meta = begin(options, part, summary)
    latents = LatentSet(options, part, meta["id"]) if options.source == "latents" else None
    shape, dtype, workers = (options.size, options.size, 3), np.uint8, 1 if make is np.asarray else options.workers
    make = partial(map, make)
    if latents:
        make, shape, dtype, workers = latents.encode, latents.shape, np.float16, 1
    check_space(sum(meta["found"].values()) * math.prod(shape) * np.dtype(dtype).itemsize, part)
    skipped, counts, names = [], {}, meta["classes"]
    for split, (jobs, labels) in splits.items():
        skipped += pack(split, make, jobs, labels, shape, dtype, part, workers)
    if skipped:
        (part / "skipped.txt").write_text("".join(skipped), errors="replace")
        print(f"{len(skipped)} unreadable images left out, listed in skipped.txt; the first: {skipped[0].strip()}")
    empty = sorted(set(range(len(names) or 1)) - set(np.load(part / "train_labels.npy").tolist()))
    if empty:
        raise ValueError((f"class {names[empty[0]]} has no readable image ({len(empty)} such classes)" if names else
                          f"none of the {len(skipped)} files is a readable image") + f": see {part / 'skipped.txt'}")
    for split in splits:
        images = np.lib.format.open_memmap(part / f"{split}_images.npy", "r+")
        kept = fill_holes(images, np.load(part / f"{split}_labels.npy"))
        save_array(part / f"{split}_labels.npy", kept)
        counts[split] = len(kept)
        if split == "train" and not latents:
            save_picture(part / "preview.png", preview(images, kept, names))
    bad = sum(meta["found"].values()) - sum(counts.values())
    facts = {"psnr": latents.show(part), **latents.facts} if latents else {}
    save_json(part / "meta.json", meta | {"skipped": bad, "counts": counts} | facts)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)

def begin(options, part, summary):
    """meta.json of an unfinished data set: the one there, or, where that had other settings or files, a new one."""
    if part.exists() and any(part.iterdir()) and not (part / "meta.json").exists():
        raise ValueError(f"{part} holds files that this script did not write: move them elsewhere")
    meta = load_json(part / "meta.json") if (part / "meta.json").exists() else {}
    if {key: meta.get(key) for key in summary} != summary:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        how = {"shapes": "drawn", "cifar10": "none", "latents": options.coder}.get(options.source, "ADM crop, RGB")
        meta = {"id": uuid.uuid4().hex, "name": options.name, "size": options.size, **summary, "preprocessing": how}
        save_json(part / "meta.json", meta)
    return meta

def preview(images, labels, names):
    """A picture with a column per class (ten at most), eight images each, the name above."""
    columns = [np.flatnonzero(labels == k)[:8] for k in range(min(len(names), 10))]
    columns = columns or np.split(np.arange(80) % len(labels), 10)
    rows = [[images[column[y]] for column in columns if y < len(column)] for y in range(max(map(len, columns)))]
    return picture(rows, names[:10])

def check_space(need, folder):
    """Stop before the start when the disk cannot hold the arrays: a memory map on a full disk is a crash."""
    have, free = sum(file.stat().st_blocks * 512 for file in folder.glob("*.npy")), shutil.disk_usage(folder).free
    if need - have > free * 0.98:
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, or pass --out")

def main(argv=None):
    options = Options(**parse(argv, "Pack images into memory-mapped arrays.", Options))
    folder = options.out / options.name
    with locked(folder):
        if already_packed(options, folder):
            return print(f"{folder} is there, made with these settings; nothing to do (--overwrite packs it again)")
        build(options, folder)
    meta = open_data(folder)[0]
    about = f", reconstruction PSNR {meta['psnr']:.1f} dB" if "coder" in meta else ""
    print(f"{folder}: {meta['counts']['train']} training and {meta['counts']['val']} held-out images, {meta['size']} x "
          f"{meta['size']}, {len(meta['classes'])} classes{about}; look at {folder / 'preview.png'}")

if __name__ == "__main__":
    sys.exit(run(main))
