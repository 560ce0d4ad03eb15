"""05_eval.py -- scores: how far generated images are from real ones, in numbers that can be compared with published ones

What this stage teaches: FID, sFID, Inception score, KID, precision and recall are a page of arithmetic each, on features of
a classifier.  Two sets of features, one arithmetic:
  --features classifier   a small network trained here, on the data set's own training images (default; works offline).  The
                          score is then called "FD (classifier features)", never FID, and beside it stands how often that
                          classifier sees the requested class in a generated image, and how often it is right on real ones.
  --features inception    Inception-v3 of the original FID, its weights downloaded with their hash checked, or given.
Reads runs/<name>/samples/ and data/<name>/.   Writes runs/<name>/metrics.json; statistics are cached beside the data.
Run it:   python 05_eval.py                                  EVALTIME on two CPU cores, the classifier's training included
          python 05_eval.py --samples my_pngs --reference VIRTUAL_imagenet256_labeled.npz --features inception
          python 05_eval.py --table runs/shapes/cfg-*-metrics.json       a table and a curve of scores made before

An image set is a folder of PNG files, a .npz with arr_0 (N,H,W,3) uint8, or a packed data set; the reference may also be a
.npz of statistics (mu, sigma).  FID is biased upwards at small N, and only comparable at equal N: every number carries its N.
"""
import csv
import hashlib
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

data, model = import_module("01_data"), import_module("02_model")
option = data.option

