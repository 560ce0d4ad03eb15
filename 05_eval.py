"""05_eval.py -- scores: how far generated images are from real ones, in numbers to compare with published ones

What this stage teaches: FID, sFID, Inception score, KID, precision and recall are a page of arithmetic each, on
features of a classifier.  Two sets of features, one arithmetic:
  --features classifier   128 numbers before the last layer of a small network trained here, on the data set's training
                          images (default; works offline).  The score is called "FD (classifier features)", never FID;
                          beside it stands how often that classifier sees the class asked for, and is right.
  --features inception    2048 numbers of Inception-v3 as in the original FID, its weights downloaded or given.
Reads runs/<name>/samples/, data/<name>/.   Writes runs/<name>/metrics.json; statistics are cached beside the data.
Run it:   python 05_eval.py                                37 s on two CPU cores, the classifier's training included
          python 05_eval.py --samples my_pngs --reference VIRTUAL_imagenet256_labeled.npz --features inception

An image set is a folder of image files, a .npz with arr_0 (N,H,W,3) uint8, or a packed data set; the reference may also
be a .npz of statistics (mu, sigma).  FID is biased upwards at small N: every number carries its N.
"""
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

data = import_module("01_data")
model = import_module("02_model")                         # before torch: it sets GOMP_SPINCOUNT, which torch reads
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

option, refuse = data.option, data.refuse

# ---- Two Gaussians: FID, and sFID on other features ------------------------------------------------------------------
def moments(sums):
    """Mean (D,) and covariance (D,D), with N-1, of features f, a row of D numbers for each image.

    sums: (D+1,D+1), fp64, the sum of F^T F over all images, F = (1, f).  So sums[0,0] is N, sums[0,1:] the sum of f,
    sums[1:,1:] the sum of f^T f; batches just add theirs.
    """
    n = sums[0, 0]
    total = sums[0, 1:]
    mean = total / n
    covariance = (sums[1:, 1:] - n * np.outer(mean, mean)) / (n - 1)
    return mean, covariance

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 root), root the matrix root of sigma1 sigma2.   (Heusel 2017, eq. 6)

    FID, on pool3 features.  The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R R = sigma1:
    symmetric, so two eigenvalue problems replace a general matrix root, and singular covariances do no harm.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma1.astype(float)))
    R = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    squares = torch.linalg.eigvalsh(R @ torch.from_numpy(sigma2.astype(float)) @ R)
    trace_of_root = squares.clamp_min(0).sqrt().sum().item()
    distance = ((mu1 - mu2)**2).sum() + np.trace(sigma1 + sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)                      # subtle: in this order a nan stays one

