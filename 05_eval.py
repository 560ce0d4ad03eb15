"""05_eval.py -- scores: how far generated images are from real ones, in numbers that can be compared with published ones

What this stage teaches: FID, sFID, Inception score, KID, precision and recall are a page of arithmetic each, on features of
a classifier.  Two sets of features, one arithmetic:
  --features classifier   a small network trained here, on the data set's own training images (default; works offline).  The
                          score is then called "FD (classifier features)", never FID, and beside it stands how often that
                          classifier sees the requested class in a generated image, and how often it is right on real ones.
  --features inception    Inception-v3 of the original FID, its weights downloaded with their hash checked, or given.
Reads runs/<name>/samples/ and data/<name>/.   Writes runs/<name>/metrics.json; statistics are cached beside the data.
Run it:   python 05_eval.py                                  40 s on two CPU cores, the classifier's training included
          python 05_eval.py --samples my_pngs --reference VIRTUAL_imagenet256_labeled.npz --features inception
          python 05_eval.py --sweep cfg=1:4:0.5 --num 1000          samples and scores over guidance, a table and a picture

A side may be a folder of PNG files, a .npz with arr_0 (N,H,W,3) uint8, or a packed data set; the reference also a .npz of statistics
(mu, sigma).
FID is biased upwards at small N, and only comparable at equal N: every number carries its N; below 2,048 look at KID.
"""
import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from importlib import import_module
from itertools import product
from pathlib import Path


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("fd", "kid", "pr", "is", "sfd")


def parse_args(argv=None):
    """Options of this script; wrong ones end it with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Score generated images against real ones.", usage="%(prog)s [options]", allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120))
    add = parser.add_argument_group("what").add_argument
    add("--run", default="shapes", metavar="NAME", help="runs/NAME, or a folder (default: shapes)")
    add("--samples", metavar="SIDE", help="generated images (default: the run's samples)")
    add("--reference", metavar="SIDE", help="real images or their statistics (default: the run's data set, training images)")
    add("--metrics", default="all", help=f"some of {','.join(METRICS)}: Fréchet distance, kernel distance, precision and recall, "
        "Inception score, spatial Fréchet distance (default: all that apply)")
    add("--features", choices=("classifier", "inception"), default="classifier", help="see the head of this file (default: classifier)")
    add("--inception-weights", type=Path, metavar="FILE", help="the weights file, where it cannot be downloaded")
    add = parser.add_argument_group("sweep").add_argument
    add("--sweep", metavar="SPEC", help="sample and score each of cfg=1:4:0.5,ema=0/1: ranges LOW:HIGH:STEP, lists A/B; keys cfg ema steps t-eps")
    add("--num", type=int, default=1000, metavar="N", help="images per point of the sweep (default: 1000)")
    add = parser.add_argument_group("output and hardware").add_argument
    add("--out", type=Path, metavar="FILE", help="result (default: metrics.json in the run's folder)")
    add("--save-statistics", type=Path, metavar="FILE", help="write mu, sigma (mu_s, sigma_s) of the samples, and stop")
    add("--overwrite", action="store_true", help="replace a result made of other samples or with other options")
    add("--batch-size", type=int, default=100, metavar="N", help="(default: 100)")
    add("--device", metavar="NAME", help="cuda or cpu")
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)", 2))
    args = parser.parse_args(argv)
    args.metrics = list(METRICS) if args.metrics == "all" else args.metrics.split(",")
    unknown = [m for m in args.metrics if m not in METRICS]
    if unknown:
        parser.error(f"--metrics {unknown[0]} is unknown: some of {', '.join(METRICS)}")
    if args.batch_size < 1 or args.num < 2:
        parser.error("--batch-size must be at least 1 and --num at least 2")
    if args.features == "classifier" and not {"fd", "kid", "pr"} & set(args.metrics):
        parser.error("--metrics is and sfd need --features inception")
    if args.sweep:
        if not {"fd", "pr"} <= set(args.metrics):
            parser.error("--sweep draws fd and pr: --metrics must have both")
        try:
            args.sweep = parse_sweep(args.sweep)
        except ValueError as error:
            parser.error(str(error))
    return args


def parse_sweep(text):
    """"cfg=1:2:0.5,ema=0/1" -> [{"cfg": 1.0, "ema": 0}, ...], all combinations.  Raises ValueError."""
    axes = {}
    for part in text.split(","):
        key, _, values = part.partition("=")
        if key not in ("cfg", "ema", "steps", "t-eps"):
            raise ValueError(f"--sweep {part}: the keys are cfg, ema, steps and t-eps, as in cfg=1:4:0.5")
        try:
            if ":" in values:
                low, high, step = map(float, values.split(":"))
                if step <= 0 or high < low:
                    raise ValueError
                points = [low + i * step for i in range(int((high - low) / step + 1e-6) + 1)]
            else:
                points = [float(v) for v in values.split("/")]
        except ValueError:
            raise ValueError(f"--sweep {part}: give LOW:HIGH:STEP or A/B/C") from None
        axes[key] = [int(v) if key in ("ema", "steps") else round(v, 6) for v in points]
    return [dict(zip(axes, values)) for values in product(*axes.values())]


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
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

data, model = import_module("01_data"), import_module("02_model")


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic of the scores
# ---------------------------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance (N-1) of a stream of features, in fp64; never more than one batch and one D x D matrix."""

    def __init__(self):
        self.n, self.shift, self.total, self.outer = 0, None, 0.0, 0.0

    def add(self, features):
        """features: (B,D)."""
        x = np.asarray(features, dtype=np.float64)
        if self.shift is None:
            self.shift = x.mean(axis=0)                   # subtle: sums around a rough mean keep their digits
        x = x - self.shift
        self.n, self.total, self.outer = self.n + len(x), self.total + x.sum(axis=0), self.outer + x.T @ x

    def result(self):
        """(mu (D,), sigma (D,D)).  Raises ValueError for fewer than two images."""
        if self.n < 2:
            raise ValueError(f"{self.n} images are too few for a covariance")
        mean = self.total / self.n
        return self.shift + mean, (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2): FID, on pool3 features.          (Heusel et al. 2017, eq. 6)

    The root's trace is the sum of the roots of the eigenvalues of R sigma2 R with R = sigma1^1/2, symmetric, so that two
    eigenvalue problems do instead of a general matrix root, and singular covariances do no harm.
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