# ---- The scores: arithmetic on features (N,D) or logits (N,classes) --------------------------------------------------
def moments(sums):
    """Mean (D,) and covariance (D,D), with N-1, from the sum over images of F^T F with F = (1, f): N, sum f and sum f f^T.

    sums: (D+1,D+1) fp64.  Raises ValueError for fewer than two images.
    """
    n, total = sums[0, 0], sums[0, 1:]
    if n < 2:
        raise ValueError(f"{int(n)} images are too few for a covariance")
    mean = total / n
    return mean, (sums[1:, 1:] - n * np.outer(mean, mean)) / (n - 1)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 root), root the matrix square root of sigma1 sigma2.   (Heusel 2017, eq. 6)

    FID, on pool3 features.  The root's trace is the sum of the roots of the eigenvalues of R sigma2 R with R R = sigma1,
    symmetric: two eigenvalue problems instead of a general matrix root, and singular covariances do no harm.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma1))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.from_numpy(sigma2) @ root).clamp_min(0).sqrt().sum().item()
    return max(0.0, float(((mu1 - mu2)**2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross))

def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), mean and std over ten parts of a shuffle.                (Salimans et al. 2016, section 4)

    The shuffle is np.random.RandomState(2020).permutation(N).  logits: (N,classes), without the bias of the last layer;
    both as torch-fidelity has it.
    """
    logits = torch.as_tensor(logits).double()[np.random.RandomState(2020).permutation(len(logits))]
    scores, n = [], len(logits)
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

def kernel_distance(a, b, subsets=100, size=1000):
    """KID: unbiased MMD^2 with the kernel (<x,y>/D + 1)^3, mean and std over subsets.     (Binkowski et al. 2018, section 3)

    a, b: (N,D) features.  Raises ValueError when a side holds fewer than `size`.
    """
    if min(len(a), len(b)) < size:
        raise ValueError(f"KID draws subsets of {size} images, one side has {min(len(a), len(b))}")
    random, scores = np.random.RandomState(2020), []
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for _ in range(subsets):
        x, y = a[random.choice(len(a), size, replace=False)], b[random.choice(len(b), size, replace=False)]
        xx, yy, xy = ((p @ q.T / x.shape[1] + 1)**3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        scores.append(within - 2 * xy.sum() / size**2)
    return float(np.mean(scores)), float(np.std(scores))

def precision_recall(generated, real, k=3, block=1000):
    """Share of generated images inside some real image's ball to its k-th neighbour, and the other way round.

    (Kynkäänniemi et al. 2019, eq. 2)  Features (N,D).  In blocks: memory grows with N, not with N^2.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (generated, real))
    if min(len(a), len(b)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side")

    def distances(x, y):
        squared = (x * x).sum(dim=1)[:, None] + (y * y).sum(dim=1) - 2 * x @ y.T
        return squared.clamp_min(0).sqrt()

    def radii(x):                                         # subtle: the image itself is the nearest, hence the (k+1)-th
        return torch.cat([distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])

    def covered(x, y, radius):
        return torch.cat([(distances(part, y) <= radius).any(dim=1) for part in x.split(block)]).double().mean().item()
    return covered(a, b, radii(b)), covered(b, a, radii(a))

# ---- One pass over an image set: features, and the sums that the moments need ----------------------------------------
KEPT, NEIGHBOURS = 50_000, 10_000      # images whose features are kept; real ones that precision and recall look at

def random_subset(n, count):
    """At most n of the places 0 ... count-1 by chance, always the same ones, in order.

    subtle: packed images may lie sorted by class, or go round the classes in turn: neither the first n nor every k-th will do.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:n])

@torch.no_grad()
def describe(images, net, device, batch_size, title, chosen=None):
    """{"n", "mu", "sigma", "features", "logits", "seen": class seen in each image; from Inception "mu_s", "sigma_s" too}.

    images: anything with len() and fancy indexing to uint8 (N,H,W,3); all, or those chosen.  Every process takes its share.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chosen = np.arange(len(images)) if chosen is None else chosen
    start, stop = len(chosen) * rank // world, len(chosen) * (rank + 1) // world
    kept, sums, parts = np.isin(np.arange(len(chosen)), random_subset(KEPT, len(chosen))), {}, []
    with data.progress(stop - start, title, " images") as bar:
        for i in range(start, stop, batch_size):
            rows = slice(i, min(i + batch_size, stop))
            out = {k: v.float() for k, v in net(torch.from_numpy(np.array(images[chosen[rows]])).to(device)).items()}
            for name in {"features", "spatial"} & out.keys():
                f = F.pad(out[name].double(), (1, 0), value=1.0)                                   # B 1+D: (1, f)
                sums[name] = sums.get(name, 0) + f.T @ f
            parts.append([v.cpu().numpy() for v in (*(out[k][kept[rows]] for k in ("features", "logits")), out["logits"].argmax(1))])
            bar.update(len(f))
    if world > 1:
        for total in sums.values():
            dist.all_reduce(total)
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [part for share in everyone for part in share]
    result = dict(zip(("features", "logits", "seen"), (np.concatenate(column) for column in zip(*parts))), n=len(chosen))
    for name, suffix in (("features", ""), ("spatial", "_s")):
        if name in sums:
            result["mu" + suffix], result["sigma" + suffix] = moments(sums[name].cpu().numpy())
    return result

# ---- Inception-v3 as the original FID uses it: names and layout of torchvision, three differences marked -------------
class Conv(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU.  At stride 1 it keeps the size, unless padding says no."""

    def __init__(self, cin, cout, kernel, stride=1, pad=True):
        super().__init__()
        padding = tuple(k // 2 for k in kernel) if stride == 1 and pad else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),           # first difference: padding not counted
         "max": lambda x: F.max_pool2d(x, 3, 1, 1), "reduce": lambda x: F.max_pool2d(x, 3, 2)}

class Mixed(nn.Module):
    """Parallel branches, concatenated.  A branch is a chain of convolutions such as "48 1x1, 64 5x5" (width, kernel, /stride).

    The convolutions of a chain are called branch_1, branch_2, ...; two side by side, "384 1x3 | 384 3x1", branch_2a and
    branch_2b.  `branch_pool` begins with the pooling `pool`, `reduce` is a pooling alone.
    """

    def __init__(self, cin, pool="avg", **branches):
        super().__init__()
        self.pool, self.chains = pool, {}
        for branch, chain in branches.items():
            width, steps, self.chains[branch] = cin, chain.split(",") if chain else [], []
            for i, step in enumerate(steps, 1):
                names = [branch + (f"_{i}" if len(steps) > 1 else "") + letter for letter in ("ab" if "|" in step else [""])]
                for name, text in zip(names, step.split("|")):
                    out, shape = text.split()
                    kernel, _, stride = shape.partition("/")
                    self.add_module(name, Conv(width, int(out), tuple(map(int, kernel.split("x"))), int(stride or 1)))
                self.chains[branch].append(names)
                width = int(out)

    def forward(self, x):
        outs = []
        for branch, chain in self.chains.items():
            y = POOLS[self.pool](x) if branch == "branch_pool" else POOLS["reduce"](x) if branch == "reduce" else x
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            outs.append(y)
        return torch.cat(outs, dim=1)

def mixed_a(cin, pool):
    return Mixed(cin, branch1x1="64 1x1", branch5x5="48 1x1, 64 5x5", branch3x3dbl="64 1x1, 96 3x3, 96 3x3", branch_pool=f"{pool} 1x1")

def mixed_c(c):
    return Mixed(768, branch1x1="192 1x1", branch7x7=f"{c} 1x1, {c} 1x7, 192 7x1",
                 branch7x7dbl=f"{c} 1x1, {c} 7x1, {c} 1x7, {c} 7x1, 192 1x7", branch_pool="192 1x1")

def mixed_e(cin, pool):                                   # second difference: Mixed_7c takes the maximum in its pool branch
    return Mixed(cin, pool, branch1x1="320 1x1", branch3x3="384 1x1, 384 1x3 | 384 3x1",
                 branch3x3dbl="448 1x1, 384 3x3, 384 1x3 | 384 3x1", branch_pool="192 1x1")

class Inception(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,2048), "spatial" (B,2023), "logits" (B,1008) without bias}."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, (3, 3), 2), Conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, (3, 3)), Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, branch3x3="384 3x3/2", branch3x3dbl="64 1x1, 96 3x3, 96 3x3/2", reduce="")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, branch3x3="192 1x1, 320 3x3/2", branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3/2", reduce="")
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)                   # third difference: 1008 outputs

    def forward(self, images):
        x = (resize_tf1(images.permute(0, 3, 1, 2).float(), 299) - 128) / 128                      # B 3 299 299
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))                     # B 288 35 35
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                                         # B 768 17 17
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)                 # B 2023
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                                         # B 1280 8 8
        x = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))                                       # B 2048
        return {"features": x, "spatial": spatial, "logits": x @ self.fc.weight.T}

def resize_tf1(x, size):
    """Bilinear, the TF-1 way: the source of pixel i is i * in/size, no half-pixel offset, no antialiasing.  x: (B,C,H,W)."""
    for axis in (2, 3):
        n = x.shape[axis]
        place = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = place.long()
        part = (place - low).view(-1, 1) if axis == 2 else place - low
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, (low + 1).clamp_max(n - 1)) * part
    return x

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_HASH = "6726825d"                                 # the first digits of the published file's sha256

def load_inception(path):
    """(network, name of its score, hash of the weights).  Another file than the published one names the score after itself."""
    try:
        if path is None:
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
            digest = WEIGHTS_HASH
        else:
            digest, state = data.file_hash(path, "sha256")[:8], torch.load(path, map_location="cpu", weights_only=True)
        net = Inception()
        own = net.state_dict()
        for name in own:
            if not name.endswith("num_batches_tracked") and state[name].shape != own[name].shape:
                raise ValueError(f"{name} has another shape")
    except Exception as error:
        hint = "fetch it elsewhere and pass --inception-weights FILE" if path is None else "is it the right file?"
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0][:80]
        raise ValueError(f"cannot load the Inception weights from {path or WEIGHTS_URL} ({what}): {hint}") from None
    net.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    if digest == WEIGHTS_HASH:
        return net.eval(), "FID", digest
    print(f"warning: {path} (sha256 {digest}...) is not the published weights file; the scores are named after it, not FID",
          file=sys.stderr)
    return net.eval(), f"FD ({path.name} {digest})", digest

# ---- The classifier whose features stand in where Inception cannot be had --------------------------------------------
class Classifier(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,128), "logits" (B,classes)}.  Images above 64 pixels are averaged down."""

    def __init__(self, classes):
        super().__init__()
        layers = [part for cin, cout in ((3, 32), (32, 64), (64, 128))
                  for part in (nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.SiLU())]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 128), nn.SiLU())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.body(F.interpolate(x, size=64, mode="area") if x.shape[-1] > 64 else x)
        return {"features": features, "logits": self.head(features)}

