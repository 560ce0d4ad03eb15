"""01_data.py -- images: from a source to arrays that every later stage reads without decoding anything again

What this stage teaches: training reads each image many times.  So it is decoded, cropped and scaled once and kept as
raw bytes, one file a split, that the operating system maps into memory.  An epoch then costs a memory copy.
Reads a source:   shapes       ten named shapes, drawn here; a function of (seed, index), nothing to download
                  folder       your own images: class folders under train/ and val/ (or test/), class folders alone
                               (a part is held out), or images without class folders
                  cifar10, imagenette-160, imagenette-320     downloaded, checked by their checksum
Writes data/<name>/:   train_images.npy (N,H,W,3) uint8, train_labels.npy (N,) int64, val_*.npy, meta.json, preview.png
Run it:   python 01_data.py          8 seconds on two cores; look at data/shapes/preview.png
          python 01_data.py --source folder --root PHOTOS --size 256 --name photos
A data set is whole, or it is not there.  Pixels stay uint8 on disk, 0..255; 03_train.py scales them to [-1, 1] later.
"""
import argparse
import colorsys
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import time
import unicodedata
import urllib.request
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:                                       # Windows: nobody has tried it; two scripts at once collide
    flock = None

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
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

# ---- Packing: every image of a split becomes a row of one file -------------------------------------------------------
def pack(path, pairs, make, shape, pool):
    """Make the images of one split and write them to `path`, row after row.

    pairs: [(job, label)].  make(job): uint8 array of this shape, or a string that says why there is none; threads call
    it, since Pillow lets others run while it decodes.  Returns (labels of the rows, a line for each image left out).
    """
    labels = []
    left_out = []

    def rows():
        with asked_to_stop() as asked, Progress(len(pairs), path.stem, " images") as bar:
            for block in in_parts(pairs, 256):
                images = pool.map(make, [job for job, _ in block])
                for (job, label), image in zip(block, images):
                    if isinstance(image, str):
                        left_out.append(f"{job}: {image}\n")
                    else:
                        labels.append(label)
                        yield image
                bar.update(len(block))
                if asked:
                    raise KeyboardInterrupt
    save_rows(path, rows(), shape)
    return labels, left_out

# ======================================================================================================================
# first reading ends here: what follows reads folders and archives, and runs it all for real
# ======================================================================================================================

# ---- Opening what was packed ----------------------------------------------------------------------------------------
def open_data(folder):
    """A packed data set -> (meta, {"train": (images, labels), "val": ...}); images are memory maps.

    images: (N,H,W,3) uint8, latents (N,h,w,C) float16.  labels: (N,) int64.  Raises ValueError with one line that says
    what to run.
    """
    folder = Path(folder)
    if not (folder / "train_images.npy").is_file():
        raise ValueError(f"no data set at {folder}: make it first (python 01_data.py draws data/shapes, with "
                         "--source cifar10 it makes data/cifar10, imagenette alike; of your own images: --source "
                         "folder --root IMAGES --name NAME; latents: tests/experiments/), or give its place: NAME "
                         "means data/NAME, with a slash it is a path")
    try:
        meta = load_json(folder / "meta.json", id=str, size=int, classes=list, counts=dict, recipe=dict)
        "".join(meta["classes"])                          # TypeError, unless all of them are texts
        kind = np.uint8
        if "coder" in meta:                               # latents
            expect(meta["coder"], experiment=str, pixels=str)
            kind = np.float16
        else:
            meta["channels"] = 3
        arrays = {}
        for split in "train", "val":
            images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
            shape = (meta["counts"][split], *[meta["size"]] * 2, meta["channels"])
            if (images.shape, images.dtype, labels.shape, labels.dtype) != (shape, kind, shape[:1], np.int64):
                raise ValueError(f"the {split} arrays do not fit meta.json")
            found = {*labels.tolist()}
            known = {*range(len(meta["classes"]) or 1)}
            if found - known or split == "train" and known - found:
                raise ValueError(f"{split}_labels.npy has a label outside 0..{max(known)}, or a class has no image")
            arrays[split] = images, labels
    except Exception as error:                            # numpy raises many kinds
        raise ValueError(f"the data set at {folder} cannot be read ({error}): if it is damaged or outdated, move the "
                         "folder away, and pack it again")
    return meta, arrays

# ---- Source "shapes": outlines in about the unit circle, y pointing down, all symmetric left to right ---
def arc(radius, start=0.0, stop=2.0, y=0.0):
    """64 points on a circle around (0, y); angles in units of pi, 0 = right, 0.5 = down."""
    angles = np.pi * np.linspace(start, stop, 64)
    return np.column_stack([radius * np.cos(angles), radius * np.sin(angles) + y])