def distances(a, b):
    """Euclidean distances (len(a), len(b)) by one matrix product."""
    squared = (a * a).sum(dim=1)[:, None] + (b * b).sum(dim=1) - 2 * a @ b.T
    return squared.clamp_min(0).sqrt()


def precision_recall(generated, real, k=3, block=1000):
    """Share of generated images inside some real image's ball to its k-th neighbour, and the other way round.

    (Kynkäänniemi et al. 2019, eq. 2)  Features (N,D).  In blocks: memory grows with N, not with N^2.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (generated, real))
    if min(len(a), len(b)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side")

    def radii(x):                                         # subtle: the image itself is the nearest, hence the (k+1)-th
        return torch.cat([distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])

    def covered(x, y, radius):
        return torch.cat([(distances(part, y) <= radius).any(dim=1) for part in x.split(block)]).double().mean().item()
    return covered(a, b, radii(b)), covered(b, a, radii(a))


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 as the original FID uses it: names and layout of torchvision, three differences marked
# ---------------------------------------------------------------------------------------------------------------------

class Conv(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated.  rows: name -> (in, out, kernel, stride, padding); routes: chains of names.

    A route may start with "avg" or "max" (3x3 pools), be "reduce" alone (3x3 maximum, stride 2), and may end in a tuple of names, which split it in two.
    """

    def __init__(self, rows, routes):
        super().__init__()
        for name, row in rows.items():
            self.add_module(name, Conv(*row))
        self.routes = routes

    def forward(self, x, first_only=False):
        outs = []
        for route in self.routes[:1] if first_only else self.routes:
            y = x
            for name in route:
                if name == "avg":                         # first difference: the padding is not counted
                    y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
                elif name == "max":
                    y = F.max_pool2d(y, 3, 1, 1)
                elif name == "reduce":
                    y = F.max_pool2d(y, 3, 2)
                elif isinstance(name, tuple):
                    y = torch.cat([getattr(self, part)(y) for part in name], dim=1)
                else:
                    y = getattr(self, name)(y)
            outs.append(y)
        return torch.cat(outs, dim=1)


