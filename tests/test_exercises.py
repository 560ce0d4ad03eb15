"""One test per exercise of make_assignment.py, in words a student can act on.  Each needs its own function only:
what it calls that may be empty as well is replaced by a stand-in written here."""
import types

import numpy as np
import pytest
import torch
from conftest import TINY, data, evaluate, model, sample, train
from PIL import Image

def same(found, wanted, message, atol=1e-5):
    """Compare two arrays; a difference says what was expected."""
    if found is None:
        pytest.fail(f"{message} -- but nothing was returned", pytrace=False)
    found, wanted = (v.detach().double() if torch.is_tensor(v) else torch.tensor(np.array(v)).double() for v in (found, wanted))
    if found.shape != wanted.shape:
        pytest.fail(f"{message} -- expected the shape {tuple(wanted.shape)}, got {tuple(found.shape)}", pytrace=False)
    if not torch.allclose(found, wanted, atol=atol):
        pytest.fail(f"{message} -- the largest difference is {(found - wanted).abs().max().item():.3g}", pytrace=False)

def test_exercise_01_center_crop():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    wanted = np.asarray(picture.resize((25, 18), Image.BOX).resize((22, 16), Image.BICUBIC))[:, 3:19]
    same(data.center_crop(picture, 16), wanted, "center_crop of 50 x 37 to 16: halve once with BOX to 25 x 18, BICUBIC to 22 x 16, cut columns 3 to 18")
    assert data.center_crop(picture.convert("L"), 16).shape == (16, 16, 3), "center_crop: a grey image must come out as RGB: convert it first"
    same(data.center_crop(picture.crop((0, 0, 16, 16)), 16), np.asarray(picture.crop((0, 0, 16, 16))), "center_crop: an image of the right size stays as it is")

def test_exercise_02_patchify():
    x = torch.arange(2 * 3 * 4 * 6.).view(2, 3, 4, 6)
    tokens = model.patchify(x, 2)
    wanted = torch.stack([torch.stack([x[b, :, i:i + 2, j:j + 2].permute(1, 2, 0).flatten() for i in (0, 2) for j in (0, 2, 4)]) for b in (0, 1)])
    assert tokens is not None and tokens.shape == wanted.shape, "patchify of (2,3,4,6) with p = 2 must give (2, 6, 12): batch, patches, p*p*C"
    same(tokens[:, 0], wanted[:, 0], "patchify, the first patch: its pixels row by row, and at each pixel the channels next to each other")
    same(tokens, wanted, "patchify: the first patch is right, the order of the patches is not: left to right, then down")

def test_exercise_03_rotate():
    x, angle = torch.randn(2, 3, 5, 8), torch.rand(5, 4) * 6
    turned = model.rotate(x, angle.cos(), angle.sin())
    same(model.rotate(x, torch.ones(5, 4), torch.zeros(5, 4)), x, "rotate by the angle 0 changes nothing")
    same(turned.square().sum(-1), x.square().sum(-1), "rotate keeps the length of every head's vector")
    wanted = x.clone()
    for i in range(4):
        wanted[..., 2 * i] = x[..., 2 * i] * angle[:, i].cos() - x[..., 2 * i + 1] * angle[:, i].sin()
        wanted[..., 2 * i + 1] = x[..., 2 * i + 1] * angle[:, i].cos() + x[..., 2 * i] * angle[:, i].sin()
    same(turned, wanted, "rotate: pairs are channels (0,1), (2,3), ...: new 0 = x0 cos - x1 sin, new 1 = x1 cos + x0 sin")

