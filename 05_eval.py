"""05_eval.py -- scores: how far generated images are from real ones, in numbers to compare with published ones

What this stage teaches: FID, sFID, Inception score, KID, precision and recall are a page of arithmetic each, on
features of a classifier.  Two sets of features, one arithmetic:
  --features classifier   a small network trained here, on the data set's own training images (default; works offline).
                          The score is then called "FD (classifier features)", never FID; beside it stands how often
                          that classifier sees the requested class, and how often it is right on real images.
  --features inception    Inception-v3 of the original FID, its weights downloaded with their hash checked, or given.
Reads runs/<name>/samples/, data/<name>/.   Writes runs/<name>/metrics.json; statistics are cached beside the data.
Run it:   python 05_eval.py                                23 s on two CPU cores, the classifier's training included
          python 05_eval.py --samples my_pngs --reference VIRTUAL_imagenet256_labeled.npz --features inception
          python 05_eval.py --table runs/shapes/cfg-*-metrics.json       a table and a curve of scores made before

An image set is a folder of image files, a .npz with arr_0 (N,H,W,3) uint8, or a packed data set; the reference may also
be a .npz of statistics (mu, sigma).  FID is biased upwards at small N, and only comparable at equal N: every number
carries its N.
"""
import csv
import hashlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

data, model = import_module("01_data"), import_module("02_model")
option = data.option

# ---- The scores: arithmetic on features (N,D) or logits (N,classes) --------------------------------------------------
def moments(sums):
    """Mean (D,) and covariance (D,D), with N-1, of features, from their sums (D+1,D+1) in fp64.

    With a 1 in front of each feature vector, F = (1, f), the sum of F^T F holds N in its corner, the sum of f beside it
    and the sum of f^T f in the rest; parts and processes just add theirs.  Raises ValueError for fewer than two images.
    """
    n, total = sums[0, 0], sums[0, 1:]
    if n < 2:
        raise ValueError(f"{int(n)} images are too few for a covariance")
    mean = total / n
    return mean, (sums[1:, 1:] - n * np.outer(mean, mean)) / (n - 1)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 root), root the matrix root of sigma1 sigma2.   (Heusel 2017, eq. 6)

    FID, on pool3 features.  The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R R = sigma1:
    symmetric, so two eigenvalue problems replace a general matrix root, and singular covariances do no harm.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma1))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.from_numpy(sigma2) @ root).clamp_min(0).sqrt().sum().item()
    distance = float(((mu1 - mu2)**2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    return max(distance, 0.0)                             # subtle: max(0.0, nan) would be a perfect score

def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), mean and std over ten parts of a shuffle.            (Salimans et al. 2016, section 4)

    The shuffle is np.random.RandomState(2020).permutation(N).  logits: (N,classes), without the bias of the last
    layer; both as torch-fidelity has it.
    """
    if len(logits) < splits:
        raise ValueError(f"the Inception score needs {splits} images")
    logits = torch.as_tensor(logits).double()[np.random.RandomState(2020).permutation(len(logits))]
    scores, n = [], len(logits)
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

def kernel_distance(a, b, subsets=100, size=1000):
    """KID: unbiased MMD^2 with the kernel (<x,y>/D + 1)^3, mean and std over subsets.   (Binkowski et al. 2018, sec. 3)

    MMD^2 = E k(x,x') + E k(y,y') - 2 E k(x,y), x and x' being two different images of one set, y and y' of the other:
    zero when both come from one distribution.  Unbiased, since an image is never compared with itself: the estimate is
    zero on average then, and now and then negative.
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
    if min(len(a), len(b)) < 10 * k:
        raise ValueError(f"precision and recall need {10 * k} images a side")

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

    subtle: packed images may lie sorted by class, or go round the classes: neither the first n nor every k-th will do.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:n])

