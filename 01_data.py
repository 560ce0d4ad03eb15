"""01_data.py -- images: from a source to two arrays that every later stage reads without decoding anything again

What this stage teaches: training reads each image hundreds of times, so it is decoded, cropped and scaled once, and kept
as raw bytes in one file that the operating system maps into memory.  An epoch then costs a memory copy.
Reads a source:   shapes          ten named shapes, drawn here; a function of (seed, index), nothing to download
                  folder          your own images: class folders under train/ and val/ (or test/), class folders alone
                                  (a part is held out), or a heap of images without classes
                  cifar10, imagenette-160, imagenette-320     downloaded, checked by their checksum
Writes data/<name>/:   train_images.npy (N,H,W,3) uint8, train_labels.npy (N,) int64, val_*.npy, meta.json, preview.png
Run it:   python 01_data.py          about 5 seconds on two cores; look at data/shapes/preview.png
          python 01_data.py --source folder --root PHOTOS --size 256 --name photos

Files appear whole: everything is written to data/<name>.partial, which is renamed at the end.  Killed half way, the same
command goes on where it was.  Pixels stay uint8 0..255 on disk; 03_train.py scales them to [-1, 1] on the device.
"""
import argparse
import colorsys
import hashlib
import json
import math
import os
import shutil
import sys
import tarfile
import time
import urllib.request
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Options of this script; wrong ones end it with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Pack images into memory-mapped arrays.", allow_abbrev=False,
                                     usage="%(prog)s [options]",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))
    add = parser.add_argument_group("what").add_argument
    add("--source", default="shapes", choices=SOURCES, metavar="NAME", help=", ".join(SOURCES))
    add("--root", type=Path, help="folder: your images; cifar10, imagenette: where the archive is kept")
    add("--size", type=int, help="height and width in pixels (default: 64; cifar10 32; imagenette 160 or 320)")
    add("--count", type=int, help="shapes: number of training images (default: 20000)")
    add("--fraction", type=float, default=1.0, help="keep this part of the training images, drawn with --seed")
    add("--val-fraction", type=float, help="folder without val/ or test/: part held out (default: 0.1)")
    add("--seed", type=int, default=0, help="of shapes, fraction and hold-out (default: 0)")
    add = parser.add_argument_group("where and how").add_argument
    add("--name", help="the data set's name (default: the source)")
    add("--out", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw or decode (default: all cores)")
    add("--overwrite", action="store_true", help="replace a data set of this name")
    add("--benchmark", action="store_true", help="compare packed reading with decoding, on a packed folder")
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)", 2))
    args = parser.parse_args(argv)
    args.size = args.size if args.size is not None else {"cifar10": 32, "imagenette-160": 160, "imagenette-320": 320}.get(args.source, 64)
    args.name = args.name or args.source
    for flag, source, default in (("count", "shapes", 20000), ("val_fraction", "folder", 0.1)):
        if getattr(args, flag) is not None and args.source != source and not args.benchmark:
            parser.error(f"--{flag.replace('_', '-')} is for --source {source}")
        setattr(args, flag, default if getattr(args, flag) is None else getattr(args, flag))
    checks = [(8 <= args.size <= 4096, f"--size {args.size}: give 8 to 4096 pixels"),
              (args.source != "cifar10" or args.size == 32, "--source cifar10 is 32 pixels: leave --size out"),
              (args.count >= 100, f"--count {args.count}: give at least 100 images"),
              (0 < args.fraction <= 1, f"--fraction {args.fraction}: give a number above 0, at most 1"),
              (0 < args.val_fraction < 1, f"--val-fraction {args.val_fraction}: give a number between 0 and 1"),
              (args.workers >= 1, f"--workers {args.workers}: give at least 1"),
              (args.source != "shapes" or not args.root or args.benchmark, "--root is for --source folder, cifar10 or imagenette; shapes are drawn"),
              (args.seed >= 0, f"--seed {args.seed}: give a number from 0 on"),
              (args.source != "folder" or args.root or args.benchmark, "--source folder needs --root, the folder of images"),
              (args.name == Path(args.name).name, f"--name {args.name}: a plain name, no path")]
    for good, message in checks:
        if not good:
            parser.error(message)
    return args


