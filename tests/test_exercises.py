"""The exercises of tests/EXERCISES.md, a group of tests each: worked examples, and what must hold for any right answer.

Each needs its own functions only: what they call that may be empty as well is replaced by a stand-in.
"""
import math
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TINY, data, evaluate, model, sample, train
from PIL import Image

def must(holds, message):
    if not holds:
        pytest.fail(message, pytrace=False)

def close(found, wanted, message, atol=1e-5):
    """Compare two arrays and say how they differ."""
    must(found is not None, f"{message}; nothing was returned")
    wanted, raw = torch.as_tensor(wanted, dtype=torch.float64), found
    try:
        found = (raw.detach() if torch.is_tensor(raw) else torch.tensor(np.array(raw, dtype=float))).double()
    except (TypeError, ValueError):
        found = None
    must(found is not None, f"{message}; numbers were expected, got {type(raw).__name__} {' '.join(str(raw).split())[:60]}")
    must(found.shape == wanted.shape, f"{message}; expected the shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
    shown = [[round(v, 4) for v in value.flatten().tolist()] for value in (wanted, found)]
    numbers = f"expected {shown[0]}, got {shown[1]}" if wanted.numel() <= 8 else f"the largest difference is {(found - wanted).abs().max().item():.3g}"
    must(torch.allclose(found, wanted, atol=atol, rtol=0), f"{message}; {numbers}")

def unchanged(value, before, name):
    must(torch.equal(value, before), f"{name} must not be changed in place: the caller goes on with it")

# ---- 1 centre crop ----------------------------------------------------------------------------------------------------
def crop(array, size, mode="RGB"):
    found = data.center_crop(Image.fromarray(np.asarray(array, dtype=np.uint8)).convert(mode), size)
    must(isinstance(found, np.ndarray) and found.dtype == np.uint8, f"center_crop returns a uint8 numpy array, got {getattr(found, 'dtype', type(found).__name__)}")
    return found

def test_exercise_01_crop_shape():
    for shape in ((37, 50, 3), (50, 37, 3), (40, 40, 3), (9, 30, 3)):
        found = crop(np.zeros(shape), 16)
        must(found.shape == (16, 16, 3), f"center_crop of {shape[1]} x {shape[0]} pixels to 16 has the shape {found.shape}, not (16, 16, 3)")
    must(crop(np.zeros((20, 20, 3)), 16, "L").shape == (16, 16, 3), "center_crop: a grey image must come out with three channels")

def test_exercise_01_crop_leaves_the_right_size_alone():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    close(crop(image, 16), image, "center_crop: an image that has the right size already stays as it is")

def test_exercise_01_crop_takes_the_centre():
    ramp = np.broadcast_to(np.arange(20)[None, :, None] * 10, (16, 20, 3))
    close(crop(ramp, 16)[0, [0, -1], 0], [20, 170], "center_crop of 20 x 16 pixels, column i having the value 10 i: first and last column")
    close(crop(ramp.transpose(1, 0, 2), 16)[[0, -1], 0, 0], [20, 170], "center_crop of 16 x 20 pixels, row i having the value 10 i: first and last row")

def test_exercise_01_crop_halves_first():
    dot = np.zeros((32, 32, 3))
    dot[10, 10] = 255
    found = crop(dot, 16)[..., 0]
    must(found[5, 5] == 64 and (found > 0).sum() == 1, "center_crop of a white pixel on black, 32 to 16 pixels: one pixel of 64 (a box of four), "
         f"got {int(found[5, 5])}, and {int((found > 0).sum())} pixels that are not black")

def test_exercise_01_crop_last_scale():
    edge = np.zeros((24, 24, 3))
    edge[:, 12:] = 255
    close(crop(edge, 16)[0, 6:10, 0], [0, 12, 243, 255], "center_crop of a black and white edge, 24 to 16 pixels, BICUBIC: row 0, columns 6 to 9", atol=1)

# ---- 2 mix and velocity_target ----------------------------------------------------------------------------------------
X, E = torch.full((2, 3, 4, 4), 4.0), torch.full((2, 3, 4, 4), 8.0)

def test_exercise_02_mix():
    found = model.mix(X, E, torch.tensor([0.25, 1.0]))
    must(found is not None and found.shape == X.shape, f"mix returns the shape of x, {tuple(X.shape)}, got {getattr(found, 'shape', found)}")
    close(found[:, 0, 0, 0], [7.0, 4.0], "mix of image 4 and noise 8, at t = 0.25 and, for the second image, at t = 1")
    close(model.mix(X, E, torch.zeros(2)), E, "mix at t = 0 is the noise")
    must(bool((X == 4).all() and (E == 8).all()), "mix must not change the image and the noise it was given")

def test_exercise_02_mix_of_other_shapes():
    points = model.mix(torch.tensor([[4.0, 0.0], [4.0, 2.0]]), torch.tensor([[8.0, 8.0], [8.0, 8.0]]), torch.tensor([0.5, 0.25]))
    close(points, [[6.0, 4.0], [7.0, 6.5]], "mix of two points in the plane, (4,0) and (4,2), with the noise (8,8), at t = 0.5 and 0.25: any shape (B,...)")

def test_exercise_02_mix_velocity():
    close(model.velocity_target(X, E, torch.tensor([0.25, 0.75]))[:, 0, 0, 0], [-4.0, -4.0], "velocity_target of image 4 and noise 8, at any t")
    must(bool((X == 4).all() and (E == 8).all()), "velocity_target must not change the image and the noise it was given")

# ---- 3 conversion -----------------------------------------------------------------------------------------------------
KNOWN, AT, MIXED = {"x": 4.0, "e": 8.0, "v": -4.0}, 0.25, 7.0           # an image, noise and velocity that belong together, t, and their z
ENDS = [("x", "v", 1.0, 20, -20), ("x", "v", 0.99, 20, -20), ("x", "e", 1.0, -20, 20), ("e", "x", 0.0, -20, 20), ("e", "v", 0.0, -20, 20),
        ("e", "v", 0.01, -20, 20), ("v", "x", 1.0, 0, 1), ("v", "e", 0.0, 0, 1)]

def converted(kind, to, t, *args):
    """(u, b), looked at."""
    pair = model.conversion(kind, to, torch.tensor(t), *args)
    must(isinstance(pair, (tuple, list)) and len(pair) == 2, f"conversion returns two tensors, (u, b); from {kind} to {to} it returned {' '.join(str(pair).split())[:60]}")
    for name, part in zip("ub", pair):
        must(torch.is_tensor(part) and part.shape == (len(t),) and part.dtype == torch.float32,
             f"conversion from {kind} to {to}: {name} is a tensor, fp32 and of the shape of t, ({len(t)},); got {' '.join(str(part).split())[:60]}")
    return pair

@pytest.mark.parametrize("to", "xev")
@pytest.mark.parametrize("kind", "xev")
def test_exercise_03_conversion(kind, to):
    u, b = converted(kind, to, [AT])
    close(u * KNOWN[kind] + b * MIXED, [KNOWN[to]], f"conversion from {kind} to {to} at t = {AT}: {kind} is {KNOWN[kind]:g}, z is {MIXED:g}, so u {kind} + b z", 1e-4)

def test_exercise_03_conversion_of_many_times():
    close(converted("x", "x", [0.1, 0.5, 0.9])[0], [1, 1, 1], "conversion from x to x at three times: u")
    close(converted("v", "x", [0.1, 0.5, 0.9])[1], [1, 1, 1], "conversion from v to x at three times: b")

def test_exercise_03_conversion_clamps():
    for kind, to, t, u, b in ENDS:
        close(torch.stack(converted(kind, to, [t])).flatten(), [u, b], f"conversion from {kind} to {to} at t = {t:g}, t_eps = 0.05, near an end of the path: u and b "
              "(each one fraction, whose denominator alone is clamped)" if kind != "v" else f"conversion from v to {to} at t = {t:g}: nothing vanishes, so nothing is clamped: u and b")
    close(converted("x", "v", [1.0], 0.1)[0], [10.0], "conversion from x to v at t = 1 with t_eps = 0.1: u")

# ---- 4 patchify -------------------------------------------------------------------------------------------------------
IMAGE = torch.arange(2 * 2 * 4 * 6.).view(2, 2, 4, 6)                  # two images, two channels, four rows of six

def tokens():
    found = model.patchify(IMAGE, 2)
    must(torch.is_tensor(found) and found.shape == (2, 6, 8), f"patchify of (2,2,4,6) with p = 2 gives (2, 6, 8): batch, patches, p*p*C; got {getattr(found, 'shape', found)}")
    return found

def test_exercise_04_patchify_inside():
    close(tokens()[0, 0], [0, 24, 1, 25, 6, 30, 7, 31], "patchify, the first patch of the first image: its pixels row by row, and at each pixel the channels next to each other")

def test_exercise_04_patchify_order():
    close(tokens()[0, :, 0], [0, 2, 4, 12, 14, 16], "patchify, the first number of each patch: patches go left to right, then down")
    close(tokens()[1, :, 0], [48, 50, 52, 60, 62, 64], "patchify, the first number of each patch of the second image")

# ---- 5 rotary embedding -----------------------------------------------------------------------------------------------
def turn(x, angle):
    before = x.clone()
    angle = torch.as_tensor(angle)                        # L d/2
    cos, sin = angle.cos().repeat_interleave(2, dim=1), torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(1)
    found = model.rotate(x, cos[:, None], sin[:, None])
    unchanged(x, before, "rotate: x")
    must(torch.is_tensor(found) and found.shape == x.shape, f"rotate returns the shape of x, {tuple(x.shape)}, got {getattr(found, 'shape', found)}")
    return found

def test_exercise_05_rotate_quarter_turn():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    close(turn(x, [[math.pi / 2, 0.0]]).flatten(), [0, 1, 0, 1], "rotate: the first pair of channels, (1,0), turned by 90 degrees, is (0,1); the second, by 0, stays")
    close(turn(x, [[0.0, math.pi / 2]]).flatten(), [1, 0, -1, 0], "rotate: the second pair of channels, (0,1), turned by 90 degrees, is (-1,0); the first, by 0, stays")

def test_exercise_05_rotate_tokens():
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).view(1, 2, 1, 2)
    close(turn(x, [[0.0], [math.pi / 6]]).flatten(), [2, 0, 1.732051, 1], "rotate: every token has angles of its own; the second, (2,0), turned by 30 degrees")

