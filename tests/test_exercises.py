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
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    try:
        found = (found.detach() if torch.is_tensor(found) else torch.tensor(np.array(found, dtype=float))).double()
    except (TypeError, ValueError):
        must(False, f"{message}; numbers were expected, got {type(found).__name__} {str(found)[:60]}")
    must(found.shape == wanted.shape, f"{message}; expected the shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
    shown = [f"{[round(v, 4) for v in value.flatten().tolist()]}" if wanted.numel() <= 8 else "" for value in (wanted, found)]
    numbers = f"expected {shown[0]}, got {shown[1]}" if shown[0] else f"the largest difference is {(found - wanted).abs().max().item():.3g}"
    must(torch.allclose(found, wanted, atol=atol, rtol=0), f"{message}; {numbers}")

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

def test_exercise_02_mix_linear():
    found = model.mix("linear", X, E, torch.tensor([0.25, 1.0]))
    must(found is not None and found.shape == X.shape, f"mix returns the shape of x, {tuple(X.shape)}, got {getattr(found, 'shape', found)}")
    close(found[:, 0, 0, 0], [7.0, 4.0], "mix on the linear path, image 4 and noise 8, at t = 0.25 and, for the second image, at t = 1")
    close(model.mix("linear", X, E, torch.zeros(2)), E, "mix at t = 0 is the noise")
    must(bool((X == 4).all() and (E == 8).all()), "mix must not change the image and the noise it was given")

def test_exercise_02_mix_cosine():
    close(model.mix("cosine", X, E, torch.full((2,), 1 / 3))[:, 0, 0, 0], [8.9282, 8.9282], "mix on the cosine path at t = 1/3, image 4 and noise 8", 1e-3)

def test_exercise_02_mix_velocity():
    close(model.velocity_target("linear", X, E, torch.tensor([0.25, 0.75]))[:, 0, 0, 0], [-4.0, -4.0], "velocity_target on the linear path, image 4 and noise 8, at any t")
    close(model.velocity_target("cosine", X, E, torch.full((2,), 1 / 3))[:, 0, 0, 0], [-0.8418, -0.8418], "velocity_target on the cosine path at t = 1/3", 1e-3)
    must(bool((X == 4).all() and (E == 8).all()), "velocity_target must not change the image and the noise it was given")

# ---- 3 conversion -----------------------------------------------------------------------------------------------------
WORKED = {"linear": (0.25, {"x": 4.0, "e": 8.0, "v": -4.0}, 7.0),      # path: (t, an image, noise and velocity that belong together, their z)
          "cosine": (1 / 3, {"x": 4.0, "e": 8.0, "v": -0.841787}, 8.928203)}

@pytest.mark.parametrize("path", WORKED)
@pytest.mark.parametrize("kind", "xev")
def test_exercise_03_conversion(kind, path):
    t, known, z = WORKED[path]
    for to in known:
        answer = model.conversion(kind, to, torch.tensor([t]), path)
        must(isinstance(answer, tuple) and len(answer) == 2, f"conversion returns a pair, (u, w); from {kind} to {to} it returned {answer}")
        u, w = answer
        close(u * known[kind] + w * z, [known[to]], f"conversion from {kind} to {to} on the {path} path at t = {t:.2f}: {kind} is {known[kind]:g}, z is {z:g}, so u {kind} + w z", 1e-4)

def test_exercise_03_conversion_of_many_times():
    for kind, to in (("x", "v"), ("v", "x"), ("x", "x")):
        for part in model.conversion(kind, to, torch.tensor([0.1, 0.5, 0.9]), "linear"):
            must(torch.is_tensor(part) and part.shape == (3,) and part.dtype == torch.float32, f"conversion from {kind} to {to}: u and w are fp32 and have the shape of t, got {part}")

def test_exercise_03_conversion_clamps():
    close(model.conversion("x", "v", torch.tensor([1.0]), "linear")[0], [20.0], "conversion from x to v at t = 1: the denominator that vanishes is clamped at t_eps = 0.05, so u")
    close(model.conversion("e", "v", torch.tensor([0.0]), "linear")[0], [-20.0], "conversion from e to v at t = 0: the denominator that vanishes is clamped at t_eps = 0.05, so u")
    close(model.conversion("x", "v", torch.tensor([1.0]), "linear", 0.1)[0], [10.0], "conversion from x to v at t = 1 with t_eps = 0.1: u")
    for part in model.conversion("v", "x", torch.tensor([1.0]), "linear"):
        must(bool(torch.isfinite(part).all()) and part.abs().max() < 1.01, "conversion from v to x: nothing is divided by a number that vanishes, so nothing is clamped")

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
    found = model.rotate(x, torch.as_tensor(angle).cos(), torch.as_tensor(angle).sin())
    must(torch.is_tensor(found) and found.shape == x.shape, f"rotate returns the shape of x, {tuple(x.shape)}, got {getattr(found, 'shape', found)}")
    return found

def test_exercise_05_rotate_quarter_turn():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    close(turn(x, [[math.pi / 2, 0.0]]).flatten(), [0, 1, 0, 1], "rotate: the first pair of channels, (1,0), turned by 90 degrees, is (0,1); the second, by 0, stays")
    close(turn(x, [[0.0, math.pi / 2]]).flatten(), [1, 0, -1, 0], "rotate: the second pair of channels, (0,1), turned by 90 degrees, is (-1,0); the first, by 0, stays")

def test_exercise_05_rotate_tokens():
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).view(1, 1, 2, 2)
    close(turn(x, [[0.0], [math.pi / 6]]).flatten(), [2, 0, 1.732051, 1], "rotate: every token has angles of its own; the second, (2,0), turned by 30 degrees")