def heart():
    """The well-known heart curve, scaled to the unit circle."""
    a = np.linspace(0, 2 * np.pi, 64)
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) - 2.5
    return np.column_stack([16 * np.sin(a)**3, y]) / 15.5

def mirrored(text):
    """Close an outline "x,y  x,y  ..." given for x >= 0, top to bottom, with its mirror image."""
    points = np.array([point.split(",") for point in text.split()], float)
    return np.concatenate([points, points[::-1] * [-1, 1]])

SHAPES = {  # name: outline, and the hole in it if there is one
    "circle": [arc(0.88)],
    "square": [mirrored("0.8,-0.8  0.8,0.8")],
    "triangle": [mirrored("0,-0.85  0.87,0.65")],
    "star": [mirrored("0,-1  0.26450336,-0.36405765  0.95105652,-0.30901699  0.42797543,0.13905765  "
                      "0.58778525,0.80901699  0,0.45")],                       # five spikes, radius 0.45 between them
    "heart": [heart()],
    "cross": [mirrored("0.31,-0.95  0.31,-0.31  0.95,-0.31  0.95,0.31  0.31,0.31  0.31,0.95")],
    "moon": [arc(1.0), arc(0.8, y=-0.5)],
    "arrow": [mirrored("0,-1  0.85,0  0.35,0  0.35,1")],
    "ring": [arc(0.92), arc(0.5)],
    "drop": [np.concatenate([[(0, -1.1)], arc(0.68, -0.2, 1.2, y=0.35)])],
}

def draw_shape(seed, index, size):
    """Image `index`, (size,size,3) uint8, of class index % 10: a function of (seed, index) alone."""
    rng = np.random.default_rng((seed, index))
    outlines = list(SHAPES.values())[index % len(SHAPES)]
    radius = size * rng.uniform(0.34, 0.42)
    turn = math.radians(rng.uniform(-8, 8))
    centre = size * (0.5 + rng.uniform(-0.05, 0.05, 2))
    contrast = 0
    while contrast <= 0.3:                                # two colours whose brightness differs enough to see the shape
        hues = rng.random(2)
        foreground = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
        background = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0, 0.25), rng.uniform(0.05, 1)))
        contrast = abs((foreground - background) @ (0.299, 0.587, 0.114))
    fine = 4                                              # drawn four times larger, then averaged: smooth edges
    mask = Image.new("L", [size * fine] * 2)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    for points, level in zip(outlines, (255, 0)):         # the shape, then the hole
        placed = (points @ rotation * radius + centre) * fine
        ImageDraw.Draw(mask).polygon(placed.ravel().tolist(), fill=level)
    cover = np.asarray(mask.reduce(fine))[..., None] / 255
    image = background + cover * (foreground - background)
    return (image * 255 + 0.5).astype(np.uint8)

# ---- Source "folder": find the files, and read them as the eye would see them ----------------------------------------
FORMATS = "JPEG PNG WEBP BMP GIF TIFF PPM".split()
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)

def to_rgb(image):
    """A PIL image of 8 or 16 bits -> RGB: turned as its EXIF says, scaled to 8 bits, transparency on white."""
    image.load()                                          # subtle: Pillow turns TIFF files by itself, in loading them
    with suppress(Exception):                             # a camera's odd entry does not spoil the picture
        ImageOps.exif_transpose(image, in_place=True)
    deep = image.mode.startswith("I;16") or image.mode == "I" and image.format != "TIFF"
    tags = getattr(image, "tag_v2", {})                   # of a TIFF file: 262 what zero means, 339 signs
    bits = tags.get(258, ())
    if (image.mode in ("I", "F") and not deep or bits == (12,) or 2 in tags.get(339, ())
            or tags.get(284) == 2 and 16 in bits[1:]):    # subtle: planes, one after the other, which Pillow misreads
        raise ValueError(f"its pixels must have 8 or 16 bits, no sign, and no planes of 16 bits ({image.mode})")
    if deep:                                              # grey; subtle: convert("RGB") would cut it off at 255
        grey = np.array(image, np.float32)
        if tags.get(262) == 0:                            # white is zero
            grey = 65535 - grey
        grey[grey == image.info.get("transparency")] = 65535
        image = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")                           # ImageNet holds grey and CMYK files

def read_image(path):
    """An image file as a PIL image, RGB.  Raises ValueError."""
    try:
        # subtle: given a path, Pillow maps some TIFF files into memory and forgets how they are turned
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as error:                            # subtle: Pillow raises many kinds, also SyntaxError
        raise ValueError(f"{path} is not a readable image ({type(error).__name__}: "
                         f"{' '.join(str(error).splitlines())})")