def test_exercise_05_rotate_any():
    x, a, b = torch.randn(2, 5, 3, 8), torch.rand(5, 4) * 6, torch.rand(5, 4) * 6
    close(turn(x, a).square().sum(-1), x.square().sum(-1), "rotate keeps the length of every head's vector", 1e-4)
    close(turn(turn(x, a), b), turn(x, a + b), "rotate by one angle and then by another is rotate by their sum", 1e-4)

# ---- 6 adaLN block ----------------------------------------------------------------------------------------------------
def block(signals, x=2.0, c=((1.0,), (1.0,)), attention=lambda h, rope=None: 3 * h, drop=1.0):
    """A block whose parts are simple functions, and whose six signals are given, times c; its output, a number for each of two tokens."""
    part = model.Block(model.JiTConfig(**{**TINY, "rope": False})).eval()
    part.norm1.forward, part.norm2.forward = (lambda h: 10 * h), (lambda h: h / 2)
    vector = torch.tensor(signals, dtype=torch.float32).repeat_interleave(32)
    part.adaLN_modulation.forward = lambda c: c[..., :1] * vector if torch.is_tensor(c) else vector
    part.attn.forward, part.mlp.forward, part.dropout.forward = attention, lambda h: h + 1, lambda h: drop * h
    before = torch.full((1, 2, 32), x)
    given = before.clone()
    found = part(given, torch.tensor(c).expand(-1, 32)[None] if c else None, "the table")
    unchanged(given, before, "Block.forward: x")
    must(torch.is_tensor(found) and found.shape == (1, 2, 32), f"Block.forward returns the shape of x, got {getattr(found, 'shape', found)}")
    return found[0, :, 0]