def mixed_a(cin, pool):
    return Mixed({"branch1x1": (cin, 64, 1), "branch5x5_1": (cin, 48, 1), "branch5x5_2": (48, 64, 5, 1, 2), "branch3x3dbl_1": (cin, 64, 1),
                  "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 1, 1), "branch_pool": (cin, pool, 1)},
                 [["branch1x1"], ["branch5x5_1", "branch5x5_2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["avg", "branch_pool"]])


def mixed_b(cin):
    return Mixed({"branch3x3": (cin, 384, 3, 2), "branch3x3dbl_1": (cin, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 2)},
                 [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["reduce"]])


def mixed_c(c):
    return Mixed({"branch1x1": (768, 192, 1), "branch7x7_1": (768, c, 1), "branch7x7_2": (c, c, (1, 7), 1, (0, 3)), "branch7x7_3": (c, 192, (7, 1), 1, (3, 0)),
                  "branch7x7dbl_1": (768, c, 1), "branch7x7dbl_2": (c, c, (7, 1), 1, (3, 0)), "branch7x7dbl_3": (c, c, (1, 7), 1, (0, 3)),
                  "branch7x7dbl_4": (c, c, (7, 1), 1, (3, 0)), "branch7x7dbl_5": (c, 192, (1, 7), 1, (0, 3)), "branch_pool": (768, 192, 1)},
                 [["branch1x1"], ["branch7x7_1", "branch7x7_2", "branch7x7_3"], [f"branch7x7dbl_{i}" for i in range(1, 6)], ["avg", "branch_pool"]])


def mixed_d():
    return Mixed({"branch3x3_1": (768, 192, 1), "branch3x3_2": (192, 320, 3, 2), "branch7x7x3_1": (768, 192, 1), "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
                  "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)), "branch7x7x3_4": (192, 192, 3, 2)},
                 [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)], ["reduce"]])


def mixed_e(cin, pool):                                   # second difference: Mixed_7c takes the maximum in its pool branch
    return Mixed({"branch1x1": (cin, 320, 1), "branch3x3_1": (cin, 384, 1), "branch3x3_2a": (384, 384, (1, 3), 1, (0, 1)), "branch3x3_2b": (384, 384, (3, 1), 1, (1, 0)),
                  "branch3x3dbl_1": (cin, 448, 1), "branch3x3dbl_2": (448, 384, 3, 1, 1), "branch3x3dbl_3a": (384, 384, (1, 3), 1, (0, 1)),
                  "branch3x3dbl_3b": (384, 384, (3, 1), 1, (1, 0)), "branch_pool": (cin, 192, 1)},
                 [["branch1x1"], ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
                  ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")], [pool, "branch_pool"]])


class Inception(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,2048), "spatial" (B,2023), "logits" (B,1008) without bias}."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3), Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = mixed_b(288), mixed_c(128), mixed_c(160), mixed_c(160), mixed_c(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = mixed_d(), mixed_e(1280, "avg"), mixed_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)                   # third difference: 1008 outputs

    def forward(self, images):
        x = (resize_tf1(images.permute(0, 3, 1, 2).float(), 299) - 128) / 128                      # B 3 299 299
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))                     # B 288 35 35
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                                         # B 768 17 17
        spatial = self.Mixed_6d(x, first_only=True)[:, :7].permute(0, 2, 3, 1).flatten(1)          # B 2023
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
    """(network, name of its score, hash of the weights).  Another file than the published one is used with a warning and named after.  Raises ValueError."""
    net = Inception()
    try:
        if path is None:
            state, digest = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True), WEIGHTS_HASH
        else:
            digest, state = data.file_hash(path, "sha256")[:8], torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        hint = "fetch it elsewhere and pass --inception-weights FILE" if path is None else "is it the right file?"
        raise ValueError(f"cannot load the Inception weights from {path or WEIGHTS_URL} ({str(error).splitlines()[0][:80]}): {hint}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no weights by name")
    state = {k: v for k, v in state.items() if not k.startswith("AuxLogits.")}
    own = net.state_dict()
    for name in own:
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != own[name].shape):
            raise ValueError(f"{path or WEIGHTS_URL} does not fit Inception-v3: {name} is {'missing' if name not in state else 'of another shape'}")
    net.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    known = digest == WEIGHTS_HASH
    if not known:
        print(f"warning: {path} (sha256 {digest}...) is not the published weights file; the scores are named after it, not FID", file=sys.stderr)
    return net.eval(), "FID" if known else f"FD ({path.name} {digest})", digest


# ---------------------------------------------------------------------------------------------------------------------
# The classifier whose features stand in where Inception cannot be had
# ---------------------------------------------------------------------------------------------------------------------

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
        if x.shape[-1] > 64:
            x = F.interpolate(x, size=64, mode="area")
        features = self.body(x)
        return {"features": features, "logits": self.head(features)}