# ---- Inception score: is each image of one class, and the set of all? ------------------------------------------------
def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), mean and std over ten parts of a shuffle.            (Salimans et al. 2016, section 4)

    Shuffled by np.random.RandomState(2020).permutation(N).  logits: (N,classes), without the last layer's bias.
    """
    if len(logits) < splits:
        raise ValueError(f"the Inception score needs {splits} images")
    scores = []
    n = len(logits)
    shuffle = np.random.RandomState(2020).permutation(n)
    logits = torch.as_tensor(logits).double()[shuffle]
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].log_softmax(dim=1)                   # log p(y|x)
        p = log_p.exp()
        p_of_all = p.mean(dim=0)                                                                   # p(y)
        kl = (p * (log_p - p_of_all.log())).sum(dim=1)
        scores.append(kl.mean().exp().item())
    return np.mean(scores), np.std(scores)

# ---- KID: are features more alike within a set than between the sets? ------------------------------------------------
def kernel_distance(a, b, subsets=100, size=1000):
    """KID: unbiased MMD^2 with the kernel (<x,y>/D + 1)^3, mean and std over subsets.   (Binkowski et al. 2018, sec. 3)

    MMD^2 = E k(x,x') + E k(y,y') - 2 E k(x,y), x and x' being two different images of one set, y and y' of the other:
    zero when both come from one distribution.  No image is compared with itself, so the estimate is then zero on
    average, and now and then negative.  The std is that of a single subset; a side of just `size` images is the same
    in all.  a, b: (N,D) features.  Raises ValueError when a side has fewer than `size`.
    """
    if min(len(a), len(b)) < size:
        raise ValueError(f"KID draws subsets of {size} images, one side has {min(len(a), len(b))}")
    random = np.random.RandomState(2020)
    scores = []
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1)**3
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        xx = kernel(x, x)
        yy = kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)             # the diagonal: an image with itself
        scores.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return np.mean(scores), np.std(scores)

# ---- Precision and recall: is each image near one of the other set? --------------------------------------------------
def share_inside(x, y, k=3, block=1000):
    """Share of x inside some ball around an element of y, which reaches to that element's k-th neighbour in y.

    Precision is share_inside(generated, real), recall share_inside(real, generated).      (Kynkäänniemi 2019, eq. 2)
    x, y: features (N,D).  In blocks: memory grows with N, not with N^2.
    """
    x = torch.as_tensor(x).double()
    y = torch.as_tensor(y).double()
    if min(len(x), len(y)) < 10 * k:
        raise ValueError(f"precision and recall need {10 * k} images a side")
    # subtle: within y an element is its own nearest neighbour, hence the (k+1)-th
    radii = torch.cat([torch.cdist(part, y).kthvalue(k + 1, dim=1).values for part in y.split(block)])
    inside = torch.cat([(torch.cdist(part, y) <= radii).any(dim=1) for part in x.split(block)])
    return inside.double().mean().item()

# ======================================================================================================================
# first reading ends here: what follows makes the features, opens image sets, and reports
# ======================================================================================================================

# ---- One pass over an image set: features, and the sums that the moments need ----------------------------------------
KEPT = 50_000                          # images whose features are kept
NEIGHBOURS = 10_000                    # real ones that precision and recall look at

def random_subset(n, count):
    """At most n of the places 0 ... count-1 by chance, always the same ones, in order.

    subtle: packed images may lie sorted by class, or go round the classes: neither the first n nor every k-th will do.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:n])

@torch.no_grad()
def describe(images, net, device, batch_size, title, chosen=None):
    """{"n", "mu", "sigma", "features" and "logits" of KEPT images at most, "seen": the class seen in each of them all}.

    From Inception also "mu_s", "sigma_s", of the spatial features.

    images: anything with len() and indexing by arrays to uint8 (N,H,W,3); all, or those chosen.
    """
    chosen = np.arange(len(images)) if chosen is None else chosen
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} {title} are too few for a covariance")
    kept = np.isin(np.arange(len(chosen)), random_subset(KEPT, len(chosen)))
    sums = {}
    parts = []
    with data.Progress(len(chosen), title, " images") as bar:
        blocks = data.in_parts(chosen, batch_size)
        # all cores read and decode, ahead of the network
        read = model.ahead(lambda rows: torch.from_numpy(images[rows]), blocks, os.cpu_count())
        for batch, keep in zip(read, data.in_parts(kept, batch_size)):
            out = net(batch.to(device))
            for name in out.keys() - {"logits"}:
                f = F.pad(out[name].double(), (1, 0), value=1.0)                                   # B 1+D: (1, f)
                if name in sums:
                    sums[name].addmm_(f.T, f)             # in place: a new sum for each batch is 33 MB
                else:
                    sums[name] = f.T @ f
            logits = out["logits"]
            parts.append((out["features"][keep], logits[keep], logits.argmax(dim=1)))
            bar.update(len(keep))
    features, logits, seen = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    result = {"n": len(chosen), "features": features, "logits": logits, "seen": seen}
    for name in sums:
        suffix = "_s" if name == "spatial" else ""
        result[f"mu{suffix}"], result[f"sigma{suffix}"] = moments(sums[name].cpu().numpy())
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
        """Convolution, norm and ReLU for each name; the last has the stride.  With `same` stride 1 keeps the size."""
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
        else:                                             # first difference: the padding is not counted
            mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            pooled = F.max_pool2d(x, 3, 1, 1) if pool == "max" else mean
            outs.append(self.chain(pooled, block, "branch_pool"))
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
    for _ in range(2):                                    # the rows; then, turned, the columns
        place = torch.arange(size, device=x.device) * (x.shape[2] / size)
        low = place.long()
        high = (low + 1).clamp_max(x.shape[2] - 1)
        part = (place - low)[:, None]
        x = (x[:, :, low] * (1 - part) + x[:, :, high] * part).transpose(2, 3)
    return x