PARTS = "Block.forward, input 2; the first norm multiplies by 10, attention triples, the second norm halves, the FFN adds 1"

def test_exercise_06_block_starts_as_the_identity():
    close(block([0, 0, 0, 0, 0, 0]), [2.0, 2.0], "Block.forward: at initialisation all signals, the gates too, are zero, so a block returns its input, 2")

def test_exercise_06_block_attention():
    close(block([0, 0, 1, 0, 0, 0]), [62.0, 62.0], f"{PARTS}; the first gate is 1, the other signals 0")
    close(block([1, 0.5, 2, 0, 0, 0]), [188.0, 188.0], f"{PARTS}; the first shift is 1, scale 0.5, gate 2, the FFN's signals 0")

def test_exercise_06_block_ffn():
    close(block([0, 0, 0, -1, 1, 0.5]), [3.0, 3.0], f"{PARTS}; the second shift is -1, scale 1, gate 0.5, attention's signals 0")
    close(block([1, 0.5, 2, -1, 1, 0.5]), [282.0, 282.0], f"{PARTS}; first shift, scale and gate 1, 0.5, 2, second -1, 1, 0.5: the FFN sees what attention has made")

def test_exercise_06_block_conditions():
    close(block([0, 0, 1, 0, 0, 0], c=((1.0,), (0.0,))), [62.0, 2.0], f"{PARTS}; a condition for each token: the first token's first gate is 1, all other signals are 0")
    close(block([0, 0, 1, 0, 0, 0], c=None), [62.0, 62.0], f"{PARTS}; adaLN_modulation gives one vector for all, (6 D,)")