def fail(message, code=1):
    """Print one line on stderr and return the exit code: 1 failure, 2 wrong usage."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    return code


SOURCES = ("shapes", "folder", "cifar10", "imagenette-160", "imagenette-320")
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGENETTE_CLASSES = {"n01440764": "tench", "n02102040": "springer", "n02979186": "cassette", "n03000684": "chainsaw",
                      "n03028079": "church", "n03394916": "horn", "n03417042": "truck", "n03425413": "pump",
                      "n03445777": "golf", "n03888257": "parachute"}
ARCHIVES = {  # source: address, md5
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "imagenette-160": ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagenette-320": ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Source "shapes": outlines in about the unit circle, y pointing down, all of them mirror images of themselves
# ---------------------------------------------------------------------------------------------------------------------

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
    """One image of class index % 10, a function of (seed, index) alone.  job: (seed, index, size) -> (size,size,3) uint8."""
    seed, index, size = job
    rng = np.random.default_rng((seed, index))
    outline, hole = list(SHAPES.values())[index % len(SHAPES)]
    radius, turn = size * rng.uniform(0.34, 0.42), math.radians(rng.uniform(-8, 8))
    centre = size * (0.5 + rng.uniform(-0.05, 0.05, 2))
    while True:                                           # two colours whose brightness differs enough to see the shape
        hues = rng.random(2)
        ink = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
        paper = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0, 0.25), rng.uniform(0.05, 1)))
        if abs((ink - paper) @ (0.299, 0.587, 0.114)) > 0.3:
            break
    fine = 4                                              # drawn four times larger, then averaged: smooth edges
    mask = Image.new("L", (size * fine, size * fine))
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    for points, level in ((outline, 255), (hole, 0)):
        if points is not None:
            ImageDraw.Draw(mask).polygon([tuple(p) for p in (points @ rotation * radius + centre) * fine], fill=level)
    cover = np.asarray(mask.reduce(fine), dtype=np.float32)[..., None] / 255
    return ((paper * (1 - cover) + ink * cover) * 255 + 0.5).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Source "folder": find the files, decode, crop
# ---------------------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def center_crop(image, size):
    """ADM's crop: halve with BOX while possible, scale the short side to `size` with BICUBIC, cut out the centre.

    image: PIL, any mode.  Returns (size,size,3) uint8.  The published ImageNet scores all use this one.
    """
    image = image.convert("RGB")                          # ImageNet holds grey and CMYK files
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def decode(job):
    """Read and crop one file.  job: (path, size) -> (size,size,3) uint8, or a string that says why not."""
    path, size = job
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)     # a header that claims a huge picture
            with Image.open(path) as image:
                if max(image.size) > 100 * min(image.size):
                    return f"{image.width} x {image.height} is too long and thin"
                return center_crop(image, size)
    except Exception as error:                            # subtle: Pillow raises many kinds, also SyntaxError
        return f"{type(error).__name__}: {error}".splitlines()[0]


def list_images(folder):
    """All image files below a folder, sorted by path; a name decides, the content is checked when it is decoded."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files
                  if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")]
    return sorted(found)


def list_classes(folder):
    """Class folders -> (names, files, labels).  A folder without sub-folders is one heap: no names, label 0."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        files = list_images(folder)
        return [], files, [0] * len(files)
    loose = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(tuple(SUFFIXES)) and not entry.name.startswith(".")]
    if loose:
        raise ValueError(f"{folder} holds class folders and {len(loose)} loose images ({loose[0]}, ...): put them into a class, or elsewhere")
    files, labels = [], []
    for label, name in enumerate(names):
        inside = list_images(os.path.join(folder, name))
        if not inside:
            raise ValueError(f"class folder {os.path.join(folder, name)} holds no images: fill it or remove it")
        files, labels = files + inside, labels + [label] * len(inside)
    return names, files, labels


def list_folder(root, val_fraction, seed):
    """A folder of images -> (class names, {"train": (files, labels), "val": (files, labels)}).  Raises ValueError."""
    if not root.is_dir():
        raise ValueError(f"--root {root} is no folder")
    held_out = next((root / name for name in ("val", "test", "validation") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out:
        names, *train = list_classes(root / "train")
        val_names, *val = list_classes(held_out)
        if names != val_names:
            odd = sorted(set(names) ^ set(val_names))[0]
            raise ValueError(f"{root / 'train'} and {held_out} do not hold the same class folders: {odd} is in one only")
    else:
        names, files, labels = list_classes(root / "train" if (root / "train").is_dir() else root)
        spare = np.flatnonzero(np.diff(labels, prepend=-1) == 0)          # all but the first of each class
        out = set(np.random.default_rng((seed, 1)).permutation(spare)[:max(1, round(len(files) * val_fraction))].tolist())
        train, val = ([[f for i, f in enumerate(files) if (i in out) == side], [v for i, v in enumerate(labels) if (i in out) == side]]
                      for side in (False, True))
    if not train[0]:
        raise ValueError(f"no images under {root}: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return names, {"train": train, "val": val}


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: whole and with the right checksum, or not there at all
# ---------------------------------------------------------------------------------------------------------------------

def file_hash(path, kind):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def fetch(source, folder):
    """Path of the source's archive in `folder`, downloaded if it is not there.  Raises ValueError."""
    url, md5 = ARCHIVES[source]
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
                total = int(answer.headers.get("Content-Length", 0))
                with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                    while piece := answer.read(1 << 20):
                        bar.update(file.write(piece))
            os.replace(part, path) if file_hash(part, "md5") == md5 else part.unlink()
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"cannot download {url} ({error}): fetch it yourself and put it into {folder}") from None
    if not path.exists() or file_hash(path, "md5") != md5:
        raise ValueError(f"{path} is damaged: its md5 is not {md5}; remove it and run again")
    return path