@torch.no_grad()
def describe(images, net, device, batch_size, title, chosen=None):
    """{"n", "mu", "sigma", "features", "logits", "seen": the class seen in each; from Inception "mu_s", "sigma_s" too}.

    images: anything with len() and indexing by arrays to uint8 (N,H,W,3); all, or those chosen, in equal parts.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chosen = np.arange(len(images)) if chosen is None else chosen
    if len(chosen) < world:
        raise ValueError(f"{len(chosen)} images are too few for {world} processes")
    start, stop = len(chosen) * rank // world, len(chosen) * (rank + 1) // world
    kept, sums, parts = np.isin(np.arange(len(chosen)), random_subset(KEPT, len(chosen))), {}, []
    with data.Progress(stop - start, title, " images") as bar:
        for i in range(start, stop, batch_size):
            rows = slice(i, min(i + batch_size, stop))
            out = {k: v.float() for k, v in net(torch.from_numpy(np.array(images[chosen[rows]])).to(device)).items()}
            for name in [name for name in ("features", "spatial") if name in out]:     # subtle: alike on all processes
                f = F.pad(out[name].double(), (1, 0), value=1.0)                                   # B 1+D: (1, f)
                sums[name] = sums[name].addmm_(f.T, f) if name in sums else f.T @ f
            part = out["features"][kept[rows]], out["logits"][kept[rows]], out["logits"].argmax(1)
            parts.append([v.cpu().numpy() for v in part])
            bar.update(len(f))
    if world > 1:
        for total in sums.values():
            dist.all_reduce(total)
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [part for share in everyone for part in share]
    result = dict(zip(("features", "logits", "seen"), map(np.concatenate, zip(*parts))), n=len(chosen))
    for name, suffix in (("features", ""), ("spatial", "_s")):
        if name in sums:
            result["mu" + suffix], result["sigma" + suffix] = moments(sums[name].cpu().numpy())
    return result

# ---- Inception-v3 as the original FID uses it, three differences from torchvision's marked ---------------------------
class Inception(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,2048), "spatial" (B,2023), "logits" (B,1008) without bias}.

    weights: {torchvision's name: tensor}; widths and kernels are theirs.  A block's branches are chains of names.
    """

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", " "), weight)               # a buffer's name may not have dots

    def weight(self, name):
        return self.get_buffer(name.replace(".", " "))

    def chain(self, x, block, *names, stride=1, same=True):
        """Convolution, batch norm and ReLU for each name; the last has the stride.  At stride 1 the size stays."""
        for name in names:
            kernel, *norm = (self.weight(f"{block}{name}.{part}") for part in
                             ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias"))
            step = stride if name == names[-1] else 1
            padding = [k // 2 for k in kernel.shape[2:]] if same and step == 1 else 0
            x = F.conv2d(x, kernel, stride=step, padding=padding)
            x = F.relu(F.batch_norm(x, *norm, eps=1e-3))
        return x

    def mixed(self, x, block, *branches, pool=None, stride=1):
        """The branches side by side: "branch5x5 2" is branch5x5_1, then branch5x5_2."""
        outs = []
        for branch in branches:
            name, _, count = branch.partition(" ")
            fork = count.endswith("ab")                   # the last of the chain is two convolutions side by side
            names = [f"{name}_{i + 1}" for i in range(int(count.strip("ab")) - fork)] if count else [name]
            y = self.chain(x, block, *names, stride=stride)
            outs += [self.chain(y, block, f"{name}_{len(names) + 1}{side}") for side in "ab"] if fork else [y]
        if stride == 2:
            outs.append(F.max_pool2d(x, 3, 2))
        elif pool == "max":
            outs.append(self.chain(F.max_pool2d(x, 3, 1, 1), block, "branch_pool"))
        else:                                             # first difference: the padding is not counted
            outs.append(self.chain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), block, "branch_pool"))
        return torch.cat(outs, dim=1)

    def forward(self, images):
        x = (resize_tf1(images.permute(0, 3, 1, 2).float(), 299) - 128) / 128                      # B 3 299 299
        x = self.chain(self.chain(x, "Conv2d_", "1a_3x3", stride=2), "Conv2d_", "2a_3x3", same=False)
        x = F.max_pool2d(self.chain(x, "Conv2d_", "2b_3x3"), 3, 2)
        x = F.max_pool2d(self.chain(self.chain(x, "Conv2d_", "3b_1x1"), "Conv2d_", "4a_3x3", same=False), 3, 2)
        for block in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):                                      # B 288 35 35
            x = self.mixed(x, block, "branch1x1", "branch5x5 2", "branch3x3dbl 3")
        x = self.mixed(x, "Mixed_6a.", "branch3x3", "branch3x3dbl 3", stride=2)                    # B 768 17 17
        for block in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
            if block == "Mixed_6d.":
                spatial = self.chain(x, block, "branch1x1")[:, :7].permute(0, 2, 3, 1).flatten(1)  # B 2023
            x = self.mixed(x, block, "branch1x1", "branch7x7 3", "branch7x7dbl 5")
        x = self.mixed(x, "Mixed_7a.", "branch3x3 2", "branch7x7x3 4", stride=2)                   # B 1280 8 8
        for block, pool in (("Mixed_7b.", "avg"), ("Mixed_7c.", "max")):      # second difference: the maximum, once
            x = self.mixed(x, block, "branch1x1", "branch3x3 2ab", "branch3x3dbl 3ab", pool=pool)
        x = x.mean(dim=(2, 3))                                                                     # B 2048
        logits = x @ self.weight("fc.weight").T                                # third difference: 1008 outputs
        return {"features": x, "spatial": spatial, "logits": logits}