def decode(path, size):
    """Read and crop one file.  Returns (size,size,3) uint8, or a string that says why not."""
    try:
        image = read_image(path)
    except ValueError as error:
        return str(error)
    if max(image.size) > 100 * min(image.size):
        return f"{image.width} x {image.height} is too long and thin"
    return center_crop(image, size)

# beginnings of names that drives, networks and Macs give
HIDDEN = tuple(".|@eaDir|@Recycle|@recycle|@Recently|@tmp|@__thumb|@appstore|@Transcode|#Recycle|#recycle|#snapshot|"
               "$RECYCLE|$Recycle|__MACOSX|__pycache__|lost+found|System Volume".split("|"))

PACKED = {"train_images.npy", "meta.json"}                # where both lie is a data set, and no folder of images

def no_pictures(place):
    """Folders not looked into from `place`: data/ and runs/, where these scripts write, itself, and those above it."""
    here = place.resolve()
    return {Path(name).resolve() for name in ("data", "runs")} | {here, *here.parents}

def folders_in(place):
    """{name: folder} in a folder, but for hidden ones, packed data sets, and those where these scripts write.

    subtle: Macs write an accent as a letter of its own; the form NFC puts both together.
    """
    found = {unicodedata.normalize("NFC", entry.name): entry for entry in place.iterdir()
             if entry.is_dir() and not entry.name.startswith(HIDDEN) and entry.resolve() not in no_pictures(place)
             and not PACKED <= {*os.listdir(entry)}}
    return dict(sorted(found.items()))

def every_file(folder):
    """Every file below a folder, but for packed data sets, runs and what these scripts write.  Raises OSError.

    Links are followed, but not in circles.
    """
    def fail(error):
        if not Path(error.filename).name.startswith(HIDDEN):
            raise error
    seen = no_pictures(folder) - {folder.resolve()}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(parent).resolve()
        if real in seen or PACKED <= {*names} or "checkpoint.pt" in names and "config.json" in names:     # a run
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            yield str(Path(parent, name))

def list_images(folder):
    """The image files of a folder and of those below it, but for hidden ones; the suffix decides."""
    return sorted(file for file in every_file(folder) if file.lower().endswith(SUFFIXES) and os.path.isfile(file)
                  and not any(part.startswith(HIDDEN) for part in Path(file).relative_to(folder).parts))

def list_classes(folder):
    """Class folders -> (names, [(file, label)]).  A folder without sub-folders is unlabelled: no names, label 0.

    Raises ValueError, also in doubt: a single folder of folders is often what an archive was unpacked into.
    """
    places = folders_in(folder)
    names = [*places]
    loose = [file for file in list_images(folder) if Path(file).parent == folder]
    if names and loose:
        raise ValueError(f"{folder} holds class folders ({names[0]}, ...) and {len(loose)} loose images ({loose[0]}, "
                         "...): put them into a class, or elsewhere")
    pairs = []
    for label, place in enumerate(places.values() or [folder]):
        files = list_images(place)
        if len(names) == 1 and folders_in(place):
            raise ValueError(f"{folder} holds one folder only, which holds folders: are those the classes? Then give "
                             f"{place} as --root, or move them up; if not, put the images themselves into it")
        if not files:
            raise ValueError(f"{place} holds no images ({', '.join(FORMATS)}, by their suffixes; what is hidden, "
                             "packed data sets, runs, data/ and runs/ of the working directory do not count): add "
                             "some, or move it")
        pairs += [(file, label) for file in files]
    return names, pairs

def hold_out(pairs, fraction, seed):
    """{"train": pairs, "val": pairs}: a random part is held out, but never the first image of a class."""
    spare = [i for i in range(1, len(pairs)) if pairs[i][1] == pairs[i - 1][1]]
    held = set(np.random.default_rng((seed, 1)).permutation(spare)[:max(1, round(len(pairs) * fraction))])
    return {"train": [pair for i, pair in enumerate(pairs) if i not in held], "val": [pairs[i] for i in sorted(held)]}

def list_folder(root, val_fraction, seed):
    """A folder of images -> (class names, {"train": [(file, label)], "val": [(file, label)]}).  Raises ValueError."""
    refuse(not root.is_dir(), f"--root {root} is not a folder")
    train, val = split_folders(root)
    names, pairs = list_classes(train)
    found = hold_out(pairs, val_fraction, seed)
    if val:
        refuse(val_fraction != Options.val_fraction, f"--val-fraction: {val} is what is held out")
        print(f"{train} is to be trained on, {val} is held out")
        val_names, found["val"] = list_classes(val)
        found["train"] = pairs
        if names != val_names:
            raise ValueError(f"{train} and {val} must hold the same class folders; "
                             f"{min({*names} ^ {*val_names})} is in one only (ImageNet's val/ comes without: sort "
                             "it; a contest's test/, too: move it away)")
    left_out = {*every_file(root)} - {file for file, _ in sum(found.values(), [])} - {str(root / "classes.txt")}
    if left_out:
        print(f"{len(left_out)} files are left out, of other kinds, hidden, or in other folders, as {max(left_out)}")
    return names, found