def test_exercise_05_rotate_any():
    x, a, b = torch.randn(2, 3, 5, 8), torch.rand(5, 4) * 6, torch.rand(5, 4) * 6
    close(turn(x, a).square().sum(-1), x.square().sum(-1), "rotate keeps the length of every head's vector", 1e-4)
    close(turn(turn(x, a), b), turn(x, a + b), "rotate by one angle and then by another is rotate by their sum", 1e-4)

# ---- 6 adaLN block ----------------------------------------------------------------------------------------------------
def block(signals, attention=lambda h, rope=None: 3 * h, mlp=lambda h: h + 1, x=2.0):
    """A block whose six signals are given, whose norms do nothing, and whose parts are simple functions; its output for x."""
    part = model.Block(model.JiTConfig(**{**TINY, "rope": False}), 0.0).eval()
    part.norm1, part.norm2 = torch.nn.Identity(), torch.nn.Identity()
    part.adaLN_modulation.forward = lambda c: torch.tensor(signals, dtype=torch.float32).repeat_interleave(32).expand(1, 1, -1)
    part.attn.forward, part.mlp.forward = attention, mlp
    found = part(torch.full((1, 2, 32), x), torch.zeros(1, 1, 32), "the table")
    must(torch.is_tensor(found) and found.shape == (1, 2, 32), f"Block.forward returns the shape of x, got {getattr(found, 'shape', found)}")
    return found[0, 0, :1]

def test_exercise_06_block_starts_as_the_identity():
    close(block([0, 0, 0, 0, 0, 0]), [2.0], "Block.forward: at initialisation all signals, the gates too, are zero, so a block returns its input, 2")

def test_exercise_06_block_attention():
    close(block([0, 0, 1, 0, 0, 0]), [8.0], "Block.forward, input 2, attention triples: with the first gate 1, the others 0, input plus attention")
    close(block([1, 0.5, 2, 0, 0, 0]), [26.0], "Block.forward, input 2, attention triples, first shift 1, scale 0.5, gate 2; the FFN's signals 0")

def test_exercise_06_block_ffn():
    close(block([0, 0, 0, -1, 1, 0.5]), [4.0], "Block.forward, input 2, the FFN adds 1, its shift -1, scale 1, gate 0.5; attention's signals 0")
    close(block([1, 0.5, 2, -1, 1, 0.5]), [52.0], "Block.forward, input 2: both together; the FFN sees what attention has made")

def test_exercise_06_block_rope_and_dropout():
    seen = []
    block([0, 0, 1, 0, 0, 0], attention=lambda h, rope=None: seen.append(rope) or h)
    must(seen == ["the table"], "Block.forward: the rotary tables, rope, must reach the attention")
    part = model.Block(model.JiTConfig(**{**TINY, "rope": False, "mlp_ratio": 1.0}), 0.0)
    part.norm1 = part.norm2 = torch.nn.Identity()
    part.adaLN_modulation.forward = lambda c: torch.tensor([0, 0, 1, 0, 0, 0.0]).repeat_interleave(32).expand(1, 1, -1)
    part.dropout.forward = lambda h: h * 0
    close(part(torch.ones(1, 2, 32), torch.zeros(1, 1, 32)), torch.ones(1, 2, 32), "Block.forward: with a dropout that lets nothing through attention adds nothing")