def resize_tf1(x, size):
    """Bilinear, the TF-1 way: pixel i comes from i * in/size, no half-pixel offset, no antialiasing.  x: (B,C,H,W)."""
    for axis in (2, 3):
        n = x.shape[axis]
        place = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = place.long()
        part = (place - low).view(-1, 1) if axis == 2 else place - low
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, (low + 1).clamp_max(n - 1)) * part
    return x

WEIGHTS_HASH = "6726825d"                                 # the first digits of the published file's sha256
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               f"pt_inception-2015-12-05-{WEIGHTS_HASH}.pth")

def load_inception(path):
    """(network, name of its score, hash of the weights).  Another file than the published one names its score."""
    try:
        if path is None:
            digest, state = WEIGHTS_HASH, torch.hub.load_state_dict_from_url(
                WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
        else:
            digest, state = data.file_hash(path, "sha256")[:8], torch.load(path, map_location="cpu", weights_only=True)
        net = Inception(state)
        net(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))   # all names, all shapes
    except Exception as error:
        hint = "fetch it elsewhere and pass --inception-weights FILE" if path is None else "is it the right file?"
        raise ValueError(f"cannot load the Inception weights from {path or WEIGHTS_URL} "
                         f"({str(error).splitlines()[0][:100]}): {hint}") from None
    if digest == WEIGHTS_HASH:
        return net, "FID", digest
    print(f"warning: {path} is not the published weights file; the scores are named after it, not FID", file=sys.stderr)
    return net, f"FD ({path.name} {digest})", digest

# ---- The classifier whose features stand in where Inception cannot be had --------------------------------------------
class Classifier(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,128), "logits" (B,classes)}.  Larger ones are averaged to 64 pixels."""

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
    """A Classifier trained on the training split, mirrored by chance; on a CPU the same weights for the same data.

    It sees 40,000 images of 64 pixels, four times as many of half the size, at most 30 times the data set.
    """
    torch.manual_seed(0)
    net, batch, random = Classifier(classes).to(device), 128, np.random.default_rng(0)
    steps = max(1, min(int(40_000 * (64 / min(64, images.shape[1]))**2), 30 * len(labels)) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    with data.Progress(steps, "training the classifier", " steps") as bar:
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

@contextmanager
def cached(path):
    """data.whole() for a file that saves time and nothing else: where it cannot be written, a warning will do."""
    try:
        with data.whole(path) as part:
            yield part
    except (OSError, RuntimeError) as error:              # torch's kind
        print(f"warning: {path} is not kept ({error})", file=sys.stderr)

def load_classifier(folder, device, rank=0, world=1):
    """(network, name of its score, hash) of the data set's classifier, trained once and cached beside the data."""
    meta, arrays = data.open_data(folder)
    path, classes = Path(folder) / "classifier.pt", len(meta["classes"])
    if classes < 2:
        raise ValueError(f"{folder} has no classes for a classifier: use --features inception, or pack class folders")
    if rank:
        dist.barrier()                                    # until the first has it: on a GPU no two trainings are alike
    net, known = Classifier(classes).to(device), False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"data": None}
        if state["data"] == meta["id"]:
            net.load_state_dict(state["weights"])
            known = True
    except Exception:
        print(f"warning: {path} is damaged; training the classifier again", file=sys.stderr)
    if not known:                                         # none yet, or the data set was packed anew
        net = train_classifier(*arrays["train"], classes, device)
        with cached(path) as part:
            torch.save({"weights": net.state_dict(), "data": meta["id"]}, part)
    if world > 1 and not rank:
        dist.barrier()
    weights = b"".join(v.cpu().numpy().tobytes() for v in net.state_dict().values())
    return net.eval(), "FD (classifier features)", hashlib.sha256(weights).hexdigest()[:8]