WEIGHTS_HASH = "6726825d"                                 # the first digits of the published file's sha256
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               f"pt_inception-2015-12-05-{WEIGHTS_HASH}.pth")

def load_inception(path):
    """(network, name of its score, hash of the weights).  Another file than the published one names its score."""
    with model.reading(path or WEIGHTS_URL, f"; fetch {WEIGHTS_URL} and pass --inception-weights FILE"):
        if path is None:
            digest = WEIGHTS_HASH
            state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        else:
            digest = data.file_hash(path, "sha256")[:8]
            state = torch.load(path, map_location="cpu", weights_only=True)
        net = Inception(state)
        net(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))   # all names, all shapes
    if digest == WEIGHTS_HASH:
        return net, "FID", digest
    model.warn(f"{path} is not the published weights file; the scores are named after it, not FID")
    return net, f"FD ({path.name} {digest})", digest

# ---- The classifier whose features stand in where Inception cannot be had --------------------------------------------
class Classifier(nn.Module):
    """uint8 images (B,H,W,3) -> {"features" (B,128), "logits" (B,classes)}.  Larger ones are averaged to 64 pixels."""

    def __init__(self, classes):
        super().__init__()
        layers = []
        for cin, cout in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 128), nn.SiLU())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.body(F.interpolate(x, 64, mode="area") if x.shape[-1] > 64 else x)
        return {"features": features, "logits": self.head(features)}

def train_classifier(images, labels, classes, device):
    """A Classifier trained on the training split, mirrored by chance; on a CPU the same weights for the same data.

    It sees 40,000 images of 64 pixels, four times as many of half the size, at most 30 times the data set.
    """
    torch.manual_seed(0)
    net = Classifier(classes).to(device)
    batch = 128
    random = np.random.default_rng(0)
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

def remembered(path, make, about=""):
    """The arrays that make() returned once, {name: array}, kept in an .npz file with a text that says what they are.

    about: what decides them and is not in the file's name.
    Files that save time and nothing else: one that does not fit is made again; where it cannot be, a warning will do.
    """
    def told(arrays):
        return f"{path.name} {about} {model.fingerprint(arrays)}"
    if path.exists():
        with suppress(Exception), np.load(path, allow_pickle=False) as file:   # zip, zlib, numpy have their own errors
            arrays = dict(file)
            if arrays.pop("told") == told(arrays):
                return arrays
        model.warn(f"{path} is damaged, or of another version; making it again")
    arrays = make()
    try:
        with data.whole(path) as part, open(part, "wb") as file:
            np.savez(file, **arrays, told=told(arrays))
    except OSError as error:
        model.warn(f"{path} is not kept ({error})")
    return arrays

def load_classifier(folder, device):
    """(network, name of its score, digest) of the data set's classifier, trained once and cached beside the data."""
    meta, arrays = data.open_data(folder)
    classes = len(meta["classes"])
    if classes < 2:
        raise ValueError(f"a classifier needs two classes, {folder} has {classes}: use --features inception, or pack "
                         "class folders")

    def make():
        trained = train_classifier(*arrays["train"], classes, device)
        return {name: value.cpu().numpy() for name, value in trained.state_dict().items()}
    net = Classifier(classes).eval()
    weights = remembered(Path(f"{folder}/classifier-{meta['id'][:8]}.{classes}.npz"), make, str(net))
    model.load_weights(net, {name: torch.from_numpy(value) for name, value in weights.items()})
    return net, "FD (classifier features)", model.fingerprint(weights)