# ---- 7 loss -----------------------------------------------------------------------------------------------------------
TIMES = torch.tensor([0.1, 0.5, 0.9, 0.99])

def losses(monkeypatch, error, *spaces, pred="x", dtype=torch.float32):
    """diffusion_loss of a prediction that is off by `error` everywhere; the functions it needs are stand-ins."""
    unit = lambda t: (torch.ones_like(t), 0 * t)
    scale = lambda t: (1 / (1 - t).clamp_min(0.05), -1 / (1 - t).clamp_min(0.05))
    monkeypatch.setattr(model, "conversion", lambda kind, to, t, path="linear", t_eps=0.05: unit(t) if kind == to else scale(t))
    monkeypatch.setattr(model, "velocity_target", lambda path, x, e, t: x * 0 + 7)
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 3, 8, 8, generator=generator), "e": torch.randn(4, 3, 8, 8, generator=generator), "t": TIMES}
    truth = batch[pred] if pred != "v" else torch.full((4, 3, 8, 8), 7.0)
    found = train.diffusion_loss((truth + error).to(dtype), batch, model.JiTConfig(**TINY, pred=pred), *spaces)
    must(found is not None, "diffusion_loss returned nothing")
    must(isinstance(found, (list, tuple)) and len(found) == len(spaces), f"diffusion_loss returns a list, one tensor for each of the {len(spaces)} spaces asked for; "
         f"it returned {'a tensor of the shape ' + str(tuple(found.shape)) if torch.is_tensor(found) else repr(found)[:60]}")
    return found

def test_exercise_07_loss_of_a_perfect_prediction(monkeypatch):
    for found in losses(monkeypatch, 0.0, "x", "v"):
        close(found, torch.zeros(4), "diffusion_loss: a perfect prediction has loss zero at every t, one number per image")

def test_exercise_07_loss_in_x(monkeypatch):
    close(losses(monkeypatch, 0.1, "x")[0], [0.01] * 4, "diffusion_loss in x-space of an x-prediction off by 0.1 everywhere, four images")

def test_exercise_07_loss_in_v(monkeypatch):
    close(losses(monkeypatch, 0.1, "x", "v")[1], [0.0123457, 0.04, 1.0, 4.0], "diffusion_loss in v-space of an x-prediction off by 0.1 everywhere, at t = 0.1, 0.5, 0.9, 0.99")

def test_exercise_07_loss_of_other_predictions(monkeypatch):
    close(losses(monkeypatch, 0.1, "v", pred="v")[0], [0.01] * 4, "diffusion_loss in v-space of a v-prediction off by 0.1: what is it to be compared with?")
    close(losses(monkeypatch, 0.1, "e", pred="e")[0], [0.01] * 4, "diffusion_loss in e-space of an e-prediction off by 0.1: what is it to be compared with?")

def test_exercise_07_loss_is_fp32(monkeypatch):
    found = losses(monkeypatch, 0.1, "x", dtype=torch.bfloat16)[0]
    must(found.dtype == torch.float32, f"diffusion_loss of a bf16 prediction: the loss is fp32, got {found.dtype}")

# ---- 8 EMA ------------------------------------------------------------------------------------------------------------
def averages():
    net = torch.nn.Linear(3, 2)
    ema = [{k: torch.zeros_like(v) for k, v in net.state_dict().items()} for _ in range(2)]
    kept = ema[0]["weight"]
    trainer = types.SimpleNamespace(net=net, ema=ema, options=types.SimpleNamespace(ema=(0.9, 0.5)))
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
    """GradScaler with a factor of 1024, which writes down when it is called."""

    def __init__(self, parameters, done):
        self.parameters, self.done = parameters, done

    def scale(self, loss):
        return loss * 1024.0

    def unscale_(self, optimizer):
        self.done.append("unscale_")
        for p in self.parameters:
            p.grad /= 1024.0

    def step(self, optimizer):
        self.done.append("step")
        optimizer.step()

    def update(self):
        self.done.append("update")