# ---- Image sets: a folder of image files, an npz batch, a packed data set, or statistics alone -----------------------
class ImageFiles:
    """Image files as an array: len(), and indexing that gives uint8 (N,H,W,3).  All have one size."""

    def __init__(self, files):
        self.files, self.size = np.array(files), None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        batch = [data.read_image(file) for file in self.files[rows]]
        self.size = self.size or batch[0].shape
        for file, image in zip(self.files[rows], batch):
            if image.shape != self.size:
                raise ValueError(f"{file} is {image.shape[1]} x {image.shape[0]}, others are {self.size[1]} x "
                                 f"{self.size[0]}: all images of a set must have one size")
        return np.stack(batch)

class ImageSet:
    """images and labels of a path, or statistics alone; record: how they were made.

    key: the data set's id, or a hash of the files' names, sizes and dates.
    """

    def __init__(self, place, split="train"):
        path, self.place, self.images, self.labels = Path(place), str(place), None, None
        self.record, self.statistics = {}, {}
        if (path / "meta.json").exists():
            self.record, arrays = data.open_data(path)
            if "coder" in self.record:
                raise ValueError(f"{path} holds latents: give the pixels they were made of, "
                                 f"{self.record['coder']['pixels']}")
            (self.images, self.labels), self.key = arrays[split], self.record["id"]
            return
        files = [str(path)] if path.suffix == ".npz" and path.exists() else data.list_images(path)
        if not files:
            raise ValueError(f"no images at {path}: make samples first (python 04_sample.py)")
        stamps = [(Path(file).name, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
        self.key = hashlib.sha256(str(stamps).encode()).hexdigest()[:16]
        if path.suffix == ".npz":
            return self.read_npz(path)
        self.images = ImageFiles(files)
        if (path / "samples.json").exists():
            self.record = data.load_json(path / "samples.json")
            self.labels = np.array(self.record.pop("labels", []))
            if self.labels.shape != (len(files),) or self.labels.dtype.kind != "i":
                raise ValueError(f"{path} holds {len(files)} images and labels for {self.labels.size}: finish it "
                                 "by the same 04_sample.py command, and leave no other images there")

    def read_npz(self, path):
        """Sample batches (arr_0, arr_1) and statistics (mu, sigma, mu_s, sigma_s)."""
        names = ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "n")
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {k: file[k] for k in names if k in file.files}
        except Exception as error:                        # zip, zlib and numpy each have their own
            raise ValueError(f"{path} is not a readable npz file ({error})") from None
        images, labels = self.images, self.labels = content.pop("arr_0", None), content.pop("arr_1", None)
        if {"mu", "sigma"} <= content.keys():             # ADM's do not say of how many images
            self.statistics = {"n": 0, **{k: v.astype(np.float64) for k, v in content.items()}}
            for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
                mu, sigma = (self.statistics.get(k, np.zeros((0,) * d)) for k, d in ((mu, 1), (sigma, 2)))
                if sigma.shape != mu.shape * 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                    raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} must be finite, (D,) and (D,D)")
        elif images is None:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
        shape = np.shape(images)
        if images is not None and (images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]):
            raise ValueError(f"{path}: arr_0 is {images.dtype} {shape}; it must be uint8 (N,H,W,3)")
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"{path}: arr_1 is {labels.dtype} {labels.shape}; it must hold one class id per image")