def test_exercise_04_block():
    block = model.Block(model.JiTConfig(**{**TINY, "rope": False}), 0.0).eval()
    x, c, condition = torch.randn(2, 5, 32), torch.randn(2, 1, 32), block.adaLN_modulation[1]
    torch.nn.init.zeros_(condition.weight), torch.nn.init.zeros_(condition.bias)
    same(block(x, c), x, "Block.forward: at initialisation the gates are zero, so a block must return its input")
    seen = []
    block.attn.forward = lambda h, rope=None: seen.append(rope) or h * 0
    block(x, c, "the table")
    assert seen == ["the table"], "Block.forward: the rotary tables must reach the attention"
    block.attn, block.mlp = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    block.attn.forward = lambda h, rope=None: h * 2
    torch.nn.init.normal_(condition.weight, std=0.1)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).split(32, dim=-1)
    middle = x + gate1 * 2 * (block.norm1(x) * (1 + scale1) + shift1)
    wanted = middle + gate2 * block.mlp(block.norm2(middle) * (1 + scale2) + shift2)
    same(block(x, c), wanted, "Block.forward: x + gate1 attn(norm1(x) (1 + scale1) + shift1), then the same with norm2 and mlp; order of the six: "
         "shift, scale, gate for attention, then for the FFN")

@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_exercise_05_conversion(path):
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float32)
    x, e = torch.randn(3), torch.randn(3)
    a, s, da, ds = model.path_coefficients(path, t)
    known = {"x": x, "e": e, "v": da * x + ds * e}
    for kind in known:
        for to in known:
            u, w = model.conversion(kind, to, t, path)
            same(u * known[kind] + w * (a * x + s * e), known[to], f"conversion from {kind} to {to} on the {path} path: u * {kind} + w * z must be {to}", 1e-4)
    u, w = model.conversion("x", "v", torch.tensor([1.0]), "linear")
    same(u, [20.0], "conversion from x to v at t = 1: 1 - t is clamped at t_eps = 0.05, so that u = 1/0.05")

def test_exercise_06_loss(monkeypatch):
    monkeypatch.setattr(model, "conversion", lambda kind, to, t, path="linear", t_eps=0.05: {
        "x": (torch.ones_like(t), 0 * t), "v": (1 / (1 - t).clamp_min(t_eps), -1 / (1 - t).clamp_min(t_eps))}[to])
    config = model.JiTConfig(**TINY)
    batch = {"x": torch.randn(4, 3, 8, 8), "e": torch.randn(4, 3, 8, 8), "t": torch.tensor([0.1, 0.5, 0.9, 0.99])}
    for loss in train.diffusion_loss(batch["x"], batch, config, "x", "v") or [None]:
        same(loss, torch.zeros(4), "diffusion_loss: a perfect prediction has loss zero at every t, one number per image")
    found = train.diffusion_loss(batch["x"] + 0.1, batch, config, "x", "v")
    same(found[0], torch.full((4,), 0.01), "diffusion_loss in x-space of a prediction off by 0.1 everywhere: the MEAN over pixels of 0.1^2")
    same(found[1], 0.01 / (1 - batch["t"]).clamp_min(0.05)**2, "diffusion_loss in v-space: the error in x times u^2 = 1 / max(1-t, 0.05)^2")

def test_exercise_07_ema():
    net = torch.nn.Linear(3, 2)
    averages = [{k: torch.zeros_like(v) for k, v in net.state_dict().items()} for _ in range(2)]
    kept = averages[0]["weight"]
    trainer = types.SimpleNamespace(net=net, ema=averages, options=types.SimpleNamespace(ema=(0.9, 0.5)))
    train.Trainer.update_ema(trainer)
    train.Trainer.update_ema(trainer)
    assert averages[0]["weight"] is kept and kept.abs().sum() > 0, "update_ema must change the averages in place"
    same(averages[0]["bias"], net.bias.detach() * 0.19, "update_ema twice from zero with decay 0.9: 1 - 0.9^2 = 0.19 of the weights, biases too")
    same(averages[1]["weight"], net.weight.detach() * 0.75, "update_ema: the second decay, 0.5, belongs to the second average")