class Toy(train.Trainer):
    """One weight, beginning at 1; the loss is weight * image, so the gradient is the image; plain SGD."""

    def __init__(self):
        self.net, self.done, self.inside = torch.nn.Linear(1, 1, bias=False), [], False
        torch.nn.init.ones_(self.net.weight)
        self.parameters = list(self.net.parameters())
        self.optimizer, self.scaler = torch.optim.SGD(self.parameters, lr=100.0), Scaler(self.parameters, self.done)
        self.step, self.skipped, self.bad, self.sums = 0, 0, 0, torch.zeros(7, 2, dtype=torch.float64)

    def indices(self):
        return range(self.micro_batches)

    def lr(self, step):
        return 0.5 if step == 0 else 0.25

    def loss(self, index, images, labels):
        must(index == labels, f"train_step: micro-batch {labels} of the step was given to self.loss as number {index}")
        must(self.inside, "train_step: the forward and backward pass go inside `with self.summing(...)`")
        return (self.net.weight * images).sum()

    @contextmanager
    def summing(self, last):
        self.done.append(f"last={last}")
        self.inside = True
        yield
        self.inside = False

    def update_ema(self):
        self.done.append("ema")
        self.averaged = self.net.weight.item()

    def run(self, *images):
        """One step, each image a micro-batch of its own."""
        self.micro_batches = len(images)
        self.done.clear()
        feed = iter([(torch.tensor([float(image)]), index) for index, image in enumerate(images)])
        self.train_step(feed)
        must(next(feed, None) is None, f"train_step must take all {len(images)} micro-batches of the step from the feed")
        return self

def test_exercise_09_step_moves_the_weights():
    toy = Toy().run(1.0)
    close(toy.net.weight.flatten(), [0.5], "train_step, weight 1, gradient 1, the learning rate self.lr gives is 0.5: the weight after the step")
    must(toy.step == 1, f"train_step counts the step: self.step was 0 and is {toy.step}")

def test_exercise_09_step_accumulates():
    toy = Toy().run(2.0, 1.0, 0.0)
    close(toy.net.weight.flatten(), [0.5], "train_step, weight 1, three micro-batches with gradients 2, 1, 0, learning rate 0.5: the weight after the step")
    must([entry for entry in toy.done if entry.startswith("last")] == ["last=False", "last=False", "last=True"],
         "train_step: processes exchange gradients with the last micro-batch only, so self.summing(last) is True for that one")

def test_exercise_09_step_begins_anew():
    toy = Toy().run(1.0).run(1.0)
    close(toy.net.weight.flatten(), [0.25], "train_step twice, gradient 1, learning rates 0.5 and 0.25: the weight (are the old gradients gone?)")

def test_exercise_09_step_averages():
    toy = Toy().run(1.0)
    must(toy.done.count("ema") == 1, f"train_step calls update_ema once a step; it was called {toy.done.count('ema')} times")
    close([toy.averaged], [0.5], "train_step: update_ema must see the weights after the step")
    must([entry for entry in toy.done if entry in ("unscale_", "step", "update")] == ["unscale_", "step", "update"],
         f"train_step: the scaler's calls come in the order unscale_, step, update; got {toy.done}")
    close([toy.sums[-1, 0]], [1.0], "train_step: gradient_norm is taken of the unscaled gradients")

def test_exercise_09_step_survives_a_bad_gradient():
    toy = Toy().run(math.inf).run(math.nan)
    close(toy.net.weight.flatten(), [1.0], "train_step: a gradient that is not finite must not reach the weights")
    must("ema" not in toy.done, "train_step: after a gradient that is not finite the averages stay as they are")
    must((toy.step, toy.skipped, toy.bad) == (2, 2, 2), f"train_step, two steps, both bad: step, skipped and bad are 2, 2, 2; got {toy.step}, {toy.skipped}, {toy.bad}")
    toy.run(1.0)
    must((toy.step, toy.skipped, toy.bad) == (3, 2, 0), f"train_step, a good step after two bad ones: step, skipped and bad are 3, 2, 0; got {toy.step}, {toy.skipped}, {toy.bad}")

# ---- 10 guidance ------------------------------------------------------------------------------------------------------
def guided(monkeypatch, *args):
    """guided_velocity where the velocity is the label: 3 and 4 with class, 10 without.  Returns (it, images that went through)."""
    seen = []
    monkeypatch.setattr(sample, "velocity", lambda net, z, t, labels, t_eps: seen.append(len(z)) or labels.float().view(-1, 1) * z)
    net = types.SimpleNamespace(config=types.SimpleNamespace(num_classes=10))
    return sample.guided_velocity(net, torch.ones(2, 1), args[0], torch.tensor([3, 4]), *args[1:]), sum(seen)