@torch.no_grad()
def accuracy(net, images, labels, device):
    """Share of images, images(range) -> (B,H,W,3) uint8, in which net sees their label."""
    hits = 0
    for i in range(0, len(labels), 200):
        batch = torch.from_numpy(images(range(i, min(i + 200, len(labels))))).to(device)
        hits += (net(batch)["logits"].argmax(1).cpu().numpy() == labels[i:i + 200]).sum()
    return float(hits / max(1, len(labels)))


def train_classifier(images, labels, classes, device):
    """A Classifier trained on the training split, mirrored by chance; the same weights for the same data.

    It sees 40,000 images of 64 pixels, four times as many of half the size, and none more than 30 times.
    """
    images_seen = min(int(40_000 * (64 / min(64, images.shape[1]))**2), 30 * len(labels))
    torch.manual_seed(0)
    net, batch = Classifier(classes).to(device), 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps, random = max(1, images_seen // batch), np.random.default_rng(0)
    for step in tqdm(range(steps), desc="training the classifier", disable=None):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        chosen = np.sort(random.integers(0, len(labels), batch))
        x = torch.from_numpy(images[chosen]).to(device)
        x = x.flip(2) if random.random() < 0.5 else x
        loss = F.cross_entropy(net(x)["logits"], torch.from_numpy(labels[chosen]).to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def load_classifier(folder, device):
    """(network, accuracy on held-out images, hash) of the data set's classifier, trained once and cached beside the data.  Raises ValueError."""
    meta, arrays = data.open_data(folder)
    if len(meta["classes"]) < 2:
        raise ValueError(f"{folder} has no classes to train a classifier on: use --features inception")
    path, key = Path(folder) / "classifier.pt", meta["sha256"]["train_images.npy"]
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:
        dist.barrier()                                    # until the first process has it: on a GPU no two trainings are alike
    found = cached_classifier(path, key, len(meta["classes"]), device) or fit_classifier(path, key, arrays, len(meta["classes"]), device)
    if dist.is_initialized() and not rank:
        dist.barrier()
    return found


def cached_classifier(path, key, classes, device):
    """What load_classifier returns, from its file; None if there is none for this data."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["data"] != key:                          # the data set was packed anew
            return None
        net = Classifier(classes)
        net.load_state_dict(state["weights"])
        return net.eval().to(device), state["accuracy"], state["hash"]
    except Exception:
        print(f"warning: {path} is damaged; training the classifier again", file=sys.stderr)
        return None


def fit_classifier(path, key, arrays, classes, device):
    """What load_classifier returns, trained now and written to its file."""
    net = train_classifier(*arrays["train"], classes, device)
    images, labels = arrays["val"]
    right = accuracy(net, lambda places: np.array(images[places.start:places.stop]), labels, device)
    weights = {k: v.cpu() for k, v in net.state_dict().items()}
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in weights.values())).hexdigest()[:8]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save({"weights": weights, "accuracy": right, "hash": digest, "data": key}, part)
    os.replace(part, path)
    return net, right, digest


# ---------------------------------------------------------------------------------------------------------------------
# Sides: a folder of PNG files, an npz batch, a packed data set, or statistics
# ---------------------------------------------------------------------------------------------------------------------

def some(n, count):
    """n of the places 0 ... count-1 by chance, always the same ones, in order; all of them if there are no more.

    subtle: packed images may lie sorted by class, or go round the classes in turn: neither the first n nor every k-th will do.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:n])