def describe_reference(real, net, features, digest, device, batch_size):
    """describe() of the real images, cached beside a packed data set; a file's own mu and sigma come first."""
    cache = Path(real.place) / f"statistics-{features}-{digest}-{real.key[:8]}.npz"
    if real.images is None:
        return real.statistics
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as file:
                return {k: file[k] for k in file.files}
        except Exception:
            print(f"warning: {cache} is damaged; making it again", file=sys.stderr)
    result = describe(real.images, net, device, batch_size, "real images") | real.statistics
    if "id" in real.record and not (dist.is_initialized() and dist.get_rank()):
        with cached(cache) as part, open(part, "wb") as file:              # mu and sigma are what other tools read
            np.savez(file, **result)
    return result

# ---- From two image sets to a result ---------------------------------------------------------------------------------
def precision_and_recall(fake, real):
    if np.trace(fake["sigma"]) < 1e-6 * np.trace(real["sigma"]):
        raise ValueError("the generated images are all the same")
    return precision_recall(fake["features"], real["features"][random_subset(NEIGHBOURS, len(real["features"]))])

def distance(mu, sigma):
    return lambda fake, real: [frechet_distance(fake[mu], fake[sigma], real[mu], real[sigma])]

METRICS = {  # name: (keys of the result, function of two descriptions)
    "fd": (["fd"], distance("mu", "sigma")),
    "kid": (["kid", "kid_std"], lambda fake, real: kernel_distance(fake["features"], real["features"])),
    "pr": (["precision", "recall"], precision_and_recall),
    "is": (["is", "is_std"], lambda fake, real: inception_score(fake["logits"])),
    "sfd": (["sfd"], distance("mu_s", "sigma_s")),
}

def compare(fake, real, metrics, inception):
    """The scores of two descriptions: ({name: number}, {score left out: why})."""
    if fake["mu"].shape != real["mu"].shape:
        raise ValueError(f"the reference has features of {len(real['mu'])} numbers, the samples of {len(fake['mu'])}: "
                         "they were made with other networks")
    scores, left_out = {}, {}
    for metric in metrics:
        keys, function = METRICS[metric]
        try:
            if metric in ("is", "sfd") and not inception:
                raise ValueError("it needs --features inception")
            scores |= dict(zip(keys, function(fake, real)))
        except KeyError as missing:
            left_out[metric] = f"the reference has no {missing.args[0]}"
        except ValueError as reason:
            left_out[metric] = str(reason)
    return scores, left_out

def score(samples, real, net, options, digest, device):
    """Score one image set against another: {name: number}, every number with its N."""
    inception, result = options.features == "inception", {}
    reference = describe_reference(real, net, options.features, digest, device, options.batch_size)
    fake = describe(samples.images, net, device, options.batch_size, "generated images")
    if not inception:
        held_out = ImageSet(real.place, "val")
        rows = random_subset(len(samples.images), len(held_out.images))                # as many: FD grows as N falls
        if len(rows) > 1:
            floor = describe(held_out.images, net, device, options.batch_size, "held-out images", rows)
            result = {"fd_floor": distance("mu", "sigma")(floor, reference)[0], "n_floor": len(rows),
                      "class_accuracy_real": float((floor["seen"] == held_out.labels[rows]).mean())}
        if samples.labels is not None:
            result["class_accuracy"] = float((fake["seen"] == samples.labels).mean())
    if dist.is_initialized() and dist.get_rank():         # the first process computes and reports
        return {}
    scores, left_out = compare(fake, reference, options.metrics, inception)
    features = len(reference.get("features", ()))
    return {**scores, **result, "left_out": left_out, "n_generated": fake["n"], "n_real": int(reference["n"]),
            "n_real_features": features}