def test_exercise_06_block_rope_and_dropout():
    seen = []
    block([0, 0, 1, 0, 0, 0], attention=lambda h, rope=None: seen.append(rope) or h)
    must(seen == ["the table"], "Block.forward: the rotary tables, rope, must reach the attention")
    close(block([0, 0, 1, 0, 0, 1], drop=0.0), [4.0, 4.0], f"{PARTS}; both gates are 1, and the block's dropout, for attention's output, lets nothing through")

# ---- 7 loss -----------------------------------------------------------------------------------------------------------
TIMES, ERRORS, WORLD = torch.tensor([0.1, 0.5, 0.9, 0.99]), torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1), {"x": 4.0, "e": 8.0, "v": 2.0, "z": 10.0}

def jit_loss(out=4.0, x=4.0):
    """diffusion_loss of four images x and predictions `out`, numbers or tensors, with z = 10."""
    full = lambda value: value if torch.is_tensor(value) else torch.full((4, 3, 8, 8), value)
    given = [full(out), full(x), full(10.0), TIMES.clone()]
    before = [value.clone() for value in given]
    found = train.diffusion_loss(*given)
    for name, value, was in zip(("x_pred", "x", "z", "t"), given, before):
        unchanged(value, was, f"diffusion_loss: {name}")
    must(torch.is_tensor(found) and found.shape == (4,), f"diffusion_loss returns one number per image, (4,); got {tuple(found.shape) if torch.is_tensor(found) else repr(found)[:60]}")
    return found

def test_exercise_07_loss():
    close(jit_loss(), torch.zeros(4), "diffusion_loss of a perfect prediction, four images, t = 0.1, 0.5, 0.9, 0.99; the clamp acts at the last: prediction and truth must be divided by the same")
    close(jit_loss(4.0 + ERRORS.expand(4, 3, 8, 8)), [0.012346, 0.16, 9.0, 64.0], "diffusion_loss of predictions off by 0.1, 0.2, 0.3, 0.4 at t = 0.1, 0.5, 0.9, 0.99: squared errors of the velocity; 1-t is at least 0.05", 2e-3)

def test_exercise_07_loss_is_fp32():
    found = jit_loss(torch.full((4, 3, 8, 8), 4.0, dtype=torch.bfloat16), 4.01)
    must(found.dtype == torch.float32, f"diffusion_loss of a bf16 prediction: the loss is fp32, got {found.dtype}")
    close(found[:2], [1.2346e-4, 4e-4], "diffusion_loss of a bf16 prediction, 4 instead of 4.01, at t = 0.1 and 0.5: the error, too, is computed in fp32", 1e-5)

def test_exercise_07_loss_has_a_gradient():
    out = torch.full((4, 3, 8, 8), 5.0, requires_grad=True)
    found = jit_loss(out)
    must(found.requires_grad, "diffusion_loss: no gradient reaches the prediction, so nothing could be learned")
    found.sum().backward()
    close(out.grad[1], torch.full((3, 8, 8), 2 / 192 * 4), "diffusion_loss of a prediction off by 1 at t = 0.5: the gradient at each of the 192 numbers of an image", 1e-6)

class Invented:
    """A path with an invented (u, b) under which the numbers of WORLD belong together, but for the last time, where it acts as if clamped."""

    def velocity_target(self, x, e, t):
        return torch.full((4, 3, 8, 8), WORLD["v"])

    def conversion(self, kind, to, t, t_eps=0.05):
        u = {"xv": 1 + t, "vx": 1 / (1 + t), "xe": 3 + 0 * t, "ex": 1 / 3 + 0 * t, "ev": 5 + 0 * t, "ve": 0.2 + 0 * t}.get(kind + to, torch.ones_like(t))
        return torch.where((t > 0.95) & (kind != to), u / 2, u), (WORLD[to] - u * WORLD[kind]) / WORLD["z"]