def unpack(archive, folder):
    """Extract a tar file next to itself, once and whole; the "data" filter refuses paths that lead out of the folder."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Packing: rows are appended to one file, so that a killed run goes on after its last finished block
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = 1024                                              # images between two entries of the progress file


def write_json(path, value):
    """Write a JSON file beside its place, then move it there: never half a file."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def npy_header(count, size):
    """The first 128 bytes of a .npy file of shape (count, size, size, 3); numpy pads it, so count can grow in place."""
    import io
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})
    return stream.getvalue()


def pack(split, make, jobs, labels, size, folder, workers):
    """Turn jobs into rows of <split>_images.npy by make(job) and write the labels.  Returns a line for each one skipped.

    make returns (size,size,3) uint8, or a string: why this one is unreadable (listed in skipped.txt and left out).
    """
    progress, rows_path = folder / f"{split}.json", folder / f"{split}_images.npy"
    state = json.loads(progress.read_text()) if progress.exists() else {"done": 0, "skipped": []}
    header, row = npy_header(0, size), size * size * 3
    rows_path.touch()
    with open(rows_path, "r+b") as file, ProcessPoolExecutor(workers) as pool, \
            tqdm(total=len(jobs), initial=state["done"], desc=f"{split}", unit=" images", disable=None) as bar:
        file.truncate(len(header) + (state["done"] - len(state["skipped"])) * row)     # rows after the last block: again
        file.seek(0, os.SEEK_END)
        while state["done"] < len(jobs):
            block = range(state["done"], min(state["done"] + BLOCK, len(jobs)))
            made = pool.map(make, [jobs[i] for i in block], chunksize=16) if workers > 1 else map(make, [jobs[i] for i in block])
            for i, image in zip(block, made):
                if isinstance(image, str):
                    state["skipped"].append((i, image))
                else:
                    file.write(image.tobytes())
                bar.update()
            bar.set_postfix(skipped=len(state["skipped"]))
            file.flush()
            os.fsync(file.fileno())
            state["done"] = block.stop
            write_json(progress, state)
        file.seek(0)
        file.write(npy_header(len(jobs) - len(state["skipped"]), size))
    kept = np.delete(np.array(labels, dtype=np.int64), [i for i, _ in state["skipped"]])
    np.save(folder / f"{split}_labels.npy", kept)
    return [f"{jobs[i][0]}: {reason}" for i, reason in state["skipped"]]