SPLIT = "(?i)(.*[^a-z])?(?P<word>train(ing)?|test(ing)?|val(id|idation)?)(set|data|images|.)?([^a-z].*)?"

def split_folders(root):
    """(folder of training, folder of held-out images or None), by their names; in doubt raises ValueError.

    train/, val/ and test/ in any case; in a pair also test_set, valid-images, seg_train, train2017 and the like, which
    by itself may be a class.  Of val/ and test/ the former is taken.  Without splits it is root itself.
    """
    folders = {name: re.fullmatch(SPLIT, name) for name in folders_in(root)}
    found = {match["word"][:3].lower(): root / name for name, match in folders.items() if match}
    plain = [match and match["word"] == name for name, match in folders.items()]
    if not any(plain) and not {"tra"} < found.keys():
        return root, None
    if len(found) < len(folders) or len(folders) > 2 and not all(plain) or "tra" not in found:
        raise ValueError(f"{root} holds {', '.join(folders)}: are they classes, or splits? Rename a class that is "
                         "called like a split; of splits, leave train/ and one of val/ and test/ there, nothing else")
    return found["tra"], found.get("val", found.get("tes"))

# ---- Downloads: whole and with the right checksum, or not there at all -----------------------------------------------
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGENETTE_CLASSES = """
n01440764 tench
n02102040 springer
n02979186 cassette
n03000684 chainsaw
n03028079 church
n03394916 horn
n03417042 truck
n03425413 pump
n03445777 golf
n03888257 parachute
"""
FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {  # source: size in pixels, address, md5
    "cifar10": (32, "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "imagenette-160": (160, f"{FAST_AI}imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagenette-320": (320, f"{FAST_AI}imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
}

def file_hash(path, kind):
    return hashlib.new(kind, path.read_bytes()).hexdigest()

def fetch(options):
    """Path of the source's archive, downloaded if it is not there.  Raises ValueError."""
    folder = options.root or options.out / "downloads"
    _, url, md5 = ARCHIVES[options.source]
    path = folder / Path(url).name
    with locked(path):
        if not path.exists():
            try:
                with whole(path) as part:
                    download(url, part)
                    if file_hash(part, "md5") != md5:
                        raise OSError(f"its md5 is not {md5}")
            except Exception as error:                    # urllib, http and ssl each have their own
                raise ValueError(f"cannot download {url} ({type(error).__name__}: {error}): fetch it yourself and put "
                                 f"it into {folder}")
        elif file_hash(path, "md5") != md5:
            raise ValueError(f"{path} is damaged: its md5 is not {md5}; remove it and run again")
    return path

def download(url, path):
    with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
        with Progress(int(answer.headers.get("Content-Length", 0)), path.stem, "B", unit_scale=True) as bar:
            while piece := answer.read(1 << 20):
                bar.update(file.write(piece))

def unpack(archive, folder):
    """Extract a tar file, once and whole; the "data" filter refuses paths that lead out of the folder."""
    part = folder.with_suffix(".part")                    # what a kill leaves there is extracted again
    with locked(folder):
        if not folder.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
            part.replace(folder)
    return folder

def read_cifar10(archive, names):
    """Some files of the binary version -> [(image, label)]; a record is a label and three 32x32 planes."""
    with tarfile.open(archive) as tar:
        raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names)
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return list(zip(images, records[:, 0]))