def cell(monkeypatch, errors, space, pred="x"):
    """grid_loss of a prediction that is off by `errors`, a number for each image, on an invented path."""
    monkeypatch.setitem(model.PATHS, "invented", Invented())
    full = lambda value: torch.full((4, 3, 8, 8), value)
    batch = {"x": full(WORLD["x"]), "e": full(WORLD["e"]), "t": TIMES.clone()}
    before = {name: value.clone() for name, value in batch.items()}
    found = train.grid_loss(full(WORLD[pred]) + errors, batch, model.JiTConfig(**TINY, pred=pred, path="invented"), space)
    for name in batch:
        unchanged(batch[name], before[name], f"grid_loss: batch[{name!r}]")
    return found

def test_exercise_07_loss_of_the_table(monkeypatch):
    for space in "xv":
        close(cell(monkeypatch, 0.0, space), torch.zeros(4), f"grid_loss in {space}-space of a perfect prediction: prediction and truth go through the same conversion")
    close(cell(monkeypatch, ERRORS, "x"), [0.01, 0.04, 0.09, 0.16], "grid_loss in x-space of an x-prediction, four images off by 0.1, 0.2, 0.3, 0.4 everywhere")
    close(cell(monkeypatch, ERRORS, "v"), [0.0121, 0.09, 0.3249, 0.158404],
          "grid_loss in v-space of an x-prediction, four images off by 0.1, 0.2, 0.3, 0.4; the path's u from x to v is 1.1, 1.5, 1.9, 0.995 here")

def test_exercise_07_loss_of_other_predictions(monkeypatch):
    for pred in "ve":
        close(cell(monkeypatch, ERRORS, pred, pred), [0.01, 0.04, 0.09, 0.16], f"grid_loss in {pred}-space of an {pred}-prediction, four images off by 0.1, 0.2, 0.3, 0.4: what is it to be compared with?")

# ---- 8 EMA ------------------------------------------------------------------------------------------------------------
def averages():
    net = torch.nn.Linear(3, 2)
    ema = [{k: torch.zeros_like(v) for k, v in net.state_dict().items()} for _ in range(2)]
    kept = ema[0]["weight"]
    trainer = types.SimpleNamespace(net=net, weights=net.state_dict(), ema=ema, parameters=list(net.parameters()), options=types.SimpleNamespace(ema=(0.9, 0.5)), step=1000)
    train.Trainer.update_ema(trainer)
    train.Trainer.update_ema(trainer)
    must(trainer.ema is ema and ema[0]["weight"] is kept and bool(kept.abs().sum() > 0), "update_ema changes the averages in place, the tensors of self.ema stay the same objects")
    return net, ema

def test_exercise_08_ema():
    net, ema = averages()
    close(ema[0]["weight"] / net.weight, torch.full((2, 3), 0.19), "update_ema twice, from zero, with decay 0.9: the average as a part of the weights", 1e-4)
    close(ema[1]["weight"] / net.weight, torch.full((2, 3), 0.75), "update_ema twice, from zero, with decay 0.5, the second average's: the average as a part of the weights", 1e-4)

def test_exercise_08_ema_of_all():
    net, ema = averages()
    close(ema[0]["bias"] / net.bias, torch.full((2,), 0.19), "update_ema averages biases, too", 1e-4)

# ---- 9 training step --------------------------------------------------------------------------------------------------
class Scaler:
    """GradScaler with a fixed factor, which writes down when it is called."""

    def __init__(self, parameters, factor):
        self.parameters, self.factor, self.done = parameters, factor, []

    def scale(self, loss):
        self.done.append("scale")
        return loss * self.factor

    def unscale_(self, optimizer):
        self.done.append("unscale_")
        for p in self.parameters:
            p.grad /= self.factor

    def step(self, optimizer):
        self.done.append("step")
        optimizer.step()

    def update(self):
        self.done.append("update")