def train_classifier(images, labels, classes, device):
    """A Classifier trained on the training split, mirrored by chance; the same weights for the same data.

    It sees 40,000 images of 64 pixels, four times as many of half the size, and none more than 30 times.
    """
    images_seen = min(int(40_000 * (64 / min(64, images.shape[1]))**2), 30 * len(labels))
    torch.manual_seed(0)
    net, batch = Classifier(classes).to(device), 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps, random = max(1, images_seen // batch), np.random.default_rng(0)
    with data.progress(steps, "training the classifier", " steps") as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            chosen = np.sort(random.integers(0, len(labels), batch))
            x = torch.from_numpy(images[chosen]).to(device)
            x = x.flip(2) if random.random() < 0.5 else x
            loss = F.cross_entropy(net(x)["logits"], torch.from_numpy(labels[chosen]).to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    return net.eval()

def load_classifier(folder, device, rank=0, world=1):
    """(network, name of its score, hash) of the data set's classifier, trained once and cached beside the data."""
    meta, arrays = data.open_data(folder)
    if len(meta["classes"]) < 2:
        raise ValueError(f"{folder} has no classes to train a classifier on: score it with --features inception, or pack class "
                         "folders")
    path, net = Path(folder) / "classifier.pt", Classifier(len(meta["classes"])).to(device)
    if rank:
        dist.barrier()                                    # until the first process has it: on a GPU no two trainings are alike
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"data": None}
        if state["data"] == meta["id"]:
            net.load_state_dict(state["weights"])
    except Exception:
        print(f"warning: {path} is damaged; training the classifier again", file=sys.stderr)
        state = {"data": None}
    if state["data"] != meta["id"]:                       # none yet, or the data set was packed anew
        net = train_classifier(*arrays["train"], len(meta["classes"]), device)
        with data.locked(path), data.whole(path) as part:
            torch.save({"weights": net.state_dict(), "data": meta["id"]}, part)
    if world > 1 and not rank:
        dist.barrier()
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in net.state_dict().values())).hexdigest()[:8]
    return net.eval(), "FD (classifier features)", digest