class Side:
    """One of the two sets.  images(i) -> uint8 (B,H,W,3) of a range; count; label ids if known; or statistics alone."""

    def __init__(self, place, split="train"):
        self.place, self.split, self.labels, self.record, self.statistics, self.order = str(place), split, None, {}, None, None
        path = Path(place)
        if not path.exists():
            raise ValueError(f"there is nothing at {path}: make samples first (python 04_sample.py)")
        if path.suffix == ".npz":
            self.open_npz(path)
        elif (path / "meta.json").exists():
            meta, arrays = data.open_data(path)
            self.array, self.labels = arrays[split]
            self.key, self.count = meta["sha256"][f"{split}_images.npy"], len(self.array)
        else:
            self.open_folder(path)

    def open_npz(self, path):
        """Sample batches (arr_0, arr_1) and statistics (mu, sigma, mu_s, sigma_s)."""
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {k: file[k] for k in ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "n") if k in file.files}
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no readable npz file ({error})") from None
        if "mu" in content:
            self.statistics = {k: content[k].astype(np.float64) for k in ("mu", "sigma", "mu_s", "sigma_s") if k in content}
            self.statistics["n"] = int(content.get("n", 0))          # ADM's file: of the whole data set, and does not say of how many
        self.array, self.key = content.get("arr_0"), data.file_hash(path, "sha256")
        self.labels = content.get("arr_1")
        self.count = len(self.array) if self.array is not None else int(content.get("n", 0))
        if self.array is None and self.statistics is None:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
        if self.array is not None and (self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3):
            raise ValueError(f"{path}: arr_0 is {self.array.dtype} {self.array.shape}; it must be uint8 (N,H,W,3)")

    def open_folder(self, path):
        """Image files, all of one size, with samples.json beside them if 04_sample.py made them."""
        if (path / "samples.json").exists():
            self.record = json.loads((path / "samples.json").read_text())
            self.labels = np.array(self.record.pop("labels"))
        self.files = data.list_images(path)
        if not self.files:
            raise ValueError(f"no images in {path}: make samples first (python 04_sample.py)")
        if self.labels is not None and len(self.labels) != len(self.files):
            raise ValueError(f"{path} holds {len(self.files)} of {len(self.labels)} images: run the same 04_sample.py command again to finish")
        stamps = [(os.path.basename(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files]
        self.array, self.count, self.key = None, len(self.files), hashlib.sha256(str(stamps).encode()).hexdigest()

    def keep(self, n):
        """Keep n images of the side at most."""
        self.order = some(n, self.count)
        self.count = len(self.order)

    def images(self, places):
        """uint8 (len(places),H,W,3).  Raises ValueError when the sizes differ."""
        if self.order is not None:
            return np.array(self.array[self.order[places.start:places.stop]])
        if self.array is not None:
            return np.array(self.array[places.start:places.stop])
        batch = [np.array(Image.open(self.files[i]).convert("RGB")) for i in places]
        odd = next((i for i, image in enumerate(batch) if image.shape != batch[0].shape), None)
        if odd is not None:
            raise ValueError(f"{self.files[places[odd]]} is {batch[odd].shape[1]} x {batch[odd].shape[0]}, others are "
                             f"{batch[0].shape[1]} x {batch[0].shape[0]}: all images of a side must have one size")
        return np.stack(batch)


KEPT, NEIGHBOURS = 50_000, 10_000                         # features kept of a side; real ones that precision and recall look at


@torch.no_grad()
def describe(side, net, device, batch_size, label):
    """One pass over a side: {"mu", "sigma", "n", "features" and, from Inception, "mu_s", "sigma_s", "logits"}.

    Every process takes its share of the batches; the moments are added up, the features put back in order.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    moments, spatial, kept = Moments(), Moments(), {}
    batches = [range(i, min(i + batch_size, side.count)) for i in range(0, side.count, batch_size)]
    shape, wanted = None, np.isin(np.arange(side.count), some(KEPT, side.count))
    for number in tqdm(range(rank, len(batches), world), desc=label, unit=" batches", disable=None if rank == 0 else True):
        images = side.images(batches[number])
        if shape and images.shape[1:] != shape:
            raise ValueError(f"{side.place}: images of {shape[1]} x {shape[0]} and of {images.shape[2]} x {images.shape[1]}; a side must have one size")
        shape = images.shape[1:]
        out = {k: v.float().cpu().numpy() for k, v in net(torch.from_numpy(images).to(device)).items()}
        moments.add(out["features"])
        if "spatial" in out:
            spatial.add(out["spatial"])
        chosen = wanted[batches[number].start:batches[number].stop]
        kept[number] = (out["features"][chosen], out["logits"][chosen] if "spatial" in out else None)
    parts = [(kept, moments, spatial)]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (kept, moments, spatial))
    kept = {k: v for part in parts for k, v in part[0].items()}
    result = dict(zip(("mu", "sigma"), merge([part[1] for part in parts]).result()))
    if any(part[2].n for part in parts):
        result.update(zip(("mu_s", "sigma_s"), merge([part[2] for part in parts]).result()))
        result["logits"] = np.concatenate([kept[k][1] for k in sorted(kept)])
    return {**result, "n": side.count, "features": np.concatenate([kept[k][0] for k in sorted(kept)])}


def merge(parts):
    """The Moments of several processes as one."""
    whole = Moments()
    whole.shift = next(p.shift for p in parts if p.n)
    for part in parts:
        if part.n:                                        # sums around part.shift -> sums around whole.shift
            move = part.shift - whole.shift
            whole.outer = whole.outer + part.outer + np.outer(part.total, move) + np.outer(move, part.total) + part.n * np.outer(move, move)
            whole.total = whole.total + part.total + part.n * move
            whole.n += part.n
    return whole


def reference(side, net, name, digest, device, batch_size):
    """describe() for the real side; where a file brings its own mu and sigma (as ADM's do), these are used.

    Cached beside a packed data set under features, their weights, split and the data's hash.
    """
    if side.array is None and side.statistics:
        return side.statistics
    cache = None
    if (Path(side.place) / "meta.json").exists():
        cache = Path(side.place) / f"statistics-{name}-{digest}-{side.split}-{side.key[:8]}.npz"
        if cache.exists():
            with np.load(cache, allow_pickle=False) as file:
                return {k: file[k] for k in file.files}
    result = {**describe(side, net, device, batch_size, "real images"), **(side.statistics or {})}
    if cache and int(os.environ.get("RANK", 0)) == 0:
        write_npz(cache, result)
    return result


def write_npz(path, arrays):
    """Write beside, then move there."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------------------------------
# From two sides to a result
# ---------------------------------------------------------------------------------------------------------------------

def compare(fake, real, metrics, inception):
    """The scores of two descriptions as {name: number}, without those that do not apply."""
    if fake["mu"].shape != real["mu"].shape:
        raise ValueError(f"the reference has features of {real['mu'].shape[0]} numbers, the samples of {fake['mu'].shape[0]}: "
                         "they were made with other networks")
    scores = {}
    if "fd" in metrics:
        scores["fd"] = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    if "sfd" in metrics and "mu_s" in fake and "mu_s" in real:
        scores["sfd"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if "kid" in metrics and "features" in real and min(len(fake["features"]), len(real["features"])) >= 1000:
        scores["kid"], scores["kid_std"] = kernel_distance(fake["features"], real["features"])
    if "pr" in metrics and "features" in real:
        scores["precision"], scores["recall"] = precision_recall(fake["features"], real["features"][some(NEIGHBOURS, len(real["features"]))])
    if "is" in metrics and inception and len(fake["logits"]) >= 10:
        scores["is"], scores["is_std"] = inception_score(fake["logits"])
    return scores


def score(samples, place, args, device):
    """Score one set of samples; returns the whole result, every number with its N and where it comes from."""
    inception, extra = args.features == "inception", {}
    if inception:
        net, name, digest = load_inception(args.inception_weights)
    else:
        if not Path(place).is_dir():
            raise ValueError(f"{place} is no packed data set, and the classifier is trained on one: --features inception takes any reference")
        net, right, digest = load_classifier(place, device)
        meta = data.open_data(place)[0]
        if samples.record.get("size", meta["size"]) != meta["size"]:
            raise ValueError(f"{samples.place} has images of {samples.record['size']} pixels, {place} of {meta['size']}: is it the right --reference?")
        if samples.record.get("classes", meta["classes"]) != meta["classes"]:
            samples.labels = None                         # labels of other classes say nothing to this classifier
        name = "FD (classifier features)"
    net = net.to(device)
    real = reference(Side(place), net, args.features, digest, device, args.batch_size)
    fake = describe(samples, net, device, args.batch_size, "generated images")
    if not inception:
        held_out = Side(place, "val")
        if samples.labels is not None:
            extra["class_accuracy"] = accuracy(net, samples.images, samples.labels, device)
        extra["class_accuracy_real"] = right
        if held_out.count > 1:
            held_out.keep(samples.count)                             # as many images as are scored: FD grows as N falls
            floor = describe(held_out, net, device, args.batch_size, "held-out images")
            extra["fd_floor"] = frechet_distance(floor["mu"], floor["sigma"], real["mu"], real["sigma"])
            extra["n_floor"] = held_out.count
    scores = {} if int(os.environ.get("RANK", 0)) else compare(fake, real, args.metrics, inception)      # the first process's alone: it reports
    return {"metrics": args.metrics, "score": name, **scores, **extra, "n_generated": samples.count, "n_real": int(real["n"]),
            "n_real_features": len(real.get("features", [])), "n_real_precision_recall": min(NEIGHBOURS, len(real.get("features", []))),
            "features": args.features, "weights": digest, "reference": str(place), "samples": samples.place, "samples_key": samples.key,
            "sampling": samples.record}


def report(result):
    """Print a result, each number with its unit and its N."""
    n, m, name = result["n_generated"], result["n_real"], result["score"]
    real = f"{m} real images" if m else f"the statistics in {result['reference']}"
    lines = [("fd", name, f"{n} generated against {real}; 0 is best"),
             ("fd_floor", f"{name} floor", f"{result.get('n_floor')} held-out real against {m} real images"),
             ("sfd", "s" + name, f"{n} generated against {real}"), ("is", "Inception score", f"{n} images, ten splits"),
             ("kid", "KID" if result["features"] == "inception" else "KID (classifier features)", f"x 1000 would be the usual unit; 100 subsets of 1000 of {n} and {result.get('n_real_features')} images"),
             ("precision", "precision", f"share of {n} generated images"), ("recall", "recall", f"share of {result['n_real_precision_recall']} real images"),
             ("class_accuracy", "class accuracy", f"share of {n} generated images in which the classifier sees the class asked for"),
             ("class_accuracy_real", "class accuracy, real", "share of the held-out real images it gets right")]
    for key, title, unit in lines:
        if key in result:
            spread = f" +- {result[key + '_std']:.4f}" if key + "_std" in result else ""
            print(f"{title:32s} {result[key]:10.4f}{spread}   ({unit})")
    if n < 2048:
        print(f"warning: {n} images are few: {name} is then biased upwards and only comparable at the same N"
              f"{'; look at KID' if 'kid' in result else ''}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep over guidance and EMA that the authors recommend
# ---------------------------------------------------------------------------------------------------------------------

def sweep(args, folder, device):
    """Sample (04_sample.py) and score every point; sweep.csv grows by a line each, a second run goes on."""
    path, rows = folder / "sweep.csv", []
    columns = ["point", "score", "n_generated", "features", "reference", "weights", "network", "fd", "sfd", "kid", "precision", "recall", "is", "class_accuracy"]
    network = checkpoint_digest(folder / "checkpoint.pt")
    wanted = (str(args.num), args.features, str(args.reference or ""), network)
    if path.exists() and not args.overwrite:
        rows = list(csv.DictReader(path.open()))
        if any((row["n_generated"], row["features"], row["reference"], row["network"]) != wanted for row in rows):
            raise ValueError(f"{path} holds scores of other weights, N, features or reference: pass --overwrite to start the sweep again")
    for point in args.sweep:
        key = ",".join(f"{k}={v}" for k, v in point.items())
        if any(row["point"] == key for row in rows):
            continue
        out = folder / "sweep" / key
        flags = [f"--{k}={v}" for k, v in point.items()]
        command = [sys.executable, Path(__file__).with_name("04_sample.py"), "--run", str(folder) if "/" in str(folder) else f"./{folder}", "--num", str(args.num),
                   "--out", str(out), *flags, *(["--device", args.device] if args.device else []), *(["--overwrite"] if args.overwrite else [])]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"04_sample.py failed at {key}; its message is above. The finished points are kept in {path}")
        samples = Side(out)
        result = score(samples, data_of(args, samples), args, device)
        if "precision" not in result:
            raise ValueError(f"--sweep draws precision and recall: the reference {args.reference} must hold images")
        rows.append({**{k: result.get(k, "") for k in columns}, "point": key, "reference": args.reference or "", "network": network})
        part = Path(f"{path}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)
        print(f"{key}: {result['score']} {result['fd']:.3f}, precision {result['precision']:.3f}, recall {result['recall']:.3f} (N = {args.num})")
    draw_sweep(args, rows, folder)


def draw_sweep(args, rows, folder):
    """sweep.png: the score over the first key, precision over recall."""
    first = list(args.sweep[0])[0]
    points = [(float(dict(p.split("=") for p in row["point"].split(","))[first]), row) for row in rows if f"{first}=" in row["point"]]
    panels = [(f"{rows[0]['score']}, N = {args.num}", first, [(x, float(row["fd"])) for x, row in points]),
              ("precision over recall", "recall", [(float(row["recall"]), float(row["precision"])) for _, row in points])]
    plot(panels).save(folder / "sweep.png")
    print(f"{folder / 'sweep.csv'} and {folder / 'sweep.png'}: {len(rows)} points")


def checkpoint_digest(path):
    """Eight hex digits that tell a checkpoint file from another.  Raises ValueError."""
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: train first (python 03_train.py)")
    return data.file_hash(path, "sha256")[:8]


def plot(panels, width=420, height=300):
    """Panels of points joined by lines, side by side, as one PIL picture.  panels: (title, x label, [(x, y), ...])."""
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, label, points) in enumerate(panels):
        left, top, right, bottom = i * width + 50, 30, (i + 1) * width - 15, height - 35
        xs, ys = zip(*points)
        spans = [(min(v), max(v) - min(v) or 1.0) for v in (xs, ys)]
        place = [(left + (x - spans[0][0]) / spans[0][1] * (right - left), bottom - (y - spans[1][0]) / spans[1][1] * (bottom - top)) for x, y in points]
        draw.rectangle((left, top, right, bottom), outline="gray")
        draw.line(place, fill="navy", width=2)
        for (x, y) in place:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="navy")
        draw.text((left, 10), title, fill="black")
        draw.text(((left + right) // 2, bottom + 18), label, fill="black")
        for k in (0, 1):
            draw.text((left if k == 0 else right - 30, bottom + 5), f"{spans[0][0] + k * spans[0][1]:.3g}", fill="black")
            draw.text((i * width + 5, bottom - 8 if k == 0 else top), f"{spans[1][0] + k * spans[1][1]:.3g}", fill="black")
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# As a script
# ---------------------------------------------------------------------------------------------------------------------

def data_of(args, samples):
    """The reference: the one asked for, or the data set on which the samples' network was trained.  Raises ValueError."""
    name = args.reference or samples.record.get("data")
    if not name:
        raise ValueError(f"{samples.place} does not say which data set it imitates: pass --reference")
    return Path(name) if args.reference or "/" in name else Path("data") / name


def run(args, device):
    """Score, print, write.  Returns the exit code."""
    folder = Path(args.run) if "/" in args.run else Path("runs") / args.run
    if args.sweep:
        if dist.is_initialized():
            raise ValueError("--sweep starts 04_sample.py for every point: run it without torchrun")
        return sweep(args, folder, device)
    samples = Side(args.samples or folder / "samples")
    if samples.array is None and samples.statistics:
        raise ValueError(f"{samples.place} holds statistics only: they serve as --reference, --samples needs images")
    if args.save_statistics:
        net = load_inception(args.inception_weights)[0] if args.features == "inception" else load_classifier(data_of(args, samples), device)[0]
        found = describe(samples, net.to(device), device, args.batch_size, "images")
        if int(os.environ.get("RANK", 0)) == 0:
            write_npz(args.save_statistics, {k: found[k] for k in ("mu", "sigma", "mu_s", "sigma_s", "n") if k in found})
            print(f"{args.save_statistics}: mu and sigma of {found['n']} images")
        return 0
    place, checkpoint, made = data_of(args, samples), folder / "checkpoint.pt", folder / "samples" / "samples.json"
    if not args.samples and checkpoint.exists() and made.exists() and checkpoint.stat().st_mtime > made.stat().st_mtime:
        print(f"warning: {checkpoint} is newer than the samples: run 04_sample.py again to score it", file=sys.stderr)
    if len(args.metrics) == 1 and args.metrics[0] == "kid" and samples.count < 1000:
        raise ValueError(f"KID draws subsets of 1000 images, {samples.place} has {samples.count}: make more samples")
    out = args.out or folder / "metrics.json"
    old = json.loads(out.read_text()) if out.exists() else None
    same = old and [old.get(k) for k in ("metrics", "sampling", "samples", "samples_key", "features", "reference", "n_generated")] == \
        [args.metrics, samples.record, samples.place, samples.key, args.features, str(place), samples.count]
    if old and not same and not args.overwrite:
        raise ValueError(f"{out} holds the score of other samples, or with other options: pass --overwrite to replace it, or --out")
    if same and not args.overwrite:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{out} is already there, for these samples:")
            report(old)
        return 0
    result = score(samples, place, args, device)
    if int(os.environ.get("RANK", 0)) == 0:
        data.write_json(out, result)
        report(result)
        print(f"{out}: all of this, and how the samples were made")


def main(args):
    """Set up the device and the processes, and turn expected errors into one line and an exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model.keep_freed_memory()
    try:
        device = model.pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return run(args, device) or 0
    except (ValueError, OSError) as error:
        return fail(str(error), 2 if str(error).startswith("--") else 1)
    except torch.cuda.OutOfMemoryError:
        return fail("out of GPU memory: pass a smaller --batch-size")
    except KeyboardInterrupt:
        return fail("interrupted")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(ARGS))