def report(result):
    """Print a result, every number with its N, then what was left out and what to be wary of."""
    n, name, offline, judge = (result.get(k) for k in ("n_generated", "score", "features", "class_accuracy_real"))
    offline, held_out = offline == "classifier", f"{result.get('n_floor')} held-out real images"
    real = f"{result['n_real'] or 'the statistics of the'} real images"
    for key, title, about in (
            ("fd", name, f"{n} generated against {real}; 0 is best"),
            ("fd_floor", f"{name} floor", f"{held_out} against {real}"),
            ("sfd", f"s{name}", f"{n} generated against {real}"), ("is", "Inception score", f"{n} images, ten splits"),
            ("kid", "KID (classifier features)" if offline else "KID", f"100 subsets of 1000 of {n} and "
             f"{result['n_real_features']} images; usually given x 1000"),
            ("precision", "precision", f"share of {n} generated images"),
            ("recall", "recall", f"share of {min(NEIGHBOURS, result['n_real_features'])} real images"),
            ("class_accuracy", "class accuracy", f"share of {n} generated images in which it sees the class asked for"),
            ("class_accuracy_real", "class accuracy, real", f"share of {held_out} it gets right")):
        if key in result:
            spread = f" +- {result[key + '_std']:.4f}" if key + "_std" in result else ""
            print(f"{title:32s} {result[key]:10.4f}{spread}   ({about})")
    for metric, reason in result["left_out"].items():
        print(f"{metric:32s}   left out   ({reason})")
    for wary, message in ((n < 2048, f"{n} images are few: {name} is biased upwards and only comparable at the same N"),
                          (offline and judge is None, "nothing is held out: how good the classifier is nobody knows"),
                          (judge is not None and judge < 0.5, f"the classifier is right on {judge or 0:.2f} of "
                           "held-out real images only: neither its features nor its class accuracy are to be trusted")):
        if wary:
            print(f"warning: {message}", file=sys.stderr)

def print_table(files, out):
    """--table: a line per result, with the settings in which they differ; a CSV file; a curve over the first."""
    try:
        rows = [data.load_json(Path(file)) for file in files]
        if len({(row["score"], row["n_real"], row["reference_key"]) for row in rows}) > 1:
            raise ValueError("they differ in features or reference")
        counts = [row["n_generated"] for row in rows]
        made = [{k: v for k, v in row["sampling"].items() if k not in ("weights", "step")} for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{', '.join(files)} are not results of this script that can be compared ({error})") from None
    varied = [k for k in made[0] if len({str(how.get(k)) for how in made}) > 1]
    scores = ("fd", "sfd", "kid", "is", "precision", "recall", "class_accuracy")
    scores = [k for k in scores if any(k in row for row in rows)]
    table = [["file", *varied, "N", *scores]] + [
        [Path(file).name, *(how.get(k) for k in varied), n, *(row.get(k, "") for k in scores)]
        for file, how, n, row in zip(files, made, counts, rows)]
    for line in table:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in line))
    out = out or Path(files[0]).with_name("table")
    with data.whole(out.with_suffix(".csv")) as part, open(part, "w", newline="") as file:
        csv.writer(file).writerows(table)
    axis = next((k for k in varied if all(isinstance(how.get(k), (int, float)) for how in made)), None)
    curve = sorted((how[axis], row["fd"]) for how, row in zip(made, rows) if "fd" in row) if axis else []
    if curve:
        data.save_picture(out.with_suffix(".png"), data.chart(rows[0]["score"], axis, {"score": curve}))
    print(f"{len(rows)} results, also in {out.with_suffix('.csv')}{f' and {out.stem}.png' if curve else ''}")

