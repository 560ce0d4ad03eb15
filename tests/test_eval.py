"""Scores against closed forms and definitions rewritten the slow way; the networks against functional rewrites."""
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, TINY_FLAGS, call, data, evaluate, images_of, model, sample, train

def features(n, d, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) + shift

def moments(x):
    """By describe()'s way: sums of (1, f)^T (1, f)."""
    f = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    return evaluate.moments(sum(part.T @ part for part in np.array_split(f, 7)))

def test_moments_are_the_moments():
    x = features(500, 20) * 3 + 100
    mu, sigma = moments(x)
    assert np.allclose(mu, x.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(x, rowvar=False), atol=1e-8)
    with pytest.raises(ValueError, match="1 pictures are too few"):
        evaluate.describe(np.zeros((1, 4, 4, 3), np.uint8), None, "cpu", 7, "pictures")

def test_frechet_distance_closed_forms():
    mu, sigma = moments(features(300, 12))
    assert evaluate.frechet_distance(mu, sigma, mu, sigma) < 1e-9
    assert evaluate.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(4 * 12)
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert evaluate.frechet_distance(np.zeros(3), a, np.zeros(3), b) == pytest.approx(1 + 0 + 4)       # sum of (std1 - std2)^2
    assert evaluate.frechet_distance(np.zeros(3), a.astype(np.float32), np.zeros(3), b.astype(int)) == pytest.approx(5)       # other tools' files
    assert evaluate.frechet_distance(np.zeros(300), np.eye(300) * 300, np.zeros(300), np.eye(300, dtype=np.float16) * 300) < 1e-6      # its trace is beyond float16
    s1, s2 = moments(features(40, 6, 1))[1], moments(features(40, 6, 2))[1]
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()                              # the general definition, not symmetric
    assert evaluate.frechet_distance(np.zeros(6), s1, np.zeros(6), s2) == pytest.approx(np.trace(s1 + s2) - 2 * roots)
    thin = moments(features(5, 30))[1]                    # singular: 5 images, 30 numbers
    assert evaluate.frechet_distance(np.zeros(30), thin, np.ones(30), thin) == pytest.approx(30)
    assert np.isfinite(evaluate.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.zeros(3), a))

def test_inception_score_by_definition():
    logits = features(103, 5) * 2
    order, scores = np.random.RandomState(2020).permutation(103), []
    for i in range(10):
        part = [np.exp(row) / np.exp(row).sum() for row in logits[order][i * 103 // 10:(i + 1) * 103 // 10]]
        marginal = np.mean(part, axis=0)
        scores.append(np.exp(np.mean([sum(p * np.log(p / q) for p, q in zip(row, marginal)) for row in part])))
    assert evaluate.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))
    assert evaluate.inception_score(np.zeros((100, 4)))[0] == pytest.approx(1)
    certain = np.eye(4)[np.arange(4000) % 4] * 100
    assert evaluate.inception_score(certain)[0] == pytest.approx(4, rel=1e-2)
    with pytest.raises(ValueError, match="needs 10 images"):
        evaluate.inception_score(np.zeros((9, 4)))

def test_kernel_distance_by_definition():
    a, b = features(30, 4), features(25, 4, 1, 0.5)
    random, scores = np.random.RandomState(2020), []
    for _ in range(3):
        x, y = a[random.choice(30, 10, replace=False)], b[random.choice(25, 10, replace=False)]
        k = lambda u, v: (u @ v / 4 + 1)**3
        scores.append(sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(10) for j in range(10) if i != j) / 90 - 2 * sum(k(u, v) for u in x for v in y) / 100)
    assert evaluate.kernel_distance(a, b, 3, 10) == pytest.approx((np.mean(scores), np.std(scores)))
    with pytest.raises(ValueError, match="subsets of 1000"):
        evaluate.kernel_distance(a, b)
    assert np.isfinite(evaluate.kernel_distance(a[:10], b[:10], 3, 10)).all()              # a subset may be the whole side
    single = [x.astype(np.float32) for x in (a, b)]       # is reckoned in double precision
    assert evaluate.kernel_distance(*single, 3, 10) == evaluate.kernel_distance(*(x.astype(float) for x in single), 3, 10)

def test_precision_and_recall_by_definition():
    a, b = features(60, 3), features(50, 3, 1, 0.7)
    radius = lambda x: [sorted(np.linalg.norm(x - p, axis=1))[3] for p in x]
    inside = lambda p, x, r: any(np.linalg.norm(p - q) <= s for q, s in zip(x, r))
    expected = np.mean([inside(p, b, radius(b)) for p in a]), np.mean([inside(p, a, radius(a)) for p in b])
    assert (evaluate.share_inside(a, b, block=7), evaluate.share_inside(b, a, block=7)) == pytest.approx(expected)
    assert evaluate.share_inside(a, a) == 1 and evaluate.share_inside(a, a + 100) == evaluate.share_inside(a + 100, a) == 0

def test_tf1_resize_by_definition():
    x = torch.rand(1, 2, 5, 7)
    out = evaluate.resize_tf1(x, 11)
    for i in range(11):
        for j in range(11):
            y, z = i * 5 / 11, j * 7 / 11
            y0, z0 = int(y), int(z)
            y1, z1, fy, fz = min(y0 + 1, 4), min(z0 + 1, 6), y - int(y), z - int(z)
            expected = (x[0, :, y0, z0] * (1 - fy) + x[0, :, y1, z0] * fy) * (1 - fz) + (x[0, :, y0, z1] * (1 - fy) + x[0, :, y1, z1] * fy) * fz
            assert torch.allclose(out[0, :, i, j], expected, atol=1e-5)