# ---- The sources: options -> (class names, make, {split: [(job, label)]}); make(job) is an image, or why there is none
def shapes_source(options):
    refuse(options.root, "--root: shapes are drawn, they have no folder; images in one need --source folder")
    options.workers = 1                                   # drawing is Python: threads would wait for each other
    indices = {"train": range(options.count), "val": range(10**7, 10**7 + max(100, options.count // 10))}
    splits = {split: [(i, i % len(SHAPES)) for i in span] for split, span in indices.items()}
    return list(SHAPES), lambda index: draw_shape(options.seed, index, options.size), splits

def folder_source(options):
    refuse(not options.root, "--source folder needs --root, its folder")
    names, splits = list_folder(options.root, options.val_fraction, options.seed)
    file = options.root / "classes.txt"
    if file.is_file():
        print(f"names of classes are read from {file}, a text in UTF-8")
        names = called(names, file.read_text(encoding="utf-8-sig"))
    print(f"folders in {options.root}, or in its train/, are classes, with all that lies in them (but not data/ and "
          "runs/ of the working directory, where these scripts write); every image is cropped and scaled to "
          f"{options.size} x {options.size}, small ones enlarged; of 16 bits, 65535 is white")
    return names, lambda path: decode(path, options.size), splits

def called(names, text):
    """What a classes.txt calls the class folders, in lines like "n01440764 tench, Tinca tinca"; others keep theirs."""
    known = dict(line.strip().split(maxsplit=1) for line in text.splitlines() if len(line.split()) > 1)
    print(f"{len(known.keys() & set(names))} of {len(names)} classes are named by a line FOLDER NAME of the list "
          "(of two for one folder the last counts)")
    names = [known.get(name, name) for name in names]
    refuse(len(set(names)) < len(names), f"classes.txt: two classes are called "
           f"{max(names, key=names.count, default=None)}: change or remove the line of one")
    return names

def cifar10_source(options):
    refuse(options.size != 32, "--size: cifar10 is 32 pixels")
    archive = fetch(options)
    train = read_cifar10(archive, [f"data_batch_{i}" for i in range(1, 6)])
    return CIFAR_CLASSES, np.asarray, {"train": train, "val": read_cifar10(archive, ["test_batch"])}

def imagenette_source(options):
    archive = fetch(options)
    options.root = unpack(archive, archive.with_name(options.source)) / archive.stem
    names, make, splits = folder_source(options)
    return called(names, IMAGENETTE_CLASSES), make, splits

SOURCES = {"shapes": shapes_source, "folder": folder_source, "cifar10": cifar10_source,
           "imagenette-160": imagenette_source, "imagenette-320": imagenette_source}

# ---- Plumbing of all five scripts (it needs no torch): flags and errors ----------------------------------------------
class UsageError(ValueError):
    """A wrong flag or value: exit code 2."""

def refuse(bad, message, error=UsageError):
    """One rule: raise UsageError if the options break it; another error if what was found does."""
    if bad:
        raise error(message)

def refuse_other(old, new, place, advice):
    """Raise ValueError if what lies at `place`, made with the settings `old`, is not what `new` asks for."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(f"{place} was made with other settings ({name} {old.get(name)!s:.40}, now "
                             f"{new[name]!s:.40}): {advice}")

def flag(name):
    return f"--{name.replace('_', '-')}"

def option(default, text, within="(-inf, inf)", choices=None, group=None):
    """A dataclass field that is also a command-line flag.  None as default: worked out later, as the text says.

    within: an interval for its numbers, as "(0, 1]".  choices: a function that returns the names allowed; it is called
    when a value is checked, so that experiments can add some.  group: title of the flags from here on.
    """
    return field(default=default, metadata=locals())

def check(name, value, within="(-inf, inf)", choices=None, **_):
    """Raise UsageError unless value is one of the choices, and its numbers are finite and in the interval."""
    if choices:
        refuse(value not in choices(), f"{name} {value!r} is unknown: one of {', '.join(choices())}")
    low, high = numbers(within[1:-1])
    for number in value if isinstance(value, tuple) else [value]:
        if isinstance(number, (int, float)):
            at_an_end = (within[0], number) == ("[", low) or (within[-1], number) == ("]", high)
            refuse(not (low < number < high or at_an_end), f"{name} {value}: give a number in {within}")

def numbers(text):
    """"0.1,1" -> (0.1, 1.0)"""
    return tuple(map(float, text.split(",")))

class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, and names stay whole."""

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)

def parse(argv, description, *classes, shown={}):
    """The flags given -> {name: value}; there is one for each option() of the dataclasses.  Raises UsageError.

    shown: defaults for --help that come before those of the fields.
    """
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]", allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, formatter_class=HelpFormatter)

    def error(message):
        raise UsageError(f"{message} (see --help)")
    parser.error = error
    options = {entry.name: entry for cls in classes for entry in fields(cls) if entry.metadata}
    group = parser
    for name, entry in options.items():
        about = entry.metadata
        default = shown.get(name, entry.default)
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        how = {"type": entry.type}
        if entry.type is bool:
            how = {"action": "store_true" if entry.default is False else argparse.BooleanOptionalAction}
        elif entry.type is tuple:
            how = {"type": numbers}
            default = str(default).strip("()[],").replace(" ", "")
        elif entry.type is list:
            how = {"nargs": "+"}
        group.add_argument(flag(name), help=help_text(about, default), **how)
    refuse(any(re.fullmatch("(--[a-z-]+=(~.*)?)?", word) for word in (sys.argv[1:] if argv is None else argv)),
           "an argument is empty (leave its flag out; or is a variable not set?), or has ~ after =, where the shell "
           "leaves it as it is")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        check(flag(name), value, **options[name].metadata)
    return given

def help_text(about, default):
    text = about["text"] if default == about["default"] else about["text"].partition(" (default")[0]
    if about["choices"]:
        text += "; " + " | ".join(about["choices"]())
    if default not in (None, "") and default is not False and "(default" not in text:
        text += f" (default: {'on' if default is True else default})"
    return text.replace("%", "%%")

RANK = os.environ.get("RANK") or "0"                      # this process's number, from torchrun

def run(main):
    """Call main() and return the exit code.  Expected errors become one line on stderr; bugs keep their traceback."""
    with suppress(AttributeError):                        # a notebook's cannot, and need not
        sys.stdout.reconfigure(errors="replace")          # a terminal without the letters of a class name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main() or 0
    except KeyboardInterrupt as stop:
        code = 130
        message = str(stop) or "stopped; the same command begins again, or goes on where it was"
    except (ValueError, OSError, NotImplementedError, MemoryError, OverflowError) as error:
        code = 2 if isinstance(error, UsageError) else 1
        message = error
    if RANK != "0":                                       # if all processes fail alike, the first speaks and torchrun
        signal.signal(signal.SIGTERM, signal.SIG_DFL)     # ends the others in this time; one that fails alone speaks
        time.sleep(3)
        message = f"[rank {RANK}] {message}"
    with suppress(OSError):                               # a full disk under stderr's file
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code

@contextmanager
def asked_to_stop():
    """Inside, a signal to stop is only noted, in the list that this yields: a loop looks, and stops where it is safe.

    subtle: Python may raise KeyboardInterrupt between any two steps, also while a lock is held; a pool then hangs.
    """
    asked = []
    signals = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}       # Windows has no SIGHUP
    before = {number: signal.signal(number, lambda *_: asked.append(1)) for number in signals
              if signal.getsignal(number) != signal.SIG_IGN}                                   # as nohup has it
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# ---- Plumbing: files and progress ------------------------------------------------------------------------------------
@contextmanager
def whole(path):
    """with whole(path) as part: write the file `part`.  At the end it is moved to its place: never half a file."""
    part = Path(f"{path}.jit-part")
    part.unlink(missing_ok=True)                          # of a kill; if it is a link, what it leads to is not ours
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