class Toy(train.Trainer):
    """One weight, beginning at 1; the loss is weight * image, so the gradient is the image; plain SGD.  Writes down what is done."""

    def __init__(self, rank=0, world=1, factor=1.0):
        self.net, self.given, self.last, self.averaged, self.inside, self.places = torch.nn.Linear(1, 1, bias=False), [], [], [], False, []
        torch.nn.init.ones_(self.net.weight)
        self.forward, self.parameters, self.world, self.rank = self.net, list(self.net.parameters()), world, rank
        self.optimizer, self.scaler = torch.optim.SGD(self.parameters, lr=100.0, fused=True), Scaler(self.parameters, factor)
        self.step, self.skipped, self.bad, self.log = 0, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), train.Log("cpu")

    def indices(self):
        return range(self.rank, self.options.batch_size, self.world)

    def lr(self, step):
        return 0.5 if step == 0 else 0.25

    def loss(self, index, images, labels):
        self.given.append(index)
        self.places.append(self.inside)
        loss = (self.net.weight * images).sum()
        loss.register_hook(lambda gradient: self.places.append(self.inside))
        return loss

    @contextmanager
    def summing(self, last):
        self.last.append(last)
        self.inside = True
        yield
        self.inside = False

    def update_ema(self):
        self.averaged.append(self.net.weight.item())

    def run(self, *images):
        """One step, each image a micro-batch of its own; the next step's are already waiting.  `left`: how many are afterwards."""
        self.options = types.SimpleNamespace(batch_size=self.world * len(images), micro_batch=1)
        feed = iter([(torch.tensor([float(image)]), torch.tensor([0])) for image in images * 2])
        self.train_step(feed)
        self.left = len(list(feed))
        return self

def test_exercise_09_step_moves_the_weights():
    close(Toy().run(2.0).net.weight.flatten(), [0.0], "train_step, weight 1, gradient 2, the learning rate self.lr gives is 0.5: the weight after the step")

def test_exercise_09_step_counts():
    toy = Toy().run(1.0)
    must(toy.step == 1, f"train_step counts the step: self.step was 0 and is {toy.step}")

def test_exercise_09_step_accumulates():
    close(Toy().run(2.0, 1.0, 0.0).net.weight.flatten(), [0.5], "train_step, weight 1, three micro-batches with gradients 2, 1, 0, whose mean counts, learning rate 0.5: the weight after the step")

def test_exercise_09_step_begins_anew():
    close(Toy().run(1.0).run(1.0).net.weight.flatten(), [0.25], "train_step twice, gradient 1, learning rates 0.5 and 0.25: the weight (are the old gradients gone?)")

def test_exercise_09_step_micro_batches():
    toy = Toy(rank=1, world=2).run(2.0, 1.0, 0.0)
    must(toy.left == 3, f"train_step takes this process's 3 micro-batches from the feed and leaves the next step's 3 there; it left {toy.left}")
    must(toy.given == [1, 3, 5], f"train_step, the second of two processes: self.loss is given the number of each micro-batch, which self.indices() lists, 1, 3, 5; got {toy.given}")

def test_exercise_09_step_sums():
    toy = Toy().run(2.0, 1.0, 0.0)
    must(toy.last == [False, False, True], f"train_step: processes exchange gradients with the last micro-batch only, so self.summing(last) is given False, False, True; got {toy.last}")
    must(all(toy.places), "train_step: forward and backward pass both go inside `with self.summing(last)`")

def test_exercise_09_step_scales():
    toy, calls = Toy(factor=2.0).run(1.0, 1.0), ["scale", "scale", "unscale_", "update"]
    done = [name for name in toy.scaler.done if name != "step"]        # its step is as good as the optimizer's
    must(done == calls, f"train_step, 2 micro-batches: self.scaler is called in the order {', '.join(calls)}; got {', '.join(done) or 'no call'}")
    close(toy.net.weight.flatten(), [0.5], "train_step, weight 1, gradient 1, scaled by 2 and unscaled, learning rate 0.5: the weight after the step")
    close(toy.log.sums[-1, 0], 1.0, "train_step, gradient 1, scaled by 2: what gradient_norm has put into the log, taken after unscaling")

def test_exercise_09_step_measures():
    times = int(Toy().run(1.0, 1.0).log.sums[-1, 1])
    must(times == 1, f"train_step calls gradient_norm once a step, it goes into the log; it was called {times} times")

def test_exercise_09_step_averages():
    toy = Toy().run(1.0, 1.0)
    must(len(toy.averaged) == 1, f"train_step calls update_ema once a step; it was called {len(toy.averaged)} times")
    close(toy.averaged, [0.5], "train_step: update_ema must see the weights after the step")

def test_exercise_09_step_survives_a_bad_gradient():
    toy = Toy().run(math.inf).run(math.nan)
    close(toy.net.weight.flatten(), [1.0], "train_step: a gradient that is not finite must not reach the weights")
    must((toy.skipped, toy.bad) == (2, 2), f"train_step, two steps, both bad: skipped and bad are 2, 2; got {toy.skipped}, {toy.bad}")
    toy.run(1.0)
    must((toy.skipped, toy.bad) == (2, 0), f"train_step, a good step after two bad ones: skipped and bad are 2, 0; got {toy.skipped}, {toy.bad}")