# ---- Image sets: a folder of image files, an npz batch, a packed data set, or statistics alone -----------------------
class ImageFiles:
    """Image files as an array: len(), and indexing that gives uint8 (N,H,W,3).  All have one size."""

    def __init__(self, files):
        self.files = np.array(files)
        self.shape = np.shape(data.read_image(files[0]))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        batch = []
        for file in self.files[rows]:
            batch.append(np.asarray(data.read_image(file)))
            if batch[-1].shape != self.shape:
                raise ValueError(f"{file} has the shape {batch[-1].shape}, others have {self.shape}: all images of a "
                                 "set must have one size")
        return np.stack(batch)

class ImageSet:
    """What a path holds: images (like an array uint8 (N,H,W,3)) and labels, or statistics alone.

    A packed data set, an npz file or a folder of image files.  record: how it was made.  Raises ValueError.
    """

    def __init__(self, place, split="train"):
        self.path = path = Path(place)
        self.split = split
        self.images = None
        self.labels = None
        self.record = {}
        self.statistics = {}
        if (path / "train_images.npy").exists():
            self.record, arrays = data.open_data(path)
            if "coder" in self.record:
                raise ValueError(f"{path} holds latents: give the pixels they were made of, "
                                 f"{self.record['coder']['pixels']}")
            self.images, self.labels = arrays[split]
            self.held_out = arrays["val"]
        elif path.suffix.lower() == ".npz" and path.exists():
            self.images, self.labels, self.statistics = read_npz(path)
        else:
            files = data.list_images(path) if path.is_dir() else []
            if not files:
                raise ValueError(f"no images at {path}: make samples (python 04_sample.py) or data first, or give "
                                 "another --samples, --run or --reference: a folder of images or a file NAME.npz")
            self.images = ImageFiles(files)
            if (path / "samples.json").exists():
                self.record = data.load_json(path / "samples.json", labels=list, classes=list)
                self.labels = np.array(self.record.pop("labels")).ravel()
                names = [f"{i:07d}.png" for i in range(self.labels.size)]
                if [*map(os.path.basename, files)] != names or self.labels.dtype.kind != "i":
                    raise ValueError(f"{path} holds {len(files)} images and labels for {self.labels.size} "
                                     f"({self.labels.dtype}): finish it by the same 04_sample.py command, and leave no "
                                     "other images there")