def load_json(path, **kinds):
    """The dict in a JSON file, whose entries named here have these types.  Raises ValueError."""
    try:
        refuse(not path.is_file(), "it is not there, or is no file")           # a pipe's reading might never end
        record = json.loads(path.read_text())
        json.dumps(record, allow_nan=False)               # ValueError: a number in it is none
        expect(record, **kinds)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not ours ({error})")
    return record

def expect(record, **kinds):
    """Raise ValueError unless it is a dict whose entries named here have these types."""
    for name, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(f"{name} is not of the type {kind.__name__}")

def save_json(path, value):
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False))

def save_rows(path, rows, shape, dtype=np.uint8):
    """Write arrays of one shape as the rows of an .npy file, one by one: memory holds one of them at a time."""
    count = 0
    with open(path, "wb") as file:
        file.seek(128)                                    # room for numpy's header, which says how many there are
        for row in rows:
            if row.shape != shape:
                raise ValueError(f"row {count} of {path} has the shape {row.shape}, not {shape}")
            file.write(row.astype(dtype).tobytes())
            count += 1
        file.seek(0)
        about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, about)

def in_parts(rows, size):
    return [rows[start:start + size] for start in range(0, len(rows), size)]

@contextmanager
def locked(path):
    """Keep other processes of this machine from writing to the same path.  Raises ValueError if one does."""
    refuse(not path.name, f"{path}: give this folder by its name, as ../NAME")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) and not os.access(path, os.W_OK):   # it may be looked at; nobody writes
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "a") as file:          # freed by the system, whatever ends us
        try:
            if flock:
                flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {path}: wait for it, or stop it")
        yield