# ---- 10 guidance ------------------------------------------------------------------------------------------------------
def guided(monkeypatch, t, *args, **more):
    """guided() where the velocity is label times z: 3 and 8 with class, 10 and 20 without.  Returns (it, sizes of the batches)."""
    seen, z = [], torch.tensor([[1.0], [2.0]])
    def predict(net, z, t, labels, to="v", t_eps=None):
        must(isinstance(t, float), f"guided: predict takes the time as a float, it got {type(t).__name__}")
        must(t_eps == 0.02 and to == more.get("to", "v"), f"guided: `to` and t_eps, {more.get('to', 'v')!r} and 0.02 here, must reach predict; it got {to!r} and {t_eps}")
        seen.append(len(z))
        return labels.float().view(-1, 1) * z
    monkeypatch.setattr(sample, "predict", predict)
    net = types.SimpleNamespace(config=types.SimpleNamespace(num_classes=10))
    found = sample.guided(net, z, t, torch.tensor([3, 4]), *args, t_eps=0.02, **more)
    unchanged(z, torch.tensor([[1.0], [2.0]]), "guided: z")
    return found, seen

OFF, ON, CASE = [[3.0], [8.0]], [[-11.0], [-16.0]], "guided of two images, whose velocities are 3 and 8 with class, 10 and 20 without (label num_classes)"

def test_exercise_10_guidance(monkeypatch):
    close(guided(monkeypatch, 0.5, 1.0)[0], OFF, f"{CASE}: with w = 1")
    close(guided(monkeypatch, 0.5, 0.0)[0], [[10.0], [20.0]], f"{CASE}: with w = 0")
    close(guided(monkeypatch, 0.5, 3.0)[0], ON, f"{CASE}: with w = 3, beyond the class and away from what has none")
    close(guided(monkeypatch, 0.5, 3.0, to="x")[0], ON, f"{CASE}: with w = 3 and to='x': images mix as velocities do")

def test_exercise_10_guidance_passes(monkeypatch):
    for w, interval, why in ((1.0, (0.0, 1.0), "with w = 1"), (0.0, (0.0, 1.0), "with w = 0"), (3.0, (0.6, 1.0), "outside its interval")):
        seen = guided(monkeypatch, 0.5, w, interval)[1]
        must(seen == [2], f"guided of 2 images {why} needs one pass with 2 images; it made passes with {seen}")
    seen = guided(monkeypatch, 0.5, 3.0)[1]
    must(seen == [4], f"guided of 2 images with w = 3: both halves go through the network as one batch of 4; it made passes with {seen}")

def test_exercise_10_guidance_interval(monkeypatch):
    close(guided(monkeypatch, 0.05, 3.0, (0.1, 1.0))[0], OFF, f"{CASE}: w = 3 at t = 0.05, interval 0.1 to 1: outside, as with w = 1")
    close(guided(monkeypatch, 0.9, 3.0, (0.1, 0.8))[0], OFF, f"{CASE}: w = 3 at t = 0.9, interval 0.1 to 0.8: outside, as with w = 1")
    close(guided(monkeypatch, 0.5, 3.0, (0.1, 0.8))[0], ON, f"{CASE}: w = 3 at t = 0.5, interval 0.1 to 0.8: inside")
    for t in (0.3, 0.7):
        close(guided(monkeypatch, t, 3.0, (0.3, 0.7))[0], OFF, f"{CASE}: w = 3 at t = {t}, interval 0.3 to 0.7: an end is outside")
    close(guided(monkeypatch, 0.0, 3.0, (0.0, 0.7))[0], ON, f"{CASE}: w = 3 at t = 0, interval 0 to 0.7: an interval that begins at 0 includes t = 0")

# ---- 11, 12 solvers ---------------------------------------------------------------------------------------------------
def stepped(step, t, t_next):
    """A step from z = 2 where v(z, t) is 4 z + t: (the new z, the times at which v was asked for)."""
    times, z = [], torch.tensor([2.0])
    found = step(z, t, t_next, lambda z, t: times.append(t) or z * 4 + t)
    unchanged(z, torch.tensor([2.0]), f"{step.__name__}: z")
    return found, times