def test_exercise_08_guided_velocity(monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "velocity", lambda net, z, t, labels, t_eps: seen.append(len(z)) or labels.float().view(-1, 1) * z)
    net, z, y = types.SimpleNamespace(config=types.SimpleNamespace(num_classes=10)), torch.ones(2, 1), torch.tensor([3, 4])
    same(sample.guided_velocity(net, z, 0.5, y, 1.0), [[3.0], [4.0]], "guided_velocity with w = 1 is the velocity of the class")
    assert sum(seen) == 2, f"guided_velocity with w = 1 must skip the pass without class: {sum(seen)} images went through for 2"
    same(sample.guided_velocity(net, z, 0.5, y, 0.0), [[10.0], [10.0]], "guided_velocity with w = 0 is the velocity without class (label num_classes)")
    same(sample.guided_velocity(net, z, 0.5, y, 3.0), [[-11.0], [-8.0]], "guided_velocity: v_uncond + w (v_class - v_uncond)")
    for t, low in ((0.3, 0.3), (0.7, 0.3)):
        same(sample.guided_velocity(net, z, t, y, 3.0, (low, 0.7)), [[3.0], [4.0]], "guided_velocity at an end of its interval is outside")
    same(sample.guided_velocity(net, z, 0.0, y, 3.0, (0.0, 0.7)), [[-11.0], [-8.0]], "guided_velocity: an interval that begins at 0 includes t = 0")
    same(sample.guided_velocity(net, z, 0.05, y, 3.0, (0.1, 1.0)), [[3.0], [4.0]], "guided_velocity outside its interval of time is that of w = 1")

def test_exercise_09_euler_step():
    same(sample.euler_step(torch.tensor([2.0]), 0.25, 0.5, lambda z, t: z * 4 + t), [2.0 + 0.25 * 8.25], "euler_step: z + (t_next - t) * v(z, t)")

def test_exercise_10_heun_step():
    times = []
    slope = lambda z, t: times.append(t) or z * 4 + t
    same(sample.heun_step(torch.tensor([2.0]), 0.25, 0.5, slope), [2.0 + 0.25 * (8.25 + 4 * 4.0625 + 0.5) / 2],
         "heun_step: an Euler step ahead to t_next, then z + (t_next - t) times the mean of v(z, t) and v(ahead, t_next)")
    times.clear()
    same(sample.heun_step(torch.tensor([2.0]), 0.5, 1.0, slope), [2.0 + 0.5 * 8.5], "heun_step: the last step, t_next = 1, is Euler's")
    assert times == [0.5], "heun_step: at t_next = 1 the velocity is not asked for, it is not defined there"

def test_exercise_11_frechet_distance():
    zero, one = np.zeros(3), np.eye(3)
    same(evaluate.frechet_distance(zero, one, zero + 2, one), 12.0, "frechet_distance with equal covariances: the squared distance of the means")
    same(evaluate.frechet_distance(zero, np.diag([1.0, 4.0, 9.0]), zero, np.diag([4.0, 4.0, 1.0])), 5.0,
         "frechet_distance with diagonal covariances: the sum of (std1 - std2)^2")
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])
    wanted = np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b)).sum()
    same(evaluate.frechet_distance(np.zeros(2), a, np.zeros(2), b), wanted, "frechet_distance: tr(A + B) - 2 tr((A B)^1/2), also where A and B do not commute")
    thin = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    try:
        found = evaluate.frechet_distance(zero, thin, zero + 1, thin)
    except (np.linalg.LinAlgError, RuntimeError):         # roots of negative numbers on the way
        found = np.nan
    same(found, 3.0, "frechet_distance of singular covariances: clamp the tiny negative eigenvalues at 0")

def test_exercise_12_inception_score():
    same(evaluate.inception_score(np.zeros((100, 4))), [1.0, 0.0], "inception_score (mean, std) of a network that never decides is (1, 0)")
    certain = np.eye(4)[np.arange(4000) % 4] * 100
    same(evaluate.inception_score(certain)[0], 4.0, "inception_score of four equally frequent, certain classes is 4", 0.05)
    logits, scores = np.random.default_rng(0).normal(size=(40, 3)), []
    shuffled = logits[np.random.RandomState(2020).permutation(40)]
    for part in shuffled.reshape(10, 4, 3):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    same(evaluate.inception_score(logits), [np.mean(scores), np.std(scores)], "inception_score: each of ten parts of the shuffle RandomState(2020).permutation(N) has its own p(y); mean and std over the parts")