def test_exercise_10_guidance(monkeypatch):
    case = "guided_velocity, the velocity being 3 and 4 with class and 10 without (label num_classes)"
    close(guided(monkeypatch, 0.5, 1.0)[0], [[3.0], [4.0]], f"{case}: with w = 1")
    close(guided(monkeypatch, 0.5, 0.0)[0], [[10.0], [10.0]], f"{case}: with w = 0")
    close(guided(monkeypatch, 0.5, 3.0)[0], [[-11.0], [-8.0]], f"{case}: with w = 3, beyond the class and away from what has none")

def test_exercise_10_guidance_skips(monkeypatch):
    for w in (1.0, 0.0):
        passed = guided(monkeypatch, 0.5, w)[1]
        must(passed == 2, f"guided_velocity of 2 images with w = {w:g} needs one pass, 2 images; {passed} went through the network")
    passed = guided(monkeypatch, 0.05, 3.0, (0.1, 1.0))[1]
    must(passed == 2, f"guided_velocity of 2 images outside its interval needs one pass, 2 images; {passed} went through the network")

def test_exercise_10_guidance_interval(monkeypatch):
    case, off, on = "guided_velocity with w = 3", [[3.0], [4.0]], [[-11.0], [-8.0]]
    close(guided(monkeypatch, 0.05, 3.0, (0.1, 1.0))[0], off, f"{case} at t = 0.05, interval 0.1 to 1: outside, as with w = 1")
    close(guided(monkeypatch, 0.9, 3.0, (0.1, 0.8))[0], off, f"{case} at t = 0.9, interval 0.1 to 0.8: outside, as with w = 1")
    close(guided(monkeypatch, 0.5, 3.0, (0.1, 0.8))[0], on, f"{case} at t = 0.5, interval 0.1 to 0.8: inside")
    for t in (0.3, 0.7):
        close(guided(monkeypatch, t, 3.0, (0.3, 0.7))[0], off, f"{case} at t = {t}, interval 0.3 to 0.7: an end is outside")
    close(guided(monkeypatch, 0.0, 3.0, (0.0, 0.7))[0], on, f"{case} at t = 0, interval 0 to 0.7: an interval that begins at 0 includes t = 0")

# ---- 11, 12 solvers ---------------------------------------------------------------------------------------------------
def slope(times):
    """v(z, t) = 4 z + t, and the times at which it was asked for."""
    return lambda z, t: times.append(t) or z * 4 + t

def test_exercise_11_euler():
    close(sample.euler_step(torch.tensor([2.0]), 0.25, 0.5, slope([])), [4.0625], "euler_step from z = 2 at t = 0.25 to 0.5, where v(z, t) is 4 z + t")

def test_exercise_12_heun():
    times = []
    close(sample.heun_step(torch.tensor([2.0]), 0.25, 0.5, slope(times)), [5.125], "heun_step from z = 2 at t = 0.25 to 0.5, where v(z, t) is 4 z + t")
    must(sorted(times) == [0.25, 0.5], f"heun_step from t = 0.25 to 0.5 asks for the velocity twice, at both ends; it asked at {times}")

def test_exercise_12_heun_last_step():
    times = []
    close(sample.heun_step(torch.tensor([2.0]), 0.5, 1.0, slope(times)), [6.25], "heun_step from z = 2 at t = 0.5 to 1, the last step, where v(z, t) is 4 z + t")
    must(times == [0.5], f"heun_step: at t = 1 the velocity is not defined, so the last step must not ask for it; it asked at {times}")

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

# ---- 14 Inception score -----------------------------------------------------------------------------------------------
def test_exercise_14_inception_ends():
    close(evaluate.inception_score(np.zeros((100, 4))), [1.0, 0.0], "inception_score (mean, std) of a network that never decides")
    certain = np.eye(4)[np.arange(4000) % 4] * 100
    close(evaluate.inception_score(certain)[0], 4.0, "inception_score of four equally frequent classes, each image certain", 0.05)

def test_exercise_14_inception_parts():
    logits = np.random.default_rng(0).normal(size=(40, 3))
    close(evaluate.inception_score(logits), [1.158295, 0.052875], "inception_score of 40 images and 3 classes: mean and std over the ten parts of the shuffle, each with a mean p(y) of its own")