def test_exercise_11_euler():
    close(stepped(sample.euler_step, 0.25, 0.5)[0], [4.0625], "euler_step from z = 2 at t = 0.25 to 0.5, where v(z, t) is 4 z + t")

EULER = {0.25: 4.0625, 0.9: 2.712, 0.5: 6.25}             # t: where euler_step arrives in the tests below

def heun(monkeypatch, t, t_next):
    monkeypatch.setattr(sample, "euler_step", lambda z, t, t_next, v: v(z, t) * 0 + EULER.get(t, math.nan))
    return stepped(sample.heun_step, t, t_next)

def test_exercise_12_heun(monkeypatch):
    found, times = heun(monkeypatch, 0.25, 0.5)
    close(found, [5.125], "heun_step from z = 2 at t = 0.25 to 0.5, where v(z, t) is 4 z + t")
    must(sorted(times) == [0.25, 0.5], f"heun_step from t = 0.25 to 0.5 asks for the velocity twice, at both ends; it asked at {times}")
    close(heun(monkeypatch, 0.9, 0.98)[0], [2.82912], "heun_step from z = 2 at t = 0.9 to 0.98, which is not the last step, where v(z, t) is 4 z + t")

def test_exercise_12_heun_last_step(monkeypatch):
    found = heun(monkeypatch, 0.25, 0.5)[0]
    must(abs(float(found) - EULER[0.25]) > 1e-5, f"heun_step: the last step alone is Euler's; from z = 2 at t = 0.25 to 0.5, where v(z, t) is 4 z + t, it is at {EULER[0.25]}, too")
    found, times = heun(monkeypatch, 0.5, 1.0)
    must(1.0 not in times, f"heun_step: at t = 1 the velocity is not defined, so the last step, to t_next = 1, must not ask for it; it asked at {times}")
    close(found, [6.25], "heun_step from z = 2 at t = 0.5 to 1, the last step, where v(z, t) is 4 z + t")
    must(times == [0.5], f"heun_step: the last step needs one velocity; it asked for it {len(times)} times")

# ---- 13 Frechet distance ----------------------------------------------------------------------------------------------
def distance(mu1, sigma1, mu2, sigma2):
    try:
        return evaluate.frechet_distance(*(np.asarray(value, dtype=float) for value in (mu1, sigma1, mu2, sigma2)))
    except (np.linalg.LinAlgError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        return np.nan                                                  # roots of negative numbers on the way

def test_exercise_13_frechet_of_means():
    close(distance(np.zeros(3), np.eye(3), np.zeros(3) + 2, np.eye(3)), 12.0, "frechet_distance, equal covariances, means that differ by (2,2,2)")

def test_exercise_13_frechet_of_covariances():
    close(distance(np.zeros(3), np.diag([1, 4, 9]), np.zeros(3), np.diag([4, 4, 1])), 5.0, "frechet_distance, equal means, standard deviations (1,2,3) and (2,2,1) along the axes")
    close(distance(np.zeros(2), [[2, 1], [1, 2]], np.zeros(2), [[1, 0], [0, 4]]), 0.7712205, "frechet_distance, equal means, covariances that do not commute")

def test_exercise_13_frechet_of_singular_covariances():
    thin = np.outer([1, 2, 3], [1, 2, 3])
    close(distance(np.zeros(3), thin, np.ones(3), thin), 3.0, "frechet_distance, equal covariances of rank one, means that differ by (1,1,1)", 1e-4)
    for seed in range(10):
        few = np.random.default_rng(seed).normal(size=(4, 8))
        close(distance(np.zeros(8), few.T @ few, np.ones(8), few.T @ few), 8.0, "frechet_distance, equal covariances, 8 x 8 but of rank 4, means that differ by 1 in each of the eight", 1e-4)

# ---- 14 Inception score -----------------------------------------------------------------------------------------------
def test_exercise_14_inception_ends():
    close(evaluate.inception_score(np.zeros((100, 4))), [1.0, 0.0], "inception_score (mean, std) of a network that never decides")
    certain = np.eye(4)[np.arange(4000) % 4] * 100
    close(evaluate.inception_score(certain)[0], 4.0, "inception_score of four equally frequent classes, each image certain", 0.05)

def test_exercise_14_inception_parts():
    logits = np.random.default_rng(0).normal(size=(40, 3))
    close(evaluate.inception_score(logits), [1.158295, 0.052875], "inception_score of 40 images and 3 classes: mean and std over the ten parts of the shuffle, each with a mean p(y) of its own")