# ---- Inception-v3: a functional rewrite that only knows the names of the weights -------------------------------------
def functional_inception(sd, images):
    """The original FID's network from a state dict, one line per block."""
    x = (evaluate.resize_tf1(images.permute(0, 3, 1, 2).float(), 299) - 128) / 128

    def c(x, name, stride=1, padding=0):
        bn = f"{name}.bn."
        x = F.conv2d(x, sd[f"{name}.conv.weight"], stride=stride, padding=padding)
        scale = sd[bn + "weight"] / (sd[bn + "running_var"] + 1e-3).sqrt()
        return (x * scale.view(1, -1, 1, 1) + (sd[bn + "bias"] - sd[bn + "running_mean"] * scale).view(1, -1, 1, 1)).clamp_min(0)

    def average(x):                                       # 3x3 mean over the pixels inside the picture
        ones = F.conv2d(torch.ones_like(x[:1, :1]), torch.ones(1, 1, 3, 3), padding=1)
        return F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]) / ones
    x = c(c(c(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = c(c(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        d = c(c(c(x, n + ".branch3x3dbl_1"), n + ".branch3x3dbl_2", 1, 1), n + ".branch3x3dbl_3", 1, 1)
        x = torch.cat([c(x, n + ".branch1x1"), c(c(x, n + ".branch5x5_1"), n + ".branch5x5_2", 1, 2), d, c(average(x), n + ".branch_pool")], 1)
    n = "Mixed_6a"
    x = torch.cat([c(x, n + ".branch3x3", 2), c(c(c(x, n + ".branch3x3dbl_1"), n + ".branch3x3dbl_2", 1, 1), n + ".branch3x3dbl_3", 2), F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = c(x, n + ".branch1x1")
        if n == "Mixed_6d":
            spatial = one[:, :7]
        s = c(c(c(x, n + ".branch7x7_1"), n + ".branch7x7_2", 1, (0, 3)), n + ".branch7x7_3", 1, (3, 0))
        d = c(x, n + ".branch7x7dbl_1")
        for i, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            d = c(d, f"{n}.branch7x7dbl_{i}", 1, pad)
        x = torch.cat([one, s, d, c(average(x), n + ".branch_pool")], 1)
    n = "Mixed_7a"
    s = c(c(c(c(x, n + ".branch7x7x3_1"), n + ".branch7x7x3_2", 1, (0, 3)), n + ".branch7x7x3_3", 1, (3, 0)), n + ".branch7x7x3_4", 2)
    x = torch.cat([c(c(x, n + ".branch3x3_1"), n + ".branch3x3_2", 2), s, F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_7b", "Mixed_7c"):
        s, d = c(x, n + ".branch3x3_1"), c(c(x, n + ".branch3x3dbl_1"), n + ".branch3x3dbl_2", 1, 1)
        pool = average(x) if n == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([c(x, n + ".branch1x1"), c(s, n + ".branch3x3_2a", 1, (0, 1)), c(s, n + ".branch3x3_2b", 1, (1, 0)), c(d, n + ".branch3x3dbl_3a", 1, (0, 1)),
                       c(d, n + ".branch3x3dbl_3b", 1, (1, 0)), c(pool, n + ".branch_pool")], 1)
    features = x.mean((2, 3))
    return features, spatial.permute(0, 2, 3, 1).reshape(len(x), -1), features @ sd["fc.weight"].T

def layers():
    """Name and shape of every convolution of torchvision's Inception-v3: "width kernel" chains, a fork after a bar."""
    a = lambda pool: {"branch1x1": "64 1x1", "branch5x5": "48 1x1, 64 5x5", "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3", "branch_pool": f"{pool} 1x1"}
    c = lambda n: {"branch1x1": "192 1x1", "branch7x7": f"{n} 1x1, {n} 1x7, 192 7x1", "branch7x7dbl": f"{n} 1x1, {n} 7x1, {n} 1x7, {n} 7x1, 192 1x7", "branch_pool": "192 1x1"}
    e = {"branch1x1": "320 1x1", "branch3x3": "384 1x1, 384 1x3 | 384 3x1", "branch3x3dbl": "448 1x1, 384 3x3, 384 1x3 | 384 3x1", "branch_pool": "192 1x1"}
    blocks = {"5b": (192, a(32)), "5c": (256, a(64)), "5d": (288, a(64)), "6a": (288, {"branch3x3": "384 3x3", "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3"}), "6b": (768, c(128)), "6c": (768, c(160)),
              "6d": (768, c(160)), "6e": (768, c(192)), "7a": (768, {"branch3x3": "192 1x1, 320 3x3", "branch7x7x3": "192 1x1, 192 1x7, 192 7x1, 192 3x3"}), "7b": (1280, e), "7c": (2048, e)}
    yield from {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3), "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3)}.items()
    for block, (width, branches) in blocks.items():
        for branch, chain in branches.items():
            cin, steps = width, chain.split(",")
            for i, step in enumerate(steps, 1):
                for side, text in zip("ab" if "|" in step else [""], step.split("|")):
                    out, kernel = text.split()
                    yield f"Mixed_{block}.{branch}" + (f"_{i}{side}" if len(steps) > 1 else ""), (int(out), cin, *map(int, kernel.split("x")))
                cin = int(out)

@pytest.fixture(scope="module")
def inception():
    generator, state = torch.Generator().manual_seed(0), {"fc.weight": torch.randn(1008, 2048) * 0.02, "fc.bias": torch.randn(1008)}     # the bias must not be used
    draw = lambda n, mean, spread: mean + spread * (torch.rand(n, generator=generator) - 0.5)
    for name, shape in layers():
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:]))**0.5
        state |= {f"{name}.bn.weight": draw(shape[0], 1.2, 0.8), f"{name}.bn.bias": draw(shape[0], 0, 0.3), f"{name}.bn.running_mean": draw(shape[0], 0, 0.3), f"{name}.bn.running_var": draw(shape[0], 1, 1)}
    assert len(state) == 94 * 5 + 2
    return state

def test_inception_agrees_with_rewrite(inception):
    with torch.no_grad():
        images = torch.from_numpy(images_of(2, 40))
        out, expected = evaluate.Inception(inception)(images), functional_inception(inception, images)
    for name, value in zip(("features", "spatial", "logits"), expected):
        assert (out[name] - value).abs().max() < 1e-4 * value.abs().max() and value.std() > 0, name
    assert out["features"].shape == (2, 2048) and out["spatial"].shape == (2, 2023) and out["logits"].shape == (2, 1008)

def test_inception_weights_file(there, inception, capsys):
    torch.save(inception, "mine.pth")
    net, name, digest = evaluate.load_inception(Path("mine.pth"))
    assert name.startswith("FD (mine.pth") and "mine.pth is not the published weights file; the scores are named after it" in capsys.readouterr().err
    assert digest == hashlib.sha256(Path("mine.pth").read_bytes()).hexdigest()[:8] and name == f"FD (mine.pth {digest})"
    state = dict(inception)
    del state["Mixed_6c.branch_pool.bn.running_var"]
    torch.save(state, "less.pth")
    with pytest.raises(ValueError, match="Mixed_6c branch_pool bn running_var"):
        evaluate.load_inception(Path("less.pth"))
    Path("text.pth").write_text("hello")
    with pytest.raises(ValueError, match="text.pth"):
        evaluate.load_inception(Path("text.pth"))

def test_scores_with_inception_end_to_end(work, inception, capsys, monkeypatch):
    """A folder against an npz; statistics written here and read back give the same distance.

    Scaled to 75 pixels, the least it takes, and of the features only the first 200, for speed.
    """
    monkeypatch.setattr(evaluate, "resize_tf1", lambda x, size, resize=evaluate.resize_tf1: resize(x, 75))
    known, describe = {}, evaluate.describe               # each set goes through the network once

    def once(images, *more):
        key = images[np.arange(len(images))].tobytes()
        if key not in known:
            known[key] = {name: value[(slice(200),) * value.ndim] if name != "n" else value for name, value in describe(images, *more).items()}
        return dict(known[key])
    monkeypatch.setattr(evaluate, "describe", once)
    torch.save(inception, "mine.pth")
    Path("pngs").mkdir()
    for i, image in enumerate(images_of(30, 24)):
        Image.fromarray(image).save(f"pngs/{i:02d}.png")
    np.savez("real.npz", arr_0=images_of(32, 24, 5))
    flags = ["--samples", "pngs", "--features", "inception", "--inception-weights", "mine.pth", "--batch-size", 5]
    assert call(evaluate, *flags, "--reference", "real.npz") == 0 and not Path("runs/x/metrics.json").exists()     # a foreign set: beside it
    first = json.loads(Path("pngs-metrics.json").read_text())
    assert first["n_generated"] == 30 and first["n_real"] == 32 and {"fd", "sfd", "is", "precision", "recall"} <= first.keys() and "kid" not in first
    assert first["left_out"] == {"kid": "KID draws subsets of 1000 images, one side has 30"}
    with torch.no_grad():
        real = evaluate.describe(np.load("real.npz")["arr_0"], evaluate.Inception(inception), torch.device("cpu"), 5, "")
    np.savez("stats.npz", **{k: real[k] for k in ("mu", "sigma", "mu_s", "sigma_s", "n")})
    assert call(evaluate, *flags, "--reference", "stats.npz", "--out", "again.json") == 0
    again = json.loads(Path("again.json").read_text())
    assert again["fd"] == pytest.approx(first["fd"], rel=1e-4) and again["sfd"] == pytest.approx(first["sfd"], rel=1e-4) and "precision" not in again and again["left_out"]["precision"] == "the reference has no features"
    assert call(evaluate, *flags, "--reference", "./pngs", "--out", "self.json") == 0
    own = json.loads(Path("self.json").read_text())
    assert own["fd"] < 1e-3 * first["fd"] and own["precision"] == own["recall"] == 1

# ---- The offline score, the sweep, and what is refused ---------------------------------------------------------------
@pytest.fixture
def scored(work):
    """A tiny run with samples."""
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0 and call(sample, "--num", 30, "--steps", 2, "--amp", "off") == 0
    return work

def test_offline_score(scored, capsys):
    assert call(evaluate) == 0
    result, out = json.loads(Path("runs/shapes/metrics.json").read_text()), capsys.readouterr()
    assert result["left_out"] == {"kid": "KID draws subsets of 1000 images, one side has 30", "is": "it needs --features inception", "sfd": "it needs --features inception"}
    assert "kid                                left out   (KID draws subsets of 1000 images, one side has 30)" in out.out
    assert result["score"] == "FD (classifier features)" and result["fd_floor"] < result["fd"] and result["n_generated"] == result["n_floor"] == 30
    assert 0 <= result["class_accuracy"] <= 1 and result["class_accuracy_real"] > 0.3 and result["sampling"]["steps"] == 2 and result["sampling"]["weights"]
    assert "FID" not in out.out and "30 images are few" in out.err and out.out.endswith("and how the samples were made; training step 4\n")
    first = Path("runs/shapes/metrics.json").read_text()
    assert call(evaluate) == 0 and Path("runs/shapes/metrics.json").read_text() == first                    # computed again, and the same
    Image.new("RGB", (16, 16)).save("runs/shapes/samples/0000003.png")
    assert call(evaluate) == 0 and json.loads(Path("runs/shapes/metrics.json").read_text())["fd"] != result["fd"]
    assert call(sample, "--num", 30, "--steps", 3, "--amp", "off", "--overwrite") == 0
    capsys.readouterr()
    assert call(data, "--size", 24, "--count", 100, "--workers", 1, "--out", "other", "--name", "d") == 0
    assert call(evaluate, "--reference", "other/d", "--out", "x.json") == 1 and "the right --reference" in capsys.readouterr().err
    Path("mine.json").write_text('{"my": "results"}')
    assert call(evaluate, "--out", "mine.json") == 1 and Path("mine.json").read_text() == '{"my": "results"}' and "mine.json" in capsys.readouterr().err
    classifier, = Path("data/shapes").glob("classifier-*.npz")
    meta = json.loads(Path("data/shapes/meta.json").read_text())
    assert classifier.stem == f"classifier-{meta['id'][:8]}.10"
    for cache in Path("data/shapes").glob("statistics-*.npz"):
        cache.write_bytes(cache.read_bytes()[:3000])                                                              # cut off: made again
    assert call(evaluate) == 0 and "is damaged, or of another version; making it again" in capsys.readouterr().err
    classifier.write_bytes(b"damaged")
    assert call(evaluate) == 0 and f"{classifier} is damaged, or of another version; making it again" in capsys.readouterr().err
    statistics, = Path("data/shapes").glob("statistics-*.npz")
    for cache in (statistics, classifier):                                                                        # good files, of something else
        np.savez(cache, mu=np.zeros(3))
        assert call(evaluate) == 0 and f"{cache} is damaged, or of another version" in capsys.readouterr().err
    state = dict(np.load(classifier))
    state["head.bias"] += 1                               # another classifier has statistics of its own
    text = str(state.pop("told"))
    state["told"] = text[:-8] + model.fingerprint(state)
    np.savez(classifier, **state)
    capsys.readouterr()
    before = len(list(Path("data/shapes").glob("statistics-*.npz")))
    assert call(evaluate) == 0 and len(list(Path("data/shapes").glob("statistics-*.npz"))) == before + 1

@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_parts_of_a_set_hold_every_class(monkeypatch, order):
    """Packed folders lie sorted by class (the first thousand of CIFAR-10 are aeroplanes), shapes go round the classes in turn."""
    torch.manual_seed(0)
    colours = np.arange(4, dtype=np.uint8) * 60
    colours = np.repeat(colours, 30) if order == "sorted" else np.tile(colours, 30)
    images = np.broadcast_to(colours[:, None, None, None], (120, 4, 4, 3))

    def net(images):
        return {"features": images.float().mean(dim=(1, 2)) + torch.rand(len(images), 3), "logits": images[:, 0, 0].float()}
    monkeypatch.setattr(evaluate, "KEPT", 40)
    whole = evaluate.describe(images, net, "cpu", 7, "")
    assert whole["n"] == len(whole["seen"]) == 120 and np.unique(whole["features"][:, 0] // 60).tolist() == [0, 1, 2, 3] and len(whole["features"]) == 40
    monkeypatch.setattr(evaluate, "NEIGHBOURS", 30)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "share_inside", lambda x, y: seen.append((len(x), np.unique(y[:, 0] // 60).tolist(), len(y))) or 0.5)
        evaluate.compare(whole, whole, ["precision", "recall"], False)
    assert seen == [(40, [0, 1, 2, 3], 30), (30, [0, 1, 2, 3], 40)]            # of the real ones 30, of every class
    part = evaluate.describe(images, net, "cpu", 7, "", evaluate.random_subset(12, 120))
    assert part["n"] == 12 and np.unique(part["features"][:, 0] // 60).tolist() == [0, 1, 2, 3]

def test_scores_of_nothing_are_left_out(work, capsys):
    """Thirty grey squares recall nothing; a held-out set of nothing has no accuracy; a poor classifier is no judge."""
    np.savez("grey.npz", arr_0=np.full((30, 16, 16, 3), 128, np.uint8))
    assert call(evaluate, "--samples", "grey.npz", "--reference", "data/shapes") == 0
    result = json.loads(Path("grey.npz-metrics.json").read_text())
    assert result["recall"] == 0 and "FD (classifier features)" in capsys.readouterr().out
    result["class_accuracy_real"] = 0.2
    evaluate.report(result)
    assert "right on 0.2 of held-out real images" in capsys.readouterr().err
    shutil.copytree("data/shapes", "d")
    meta = json.loads(Path("d/meta.json").read_text())
    Path("d/meta.json").write_text(json.dumps({**meta, "counts": {**meta["counts"], "val": 0}}))
    np.save("d/val_images.npy", np.zeros((0, 16, 16, 3), np.uint8)), np.save("d/val_labels.npy", np.zeros(0, np.int64))
    assert call(evaluate, "--samples", "grey.npz", "--reference", "./d", "--out", "g.json") == 0
    assert "class_accuracy_real" not in json.loads(Path("g.json").read_text()) and "right on no share of held-out" in capsys.readouterr().err
    assert call(evaluate, "--samples", "grey.npz", "--reference", "./d", "--split", "val") == 1 and "0 real images are too few" in capsys.readouterr().err

def test_a_score_of_the_packed_samples_is_no_foreign_file(scored):
    again = ["--num", 30, "--steps", 2, "--amp", "off", "--npz"]
    assert call(sample, *again) == 0 and call(evaluate, "--samples", "runs/shapes/samples/samples.npz", "--reference", "shapes", "--metrics", "fd") == 0
    assert call(sample, *again) == 0 == call(sample, *again, "--overwrite")

def test_samples_made_anew_while_they_are_scored_have_no_score(scored, monkeypatch, capsys):
    """As by 04_sample.py --overwrite: half of the images would be the old ones, half the new ones."""
    def score(*given, real=evaluate.score):
        assert call(sample, "--num", 30, "--steps", 3, "--amp", "off", "--overwrite") == 0
        return real(*given)
    opened, real = [], evaluate.read_npz
    monkeypatch.setattr(evaluate, "read_npz", lambda path: opened.append(path) or real(path))
    np.savez("few.npz", arr_0=images_of(9))               # has no record, and is not read again
    assert call(evaluate, "--samples", "few.npz", "--reference", "shapes", "--metrics", "fd") == 0 and len(opened) == 1
    monkeypatch.setattr(evaluate, "score", score)
    assert call(evaluate, "--metrics", "fd") == 1 and "samples was made anew in the meantime" in capsys.readouterr().err and not Path("runs/shapes/metrics.json").exists()

def test_the_result_lies_beside_the_samples_also_from_within(scored, monkeypatch):
    monkeypatch.chdir("runs/shapes/samples")
    assert call(evaluate, "--samples", ".", "--reference", "../../../data/shapes", "--metrics", "fd") == 0
    assert Path("../samples-metrics.json").exists() and not list(Path(".").glob("*metrics*"))

def test_a_score_written_a_second_time(scored):
    """From pictures to numbers, by numpy: FD against either split, floor, accuracies, precision and recall."""
    assert call(evaluate) == 0 and call(evaluate, "--split", "val", "--out", "val.json") == 0
    result, on_val = (json.loads(Path(path).read_text()) for path in ("runs/shapes/metrics.json", "val.json"))
    meta, arrays = data.open_data("data/shapes")
    net, _, digest = evaluate.load_classifier("data/shapes", torch.device("cpu"))
    pictures = np.stack([np.array(Image.open(path)) for path in sorted(Path("runs/shapes/samples").glob("*.png"))])
    with torch.no_grad():
        seen = {name: {key: value.double().numpy() for key, value in net(torch.from_numpy(np.array(images))).items()}
                for name, images in (("fake", pictures), ("train", arrays["train"][0]), ("val", arrays["val"][0]))}
    f = {name: out["features"] for name, out in seen.items()}

    def distance(a, b):
        root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real.sum()
        return ((a.mean(0) - b.mean(0))**2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root

    def inside(x, y):
        between = lambda a, b: np.sqrt(((a[:, None] - b[None])**2).sum(-1))
        radii = np.sort(between(y, y), axis=1)[:, 3]
        return (between(x, y) <= radii).any(1).mean()
    floor = np.random.default_rng(0).permutation(100)[:30]
    right = lambda name, labels: (seen[name]["logits"].argmax(1) == labels)
    expected = {"fd": distance(f["fake"], f["train"]), "fd_floor": distance(f["val"][floor], f["train"]), "precision": inside(f["fake"], f["train"]),
                "recall": inside(f["train"], f["fake"]), "class_accuracy": right("fake", np.arange(30) % 10).mean(),
                "class_accuracy_real": right("val", arrays["val"][1])[floor].mean(), "n_generated": 30, "n_real": 200, "n_floor": 30}
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-3) and result["weights"] == digest
    assert on_val["fd"] == pytest.approx(distance(f["fake"], f["val"]), rel=1e-3) and on_val["n_real"] == 100 and "fd_floor" not in on_val
    assert on_val["class_accuracy_real"] == result["class_accuracy_real"] and result["reference_id"] == on_val["reference_id"] == meta["id"]

def test_the_scores_are_asked_of_the_right_numbers():
    """The Inception score of logits, moments in fp64 also far from zero."""
    rng = np.random.default_rng(0)
    side = {"features": rng.normal(size=(60, 4)), "logits": rng.normal(size=(60, 7)), "mu": np.zeros(4), "sigma": np.eye(4)}
    scores, left_out = evaluate.compare(side, side, ["is", "fd"], True)
    assert scores["is"] == evaluate.inception_score(side["logits"])[0] and scores["is_std"] > 0 and scores["fd"] < 1e-9 and not left_out
    images = rng.integers(0, 256, (500, 2, 2, 3), dtype=np.uint8)
    net = lambda x: {"features": 3e4 + x.float().flatten(1) / 255, "logits": x.float().flatten(1)}
    found = evaluate.describe(images, net, torch.device("cpu"), 64, "x")
    assert np.allclose(found["sigma"], np.cov((images.reshape(500, -1) / 255).T), rtol=0.05, atol=2e-3) and found["n"] == 500

def test_the_classifiers_training(monkeypatch):
    """Steps by size and number of images, a rate that warms up and falls to zero, AdamW's decay, the same weights whatever came before."""
    rates, made = [], []

    class Spy(torch.optim.AdamW):
        def __init__(self, parameters, **more):
            made.append(more)
            super().__init__(parameters, **more)

        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    images, labels = images_of(200), np.arange(200) % 10
    first = evaluate.train_classifier(images, labels, 10, torch.device("cpu")).state_dict()
    torch.manual_seed(99)
    again = evaluate.train_classifier(images, labels, 10, torch.device("cpu")).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first) and made[0] == {"lr": 2e-3, "weight_decay": 0.05}
    steps = 30 * 200 // 128
    assert rates[:steps] == pytest.approx([2e-3 * min(1, (i + 1) / 50) * (1 - i / steps) for i in range(steps)]) and len(rates) == 2 * steps

    class Enough(Exception):
        pass
    asked = []
    monkeypatch.setattr(data, "Progress", lambda total, *more: asked.append(total) or (_ for _ in ()).throw(Enough))
    for size, n in ((64, 20_000), (32, 50_000), (256, 9_469)):
        with pytest.raises(Enough):
            evaluate.train_classifier(np.empty((0, size, size, 3)), np.empty(n), 10, torch.device("cpu"))
    assert asked == [40_000 // 128, 160_000 // 128, 40_000 // 128]

def test_a_curve_runs_over_the_settings_in_order(there, monkeypatch):
    """Whatever the order of the files; and another reference is refused, also one of the same size."""
    curves, record = [], {"score": "FD", "n_real": 9, "n_generated": 9, "reference_id": "a", "sampling": {"cfg": 1.0}}
    monkeypatch.setattr(evaluate.model, "chart", lambda title, label, lines: curves.append((label, lines["score"])) or Image.new("RGB", (9, 9)))
    for w, fd in ((3.0, 9.0), (1.0, 5.0), (2.0, 4)):       # a whole number, as an editor may leave it, counts too
        Path(f"{9 - w}.json").write_text(json.dumps({**record, "fd": fd, "sampling": {"cfg": w}}))
    assert call(evaluate, "--table", "6.0.json", "8.0.json", "7.0.json", "--out", "c.png") == 0
    assert curves == [("cfg", [(1.0, 5.0), (2.0, 4.0), (3.0, 9.0)])] and Path("c.png").exists()
    Path("kid.json").write_text(json.dumps({**record, "kid": 1.0}))            # a result without fd has no place on the curve
    assert call(evaluate, "--table", "6.0.json", "kid.json", "8.0.json", "--out", "c.png") == 0 and len(curves[-1][1]) == 2
    Path("other.json").write_text(json.dumps({**record, "fd": 1.0, "reference_id": "b"}))
    assert call(evaluate, "--table", "6.0.json", "other.json") == 2

def test_labels_of_other_classes_are_not_judged(scored):
    record = json.loads(Path("runs/shapes/samples/samples.json").read_text())
    Path("runs/shapes/samples/samples.json").write_text(json.dumps({**record, "classes": record["classes"][::-1]}))
    assert call(evaluate, "--metrics", "fd") == 0 and (scores := json.loads(Path("runs/shapes/metrics.json").read_text())) and "class_accuracy" not in scores and scores["left_out"] == {"class_accuracy": "the samples have no labels, or of other classes"}

def test_a_data_set_packed_again_is_said(scored, capsys):
    shutil.copytree("data/shapes", "mine")
    Path("data").unlink(), Path("data").mkdir(), Path("mine").rename("data/shapes")
    assert call(data, "--size", 16, "--count", 200, "--workers", 1, "--overwrite") == 0
    assert call(evaluate) == 1 and "was packed anew since the network of runs/shapes/samples was trained, or its samples.json does not say of which it is: pass --reference 'shapes' to compare" in capsys.readouterr().err
    assert call(evaluate, "--reference", "shapes") == 0                                # as the line says

def test_unlabelled_data_cannot_be_judged_offline(there, capsys):
    (there / "in").mkdir()
    for i, image in enumerate(images_of(20)):
        Image.fromarray(image).save(f"in/{i}.png")
    assert call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "u", "--workers", 1) == 0
    assert call(evaluate, "--samples", "in", "--reference", "data/u") == 1
    error = capsys.readouterr().err
    assert "use --features inception, or pack class folders" in error and error.count("\n") == 1

def test_table_of_results(scored, capsys):
    files = []
    for w in (3, 1, 2):
        assert call(sample, "--num", 30, "--steps", 2, "--amp", "off", "--cfg", w, "--out", f"w{w}") == 0 and call(evaluate, "--samples", f"w{w}") == 0
        files.append(f"w{w}-metrics.json")
    capsys.readouterr()
    assert call(evaluate, "--table", *files, "--out", "curve.png") == 0
    out = capsys.readouterr().out
    assert out.startswith("file | cfg | n_generated | fd | sfd | is | kid | precision | recall | class_accuracy\nw3-metrics.json | 3 | 30 | ") and Image.open("curve.png").width > 100
    first = Path("curve.png").read_bytes()
    assert call(evaluate, "--table", *files, "--out", "curve.png") == 0 and Path("curve.png").read_bytes() == first       # our own is replaced
    for few in (files[:1], ["kid1.json", "kid3.json"]):
        for w in (1, 3):
            record = json.loads(Path(f"w{w}-metrics.json").read_text())
            Path(f"kid{w}.json").write_text(json.dumps({name: value for name, value in record.items() if name != "fd"}))
        assert call(evaluate, "--table", *few, "--out", "none.png") == 2 and "no number to draw fd over" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save("curve.png")
    foreign = Path("curve.png").read_bytes()
    assert call(evaluate, "--table", *files, "--out", "curve.png") == 1 and "not drawn by these scripts" in capsys.readouterr().err and Path("curve.png").read_bytes() == foreign
    Path("other.json").write_text("[]")
    assert call(evaluate, "--table", *files, "other.json") == 1 and "other.json is damaged" in capsys.readouterr().err

def bad_sets():
    Path("mixed").mkdir()
    Image.new("RGB", (16, 16)).save("mixed/a.png"), Image.new("RGB", (17, 16)).save("mixed/b.png")
    for name, text in (("list", "[]"), ("nolabels", "{}"), ("cutjson", "{")):
        Path(name).mkdir()
        Image.new("RGB", (8, 8)).save(f"{name}/a.png"), Path(f"{name}/samples.json").write_text(text)
    Path("void").mkdir()
    np.savez("float.npz", arr_0=np.zeros((3, 8, 8, 3), np.float32))
    np.savez("nothing.npz", other=np.zeros(3))
    np.savez("none.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez("small.npz", mu=np.zeros(64), sigma=np.eye(64)), np.savez("mean.npz", mu=np.zeros(8))
    np.savez("pickled.npz", arr_0=np.array([{}], dtype=object))
    np.savez("few.npz", arr_0=images_of(9, 16)), np.savez("grey.npz", arr_0=images_of(9, 16)[..., :1]), np.savez("minus.npz", arr_0=images_of(9, 16), arr_1=np.arange(9) - 1)
    np.savez("onehot.npz", arr_0=images_of(9, 16), arr_1=np.eye(9))
    np.savez("wide.npz", arr_0=np.zeros((9, 16, 40, 3), np.uint8)), np.save("a.npy", np.zeros(3))
    np.savez("square.npz", mu=np.zeros((8, 8)), sigma=np.eye(8))
    np.savez("one_far.npz", arr_0=images_of(9, 16), arr_1=np.arange(9) // 8 * 10)
    np.savez("far.npz", arr_0=images_of(9, 16), arr_1=np.full(9, 77)), np.savez("far8.npz", arr_0=images_of(9, 16), arr_1=np.full(9, 77, np.uint8)), np.savez("big.npz", arr_0=images_of(9, 32))
    np.savez("nan.npz", mu=np.full(8, np.nan), sigma=np.eye(8)), np.savez("odd.npz", mu=np.zeros(8), sigma=np.eye(3))
    np.savez("short.npz", arr_0=images_of(9, 16), arr_1=np.arange(8))
    Path("broken.npz").write_bytes(b"PK broken")
    Path("cut.npz").write_bytes(Path("few.npz").read_bytes()[:-500])

@pytest.mark.parametrize("flags,words,code", [
    (["--samples", "mixed"], "must have one size", 1), (["--samples", "void"], "no images at void", 1), (["--samples", "float.npz"], "float.npz: arr_0 is float32 (3, 8, 8, 3); it must be uint8 (N,H,W,3)", 1), (["--samples", "nothing.npz"], "holds no images (arr_0), or of statistics", 1),
    (["--samples", "none.npz"], "must be uint8", 1), (["--samples", "onehot.npz"], "one class id per image", 1), (["--samples", "short.npz"], "one class id per image", 1), (["--samples", "cut.npz"], "npz cannot be used: ", 1),
    (["--samples", "list"], "samples.json is damaged", 1), (["--samples", "nolabels"], "labels is not of the type list", 1), (["--samples", "cutjson"], "samples.json is damaged", 1), (["--samples", "far.npz"], "labels outside 0..9", 1), (["--samples", "far8.npz"], "labels outside 0..9", 1), (["--samples", "one_far.npz"], "labels outside 0..9", 1), (["--samples", "big.npz"], "the right --reference", 1),
    (["--samples", "few.npz", "--reference", "nan.npz", "--features", "inception", "--inception-weights", "gone.pth"], "all of them finite", 1), (["--samples", "few.npz", "--reference", "odd.npz", "--features", "inception", "--inception-weights", "gone.pth"], "all of them finite", 1),
    (["--samples", "few.npz", "--reference", "square.npz", "--features", "inception", "--inception-weights", "gone.pth"], "mu is float64 (8, 8)", 1),
    (["--samples", "few.npz", "--reference", "small.npz"], "is not a packed data set", 1), (["--samples", "small.npz"], "statistics only", 1), (["--device", "gpu"], "give cuda or cpu", 2),
    (["--samples", "pickled.npz"], "npz cannot be used: ", 1), (["--samples", "broken.npz"], "npz cannot be used: ", 1), (["--samples", "few.npz", "--reference", ""], "an argument is empty", 2),
    (["--samples", "wide.npz"], "images of 16 x 40 pixels", 1), (["--samples", "a.npy"], "no images at a.npy", 1),
    (["--samples", "nowhere"], "no images at nowhere", 1), (["--metrics", "psnr"], "unknown", 2), (["--features", "clip"], "is unknown", 2), (["--metrics", "fd,class_accuracy"], "is unknown", 2), (["--samples", "few.npz", "--reference", "mean.npz"], "holds no images (arr_0), or of statistics", 1), (["--split", "test"], "is unknown", 2),
    (["--samples", "grey.npz"], "must be uint8", 1), (["--samples", "minus.npz"], "labels outside 0..9", 1), (["--run", "nope"], "no images at runs/nope/samples: make samples (python 04_sample.py) or data first", 1), (["--table", "gone.json"], "gone.json", 1),
    (["--features", "inception", "--inception-weights", "gone.pth", "--samples", "few.npz", "--reference", "few.npz"], "gone.pth", 1)])
def test_wrong_sets(work, capsys, flags, words, code):
    bad_sets()
    reference = [] if "--reference" in flags or code == 2 else ["--reference", "data/shapes"]
    assert call(evaluate, *flags, *reference) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len([line for line in error.strip().splitlines() if "error" in line]) == 1

def test_the_n_of_statistics_is_not_that_of_the_images_beside_them(there):
    """ADM's reference files: mu and sigma of the whole data set, 10,000 images for precision and recall, and no n."""
    np.savez("r.npz", arr_0=images_of(30), mu=np.zeros(3), sigma=np.eye(3))
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    real = evaluate.describe_reference(evaluate.ImageSet("r.npz"), net, "d", torch.device("cpu"), 7)
    assert real["n"] == 0 and len(real["features"]) == 30 and (real["mu"] == 0).all()

def test_statistics_of_another_feature_size(work, inception, capsys):
    bad_sets()
    torch.save(inception, "mine.pth")
    assert call(evaluate, "--samples", "few.npz", "--reference", "small.npz", "--features", "inception", "--inception-weights", "mine.pth", "--out", "x.json") == 1
    assert "features of 64 numbers, the samples of 2048" in capsys.readouterr().err

def test_statistics_are_cached_by_weights_and_data(work):
    real, nets = evaluate.ImageSet("data/shapes"), [lambda x, k=k: {"features": x.float().mean(dim=(1, 2)) * k, "logits": x[:, 0, 0].float()} for k in (1, 2)]
    first, same, other = (evaluate.describe_reference(real, nets[k], digest, "cpu", 50) for k, digest in ((0, "a"), (1, "a"), (1, "b")))
    assert np.array_equal(first["mu"], same["mu"]) and np.allclose(other["mu"], 2 * first["mu"])
    real.record["id"] = "packed anew"
    assert np.allclose(evaluate.describe_reference(real, nets[1], "a", "cpu", 50)["mu"], 2 * first["mu"])

def test_a_cache_is_that_of_its_name(there, capsys):
    assert evaluate.remembered(Path("val.npz"), lambda: {"a": np.ones(3)})["a"].sum() == 3
    Path("val.npz").rename("train.npz")
    assert evaluate.remembered(Path("train.npz"), lambda: {"a": np.zeros(3)})["a"].sum() == 0 and "train.npz is damaged, or of another version" in capsys.readouterr().err
    assert evaluate.remembered(Path("train.npz"), None)["a"].sum() == 0 and not capsys.readouterr().err

def test_a_set_of_one_image_only_can_be_a_reference(there):
    """Its covariance is rounding, negative at times."""
    folder = Path("in")
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (90, 120, 30)).save(folder / name / f"{i}.png")
    assert call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "same", "--workers", 1) == 0
    np.savez("s.npz", arr_0=images_of(9, 16))
    for _ in range(2):                                    # made, then remembered
        assert call(evaluate, "--samples", "s.npz", "--reference", "same", "--out", "o.json") == 0 and json.loads(Path("o.json").read_text())["fd"] > 0

def test_a_cached_classifier_whose_weights_are_none_is_trained_again(work, capsys):
    evaluate.load_classifier("data/shapes", "cpu")
    [path] = Path("data/shapes").glob("classifier-*")
    weights = dict(np.load(path))
    np.savez(path, **weights | {"head.bias": weights["head.bias"] * np.nan})
    assert evaluate.load_classifier("data/shapes", "cpu")[0].head.bias.isfinite().all() and "is damaged, or of another version" in capsys.readouterr().err

def test_a_classifier_of_other_layers_is_trained_anew(work, monkeypatch, capsys):
    evaluate.load_classifier("data/shapes", "cpu")
    class Wider(evaluate.Classifier):
        def __init__(self, classes):
            super().__init__(classes)
            self.body[9], self.body[11] = torch.nn.AdaptiveAvgPool2d(2), torch.nn.Linear(512, 128)
    monkeypatch.setattr(evaluate, "Classifier", Wider)
    assert evaluate.load_classifier("data/shapes", "cpu")[0].body[11].in_features == 512 and "of another version; making it again" in capsys.readouterr().err
    [path] = Path("data/shapes").glob("classifier-*")
    path.unlink()
    real = evaluate.train_classifier
    def broken(*args):
        net = real(*args)
        net.head.bias.data[0] = float("nan")
        return net
    monkeypatch.setattr(evaluate, "train_classifier", broken)
    with pytest.raises(ValueError, match="weight head.bias holds NaN"):
        evaluate.load_classifier("data/shapes", "cpu")
    path.unlink()

@pytest.mark.parametrize("change", [dict(sigma=-np.eye(3)), dict(features=np.zeros((200, 3), np.float32)), dict(n=np.array(7)), dict(mu="three")])
def test_cached_statistics_that_were_edited_are_made_again(work, change, capsys):
    real, net = evaluate.ImageSet("data/shapes"), lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    first, path = evaluate.describe_reference(real, net, "edited", "cpu", 50), next(Path("data/shapes").glob("statistics-train-edited-*"))
    again = evaluate.describe_reference(real, None, "edited", "cpu", 50)       # read: no network is asked
    assert all(np.array_equal(first[name], again[name]) for name in first) and first.keys() == again.keys() and not capsys.readouterr().err
    np.savez(path, **dict(np.load(path)) | change)
    again = evaluate.describe_reference(real, net, "edited", "cpu", 50)
    assert all(np.array_equal(first[name], again[name]) for name in first) and "edited" in (err := capsys.readouterr().err) and "damaged" in err
    path.unlink()

def test_a_cache_that_cannot_be_written_is_only_said(work, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.np, "savez", lambda *args, **more: (_ for _ in ()).throw(OSError("read-only")))
    for path in Path("data/shapes").glob("classifier-*"):
        path.unlink()
    assert evaluate.load_classifier("data/shapes", "cpu")
    assert ".npz is not kept (read-only)" in capsys.readouterr().err and not list(Path("data/shapes").glob("classifier-*"))

def test_which_side_is_precise():
    """Samples in a corner of the real ones: all precise, little recalled; and the spatial score uses the spatial moments."""
    real, fake = features(300, 2), features(300, 2) * 0.1
    side = lambda x, k: {"features": x, "mu": x.mean(0), "sigma": np.cov(x.T), "mu_s": x.mean(0) + k, "sigma_s": np.cov(x.T)}
    scores, _ = evaluate.compare(side(fake, 0), side(real, 3), ["precision", "recall", "fd", "sfd"], True)
    assert scores["precision"] > 0.9 > 0.5 > scores["recall"] and scores["sfd"] > scores["fd"] + 10

def test_the_classifier_is_mirrored_left_to_right_and_judges_in_eval_mode(work, monkeypatch):
    seen, real = [], evaluate.Classifier.forward
    monkeypatch.setattr(evaluate.Classifier, "forward", lambda self, x: seen.append(x.float().mean(dim=(0, 3))) or real(self, x))
    images = np.zeros((64, 16, 16, 3), np.uint8)
    images[:, :8, :4] = 255
    evaluate.train_classifier(images, np.arange(64) % 2, 2, "cpu")
    assert all(x[:8].mean() > 30 and x[8:].mean() == 0 for x in seen) and len({bool(x[0, 0] > 0) for x in seen}) == 2
    assert [evaluate.load_classifier("data/shapes", "cpu")[0].training for _ in range(2)] == [False, False]

def test_memory_of_precision_and_recall_is_not_quadratic():
    """5,000 x 5,000 distances in fp64, and their copies, would be 600 MB."""
    code = ("import sys, resource, numpy as np; sys.path.insert(0, %r); from importlib import import_module; e = import_module('05_eval'); x = np.random.rand(5000, 16);"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; e.share_inside(x, x[::-1].copy()); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)" % str(ROOT))
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 300_000

def test_nothing_is_cached_in_a_folder_of_the_users(there):
    """Image files of any kind, also in folders within."""
    Path("mine/deep").mkdir(parents=True)
    for i, image in enumerate(images_of(9)):
        Image.fromarray(image).save("mine/deep/8.jpg" if i == 8 else f"mine/{i}.png")
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    assert evaluate.describe_reference(evaluate.ImageSet("mine"), net, "d", torch.device("cpu"), 7)["n"] == 9 and len(list(Path("mine").iterdir())) == 9
    Path("mine/samples.json").write_text(json.dumps({"labels": ["a"] * 9, "classes": ["a"]}))
    with pytest.raises(ValueError, match="labels for 9"):
        evaluate.ImageSet("mine")

def test_large_images_are_averaged_for_the_classifier():
    seen, net = [], evaluate.Classifier(3).eval()
    net.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.from_numpy(images_of(2, 256))
    net(images)
    wanted = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 4)
    assert seen[0].shape == (2, 3, 64, 64) and torch.allclose(seen[0], wanted, atol=1e-5)
    assert [type(part).__name__ for part in net.body] == ["Conv2d", "BatchNorm2d", "SiLU"] * 3 + ["AdaptiveAvgPool2d", "Flatten", "Linear", "SiLU"]
    assert [tuple(p.shape) for p in net.body.parameters() if p.ndim > 1] == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (128, 2048)]

def test_a_distance_that_is_no_number_is_never_the_best():
    x = np.eye(3)
    assert np.isnan(evaluate.frechet_distance(np.full(3, np.nan), x, np.zeros(3), x)) and evaluate.frechet_distance(np.zeros(3), x, np.zeros(3), x) < 1e-9

def test_only_the_scores_that_are_asked_for_are_made(scored):
    assert call(evaluate, "--metrics", "fd,recall") == 0
    result = json.loads(Path("runs/shapes/metrics.json").read_text())
    assert {"fd", "recall"} == result.keys() & evaluate.SCORES.keys() and result["left_out"] == {}

def test_labels_are_smoothed_for_the_classifier(monkeypatch):
    asked, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **more: asked.append(more) or real(*args, **more))
    evaluate.train_classifier(images_of(9), np.arange(9) % 3, 3, torch.device("cpu"))
    assert asked and all(more == {"label_smoothing": 0.05} for more in asked)

def test_an_npz_may_hold_anything(there, capsys):
    for name, members in (("text", {"arr_0": "x"}), ("texts", {"mu": "x", "sigma": "y"})):
        with zipfile.ZipFile(f"{name}.npz", "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
    np.savez("points.npz", mu=np.float64(1), sigma=np.float64(1))
    for name, words in (("text", "arr_0 is"), ("texts", "mu is"), ("points", "mu is float64")):
        with pytest.raises(ValueError, match=f"{name}.npz: {words}"):
            evaluate.read_npz(Path(f"{name}.npz"))

def test_a_result_that_is_not_finite_is_not_written(there):
    with pytest.raises(ValueError, match="not JSON compliant"):
        data.save_json(Path("a.json"), {"fd": float("inf")})
    assert not list(there.iterdir())

def test_weights_that_are_empty_are_named(there):
    Path("w.pth").touch()
    with pytest.raises(ValueError, match=r"w.pth cannot be used: EOFError ; fetch https://"):
        evaluate.load_inception(Path("w.pth"))

def test_a_covariance_is_symmetric(there):
    np.savez("tilted.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        evaluate.ImageSet("tilted.npz")
    np.savez("minus.npz", mu=np.zeros(2), sigma=np.array([[1.0, 2.0], [2.0, 1.0]])), np.savez("two_n.npz", mu=np.zeros(2), sigma=np.eye(2), n=np.array([5, 6]))
    np.savez("less.npz", mu=np.zeros(2), sigma=np.eye(2), n=-5)
    for name, words in (("minus", "sigma is .* negative variances"), ("two_n", "n is int64"), ("less", "n is int64")):
        with pytest.raises(ValueError, match=words):
            evaluate.ImageSet(f"{name}.npz")
    wide = np.eye(500)                                    # a variance of -0.2 among 499 good ones
    wide[0, 0] = -0.2
    np.savez("wide.npz", mu=np.zeros(500), sigma=wide)
    with pytest.raises(ValueError, match="sigma is .* negative variances"):
        evaluate.ImageSet("wide.npz")
    np.savez("many.npz", mu=np.zeros(500), sigma=np.diag([1.0] + [-0.0009] * 499))        # small ones, in all half of the trace
    with pytest.raises(ValueError, match="sigma is .* negative variances"):
        evaluate.ImageSet("many.npz")
    np.savez("one.npz", mu=np.zeros(1), sigma=np.eye(1)), Path("one.npz").rename("ONE.NPZ")
    assert evaluate.ImageSet("ONE.NPZ").statistics["sigma"] == 1
    np.savez("empty.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(ValueError, match="empty.npz: mu is float64"):
        evaluate.ImageSet("empty.npz")
    f = np.random.default_rng(0).normal(1, 1, (50, 400))  # of fewer images than numbers, rounded: some variances are a little below zero
    for kind in (np.float16, np.float32):
        np.savez("rounded.npz", mu=f.mean(axis=0).astype(kind), sigma=np.cov(f.T).astype(kind))
        assert evaluate.ImageSet("rounded.npz").statistics["mu"].dtype == kind
    np.savez("same.npz", mu=np.zeros(2), sigma=np.zeros((2, 2), np.float16))           # of equal images
    assert not evaluate.ImageSet("same.npz").statistics["sigma"].any()
    np.savez("spatial.npz", mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(2), sigma_s=np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="sigma_s is .* symmetric"):
        evaluate.read_npz(Path("spatial.npz"))

def test_one_held_out_image_is_no_floor(work):
    """And no reason to give no score."""
    shutil.copytree("data/shapes", "d")
    meta, arrays = data.open_data("d")
    np.save("d/val_images.npy", arrays["val"][0][:1].copy()), np.save("d/val_labels.npy", arrays["val"][1][:1])
    Path("d/meta.json").write_text(json.dumps({**meta, "counts": {**meta["counts"], "val": 1}}))
    np.savez("few.npz", arr_0=images_of(9))
    assert call(evaluate, "--samples", "few.npz", "--reference", "./d", "--metrics", "fd", "--out", "x.json") == 0
    result = json.loads(Path("x.json").read_text())
    assert result["fd"] > 0 and not {"fd_floor", "class_accuracy_real"} & result.keys()

def test_the_report_counts_the_features_not_the_statistics(there, capsys):
    """ADM's files: statistics of all, features of 10,000."""
    np.savez("r.npz", arr_0=images_of(30), mu=np.zeros(3), sigma=np.eye(3), n=50_000), np.savez("s.npz", arr_0=images_of(40))
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    options = evaluate.Options(metrics="fd", features="inception")
    result = evaluate.score(evaluate.ImageSet("s.npz"), evaluate.ImageSet("r.npz"), net, options, "d", torch.device("cpu"))
    assert (result["n_generated"], result["n_real"], result["n_features"]) == (40, 50_000, 30)
    np.savez("r.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(5), sigma_s=np.eye(5))            # no n, and a sigma_s of another network
    both = lambda x: net(x) | {"spatial": x.float().mean(dim=(1, 2))}
    options = evaluate.Options(metrics="fd,sfd", features="inception")
    result = evaluate.score(evaluate.ImageSet("s.npz"), evaluate.ImageSet("r.npz"), both, options, "d", torch.device("cpu"))
    evaluate.report(result | {"features": "inception", "score": "FID"})
    assert "(40 generated against an unknown number of real images; 0 is best)" in capsys.readouterr().out and "3x3 and 5x5" in result["left_out"]["sfd"]

def test_a_result_without_a_step_is_left_out_of_the_curve(there):
    for name, step in (("a", 4), ("b", 8), ("c", None)):
        Path(f"{name}.json").write_text(json.dumps({"score": "FD", "n_real": 9, "n_generated": 9, "reference_id": "a", "sampling": {"step": step}, "fd": 1.0}))
    assert call(evaluate, "--table", "a.json", "b.json", "c.json", "--out", "curve.png") == 0 and Path("curve.png").exists()

def test_scores_of_other_features_are_not_put_in_one_table(there, capsys):
    for score in ("FID", "FD (classifier features)"):
        Path(f"{score[:3]}.json").write_text(json.dumps({"score": score, "n_real": 9, "n_generated": 9, "reference_id": "a", "sampling": {}, "fd": 1.0}))
    assert call(evaluate, "--table", "FID.json", "FD .json") == 2 and "differ in features" in capsys.readouterr().err
    for n in (9, 10):
        Path(f"n{n}.json").write_text(json.dumps({"score": "FD", "n_real": n, "n_generated": 9, "reference_id": "a", "sampling": {}, "fd": 1.0}))
    assert call(evaluate, "--table", "n9.json", "n10.json") == 2

@pytest.mark.parametrize("missing", [True, False], ids=["one too few", "one too many"])
def test_samples_that_do_not_fit_their_record_are_refused(scored, capsys, missing):
    sample_of = Path("runs/shapes/samples")
    (sample_of / "0000007.png").unlink() if missing else shutil.copy(sample_of / "0000007.png", sample_of / "0000030.png")
    assert call(evaluate, "--metrics", "fd") == 1 and "finish it by the same 04_sample.py command" in capsys.readouterr().err

def test_a_result_makes_its_folder(scored):
    assert call(evaluate, "--metrics", "fd", "--out", "new/place/x.json") == 0 and Path("new/place/x.json").exists()

def test_too_few_neighbours_on_either_side_are_said():
    for x, y in ((features(60, 3), features(3, 3)), (features(3, 3), features(60, 3))):
        with pytest.raises(ValueError, match="need 30 images a side"):
            evaluate.share_inside(x, y)

def test_distances_are_those_of_fp64():
    """Features in fp32, far from zero: a product of matrices would lose what they differ by."""
    a, b = ((features(60, 30, seed) * 0.1 + 1000).astype(np.float32) for seed in (0, 1))
    assert evaluate.share_inside(a, b) == evaluate.share_inside(a.astype(np.float64), b.astype(np.float64)) > 0.05

def test_a_run_that_is_a_folder_has_its_samples_there(scored):
    shutil.move("runs/shapes", "elsewhere")
    assert call(evaluate, "--run", "./elsewhere", "--metrics", "fd") == 0 and Path("elsewhere/metrics.json").exists()

def test_the_spread_beside_a_score_is_its_own():
    rng = np.random.default_rng(0)
    side = {"features": rng.normal(size=(60, 4)), "logits": rng.normal(size=(60, 7)), "mu": np.zeros(4), "sigma": np.eye(4)}
    scores, _ = evaluate.compare(side, side, ["is"], True)
    assert (scores["is"], scores["is_std"]) == evaluate.inception_score(side["logits"])

def test_scores_that_cannot_be_written_are_printed(scored, monkeypatch, capsys):
    """They took an hour, perhaps."""
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "save_json", full)
    assert call(evaluate, "--metrics", "fd") == 1
    out = capsys.readouterr()
    assert out.out.startswith("FD (classifier features)") and "No space left" in out.err

def test_every_score_is_of_the_generated_images_against_the_real_ones(monkeypatch):
    monkeypatch.setattr(evaluate, "kernel_distance", lambda x, y: (x.sum(), y.sum()))                # the real one takes seconds
    rng = np.random.default_rng(0)
    side = lambda n, width: {"features": width * rng.normal(size=(n, 4)), "logits": width * rng.normal(size=(n, 7)), "mu": width * np.ones(4), "sigma": width * np.eye(4),
                             "mu_s": 3 * width * np.ones(5), "sigma_s": np.eye(5)}
    fake, real = side(110, 1.0), side(120, 1.5)
    scores, left_out = evaluate.compare(fake, real, list(evaluate.SCORES), True)
    x, y = fake["features"], real["features"]
    assert left_out == {} and (scores["is"], scores["is_std"]) == evaluate.inception_score(fake["logits"]) and (scores["kid"], scores["kid_std"]) == evaluate.kernel_distance(x, y)
    assert scores["precision"] == evaluate.share_inside(x, y) > scores["recall"] == evaluate.share_inside(y, x)
    assert scores["fd"] == pytest.approx(4 * 0.25 + 4 * (1.5**0.5 - 1)**2) and scores["sfd"] == pytest.approx(5 * 1.5**2)

def test_the_whole_report(capsys):
    numbers = {"fd": 1.0, "sfd": 2.0, "is": 3.0, "is_std": 0.5, "kid": 4.0, "kid_std": 0.25, "precision": 0.5, "recall": 0.125, "fd_floor": 0.75, "class_accuracy": 0.9, "class_accuracy_real": 0.4}
    evaluate.report(numbers | {"left_out": {"x": "why"}, "n_generated": 2047, "n_real": 50_000, "n_features": 10_000, "n_floor": 99, "features": "classifier", "score": "FD"})
    out = capsys.readouterr()
    assert out.out == """\
FD                                   1.0000   (2047 generated against 50000 real images; 0 is best)
sFD                                  2.0000   (2047 generated against 50000 real images)
Inception score                      3.0000 +- 0.5000   (2047 images, ten splits)
KID (classifier)                     4.0000 +- 0.2500   (100 subsets of 1000 of 2047 and 10000 images; usually given x 1000)
precision                            0.5000   (share of 2047 generated images)
recall                               0.1250   (share of 10000 real images at most)
FD floor                             0.7500   (99 held-out real images against 50000 real images)
class accuracy                       0.9000   (share of 2047 generated images in which it sees the class asked)
class accuracy, real                 0.4000   (share of 99 held-out real images it gets right)
x                                  left out   (why)
"""
    assert "2047 images are few: FD is biased" in out.err and "right on 0.4 of held-out" in out.err
    for accuracy, trusted in ((0.5, False), (0.51, True)):                     # of two classes chance is right on one half
        evaluate.report({"left_out": {}, "n_generated": 2048, "n_floor": 9, "features": "classifier", "class_accuracy_real": accuracy})
        assert (capsys.readouterr().err == "") == trusted

def test_kid_names_the_number_of_features_it_compares(capsys):
    evaluate.report({"kid": 0.5, "kid_std": 0.1, "left_out": {}, "n_generated": 3000, "n_real": 50_000, "n_features": 10_000, "features": "inception", "score": "FID"})
    assert "+- 0.1000   (100 subsets of 1000 of 3000 and 10000 images" in capsys.readouterr().out

def test_a_result_holds_how_samples_were_made_but_not_their_labels(scored):
    assert call(evaluate, "--metrics", "fd") == 0
    made = json.loads(Path("runs/shapes/metrics.json").read_text())["sampling"]
    record = json.loads(Path("runs/shapes/samples/samples.json").read_text())
    assert record.pop("labels") and made == record

def test_ten_thousand_real_images_are_neighbours():
    assert [len(evaluate.neighbours({"features": np.zeros((n, 2))})) for n in (9_000, 60_000)] == [9_000, 10_000]

def test_no_image_at_a_time_is_refused(capsys):
    assert call(evaluate, "--batch-size", 0) == 2 and "--batch-size 0: give a number in [1, inf)" in capsys.readouterr().err

# ---- Mistakes that nothing had noticed -----------------------------------------------------------------------------------
def test_scores_are_made_in_full_fp32(there):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert call(evaluate, "--run", "nope") == 1
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

def test_the_published_weights_are_checked_and_named(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **more: asked.append((args, more)) or {})
    monkeypatch.setattr(evaluate, "Inception", lambda state: lambda images: None)
    assert evaluate.load_inception(None)[1:] == ("FID", "6726825d")
    assert asked == [((evaluate.WEIGHTS_URL,), {"map_location": "cpu", "check_hash": True, "weights_only": True})]

def test_samples_that_name_no_data_set_need_a_reference(there, capsys):
    np.savez("few.npz", arr_0=images_of(9))
    assert call(evaluate, "--samples", "few.npz") == 1 and "pass --reference" in capsys.readouterr().err

def test_one_class_is_none_to_judge_by(there):
    Path("in/cat").mkdir(parents=True)
    for i, image in enumerate(images_of(20)):
        Image.fromarray(image).save(f"in/cat/{i}.png")
    assert call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "o", "--workers", 1) == 0
    with pytest.raises(ValueError, match="needs two classes, data/o has 1"):
        evaluate.load_classifier("data/o", torch.device("cpu"))

def test_a_batch_without_colours_is_refused(there):
    np.savez("flat.npz", arr_0=images_of(9)[..., 0])
    with pytest.raises(ValueError, match="must be uint8"):
        evaluate.ImageSet("flat.npz")

def test_no_more_images_at_a_time_than_asked_for(work):
    np.savez("few.npz", arr_0=images_of(20))
    seen, options = [], evaluate.Options(metrics="fd", batch_size=7)
    net = lambda x: seen.append(len(x)) or {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    evaluate.score(evaluate.ImageSet("few.npz"), evaluate.ImageSet("data/shapes"), net, options, "seven777", torch.device("cpu"))
    assert max(seen) == 7 and sum(seen) == 200 + 20 + 20

def test_a_table_shows_what_differs_in_four_digits(there, capsys):
    for name, step, fd in (("a", 4, 12.3456), ("b", 8, 0.000123456)):
        Path(f"{name}.json").write_text(json.dumps({"score": "FD", "n_real": 9, "n_generated": 9, "reference_id": "a", "sampling": {"weights": name, "step": step}, "fd": fd}))
    assert call(evaluate, "--table", "a.json", "b.json") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("file | step | n_generated | fd |") and rows == ["a.json | 4 | 9 | 12.35" + " | " * 6, "b.json | 8 | 9 | 0.0001235" + " | " * 6]

@pytest.mark.parametrize("device,used", [("mps", "cpu"), ("meta", "meta")])
def test_scores_are_made_on_the_device_unless_it_has_no_fp64(work, monkeypatch, device, used):
    def enough(folder, device):
        raise ValueError(f"asked on {device.type}")
    np.savez("few.npz", arr_0=images_of(9))
    monkeypatch.setattr(evaluate, "load_classifier", enough)
    with pytest.raises(ValueError, match=f"asked on {used}"):
        evaluate.evaluate(evaluate.Options(samples="few.npz", reference="data/shapes"), torch.device(device))

def test_each_sum_has_its_own_moments():
    images = images_of(20)
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "spatial": x[:, :2, 0, 0].float(), "logits": x[:, 0, 0].float()}
    found = evaluate.describe(images, net, torch.device("cpu"), 7, "images")
    assert np.allclose(found["mu"], images.mean(axis=(1, 2)).mean(axis=0)) and np.allclose(found["mu_s"], images[:, :2, 0, 0].mean(axis=0))
    assert np.allclose(found["sigma_s"], np.cov(images[:, :2, 0, 0].astype(float).T))

@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_scores(there, monkeypatch, rank):
    done = []
    monkeypatch.setattr(evaluate.model, "device_and_processes", lambda name: nullcontext((torch.device("cpu"), rank, 2)))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: done.append(1))
    assert call(evaluate) == 0 and len(done) == 1 - rank

@pytest.mark.parametrize("flags,asked", [(["--features", "inception"], "inception None"), (["--inception-weights", "w.pth"], "classifier"), (["--features", "inception", "--inception-weights", "w.pth"], "inception w.pth")])
def test_the_features_asked_for_are_taken(work, monkeypatch, capsys, flags, asked):
    def stop(what):
        raise ValueError(f"it takes {what}")
    np.savez("few.npz", arr_0=images_of(9))
    monkeypatch.setattr(evaluate, "load_inception", lambda path: stop(f"inception {path}"))
    monkeypatch.setattr(evaluate, "load_classifier", lambda *_: stop("classifier"))
    assert call(evaluate, "--samples", "few.npz", "--reference", "data/shapes", *flags) == 1 and f"it takes {asked}\n" in capsys.readouterr().err

# ---- Details that only some users meet ------------------------------------------------------------------------------
def test_the_classifier_sees_small_images_as_they_are():
    seen, net = [], evaluate.Classifier(3).eval()
    net.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    for size in (16, 32, 64):
        net(torch.from_numpy(images_of(2, size)))
    assert seen == [16, 32, 64] and net.body[-4].output_size == 4
    assert [(part.kernel_size, part.stride, part.padding) for part in net.body if isinstance(part, torch.nn.Conv2d)] == [((3, 3), (2, 2), (1, 1))] * 3

def test_the_classifier_begins_each_step_anew_and_sees_every_image(monkeypatch):
    done, rows = [], set()

    class Spy(torch.optim.AdamW):
        def zero_grad(self, *args, **more):
            done.append("zero")
            super().zero_grad(*args, **more)

        def step(self, closure=None):
            done.append("step")
            return super().step(closure)

    class Images:
        shape = (200, 8, 8, 3)

        def __getitem__(self, chosen):
            rows.update(chosen.tolist())
            return images_of(len(chosen), 8)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    evaluate.train_classifier(Images(), np.arange(200) % 3, 3, torch.device("cpu"))
    assert done == ["zero", "step"] * (30 * 200 // 128) and rows == set(range(200))

def test_labels_against_statistics_alone(there):
    """The usual case of published scores: samples.npz with labels, a reference without images."""
    np.savez("s.npz", arr_0=images_of(9), arr_1=np.arange(9)), np.savez("r.npz", mu=np.zeros(3), sigma=np.eye(3))
    samples, real = evaluate.open_sets(evaluate.Options(samples="s.npz", reference="r.npz", features="inception"))
    assert len(samples.images) == 9 and real.images is None and real.statistics["n"] == 0

def test_inception_is_no_judge_of_classes(work, capsys):
    np.savez("s.npz", arr_0=images_of(30))
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    options = evaluate.Options(metrics="fd", features="inception")
    result = evaluate.score(evaluate.ImageSet("s.npz"), evaluate.ImageSet("data/shapes"), net, options, "0123abcd", torch.device("cpu"))
    assert not {"class_accuracy", "class_accuracy_real", "fd_floor"} & result.keys()
    evaluate.report(result | {"features": "inception", "score": "FID", "n_generated": 2048})
    assert capsys.readouterr().err == ""

def test_the_published_file_given_by_hand_makes_fid(there, monkeypatch, capsys):
    Path("w.pth").write_bytes(b"x")
    asked = []
    monkeypatch.setattr(data, "file_hash", lambda path, kind: "6726825d" + "0" * 56)
    monkeypatch.setattr(torch, "load", lambda path, **how: asked.append(how) or {})
    monkeypatch.setattr(evaluate, "Inception", lambda state: lambda images: None)
    assert evaluate.load_inception(Path("w.pth"))[1:] == ("FID", "6726825d") and capsys.readouterr().err == ""
    assert asked == [{"map_location": "cpu", "weights_only": True}]

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"https://github.com/mseitzer/.* cannot be used: OSError no route to host; fetch https://github.com/.* and pass --inception-weights FILE$"):
        evaluate.load_inception(None)

def test_scores_are_reckoned_on_the_device(there, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "describe", lambda *_: {"n": 3})
    monkeypatch.setattr(evaluate, "describe_reference", lambda *_: {"n": 3})
    monkeypatch.setattr(evaluate, "compare", lambda *_: asked.append(torch.empty(0).device.type) or ({}, {}))
    np.savez("s.npz", arr_0=images_of(9))
    samples = evaluate.ImageSet("s.npz")
    evaluate.score(samples, samples, None, evaluate.Options(features="inception"), "", torch.device("meta"))
    assert asked == ["meta"] and evaluate.resize_tf1(torch.zeros(1, 3, 8, 8, device="meta"), 5).device.type == "meta"

    def elsewhere(*_):
        raise AssertionError("from_numpy: on the CPU whatever the device")
    x, y = features(40, 3), features(40, 3, 1)
    monkeypatch.setattr(torch, "from_numpy", elsewhere)
    assert 0 < evaluate.share_inside(x, y) <= 1 and evaluate.inception_score(x)[0] > 1

def test_the_floor_has_no_more_images_than_are_held_out(work):
    np.savez("many.npz", arr_0=images_of(150))
    assert call(evaluate, "--samples", "many.npz", "--reference", "shapes", "--metrics", "fd") == 0
    result = json.loads(Path("many.npz-metrics.json").read_text())
    assert (result["n_generated"], result["n_floor"], result["samples"]) == (150, 100, "many.npz")

def test_a_result_names_the_samples(scored):
    assert call(evaluate, "--metrics", "fd") == 0 and json.loads(Path("runs/shapes/metrics.json").read_text())["samples"] == "runs/shapes/samples"

@pytest.mark.parametrize("content,words", [
    ({"arr_0": images_of(9), "arr_1": np.zeros(9)}, "it must hold one class id per image"), ({"arr_0": images_of(9), "arr_1": np.array(list("abcdefghi"))}, "it must hold one class id per image"),
    ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "mu is <U1"), ({"mu": np.zeros(3, complex), "sigma": np.eye(3)}, "mu is complex128"), ({"mu": np.zeros(3, bool), "sigma": np.eye(3)}, "mu is bool")], ids=str)
def test_what_is_no_number_or_no_class(there, content, words):
    np.savez("s.npz", **content)
    with pytest.raises(ValueError, match=words):
        evaluate.read_npz(Path("s.npz"))

def test_what_refusals_advise(work, capsys):
    np.savez("small.npz", arr_0=images_of(9))
    assert call(evaluate, "--samples", "small.npz", "--reference", "./small.npz") == 1 and "error: ./small.npz is not a packed data set, the classifier is trained on one: use --features inception" in capsys.readouterr().err
    Path("other").mkdir(), Image.fromarray(images_of(1)[0]).save("other/0000000.png")
    Path("other/samples.json").write_text(json.dumps({"labels": [0], "classes": ["a", "b"]}))                  # samples, and what they are compared with
    assert call(evaluate, "--samples", "small.npz", "--reference", "./other") == 1 and "error: ./other is not a packed data set, the classifier is trained on one" in capsys.readouterr().err
    assert call(evaluate, "--samples", "gone.npz", "--reference", "shapes") == 1 and "no images at gone.npz: make samples (python 04_sample.py) or data first" in capsys.readouterr().err
    Path("made").mkdir(), Image.fromarray(images_of(1)[0]).save("made/0000000.png")
    Path("made/samples.json").write_text('{"labels": [1]}')
    assert call(evaluate, "--samples", "made", "--reference", "shapes") == 1 and "classes is not of the type list" in capsys.readouterr().err
    for content in ({"score": "x"}, {"score": "x", "n_generated": "many"}):
        Path("mine.json").write_text(json.dumps(content))
        assert call(evaluate, "--samples", "small.npz", "--reference", "shapes", "--out", "mine.json") == 1 and "n_generated is not of the type int" in capsys.readouterr().err
        assert json.loads(Path("mine.json").read_text()) == content
    assert call(evaluate, "--table") == 2

def test_latents_name_the_pixels_to_give_instead(there, monkeypatch):
    Path("set").mkdir(), Path("set/train_images.npy").touch()
    monkeypatch.setattr(data, "open_data", lambda path: ({"coder": {"experiment": "vae", "pixels": "photos", "id": "0a"}}, {}))
    with pytest.raises(ValueError, match="set holds latents: give the pixels they were made of, photos$"):
        evaluate.ImageSet("set")

def test_a_bare_name_is_a_data_set(work):
    """Also where a folder of the same name lies in the working directory."""
    Path("shapes").mkdir()
    Image.fromarray(images_of(1)[0]).save("shapes/a.png")
    np.savez("s.npz", arr_0=images_of(9))
    assert evaluate.open_sets(evaluate.Options(samples="s.npz", reference="shapes"))[1].path == Path("data/shapes")

def test_tables_of_results_made_elsewhere(there, monkeypatch, capsys):
    titles, record = [], {"score": "FD (x)", "n_real": 9, "n_generated": 9, "reference_id": "a"}
    monkeypatch.setattr(evaluate.model, "chart", lambda title, label, lines: titles.append((title, label, lines)) or Image.new("RGB", (9, 9)))
    for name, more in {"a": {"fd": 1.0, "sampling": {"solver": "heun", "interval": [0, 1], "cfg": 2.0}}, "b": {"fd": 2.0, "sampling": {"solver": "euler", "interval": [0.1, 1], "cfg": 1.0}},
                       "none": {"fd": 3.0, "sampling": {}}, "text": {"fd": "low", "sampling": {"solver": "heun", "interval": [0, 1], "cfg": 3.0}}, "old": {"fd": 3.0}}.items():
        Path(f"{name}.json").write_text(json.dumps(record | more))
    Path("odd.json").write_text(json.dumps(record | {"fd": 5.0, "sampling": {"solver": "heun", "interval": [0, 1], "cfg": "high"}}))
    Path("of_val.json").write_text(json.dumps(record | {"fd": 1.0, "sampling": {}, "split": "val"})), Path("list.json").write_text(json.dumps(record | {"n_real": [1], "sampling": {}}))
    for name in ("c", "d"):                               # image folders have no id
        Path(f"to_{name}.json").write_text(json.dumps(record | {"reference_id": None, "reference": name, "sampling": {}}))
    assert call(evaluate, "--table", "to_c.json", "to_d.json") == 2 and call(evaluate, "--table", "to_c.json", "to_c.json") == 0
    assert "cannot be compared" in capsys.readouterr().err
    for name in ("of_val", "list"):
        assert call(evaluate, "--table", "a.json", f"{name}.json") == 2 and "cannot be compared" in capsys.readouterr().err
    assert call(evaluate, "--table", "a.json", "b.json", "none.json", "text.json", "odd.json", "--out", "c.png") == 0
    assert call(evaluate, "--table", "none.json", "b.json", "a.json", "--out", "d.png") == 0 and "file | solver | interval | cfg | n_generated" in capsys.readouterr().out
    assert call(evaluate, "--table", "none.json", "none.json") == 0
    assert call(evaluate, "--table", "a.json", "old.json") == 1 and "sampling is not of the type dict" in capsys.readouterr().err
    Path("no_n.json").write_text(json.dumps({"score": "FD (x)", "sampling": {}}))
    assert call(evaluate, "--table", "a.json", "no_n.json") == 1 and "n_generated is not of the type int" in capsys.readouterr().err

def test_features_are_read_by_all_cores_and_kept_in_part(monkeypatch):
    asked, ahead = [], evaluate.model.ahead
    monkeypatch.setattr(evaluate.model, "ahead", lambda function, jobs, count: asked.append(count) or ahead(function, jobs, count))
    monkeypatch.setattr(evaluate, "KEPT", 40)
    net = lambda x: {"features": x.float().mean(dim=(1, 2)), "logits": x[:, 0, 0].float()}
    described = evaluate.describe(images_of(120), net, "cpu", 7, "")
    assert asked == [evaluate.os.cpu_count()] and (len(described["features"]), len(described["logits"]), len(described["seen"])) == (40, 40, 120)
    rows = evaluate.random_subset(30, 100)
    assert len(rows) == 30 and (np.diff(rows) > 0).all()                       # in order, as a memory map is read fastest

def test_scores_at_their_limits():
    for seed in range(20):
        mu, sigma = moments(features(60, 12, seed))
        assert evaluate.frechet_distance(mu, sigma, mu, sigma) >= 0
    logits = features(100, 4).astype(np.float32) * 30
    assert evaluate.inception_score(logits) == evaluate.inception_score(logits.astype(np.float64)) and evaluate.inception_score(logits[:10]) == (1, 0)
    with pytest.raises(ValueError, match="KID draws subsets of 1000 images, one side has 999"):
        evaluate.kernel_distance(features(1000, 2), features(999, 2))
    assert evaluate.share_inside(np.zeros((40, 2)), np.zeros((40, 2))) == 1   # equal images lie in each other's balls of radius 0

def test_a_cache_with_code_in_it_is_made_again(there, capsys):
    np.savez("c.npz", a=np.array([{}], dtype=object))
    assert evaluate.remembered(Path("c.npz"), lambda: {"a": np.ones(3)})["a"].tolist() == [1, 1, 1] and "c.npz is damaged" in capsys.readouterr().err

def test_a_classifier_trained_on_a_gpu_is_kept_as_numbers(work, monkeypatch):
    asked, real = [], torch.Tensor.cpu
    monkeypatch.setattr(evaluate, "remembered", lambda path, make, about: make())
    monkeypatch.setattr(evaluate, "train_classifier", lambda images, labels, classes, device: evaluate.Classifier(classes))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: asked.append(1) or real(value))
    net, *_ = evaluate.load_classifier("data/shapes", torch.device("cpu"))
    assert len(asked) == 2 * len(net.state_dict())        # kept, and taken for the fingerprint

def test_the_classifier_is_trained_on_the_device():
    """On meta, whose tensors meet no others."""
    net = evaluate.train_classifier(images_of(40, 8), np.arange(40) % 3, 3, torch.device("meta"))
    assert {p.device.type for p in net.parameters()} == {"meta"}

def test_features_are_made_on_the_device_and_brought_back(monkeypatch):
    seen, brought, real = [], [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: brought.append(tuple(value.shape)) or real(value))
    net = lambda batch: seen.append(batch.device.type) or {name: torch.rand(len(batch), 3) for name in ("features", "logits")}
    evaluate.describe(images_of(10), net, "meta", 5, "")
    assert seen == ["meta"] * 2 and sorted(brought) == [(4, 4), (10,), (10, 3), (10, 3)]

def test_the_network_that_judges_moves_and_the_result_is_where_the_last_line_says(work, monkeypatch, capsys):
    class Net:
        def to(self, device):
            return f"on {device.type}"
    np.savez("few.npz", arr_0=images_of(9)), Path("link.npz").symlink_to("few.npz")
    monkeypatch.setattr(evaluate, "load_classifier", lambda folder, device: (Net(), "FD", "0a"))
    monkeypatch.setattr(evaluate, "score", lambda samples, real, net, *_: {"net": net, "left_out": {}, "n_generated": 9})
    for flags, result in ((["few.npz"], "few.npz-metrics.json"), (["link.npz"], "link.npz-metrics.json"), (["few.npz", "--out", "mine.json"], "mine.json")):
        assert call(evaluate, "--reference", "shapes", "--samples", *flags) == 0
        assert json.loads(Path(result).read_text())["net"] == "on cpu"
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"{result}: all of this, and how the samples were made; training step unknown")

def test_refusals_name_the_set_that_is_meant(work, capsys):
    np.savez("wide.npz", arr_0=np.zeros((9, 16, 40, 3), np.uint8)), np.savez("far.npz", arr_0=images_of(9, 16), arr_1=np.full(9, 77))
    for name, words in (("wide.npz", "wide.npz has images of 16 x 40 pixels, data/shapes of others: is it the right --reference, and are they samples (a run's lie in its samples/)?"),
                        ("far.npz", "far.npz has labels outside 0..9, the classes of data/shapes")):
        assert call(evaluate, "--samples", name, "--reference", "shapes") == 1 and f"error: {words}\n" in capsys.readouterr().err

@pytest.mark.parametrize("name", ["mu", "sigma", "n"])
def test_infinity_is_no_statistic(there, name):
    content = {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.float64(9)}
    content[name] = content[name] + np.inf
    np.savez("s.npz", **content)
    with pytest.raises(ValueError, match=f"s.npz: {name} is float64 .* all of them finite"):
        evaluate.read_npz(Path("s.npz"))

def test_a_negative_variance_is_none_in_float16_either(there):
    """The sum of its variances is beyond what float16 holds."""
    np.savez("s.npz", mu=np.zeros(300), sigma=np.diag([300.0] * 299 + [-300.0]).astype(np.float16))
    with pytest.raises(ValueError, match="without negative variances"):
        evaluate.read_npz(Path("s.npz"))

def test_whole_lines_about_image_sets(work, capsys):
    Path("deep/mixed").mkdir(parents=True), Path("deep/void").mkdir()
    Image.new("RGB", (16, 16)).save("deep/mixed/a.png"), Image.new("RGB", (17, 16)).save("deep/mixed/b.png")
    np.savez("deep/few.npz", arr_0=images_of(9, 16), arr_1=np.zeros((9, 2))), np.savez("deep/stats.npz", mu=np.zeros(3), sigma=np.eye(3)), np.savez("deep/other.npz", x=np.zeros(3))
    np.savez("deep/good.npz", arr_0=images_of(9, 16)), Path("deep/cut.npz").write_bytes(b"PK"), np.savez("deep/half.npz", arr_0=images_of(9, 16), mu=np.zeros(3)), np.savez("deep/n.npz", arr_0=images_of(9, 16), n=9)
    shutil.copytree("deep/mixed", "deep/made"), Path("deep/made/samples.json").write_text('{"labels": [1, 2, 0], "classes": []}')
    for name, words in (("mixed", "deep/mixed/b.png has the shape (16, 17, 3), others have (16, 16, 3): all images of a set must have one size"),
                        ("void", "no images at deep/void: make samples (python 04_sample.py) or data first, or give another --samples, --run or --reference"),
                        ("few.npz", "deep/few.npz: arr_1 is float64 (9, 2); it must hold one class id per image"), ("stats.npz", "deep/stats.npz holds statistics only: they serve as --reference"),
                        ("other.npz", "deep/other.npz holds no images (arr_0), or of statistics (mu, sigma) a part"), ("half.npz", "deep/half.npz holds no images (arr_0), or of statistics (mu, sigma) a part"), ("cut.npz", "deep/cut.npz cannot be used: "),
                        ("made", "deep/made holds 2 images and labels for 3 (int64): finish it by the same 04_sample.py command, and leave no other images there")):
        assert call(evaluate, "--samples", f"deep/{name}", "--reference", "shapes") == 1
        assert f"error: {words}" in capsys.readouterr().err
    assert len(evaluate.read_npz(Path("deep/n.npz"))[0]) == 9
    assert call(evaluate, "--samples", "deep/good.npz") == 1 and "error: deep/good.npz does not say which data set it imitates: pass --reference, or, of a run, --run\n" in capsys.readouterr().err

def test_whole_lines_about_results(scored, capsys):
    record = json.loads(Path("runs/shapes/samples/samples.json").read_text())
    Path("runs/shapes/samples/samples.json").write_text(json.dumps(record | {"data_id": "another", "data": "./data/shapes"}))
    capsys.readouterr()
    assert call(evaluate) == 1 and capsys.readouterr().err.endswith("error: data/shapes was packed anew since the network of runs/shapes/samples was trained, or its samples.json does not say of which it is: pass --reference './data/shapes' to compare them all the same\n")
    for w in (1, 2):
        Path(f"{w}.json").write_text(json.dumps({"score": "FD", "n_real": 9, "n_generated": 9, "fd": float(w), "sampling": {"cfg": w}}))
    Path("deep").mkdir(), Path("1.json").rename("deep/1.json")
    assert call(evaluate, "--table", "deep/1.json", "2.json", "--out", "deep/c.png") == 0
    out = capsys.readouterr().out
    assert out.endswith("\nlook at deep/c.png: 2 of 2 results\n") and "\ndeep/1.json | 1 | " in out and "\n2.json | 2 | " in out         # two metrics.json can be told apart

def test_samples_under_other_names_are_not_judged(scored, capsys):
    Path("runs/shapes/samples/0000002.png").rename("runs/shapes/samples/zebra.png")
    assert call(evaluate) == 1 and "leave no other images there" in capsys.readouterr().err
    Path("runs/shapes/samples/zebra.png").rename("runs/shapes/samples/0000001 copy.png")      # the last has its name
    assert call(evaluate) == 1 and "leave no other images there" in capsys.readouterr().err

def test_a_set_that_is_packed_anew_meanwhile_is_not_mixed_in(work, monkeypatch):
    """The held-out images are those of the set that was opened."""
    shutil.copytree(Path("data/shapes").resolve(), "set")
    np.savez("s.npz", arr_0=images_of(40, 16), arr_1=np.arange(40) % 10)
    flags = ["--samples", "s.npz", "--reference", "./set", "--metrics", "fd"]
    assert call(evaluate, *flags, "--out", "a.json") == 0
    real = evaluate.describe_reference

    def meanwhile(*arguments):
        shutil.rmtree("set"), shutil.copytree(Path("data/shapes").resolve(), "set")
        np.save("set/val_images.npy", 255 - np.load("set/val_images.npy"))
        return real(*arguments)
    monkeypatch.setattr(evaluate, "describe_reference", meanwhile)
    assert call(evaluate, *flags, "--out", "b.json") == 0
    before, after = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert after["fd_floor"] == pytest.approx(before["fd_floor"], rel=1e-6) and after["class_accuracy_real"] == before["class_accuracy_real"]