# ---- Image sets: a folder of PNG files, an npz batch, a packed data set, or statistics alone -------------------------
class ImageFiles:
    """A list of image files as an array: len() and slices, which give uint8 (N,H,W,3).  All have one size."""

    def __init__(self, files):
        self.files, self.size = np.array(files), None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        batch = [np.array(Image.open(file).convert("RGB")) for file in self.files[rows]]
        for file, image in zip(self.files[rows], batch):
            self.size = self.size or image.shape
            if image.shape != self.size:
                raise ValueError(f"{file} is {image.shape[1]} x {image.shape[0]}, others are {self.size[1]} x {self.size[0]}: "
                                 "all images of a set must have one size")
        return np.stack(batch)

@dataclass
class ImageSet:
    """place, images or None, class ids or None, how 04_sample.py made them, statistics of the file, key of the content."""
    place: str
    images: object = None
    labels: object = None
    record: dict = None
    statistics: dict = None
    key: str = ""

def open_set(place, split="train"):
    """A path -> ImageSet.  Raises ValueError."""
    path, found = Path(place), ImageSet(str(place), record={})
    if (path / "meta.json").exists():
        meta, arrays = data.open_data(path)
        (found.images, found.labels), found.key = arrays[split], meta["id"]
        return found
    files = [str(path)] if path.suffix == ".npz" else data.list_images(path)
    if not path.exists() or not files:
        raise ValueError(f"no images at {path}: make samples first (python 04_sample.py)")
    stamps = [(Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    found.key = hashlib.sha256(str(stamps).encode()).hexdigest()[:16]
    if path.suffix == ".npz":
        read_npz(path, found)
    else:
        found.images = ImageFiles(files)
        if (path / "samples.json").exists():
            try:
                found.record = json.loads((path / "samples.json").read_text())
                found.labels = np.array(found.record.pop("labels"), dtype=np.int64)
            except (ValueError, TypeError, LookupError, AttributeError):
                raise ValueError(f"{path / 'samples.json'} is damaged: run 04_sample.py again") from None
            if len(found.labels) != len(files):
                raise ValueError(f"{path} holds {len(files)} of {len(found.labels)} images: run the same 04_sample.py command "
                                 "again to finish")
    return found

def read_npz(path, found):
    """Sample batches (arr_0, arr_1) and statistics (mu, sigma, mu_s, sigma_s), into an ImageSet."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {k: file[k] for k in ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "n") if k in file.files}
    except Exception as error:                            # zip, zlib and numpy each have their own
        raise ValueError(f"{path} is not a readable npz file ({error})") from None
    found.images, found.labels = content.get("arr_0"), content.get("arr_1")
    if "mu" in content and "sigma" in content:            # ADM's: of the whole data set, and it does not say of how many
        found.statistics = {k: content[k].astype(np.float64) for k in content if k[:2] in ("mu", "si")}
        found.statistics["n"] = int(content.get("n", 0))
    elif found.images is None:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    shape, images = np.shape(found.images), found.images
    if images is not None and (images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {shape}; it must be uint8 (N,H,W,3)")
    if found.labels is not None and (found.labels.shape != shape[:1] or found.labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: arr_1 is {found.labels.dtype} {found.labels.shape}; it must hold one class id per image")

def describe_reference(real, net, features, digest, device, batch_size):
    """describe() of the real images, cached beside a packed data set; mu and sigma of a file come before those computed."""
    if real.images is None:
        return real.statistics
    cache = Path(real.place) / f"statistics-{features}-{digest}-{real.key[:8]}.npz"
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as file:
                return {k: file[k] for k in file.files}
        except Exception:
            print(f"warning: {cache} is damaged; making it again", file=sys.stderr)
    result = describe(real.images, net, device, batch_size, "real images") | (real.statistics or {})
    if Path(real.place).is_dir() and not (dist.is_initialized() and dist.get_rank()):
        with data.whole(cache) as part, open(part, "wb") as file:          # mu and sigma are what other tools read
            np.savez(file, **result)
    return result

# ---- From two image sets to a result ---------------------------------------------------------------------------------
METRICS = ("fd", "kid", "pr", "is", "sfd")

def compare(fake, real, metrics, inception):
    """The scores of two descriptions: ({name: number}, {score left out: why})."""
    scores, left_out, few = {}, {}, len(fake["features"])
    if fake["mu"].shape != real["mu"].shape:
        raise ValueError(f"the reference has features of {real['mu'].shape[0]} numbers, the samples of {fake['mu'].shape[0]}: "
                         "they were made with other networks")
    known = real["features"][random_subset(NEIGHBOURS, len(real["features"]))] if "features" in real else ()
    alike = float(np.trace(fake["sigma"])) < 1e-6 * float(np.trace(real["sigma"]))
    needs = {  # score: reasons why it cannot be computed
        "fd": {}, "sfd": {"it needs --features inception": not inception, "the reference has no mu_s, sigma_s": "mu_s" not in real},
        "kid": {"it needs 1000 images a side": min(few, len(real.get("features", ()))) < 1000},
        "pr": {"the reference has no images": not len(known), "the generated images are all the same": alike,
               "it needs at least 10 images a side": min(few, len(known)) < 10},
        "is": {"it needs --features inception": not inception, "it needs at least 10 images": few < 10}}
    for metric in metrics:
        reason = next((reason for reason, holds in needs[metric].items() if holds), None)
        if reason:
            left_out[metric] = reason
        elif metric == "fd":
            scores["fd"] = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
        elif metric == "sfd":
            scores["sfd"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
        elif metric == "kid":
            scores["kid"], scores["kid_std"] = kernel_distance(fake["features"], real["features"])
        elif metric == "pr":
            scores["precision"], scores["recall"] = precision_recall(fake["features"], known)
        elif metric == "is":
            scores["is"], scores["is_std"] = inception_score(fake["logits"])
    return scores, left_out

def score(samples, real, place, net, options, digest, device):
    """Score one image set against another: {name: number}, every number with its N."""
    inception, result = options.features == "inception", {}
    reference = describe_reference(real, net, options.features, digest, device, options.batch_size)
    fake = describe(samples.images, net, device, options.batch_size, "generated images")
    if not inception:
        held_out = open_set(place, "val")
        rows = random_subset(len(samples.images), len(held_out.images))                # as many: FD grows as N falls
        if len(rows) > 1:
            floor = describe(held_out.images, net, device, options.batch_size, "held-out images", rows)
            result["fd_floor"] = frechet_distance(floor["mu"], floor["sigma"], reference["mu"], reference["sigma"])
            result |= {"n_floor": len(rows), "class_accuracy_real": float((floor["seen"] == held_out.labels[rows]).mean())}
        if samples.labels is not None:
            result["class_accuracy"] = float((fake["seen"] == samples.labels).mean())
    if dist.is_initialized() and dist.get_rank():         # the first process computes and reports
        return {}
    scores, left_out = compare(fake, reference, options.metrics, inception)
    features = len(reference.get("features", ()))
    return {**scores, **result, "left_out": left_out, "n_generated": fake["n"], "n_real": int(reference["n"]),
            "n_real_features": features, "n_real_precision_recall": min(NEIGHBOURS, features)}

def report(result):
    """Print a result, each number with its unit and its N, then what was left out and what to be wary of."""
    n, m, name = result["n_generated"], result["n_real"], result["score"]
    kid = "KID" if result["features"] == "inception" else "KID (classifier features)"
    real = f"{m} real images" if m else f"the statistics in {result['reference']}"
    lines = {"fd": (name, f"{n} generated against {real}; 0 is best"),
             "fd_floor": (f"{name} floor", f"{result.get('n_floor')} held-out real against {m} real images"),
             "sfd": ("s" + name, f"{n} generated against {real}"), "is": ("Inception score", f"{n} images, ten splits"),
             "kid": (kid, f"x 1000 would be the usual unit; 100 subsets of 1000 of {n} and {result['n_real_features']} images"),
             "precision": ("precision", f"share of {n} generated images"),
             "recall": ("recall", f"share of {result['n_real_precision_recall']} real images"),
             "class_accuracy": ("class accuracy", f"share of {n} generated images that the classifier puts into the class asked for"),
             "class_accuracy_real": ("class accuracy, real", f"share of {result.get('n_floor')} held-out real images it gets right")}
    for key, (title, unit) in lines.items():
        if key in result:
            spread = f" +- {result[key + '_std']:.4f}" if key + "_std" in result else ""
            print(f"{title:32s} {result[key]:10.4f}{spread}   ({unit})")
    for metric, reason in result["left_out"].items():
        print(f"{metric:32s}   left out   ({reason})")
    judge = result.get("class_accuracy_real")
    for wary, message in ((n < 2048, f"{n} images are few: {name} is then biased upwards and only comparable at the same N"),
                          (result["features"] == "classifier" and judge is None, "nothing is held out: how well the classifier "
                           "judges is not known"),
                          (judge is not None and judge < 0.5, f"the classifier is right on {judge or 0:.2f} of held-out real "
                           "images only: neither its features nor its class accuracy are to be trusted")):
        if wary:
            print(f"warning: {message}", file=sys.stderr)

def print_table(files, out):
    """--table: a line per result, with the settings in which they differ; a CSV file and a curve over the first of these."""
    rows = []
    for file in files:
        try:
            rows.append(json.loads(Path(file).read_text()))
            rows[-1]["sampling"], rows[-1]["score"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{file} is not a result of this script") from None
    if len({(row["score"], row["n_real"]) for row in rows}) > 1:
        raise ValueError("the results differ in features or reference: they cannot be compared")
    varied = [k for k in rows[0]["sampling"] if len({str(row["sampling"].get(k)) for row in rows}) > 1 and k not in ("weights", "step")]
    scores = [k for k in ("fd", "sfd", "kid", "is", "precision", "recall", "class_accuracy") if any(k in row for row in rows)]
    table = [[Path(file).name, *(row["sampling"].get(k) for k in varied), row["n_generated"], *(row.get(k, "") for k in scores)]
             for file, row in zip(files, rows)]
    print(" | ".join(["file", *varied, "N", *scores]))
    for row in table:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    out = out or Path(files[0]).with_name("table")
    with data.whole(out.with_suffix(".csv")) as part, open(part, "w", newline="") as file:
        csv.writer(file).writerows([["file", *varied, "N", *scores], *table])
    numeric = [k for k in varied if all(isinstance(row["sampling"].get(k), (int, float)) for row in rows)]
    if numeric:
        points = sorted((float(row["sampling"][numeric[0]]), row["fd"]) for row in rows if "fd" in row)
        with data.whole(out.with_suffix(".png")) as part:
            data.chart(rows[0]["score"], numeric[0], {f"N = {rows[0]['n_generated']}": points}).save(part, "png")
    print(f"{out.with_suffix('.csv')}{f' and {out.stem}.png' if numeric else ''}: {len(rows)} results")

# ---- Running it ------------------------------------------------------------------------------------------------------
@dataclass
class Options:
    run: str = option("shapes", "runs/NAME, or a folder", group="what")
    samples: str = option(None, "generated images (default: the run's samples)")
    reference: str = option(None, "real images or their statistics (default: the samples' data set, training images)")
    metrics: str = option("all", f"some of {','.join(METRICS)}: Frechet distance, kernel distance, precision and recall, "
                          "Inception score, spatial Frechet distance")
    features: str = option("classifier", "see the head of this file:", choices=("classifier", "inception"))
    inception_weights: Path = option(None, "the weights file, where it cannot be downloaded")
    table: list = option(None, "only compare results made before: a table, a CSV file and a curve")
    out: Path = option(None, "result (default: metrics.json in the run's folder; SAMPLES-metrics.json with --samples)",
                       group="output and hardware")
    overwrite: bool = option(False, "replace a result made of other samples or with other options")
    batch_size: int = option(100, "images at a time and process", "[1, inf)")
    device: str = option(None, "cuda or cpu")

    def __post_init__(self):
        self.metrics = list(METRICS) if self.metrics == "all" else self.metrics.split(",")
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown:
            raise data.UsageError(f"--metrics {unknown[0]} is unknown: some of {', '.join(METRICS)}")

def reference_of(options, samples):
    """The reference's path: the one asked for, or the data set on which the samples' network was trained."""
    name = options.reference or samples.record.get("data")
    if not name:
        raise ValueError(f"{samples.place} does not say which data set it imitates: pass --reference")
    place = Path(name) if options.reference else data.folder_of(name, "data")
    if options.features == "classifier" and not place.is_dir():
        raise ValueError(f"{place} is not a packed data set, and the classifier is trained on one: --features inception takes "
                         "any reference")
    return place

def main(argv=None):
    options = Options(**data.parse(argv, "Score generated images against real ones.", Options))
    if options.table:
        return print_table(options.table, options.out)
    with model.machine(options.device) as (device, rank, world):
        folder = data.folder_of(options.run, "runs")
        samples = open_set(options.samples or folder / "samples")
        if samples.images is None:
            raise ValueError(f"{samples.place} holds statistics only: they serve as --reference, --samples needs images")
        place = reference_of(options, samples)
        inception = options.features == "inception"
        net, name, digest = load_inception(options.inception_weights) if inception else load_classifier(place, device, rank, world)
        real, record = open_set(place), samples.record
        if place.is_dir() and (place / "meta.json").exists():
            meta = data.open_data(place)[0]
            if record.get("size", meta["size"]) != meta["size"]:
                raise ValueError(f"{samples.place} has images of {record['size']} pixels, {place} of {meta['size']}: is it the "
                                 "right --reference?")
            if record.get("classes", meta["classes"]) != meta["classes"]:
                samples.labels = None                     # labels of other classes say nothing to this classifier
        beside = Path(options.samples or folder).with_name(f"{Path(options.samples or folder).name}-metrics.json")
        out = options.out or (beside if options.samples else folder / "metrics.json")
        made = {"score": name, "features": options.features, "weights": digest, "metrics": options.metrics, "samples": samples.place,
                "samples_key": samples.key, "reference": str(place), "reference_key": real.key, "sampling": record}
        if rank == 0 and not options.samples:
            warn_if_stale(folder)
        if out.exists() and not options.overwrite:
            old = json.loads(out.read_text())
            odd = next((k for k in made if old.get(k) != made[k]), None)
            if odd:
                raise ValueError(f"{out} holds the score of other samples, weights or data, or with other options ({odd} differs): "
                                 "pass --overwrite to replace it, or --out")
            return rank or print(f"{out} is already there, for these samples:") or report(old)
        result = made | score(samples, real, place, net.to(device), options, digest, device)
        if rank == 0:
            data.save_json(out, result)
            report(result)
            print(f"{out}: all of this, and how the samples were made")

def warn_if_stale(folder):
    checkpoint, made = folder / "checkpoint.pt", folder / "samples" / "samples.json"
    if checkpoint.exists() and made.exists() and checkpoint.stat().st_mtime > made.stat().st_mtime:
        print(f"warning: {checkpoint} is newer than the samples: run 04_sample.py again to score it", file=sys.stderr)

if __name__ == "__main__":
    sys.exit(data.run(main))