def read_npz(path):
    """(images, labels, statistics) of a sample batch (arr_0, arr_1), or of statistics (mu, sigma, mu_s, sigma_s, n)."""
    with model.reading(path, ": is it an .npz file?"), np.load(path, allow_pickle=False) as file:
        content = {name: np.asarray(file[name])
                   for name in "arr_0 arr_1 mu sigma mu_s sigma_s n".split() if name in file}
    images = content.pop("arr_0", None)
    labels = content.pop("arr_1", None)
    if ("mu" in content) != ("sigma" in content) or images is None and "mu" not in content:
        raise ValueError(f"{path} holds no images (arr_0), or of statistics (mu, sigma) a part")
    shape = np.shape(images)
    if images is not None and (images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {shape}; it must be uint8 (N,H,W,3)")
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: arr_1 is {labels.dtype} {labels.shape}; it must hold one class id per image")
    for name in content:
        check_statistic(path, name, content)
    return images, labels, {"n": 0} | content if content else {}               # ADM's do not say of how many images

def check_statistic(path, name, content):
    """Raise ValueError unless it is a mean (D,), a covariance (D,D), or a number n."""
    value = content[name]
    mean = content.get(name.replace("sigma", "mu"))
    shape = {"n": (), "m": (value.size,), "s": np.shape(mean) * 2}[name[0]]    # of n, mu or mu_s, sigma or sigma_s
    good = value.shape == shape and value.size and value.dtype.kind in "fiu" and np.isfinite(value).all() and (
        name != "n" or value >= 0)
    if good and name[0] == "s":
        variances = np.linalg.eigvalsh(value.astype(float))                    # ascending
        rounding = 0.001                                  # float16 rounds this coarsely
        good = np.allclose(value, value.T) and variances[0] >= -rounding * variances[-1] and (
            variances.clip(max=0).sum() >= -rounding * variances.sum())
    if not good:
        raise ValueError(f"{path}: {name} is {value.dtype} {value.shape}; mu must be (D,), sigma (D,D), symmetric "
                         "and without negative variances, n one number, all of them finite")

def describe_reference(real, net, digest, device, batch_size):
    """describe() of the real images, cached beside a packed data set; a file's own mu and sigma come first."""
    def make():
        return describe(real.images, net, device, batch_size, "real images") | real.statistics
    if real.images is None:
        return real.statistics
    if "id" not in real.record:
        return make()
    return remembered(real.path / f"statistics-{real.split}-{digest}-{real.record['id'][:8]}.npz", make)

# ---- From two image sets to a result ---------------------------------------------------------------------------------
def frechet(suffix):
    """The score that is the distance of two descriptions: of their features (suffix ""), or the spatial ones ("_s")."""
    mu = f"mu{suffix}"
    sigma = f"sigma{suffix}"
    return lambda fake, real: frechet_distance(fake[mu], fake[sigma], real[mu], real[sigma])

def neighbours(real):
    return real["features"][random_subset(NEIGHBOURS, len(real["features"]))]

SCORES = {  # name: (title, of what, function of two descriptions -> a number, or a number and its spread)
    "fd": ("{score}", "{n_generated} generated against {n_real} real images; 0 is best", frechet("")),
    "sfd": ("s{score}", "{n_generated} generated against {n_real} real images", frechet("_s")),
    "is": ("Inception score", "{n_generated} images, ten splits", lambda fake, real: inception_score(fake["logits"])),
    "kid": ("KID ({features})", "100 subsets of 1000 of {n_generated} and {n_features} images; usually given x 1000",
            lambda fake, real: kernel_distance(fake["features"], real["features"])),
    "precision": ("precision", "share of {n_generated} generated images",
                  lambda fake, real: share_inside(fake["features"], neighbours(real))),
    "recall": ("recall", "share of 10000 real images at most",
               lambda fake, real: share_inside(neighbours(real), fake["features"])),
}
JUDGED = {  # by the classifier
    "fd_floor": ("{score} floor", "{n_floor} held-out real images against {n_real} real images"),
    "class_accuracy": ("class accuracy", "share of {n_generated} generated images in which it sees the class asked"),
    "class_accuracy_real": ("class accuracy, real", "share of {n_floor} held-out real images it gets right"),
}

def compare(fake, real, metrics, inception):
    """The scores of two descriptions: ({name: number}, {score left out: why})."""
    if fake["mu"].shape != real["mu"].shape:
        raise ValueError(f"the reference has features of {len(real['mu'])} numbers, the samples of {len(fake['mu'])}: "
                         "they were made with other networks")
    scores = {}
    left_out = {}
    for metric in metrics:
        try:
            if metric in ("is", "sfd") and not inception:
                raise ValueError("it needs --features inception")
            value = SCORES[metric][2](fake, real)
            scores |= {metric: value[0], f"{metric}_std": value[1]} if isinstance(value, tuple) else {metric: value}
        except KeyError as missing:
            left_out[metric] = f"the reference has no {missing.args[0]}"
        except (ValueError, RuntimeError) as reason:
            left_out[metric] = str(reason)
    return scores, left_out

def score(samples, real, net, options, digest, device):
    """Score one image set against another: {name: number}, every number with its N."""
    reference = describe_reference(real, net, digest, device, options.batch_size)
    fake = describe(samples.images, net, device, options.batch_size, "generated images")
    with device:                                          # where torch.as_tensor then puts what numpy has
        scores, left_out = compare(fake, reference, options.metrics, options.features == "inception")
    result = scores | {"left_out": left_out, "n_generated": fake["n"],
                       "n_real": int(reference["n"]) or "an unknown number of",
                       "n_features": len(reference.get("features", ()))}
    if options.features == "inception":
        return result
    images, labels = real.held_out
    rows = random_subset(len(samples.images), len(images))                     # as many: FD grows as N falls
    if len(rows) > 1:
        floor = describe(images, net, device, options.batch_size, "held-out images", rows)
        result |= {"n_floor": len(rows), "class_accuracy_real": (floor["seen"] == labels[rows]).mean()}
        if real.split == "train":                         # else the floor is a part of the reference itself
            result["fd_floor"] = frechet("")(floor, reference)
    if samples.labels is None:
        left_out["class_accuracy"] = "the samples have no labels, or of other classes"
    else:
        result["class_accuracy"] = (fake["seen"] == samples.labels).mean()
    return result

def report(result):
    """Print a result, every number with its N, then what was left out and what to be wary of."""
    for name, (title, about, *_) in (SCORES | JUDGED).items():
        if name in result:
            spread = f" +- {result[f'{name}_std']:.4f}" if f"{name}_std" in result else ""
            print(f"{title.format(**result):32s} {result[name]:10.4f}{spread}   ({about.format(**result)})")
    for metric, reason in result["left_out"].items():
        print(f"{metric:32s}   left out   ({reason})")
    if result["n_generated"] < 2048:
        model.warn(f"{result['n_generated']} images are few: {result['score']} is biased upwards and only comparable "
                   "at the same N")
    if result["features"] == "classifier" and result.get("class_accuracy_real", 0) <= 0.5:
        model.warn(f"the classifier is right on {result.get('class_accuracy_real', 'no share')} of held-out real "
                   "images: neither its features nor its class accuracy are to be trusted")

def print_table(files, out):
    """--table: a line per result, with the settings in which they differ; with --out a curve over the first of them."""
    results = [data.load_json(Path(file), score=str, n_generated=int, sampling=dict) for file in files]
    judges = {f"{r['score']} {r.get('n_real')} {r.get('reference_id') or r.get('reference')} {r.get('split', 'train')}"
              for r in results}
    refuse(len(judges) > 1, f"{', '.join(files)} cannot be compared: they differ in features, reference or split")
    rows = [{"file": file} | result["sampling"] | result for file, result in zip(files, results)]
    most = max(rows, key=len)["sampling"]                 # foreign samples have none
    varied = [k for k in most if k != "weights" and len({str(row[k]) for row in rows if k in row}) > 1]
    columns = ["file", *varied, "n_generated", *SCORES, "class_accuracy"]
    print(" | ".join(columns))
    for row in rows:
        values = [row.get(column, "") for column in columns]
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    if out:
        name = next((name for name in varied if isinstance(most[name], (int, float))), None)
        curve = sorted((row[name], row["fd"]) for row in rows
                       if isinstance(row.get("fd"), (int, float)) and isinstance(row.get(name), (int, float)))
        refuse(not curve, "--out: the results differ in no number to draw fd over")
        model.save_picture(out, model.chart(rows[0]["score"], name, {"score": curve}))
        print(f"look at {out}: {len(curve)} of {len(rows)} results")

# ---- Running it ------------------------------------------------------------------------------------------------------
@dataclass
class Options:
    run: str = option("shapes", "runs/NAME, or a folder", group="what")
    samples: str = option(None, "generated images, a folder or .npz (default: the run's samples)")
    split: str = option("train", "part of the reference that is packed", choices=lambda: ("train", "val"))
    reference: str = option(None, "real images or their statistics: data/NAME, or a path with a slash, or a .npz file "
                            "(default: the samples' data set)")
    metrics: str = option(",".join(SCORES), "scores, with commas between")
    features: str = option("classifier", "see the head of this file", choices=lambda: ("classifier", "inception"))
    inception_weights: Path = option(None, "the weights file, where it cannot be downloaded")
    table: list = option(None, "only compare results made before; with --out PICTURE.png also a curve")
    out: Path = option(None, "result (default: metrics.json in the run's folder; SAMPLES-metrics.json with --samples)",
                       group="output and hardware")
    batch_size: int = option(100, "images at a time", "[1, inf)")
    device: str = option(None, "cuda or cpu")

    def __post_init__(self):
        self.metrics = self.metrics.split(",")
        for metric in self.metrics:
            data.check("--metrics", metric, choices=lambda: SCORES)

def open_sets(options):
    """The generated images and the real ones.  Raises ValueError if they cannot be compared."""
    samples = ImageSet(options.samples or model.folder_of(options.run, "runs") / "samples")
    made = samples.record
    name = options.reference or made.get("data")
    if samples.images is None:
        raise ValueError(f"{samples.path} holds statistics only: they serve as --reference")
    if not isinstance(name, str):
        raise ValueError(f"{samples.path} does not say which data set it imitates: pass --reference, or, of a run, "
                         "--run")
    real = ImageSet(name if name.lower().endswith(".npz") else model.folder_of(name, "data"), options.split)
    if not options.reference and made.get("data_id") != real.record.get("id"):
        raise ValueError(f"{real.path} was packed anew since the network of {samples.path} was trained, or its "
                         "samples.json does not say of which it is: pass "
                         f"--reference {name!r} to compare them all the same")
    if options.features == "classifier" and "counts" not in real.record:
        raise ValueError(f"{name} is not a packed data set, the classifier is trained on one: use --features inception")
    size = samples.images[np.arange(1)].shape[1:3]
    if "size" in real.record and {*size} != {real.record["size"]}:
        raise ValueError(f"{samples.path} has images of {size[0]} x {size[1]} pixels, {real.path} of others: is it the "
                         "right --reference, and are they samples (a run's lie in its samples/)?")
    classes = real.record.get("classes")
    if made and made.get("classes", []) != classes:
        samples.labels = None                             # labels of other classes say nothing to this classifier
    if classes and samples.labels is not None and not 0 <= samples.labels.min() <= samples.labels.max() < len(classes):
        raise ValueError(f"{samples.path} has labels outside 0..{len(classes) - 1}, the classes of {real.path}")
    return samples, real

def main(argv=None):
    options = Options(**data.parse(argv, "Score generated images against real ones.", Options))
    if options.table:
        return print_table(options.table, options.out)
    with model.device_and_processes(options.device) as (device, rank, _):
        if rank == 0:                                     # one process is enough
            evaluate(options, device)

def evaluate(options, device):
    """Score, report, and write the result."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False            # full fp32
    if device.type == "mps":
        device = torch.device("cpu")                      # it has no fp64
    samples, real = open_sets(options)
    path = samples.path
    out = options.out or (Path(f"{path.absolute()}-metrics.json") if options.samples else path.parent / "metrics.json")
    if out.exists():                                      # it is replaced, if it is a result
        data.load_json(out, score=str, n_generated=int)
    if options.features == "inception":
        net, name, digest = load_inception(options.inception_weights)
    else:
        net, name, digest = load_classifier(real.path, device)
    result = {"score": name, "features": options.features, "weights": digest,
              "samples": str(path), "reference": str(real.path), "reference_id": real.record.get("id"),
              "split": real.split, "sampling": samples.record} | score(
                  samples, real, net.to(device), options, digest, device)
    if samples.record and ImageSet(path).record != samples.record:             # an .npz, which is large, has none
        raise ValueError(f"{path} was made anew in the meantime: score it again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        data.save_json(out, result)
    finally:
        report(result)                                    # also if the disk is full
    print(f"{out}: all of this, and how the samples were made; training step {samples.record.get('step') or 'unknown'}")

if __name__ == "__main__":
    sys.exit(data.run(main))