# ---- Running it ------------------------------------------------------------------------------------------------------
@dataclass
class Options:
    run: str = option("shapes", "runs/NAME, or a folder", group="what")
    samples: str = option(None, "generated images, a folder or .npz (default: the run's samples)")
    reference: str = option(None, "real images or their statistics (default: the samples' data set, training images)")
    metrics: str = option(",".join(METRICS), "distance, kernel distance, precision and recall, Inception score, "
                          "spatial distance")
    features: str = option("classifier", "see the head of this file", choices=("classifier", "inception"))
    inception_weights: Path = option(None, "the weights file, where it cannot be downloaded")
    table: list = option(None, "only compare results made before: a table, a CSV file and a curve")
    out: Path = option(None, "result (default: metrics.json in the run's folder; SAMPLES-metrics.json with --samples; "
                       "table.csv and .png beside the first file with --table)", group="output and hardware")
    overwrite: bool = option(False, "replace a result made of other samples or with other options")
    batch_size: int = option(100, "images at a time and process", "[1, inf)")
    device: str = option(None, "cuda or cpu")

    def __post_init__(self):
        self.metrics = self.metrics.split(",")
        for metric in self.metrics:
            data.check("--metrics", metric, choices=METRICS)

def open_sets(options):
    """The generated images and the real ones.  Raises ValueError if they cannot be compared."""
    samples = ImageSet(options.samples or data.folder_of(options.run, "runs") / "samples")
    name, made = options.reference or samples.record.get("data"), samples.record
    if samples.images is None:
        raise ValueError(f"{samples.place} holds statistics only: they serve as --reference")
    if not name:
        raise ValueError(f"{samples.place} does not say which data set it imitates: pass --reference")
    real = ImageSet(name if Path(name).exists() else data.folder_of(name, "data"))
    if options.features == "classifier" and "classes" not in real.record:
        raise ValueError(f"{name} is not a packed data set, the classifier is trained on one: use --features inception")
    size = samples.images[np.arange(1)].shape[1]
    if size != real.record.get("size", size):
        raise ValueError(f"{samples.place} has images of {size} pixels, {real.place} of {real.record['size']}: is it "
                         "the right --reference?")
    classes = real.record.get("classes")
    if made and made.get("classes", []) != classes:
        samples.labels = None                             # labels of other classes say nothing to this classifier
    if classes and samples.labels is not None and not 0 <= samples.labels.min() <= samples.labels.max() < len(classes):
        raise ValueError(f"{samples.place} has labels outside 0..{len(classes) - 1}, the classes of {real.place}")
    return samples, real

def main(argv=None):
    options = Options(**data.parse(argv, "Score generated images against real ones.", Options))
    if options.table:
        return print_table(options.table, options.out)
    with model.machine(options.device) as (device, rank, world):
        samples, real = open_sets(options)
        folder, path = data.folder_of(options.run, "runs"), Path(samples.place)
        beside = path.parent / f"{path.name or 'samples'}-metrics.json"
        out = options.out or (beside if options.samples else folder / "metrics.json")
        if options.features == "inception":
            net, name, digest = load_inception(options.inception_weights)
        else:
            net, name, digest = load_classifier(real.place, device, rank, world)
        made = {"score": name, "features": options.features, "weights": digest, "metrics": options.metrics,
                "samples": samples.place, "samples_key": samples.key, "reference": real.place,
                "reference_key": real.key, "sampling": samples.record}
        stamps = [file.stat().st_mtime for file in (folder / "checkpoint.pt", path / "samples.json") if file.exists()]
        if rank == 0 and not options.samples and stamps == sorted(stamps, reverse=True) and len(stamps) == 2:
            print(f"warning: {folder / 'checkpoint.pt'} is newer than the samples: sample again", file=sys.stderr)
        if out.exists() and not options.overwrite:
            old = data.load_json(out)
            odd = next((k for k in made if old.get(k) != made[k]), None)
            if odd:
                raise ValueError(f"{out} holds the score of other samples, weights or data, or with other options "
                                 f"({odd} differs): pass --overwrite to replace it, or --out")
            if rank == 0:
                print(f"{out} is already there, for these samples:")
                report(old)
            return
        result = made | score(samples, real, net.to(device), options, digest, device)
        if rank == 0:
            report(result)
            out.parent.mkdir(parents=True, exist_ok=True)
            data.save_json(out, result)
            print(f"{out}: all of this, and how the samples were made")

if __name__ == "__main__":
    sys.exit(data.run(main))