def only_ours(folder, patterns, advice):
    """Raise ValueError if a folder that is about to be replaced holds more than files of these names."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() or not any(map(path.match, patterns)):
            raise ValueError(f"{folder} holds {path.name}, which this script did not write: {advice}")

class Progress(tqdm):
    """A tqdm bar on a terminal, elsewhere a line every half minute; the first process alone shows it."""

    def __init__(self, total, title, unit, **more):
        silent = sys.stderr is None or RANK != "0"
        self.lines = silent or not sys.stderr.isatty()
        if self.lines:
            more |= {"mininterval": 30, "delay": 4,
                     "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"}
        super().__init__(total=total, desc=title, unit=unit, disable=silent, **more)

    def display(self, *args, **more):
        with suppress(OSError):                           # a full disk under stderr's file is no reason to stop
            return print(self, file=sys.stderr, flush=True) if self.lines else super().display(*args, **more)

# ---- Plumbing: pictures ----------------------------------------------------------------------------------------------
def write(draw, place, text, width, anchor="la", fill="black"):
    """Draw text; what does not fit into `width` pixels is cut, and two dots say so.

    The font that Pillow brings has only ASCII: a letter that it lacks is written as its number, as \\u732b.
    """
    font = ImageFont.load_default(12)
    text = " ".join(str(text).split()).encode("ascii", "backslashreplace").decode()
    room = int(len(text) * width / max(1, draw.textlength(text, font)))
    if len(text) > room:
        text = text[:max(0, room - 2)] + ".."
    draw.text(place, text, fill=fill, font=font, anchor=anchor)

def picture(rows, titles=(), names=()):
    """Rows of images (H,W,3) uint8 -> one PIL picture: a title above each column, a name left of each row.

    None in a row is an empty place.
    """
    small = len(rows[0][0])
    side = max(small, 64 // small * small)                # small images are enlarged
    left = 80 * bool(names)
    top = 16 * bool(titles)
    sheet = Image.new("RGB", (left + side * max(map(len, rows)), top + side * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        write(draw, (left + x * side + 3, 1), title, side - 4)
    for y, row in enumerate(rows):
        write(draw, (3, top + y * side + side // 2), names[y] if names else "", left - 6, "lm")
        for x, image in enumerate(row):
            if image is not None:
                tile = Image.fromarray(image).resize((side, side), Image.NEAREST)
                sheet.paste(tile, (left + x * side, top + y * side))
    return sheet

def class_picture(labels, names, image_of):
    """A column per class (ten at most), eight images each, its name above; a single class fills the sheet, row by row.

    image_of(i) -> (H,W,3) uint8.
    """
    if len(set(labels)) == 1:
        labels = np.arange(len(labels)) % 10
        names = [""] * 10
    shown = np.unique(labels)[:10]
    columns = [np.flatnonzero(np.equal(labels, label))[:8] for label in shown]
    titles = [names[label] if label < len(names) else label for label in shown]
    rows = zip_longest(*[map(image_of, column) for column in columns])
    return picture([*rows], titles)

# ---- Running it ------------------------------------------------------------------------------------------------------
# the last lines: 05's caches; what kills and Macs leave
SET_FILES = """train_images.npy train_labels.npy val_images.npy val_labels.npy meta.json preview.png skipped.txt
               coder.pt reconstructions.npz classifier-????????.*.npz statistics-*????????-????????.npz
               *.jit-part .*.lock .DS_Store""".split()

@dataclass
class Options:
    source: str = option("shapes", "where the images come from", choices=lambda: SOURCES, group="what")
    root: Path = option(None, "folder: your images; others: where the archive is kept (default: OUT/downloads)")
    size: int = option(None, "height and width in pixels (default: 64; cifar10 32; imagenette 160, 320)", "[8, 4096]")
    count: int = option(20000, "shapes: number of training images", "[100, 10000000]")
    fraction: float = option(1.0, "keep this part of the training images, drawn with --seed", "(0, 1]")
    val_fraction: float = option(0.1, "folder without val/ or test/: part held out", "(0, 1)")
    seed: int = option(0, "of drawing, --fraction and hold-out", "[0, 1e18]")
    name: str = option(None, "the data set's name (default: the source)", group="where and how")
    out: Path = option(Path("data"), "folder of data sets; 03_train.py then needs --data OUT/NAME")
    workers: int = option(os.cpu_count(), "threads that draw or decode", "[1, inf)")
    overwrite: bool = option(False, "replace a data set of this name")

    def __post_init__(self):
        self.size = self.size or ARCHIVES.get(self.source, [64])[0]
        self.name = self.name or self.source
        refuse(self.count != Options.count and self.source != "shapes", "--count is for shapes; others have --fraction")
        refuse(self.val_fraction != Options.val_fraction and self.source != "folder", "--val-fraction is for folders")
        refuse("/" in self.name or self.name[0] == ".", f"--name {self.name}: give a name, not a path")

def keep_fraction(pairs, fraction, seed):
    """A seeded random part of the training images, in order: 1 % of ImageNet is 12,811.         (Improved JiT, 4.1)"""
    order = np.random.default_rng((seed, 2)).permutation(len(pairs))
    return [pairs[i] for i in np.sort(order[:max(1, int(len(pairs) * fraction))])]

def recipe_of(options, names, splits):
    """What decides the content: the settings, the classes, and a digest of the jobs: of files their names alone."""
    jobs = [str(job) for pairs in splits.values() for job, _ in pairs]
    settings = {name: getattr(options, name) for name in "source size fraction val_fraction seed".split()}
    return settings | {"classes": names, "files": f"{zlib.crc32(str(jobs).encode()):08x}"}

@contextmanager
def new_set(folder):
    """with new_set(folder) as part: fill the empty folder `part`.  At the end it takes the place of `folder`."""
    part = folder.with_name(f".{folder.name}.partial")    # no data set can be called so
    aside = folder.with_name(f".{folder.name}.old")

    def look():
        for place in (part, aside, folder):
            only_ours(place, SET_FILES, "nothing is touched; move it away, or choose --name or --out")
    look()
    refuse(os.path.ismount(folder), f"{folder} cannot be replaced, a disk is mounted there: choose --name or --out")
    shutil.rmtree(part, ignore_errors=True)               # left there by a kill
    part.mkdir()
    try:
        yield part
        look()                                            # hours may have passed
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)      # also left by one; else it is the only copy, and comes back
            folder.replace(aside)                         # fails before anything is lost, if it cannot be moved
        part.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        with suppress(OSError):                           # it is not there, or the new one is
            aside.replace(folder)
        shutil.rmtree(part)
        raise

def build(options, folder, names, make, splits):
    """Pack all splits, check them, and draw the preview; returns how many images each has."""
    shape = (options.size, options.size, 3)
    need = sum(map(len, splits.values())) * math.prod(shape)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, or pass --out")
    with new_set(folder) as part, ThreadPoolExecutor(options.workers) as pool:
        counts = {}
        left_out = []
        for split, pairs in splits.items():
            labels, lines = pack(part / f"{split}_images.npy", pairs, make, shape, pool)
            np.save(part / f"{split}_labels.npy", np.array(labels, np.int64))
            counts[split] = len(labels)
            left_out += lines
            empty = set(range(len(names) or 1)) - set(labels)
            if split == "train" and empty:
                what = f"class {names[min(empty)]}" if names else options.root
                jobs = [job for job, label in pairs if label == min(empty)]
                raise ValueError(f"{what} has no readable image to train on; --fraction and hold-out left {len(jobs)} "
                                 f"{''.join([line for line in left_out if line.startswith(tuple(jobs))][:1])}")
        if left_out:
            (part / "skipped.txt").write_text("".join(left_out), errors="replace")
            print(f"{len(left_out)} unreadable images left out, listed in skipped.txt; first: {left_out[0].strip()}")
        save_json(part / "meta.json", {
            "id": uuid.uuid4().hex, "size": options.size, "classes": names, "counts": counts,
            "recipe": recipe_of(options, names, splits)})
        images, labels = open_data(part)[1]["train"]
        class_picture(labels, names, images.__getitem__).save(part / "preview.png")
    return counts

def already_packed(folder, recipe, overwrite):
    """True if the folder holds what is asked for.  Raises ValueError if it holds anything else."""
    if not folder.exists():
        return False
    if not (folder / "train_images.npy").exists():
        raise ValueError(f"{folder} exists and is not a packed data set: nothing is touched; choose --name or --out")
    if overwrite:
        load_json(folder / "meta.json", id=str, recipe=dict)
        return False
    refuse_other(open_data(folder)[0]["recipe"], recipe, folder, "choose --name, or replace it with --overwrite")
    return True

def main(argv=None):
    options = Options(**parse(argv, "Pack images into memory-mapped arrays.", Options))
    folder = options.out / options.name
    folder = folder.resolve() if folder.is_symlink() else folder               # a set on another disk
    names, make, splits = SOURCES[options.source](options)
    splits["train"] = keep_fraction(splits["train"], options.fraction, options.seed)
    with locked(folder):
        if already_packed(folder, recipe_of(options, names, splits), options.overwrite):
            return print(f"{folder} is there, made with these settings of files with these names; nothing to do "
                         "(--overwrite packs it again)")
        counts = build(options, folder, names, make, splits)
    print(f"{folder}: {counts['train']} training and {counts['val']} held-out images, {options.size} x {options.size}, "
          f"{len(names)} classes ({textwrap.shorten(', '.join(names), 90) or 'no labels'}); "
          f"look at {folder / 'preview.png'}")

if __name__ == "__main__":
    sys.exit(run(main))