def plan(args):
    """The source as (class names, make, {split: (jobs, labels)}); nothing is drawn or decoded yet.  Raises ValueError."""
    if args.source == "shapes":
        held_out = max(100, args.count // 10)             # drawn from indices that training never reaches
        spans = {"train": range(args.count), "val": range(10**7, 10**7 + held_out)}
        return list(SHAPES), draw_shape, {split: ([(args.seed, i, args.size) for i in span], [i % len(SHAPES) for i in span])
                                          for split, span in spans.items()}
    root = args.root or Path(args.out) / "downloads"
    if args.source == "cifar10":
        return CIFAR_CLASSES, np.asarray, read_cifar10(fetch("cifar10", root))
    if args.source.startswith("imagenette"):
        archive = fetch(args.source, root)
        root = unpack(archive, root / args.source) / archive.name.removesuffix(".tgz")
    names, splits = list_folder(root, args.val_fraction, args.seed)
    splits = {split: ([(file, args.size) for file in files], labels) for split, (files, labels) in splits.items()}
    return [IMAGENETTE_CLASSES.get(name, name) if args.source != "folder" else name for name in names], decode, splits


def keep_fraction(jobs, labels, fraction, seed):
    """A seeded random part of the training images, in their old order: 1 % of ImageNet is 12,811.  (document 000, 4.1)"""
    if fraction == 1:
        return jobs, labels
    kept = np.sort(np.random.default_rng((seed, 2)).permutation(len(jobs))[:max(1, int(len(jobs) * fraction))])
    return [jobs[i] for i in kept], [labels[i] for i in kept]


def preview(images, labels, names, path):
    """Write a picture with a column per class (ten at most), eight images each, the name above."""
    columns = [np.flatnonzero(labels == k)[:8] for k in range(min(len(names), 10))] or np.array_split(np.arange(min(80, len(labels))), 10)
    cell = max(64, images.shape[1])
    picture = Image.new("RGB", (cell * len(columns), cell * 8 + 16), "white")
    for x, column in enumerate(columns):
        ImageDraw.Draw(picture).text((x * cell + 3, 2), names[x][:cell // 6] if names else "", fill="black")
        for y, i in enumerate(column):
            picture.paste(Image.fromarray(images[i]).resize((cell, cell), Image.NEAREST), (x * cell, y * cell + 16))
    picture.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# What the later stages call
# ---------------------------------------------------------------------------------------------------------------------

def open_data(folder):
    """A packed data set -> (meta, {"train": (images, labels), "val": ...}); images are memory maps.

    images: (N,H,W,3) uint8.  labels: (N,) int64.  Raises ValueError with one line that says what to run.
    """
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        unfinished = folder.with_name(folder.name + ".partial").is_dir()
        raise ValueError(f"no data set at {folder}{' (its packing was interrupted)' if unfinished else ''}: "
                         f"make it first (python 01_data.py --name {folder.name} ...; python 01_data.py alone draws data/shapes)")
    try:
        meta, arrays = json.loads((folder / "meta.json").read_text()), {}
        for split in ("train", "val"):
            images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
            arrays[split] = images, np.load(folder / f"{split}_labels.npy", allow_pickle=False)
            size, labels = meta["size"], arrays[split][1]
            if images.shape != (meta["counts"][split], size, size, 3) or images.dtype != np.uint8 or len(labels) != len(images):
                raise ValueError(f"{split} arrays do not fit meta.json")
            if len(labels) and not 0 <= labels.min() <= labels.max() < max(1, len(meta["classes"])):
                raise ValueError(f"a label in {split}_labels.npy is outside 0..{len(meta['classes']) - 1}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"the data set at {folder} is damaged ({error}): remove the folder and pack it again") from None
    return meta, arrays


# ---------------------------------------------------------------------------------------------------------------------
# As a script
# ---------------------------------------------------------------------------------------------------------------------

def check_space(splits, size, folder):
    """Stop before the start when the disk cannot hold the arrays.  Raises ValueError."""
    need = sum(len(jobs) for jobs, _ in splits.values()) * size * size * 3
    have = sum(file.stat().st_size for file in folder.glob("*_images.npy"))
    free = shutil.disk_usage(folder).free
    if need - have > free * 0.98:
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, or choose another --out")
    if need > 1e9:
        print(f"{need / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free")


def jobs_hash(splits):
    """Digest of all jobs (file names and labels, or images), by which a resumed packing knows that its source has not changed."""
    digest = hashlib.sha256()
    for jobs, labels in splits.values():
        for job, label in zip(jobs, labels):
            digest.update(job.tobytes() if isinstance(job, np.ndarray) else f"{job} {label}\n".encode())
    return digest.hexdigest()


def build(args, folder, settings):
    """Pack all splits into <folder>.partial, then rename it."""
    names, make, splits = plan(args)
    splits["train"] = keep_fraction(*splits["train"], args.fraction, args.seed)
    part, stamp = folder.with_name(folder.name + ".partial"), dict(settings, jobs=jobs_hash(splits))
    if part.exists() and not ((part / "settings.json").exists() and json.loads((part / "settings.json").read_text()) == stamp):
        shutil.rmtree(part)                               # begun with other settings or other files: of no use
    part.mkdir(parents=True, exist_ok=True)
    write_json(part / "settings.json", stamp)
    check_space(splits, args.size, part)
    skipped = []
    for split, (jobs, labels) in splits.items():
        skipped += pack(split, make, jobs, labels, args.size, part, args.workers if make is not np.asarray else 1)
    labels = np.load(part / "train_labels.npy")
    if skipped:
        (part / "skipped.txt").write_text("\n".join(skipped) + "\n")
        print(f"{len(skipped)} unreadable images left out; they are listed in {folder / 'skipped.txt'}")
    if not len(labels):
        raise ValueError(f"none of the {len(skipped)} files under {args.root} is a readable image; the reasons are in {part / 'skipped.txt'}")
    empty = sorted(set(range(len(names))) - set(labels.tolist()))
    if empty:
        raise ValueError(f"class {names[empty[0]]} has no readable training image ({len(empty)} such classes)")
    preview(np.load(part / "train_images.npy", mmap_mode="r"), labels, names, part / "preview.png")
    counts = {split: int(len(np.load(part / f"{split}_labels.npy"))) for split in splits}
    for leftover in ("settings.json", "train.json", "val.json"):
        (part / leftover).unlink(missing_ok=True)
    write_json(part / "meta.json", {"name": args.name, "size": args.size, "classes": names, "counts": counts, "settings": settings,
               "preprocessing": "drawn" if args.source == "shapes" else "none" if args.source == "cifar10" else "ADM centre crop, RGB",
               "skipped": len(skipped), "sha256": {file.name: file_hash(file, "sha256") for file in sorted(part.glob("*.npy"))}})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)


def benchmark(args, folder):
    """Images per second and core: random rows of the packed file against decoding and cropping the originals."""
    meta, arrays = open_data(folder)
    root = args.root or (meta["settings"]["root"] and Path(meta["settings"]["root"]))
    files = list_images(root)[:200] if root else []
    if not files:
        raise ValueError(f"--benchmark compares with the originals of a packed folder; {folder} has none (give --root)")
    start = time.perf_counter()
    for file in files:
        decode((file, meta["size"]))
    decoding = len(files) / (time.perf_counter() - start)
    images, order, count = arrays["train"][0], np.random.default_rng(0), 0
    start = time.perf_counter()
    while time.perf_counter() - start < 2:
        count += len(images[np.sort(order.integers(0, len(images), 64))])
    packed = count / (time.perf_counter() - start)
    print(f"{meta['size']} px, one core: decoding {decoding:.0f} images/s, packed reading {packed:.0f} images/s, "
          f"{packed / decoding:.0f} times as fast")


def main(args):
    folder = args.out / args.name
    settings = {"source": args.source, "root": str(args.root.resolve()) if args.root else None, "size": args.size, "seed": args.seed,
                "fraction": args.fraction, **({"count": args.count} if args.source == "shapes" else {}),
                **({"val_fraction": args.val_fraction} if args.source == "folder" else {})}
    try:
        if args.benchmark:
            return benchmark(args, folder)
        if args.source == "folder" and not (args.root.is_dir() and any(list_images(args.root))):
            return fail(f"--root {args.root} {'holds no images' if args.root.is_dir() else 'is no folder'}", 2)
        if folder.exists() and not (folder / "meta.json").exists():
            return fail(f"{folder} exists and is no packed data set: nothing is touched; choose another --name or --out")
        if folder.exists() and not args.overwrite:
            if open_data(folder)[0]["settings"] == settings:
                return print(f"{folder} is already there, made with these settings; nothing to do (--overwrite packs it again)")
            return fail(f"{folder} holds another data set; choose --name, or pass --overwrite to replace it")
        build(args, folder, settings)
    except (ValueError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where it was")
    meta = open_data(folder)[0]
    print(f"{folder}: {meta['counts']['train']} training and {meta['counts']['val']} held-out images, {meta['size']} x {meta['size']}, "
          f"{len(meta['classes'])} classes; look at {folder / 'preview.png'}")


if __name__ == "__main__":
    sys.exit(main(parse_args()))
