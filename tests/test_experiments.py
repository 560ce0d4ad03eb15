"""The experiment files: one-step generation, REPA, mixers, cascades, the wide head, and the door they come in by; each against a closed form
or a rewrite.  Latent spaces are in test_latents.py, paths in test_paths.py."""
import csv
import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, TINY, TINY_FLAGS, call, data, evaluate, model, sample, shell, train
from test_train import two_processes, weights

FOLDER = ROOT / "tests" / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
one_step, repa, differential, convnext, td_norm, dimr, dice, ddt, collapse, manifold, width, both_ffn = (
    model.load_experiment(name) for name in ("one_step", "repa", "differential", "convnext", "td_norm", "dimr", "dice", "ddt", "collapse", "manifold", "width", "both_ffn"))

def config_with(**more):
    settings = TINY | more
    return model.NETWORKS[settings.get("network", "jit")][0](**settings)

def shaken(config, seed=0):
    """A network in which everything reaches the output: gates, head and zero maps are not zero."""
    torch.manual_seed(seed)
    net = model.build(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return net

def inputs(n=3, size=16):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), torch.tensor([0.1, 0.5, 0.8, 0.3])[:n], torch.arange(n) % 4

# ---- pMF: Gaussian data has an exact mean velocity ---------------------------------------------------------------------
S = 0.5                                                   # std of the data; the path from noise scales by sd(r) / sd(t)

def sd(t):
    return (t**2 * S**2 + (1 - t)**2).sqrt()

def exact_v(z, t):
    return z * ((t * S**2 - (1 - t)) / sd(t)**2)[:, None]

def exact_u(z, t, r):
    """(z_r - z_t) / (r - t), and its limit v at r = t."""
    moved = (z * (sd(r) / sd(t))[:, None] - z) / (r - t).clamp_min(1e-12)[:, None]
    return torch.where((r > t)[:, None], moved, exact_v(z, t))

def test_the_mean_velocity_of_a_gaussian_is_its_own_target():
    t, r = torch.tensor([0.0, 0.2, 0.5, 0.4]).double(), torch.tensor([1.0, 0.7, 0.9, 0.4]).double()
    z = torch.randn(4, 6).double()
    target = one_step.mean_flow_target(exact_u, z, t, r, exact_v(z, t), exact_v(z, t), cap=1e9)
    assert (target - exact_u(z, t, r)).abs().max() < 1e-6
    wrong = one_step.mean_flow_target(exact_u, z, t, r, exact_v(z, t), 0 * z, cap=1e9)                       # not along the path
    assert (wrong - exact_u(z, t, r)).abs().max() > 0.01

def test_one_step_of_a_gaussian_ends_where_the_path_does():
    def net(z, t, y):                                     # predicts x(z, t, r) = z + (1-t) u
        t, r = (time.double() for time in t.unbind(1))
        flat = z.double().flatten(1)
        return (flat + (1 - t)[:, None] * exact_u(flat, t, r)).view_as(z).float()
    class Net(one_step.OneStepJiT):                       # begin_step and forward are the network's own, the answer is exact
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = types.SimpleNamespace(pred="x", path="linear", noise_scale=1.0, num_classes=0)

        def forward(self, z, t, y):
            return net(z, torch.stack([t, torch.full_like(t, self.t_next)], dim=1), y)
    noise = torch.randn(5, 3, 4, 4)
    for steps in (1, 2, 5):
        images = sample.generate(Net(), noise, torch.zeros(5).long(), solver="euler", steps=steps, t_eps=1e-3)
        assert (images - S * noise).abs().max() < 1e-6 * max(1, 10 * (steps - 1)), steps

def test_the_second_term_is_capped_per_image():
    u = lambda z, t, r: z * (t * torch.tensor([1.0, 100.0]))[:, None]
    z, t, r = torch.ones(2, 4), torch.zeros(2), torch.ones(2)
    assert torch.allclose(one_step.mean_flow_target(u, z, t, r, 0 * z, 0 * z), torch.tensor([[1.0], [1.5]]).expand(2, 4))

def test_spans():
    torch.manual_seed(0)
    times = torch.rand(40_000)
    t, r = one_step.draw_spans(times)
    first, rest = slice(0, 20_000), slice(20_000, None)
    assert torch.equal(t[rest], times[rest]) and torch.equal(r[rest], t[rest]) and (r >= t).all() and (r <= 1).all()
    assert abs((r[first] == 1).float().mean() - 0.5) < 0.02 and abs((t[first] == 0).float().mean() - 0.15) < 0.02
    where = (t[first] > 0) & (r[first] < 1)
    assert abs(((r - t) / (1 - t))[first][where].mean() - 0.5) < 0.02          # the ends in between are uniform

def small_batch(config):
    x, t, y = inputs(4)
    return {"x": x.clamp(-1, 1), "e": torch.randn_like(x), "t": t, "y": torch.tensor([0, 1, 3, 2]), "turns": y}

PAIR = TINY | dict(network="one_step")

def trainer_of(net, **options):
    """What an objective asks of a trainer."""
    return types.SimpleNamespace(net=net, forward=net, config=net.config, options=train.Options(**options), autocast=model.autocast("off", torch.device("cpu")))

def test_without_spans_and_guidance_it_is_the_jit_loss(monkeypatch):
    monkeypatch.setattr(one_step, "draw_spans", lambda t: (t, t))
    net, batch = shaken(config_with(**PAIR, guidance=1.0)), small_batch(None)
    loss, error = one_step.one_step_objective(trainer_of(net), dict(batch))
    _, wanted = train.jit_objective(trainer_of(net), batch)
    assert torch.allclose(error, wanted, rtol=1e-5) and torch.allclose(loss, (error / (error + 0.01)).mean())
    net.config.guidance = 2.0
    _, guided = one_step.one_step_objective(trainer_of(net), dict(batch))
    assert guided[2] == error[2] and (guided[[0, 1, 3]] != error[[0, 1, 3]]).all()                         # index 2 has no class
    with pytest.raises(data.UsageError, match="label-drop above 0"):
        one_step.one_step_objective(trainer_of(net, label_drop=0.0), dict(batch))

def test_guidance_is_built_into_the_target(monkeypatch):
    """v_null + w (v - v_null), v the true velocity and v_null the network's own."""
    monkeypatch.setattr(one_step, "draw_spans", lambda t: (t, t))
    net, batch = shaken(config_with(**PAIR, guidance=1.7)), small_batch(None)
    _, error = one_step.one_step_objective(trainer_of(net), dict(batch))
    z = model.mix(batch["x"], batch["e"], batch["t"])
    ask = lambda y: (net(z, batch["t"], y) - z) / (1 - batch["t"]).clamp_min(0.05)[:, None, None, None]
    null = ask(torch.full((4,), 3))
    target = null + 1.7 * (batch["x"] - batch["e"] - null)
    wanted = (ask(batch["y"]) - target).square().flatten(1).mean(1)
    assert torch.allclose(error[[0, 1, 3]], wanted[[0, 1, 3]].detach(), rtol=1e-4)

def test_derivative_against_a_difference():
    """Forward mode through attention, rotation and norms; the tangent reaches both z and t."""
    net = shaken(config_with(**PAIR))
    z, t, y = (part[:2] for part in inputs())
    t, r, h = torch.tensor([0.2, 0.5]), torch.tensor([1.0, 0.8]), 1e-3
    u = lambda z, t, r: one_step.average_velocity(net, z, t, r, y)
    tangent = torch.randn_like(z)
    with torch.no_grad():
        turn = one_step.mean_flow_target(u, z, t, r, 0 * z, tangent, cap=1e9)
        difference = (u(z + h * tangent, t + h, r) - u(z - h * tangent, t - h, r)) / (2 * h) * (r - t).view(2, 1, 1, 1)
    assert (turn - difference).square().mean().sqrt() < 0.02 * difference.square().mean().sqrt()
    assert turn.abs().max() > 0.01

def test_a_trained_jit_begins_as_itself(capsys):
    plain = shaken(model.JiTConfig(**TINY))
    net = model.build(config_with(**PAIR)).eval()
    train.fill_in(net, plain.state_dict())
    said = capsys.readouterr().out
    assert said.count("t_embedder.") == said.count("t_embedder.span") == 5 and "begin anew" in said
    z, t, y = inputs()
    for r in (t, torch.ones(3), (t + 1) / 2):
        assert torch.equal(net(z, torch.stack([t, r], dim=1), y), plain(z, t, y))
    assert torch.equal(net(z, t, y), plain(z, t, y))
    with torch.no_grad():
        net.t_embedder.span_out.add_(0.1)
    assert not torch.equal(net(z, torch.stack([t, torch.ones(3)], dim=1), y), net(z, t, y))

@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
def test_from_a_jit_to_one_step(work, capsys, more):
    """Also accumulation, resuming, sampling; a flag stored in the checkpoint is never asked again."""
    assert call(train, *TINY_FLAGS, "--steps", 8, "--run", "jit") == 0
    flags = ["--experiment", "one_step", "--init", "jit", "--batch-size", 8, "--micro-batch", 4, "--amp", "off", "--preview-every", 0, "--snapshots", 0, "--log-every", 2, *more]
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0 and "t_embedder.span" in capsys.readouterr().out
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0 and "is finished" in capsys.readouterr().out
    config = json.loads(Path("runs/whole/config.json").read_text())
    assert config["config"]["network"] == "one_step" and config["config"]["hidden_size"] == 32 and config["options"]["lr"] == 1.2e-3 and config["config"]["guidance"] == 1.5
    real = train.Recorder.after_step
    with pytest.MonkeyPatch.context() as patch:           # stopped at step 3, the same command goes on
        patch.setattr(train.Recorder, "after_step", lambda self: (self.asked.append(1) if self.trainer.step == 3 else None, real(self)))
        assert call(train, *flags, "--steps", 6, "--run", "half") == 130
    assert call(train, *flags, "--steps", 6, "--run", "half") == 0
    assert all(torch.equal(a, b) for a, b in zip(weights("runs/whole/checkpoint.pt"), weights("runs/half/checkpoint.pt"), strict=True))
    Path("runs/jit/checkpoint.pt").rename("start.pt")     # what it began with is not needed to go on, and may be a file
    assert call(train, *flags, "--steps", 6, "--run", "half") == 0 and call(train, *[{"jit": "start.pt"}.get(flag, flag) for flag in flags], "--steps", 1, "--run", "file") == 0
    losses = [float(row["loss"]) for row in csv.DictReader(open("runs/whole/log.csv"))]
    assert all(map(math.isfinite, losses))
    for steps in (None, 2):
        out = Path(f"runs/whole/{steps}")
        assert call(sample, "--run", "whole", "--num", 4, "--out", out, *(["--steps", steps] if steps else [])) == 0
        record = json.loads((out / "samples.json").read_text())
        assert (record["solver"], record["steps"], record["cfg"]) == ("euler", steps or 1, 1.0)
    capsys.readouterr()
    assert call(sample, "--run", "whole", "--num", 4, "--solver", "heun", "--out", "x") == 2 and "--solver 'heun' is unknown: one of euler\n" in capsys.readouterr().err

def test_one_step_is_one_evaluation(work):
    net, calls = shaken(config_with(**PAIR)), []
    net.t_embedder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    noise = torch.randn(2, 3, 16, 16)
    out = sample.generate(net, noise, torch.tensor([0, 1]), solver="euler", steps=1)
    assert len(calls) == 1 and torch.equal(calls[0], torch.tensor([[0.0, 1.0]] * 2))
    with torch.no_grad():
        assert torch.allclose(out, net(noise, calls[0], torch.tensor([0, 1])), atol=1e-5)                  # the image is x(z_0, 0, 1)

def test_init_that_does_not_fit_is_refused_in_one_line(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 1, "--run", "jit") == 0
    assert call(data, "--size", 32, "--count", 100, "--workers", 1, "--name", "big") == 0
    capsys.readouterr()
    for more, words in ((["--init", "nowhere"], "no checkpoint"), (["--init", "jit", "--hidden-size", 64], "do not fit this network"), (["--init", "jit", "--patch-size", 4], "do not fit this network"),
                        (["--init", "jit", "--experiment", "dit"], "do not fit this network"), (["--init", ""], "an argument is empty"),
                        (["--init", "jit", "--data", "big", "--patch-size", 16], "do not fit this network (final_layer"), (["--init", "jit", "--experiment", "one_step", "--aux", "time"], "no auxiliary head"),
                        (["--experiment", "one_step,paths"], "linear path")):
        assert call(train, *more, "--batch-size", 8, "--run", "new") in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error
    assert not Path("runs/new").exists()
    assert call(train, "--init", "jit", "--data", "big", "--batch-size", 8, "--steps", 1, "--amp", "off", "--no-compile", "--run", "large") == 0
    assert "pos_embed begin anew" in capsys.readouterr().out                   # more patches of the same size: the table of positions is no weight
    grown = model.read_checkpoint("runs/large/checkpoint.pt")
    assert torch.equal(grown["model"]["pos_embed"], model.position_table(32, 4)) and grown["config"]["patch_size"] == 8

def test_fine_tuning_on_other_classes_makes_the_label_table_anew(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 3, "--run", "jit") == 0
    folder = Path("three")
    for k, name in enumerate("abc"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            data.Image.fromarray(data.draw_shape(0, 10 * i + k, 16)).save(folder / name / f"{i}.png")
    assert call(data, "--source", "folder", "--root", "three", "--size", 16, "--name", "mine", "--out", "sets", "--workers", 1) == 0
    capsys.readouterr()
    assert call(train, *TINY_FLAGS[:0], "--init", "jit", "--data", "sets/mine", "--batch-size", 8, "--amp", "off", "--steps", 2, "--run", "fine") == 0
    assert "y_embedder.embedding_table.weight" in capsys.readouterr().out
    state, old = model.read_checkpoint("runs/fine/checkpoint.pt"), model.read_checkpoint("runs/jit/checkpoint.pt")
    assert state["model"]["y_embedder.embedding_table.weight"].shape[0] == 4 and state["config"]["num_classes"] == 3
    assert (state["model"]["blocks.0.attn.qkv.weight"] - old["ema"][0]["blocks.0.attn.qkv.weight"]).abs().max() < 0.05

def test_two_processes_fine_tune_as_one(work):
    """one_step asks the bare network for its targets, beside DDP's forward."""
    assert call(train, *TINY_FLAGS, "--steps", 4, "--run", "jit") == 0
    flags = ["--experiment", "one_step", "--init", "jit", "--batch-size", 8, "--micro-batch", 4, "--amp", "off", "--preview-every", 0, "--snapshots", 0, "--log-every", 2, "--no-compile"]
    assert call(train, *flags, "--steps", 4, "--run", "one") == 0
    two_processes("03_train.py", *flags, "--steps", 4, "--run", "two", cwd=work)
    for a, b in zip(weights("runs/one/checkpoint.pt"), weights("runs/two/checkpoint.pt")):
        assert (a - b).abs().max() < 1e-5

# ---- What samplers do to a direction of small variance, with an exact network -------------------------------------------
@pytest.mark.parametrize("solver, steps, shift, k, ratio", [
    ("ddpm", 25, 3.0, 2.0, 0.552), ("euler", 25, 3.0, 2.0, 0.588), ("heun", 12, 3.0, 2.0, 0.348), ("heun", 25, 3.0, 2.0, 0.642),
    ("ddpm", 25, 3.0, 1.0, 0.690), ("euler", 25, 3.0, 1.0, 0.768), ("heun", 25, 3.0, 1.0, 0.865), ("heun", 50, 1.0, 2.0, 1.014)])
def test_samplers_shrink_a_narrow_direction(solver, steps, shift, k, ratio):
    """Of N(0, 0.2^2) the exact denoiser is x = s^2 t z / (t^2 s^2 + k^2 (1-t)^2); std after sampling, over 0.2."""
    def net(z, t, y):
        t = model.expand(t, z)
        return 0.04 * t * z / (0.04 * t**2 + k**2 * (1 - t)**2)
    net.config = types.SimpleNamespace(pred="x", path="linear", noise_scale=k, num_classes=0)
    torch.manual_seed(0)
    noise = torch.randn(1, 1, 300, 300)
    x = sample.generate(net, noise / noise.std() * k, torch.zeros(1).long(), solver=solver, steps=steps, shift=shift)
    assert abs(x.std() / 0.2 - ratio) < (0.006 if solver == "ddpm" else 0.001)

def test_what_the_clamp_leaves():
    """A network that always says x: Heun 50 ends at 0.983 x + 0.017 e.

    Where 1-t is clamped at 0.05, a step of 0.02 leaves 1 - 0.02 / 0.05 = 0.6 of the distance instead of less.  Euler: of 0.04, left at t = 0.96, 0.6 twice.
    Heun: of 0.06, left at t = 0.94, first 1 - 0.02 (1/0.06 + (2/3)/0.05) / 2 = 0.7, then 1 - 0.02 (1 + 0.6) / 0.05 / 2 = 0.68, then 0.6.
    """
    net = lambda z, t, y: torch.full_like(z, 0.7)
    net.config = types.SimpleNamespace(pred="x", path="linear", noise_scale=1.0, num_classes=0)
    for solver, left in (("heun", 0.06 * 0.7 * 0.68 * 0.6), ("euler", 0.04 * 0.6**2)):
        out = sample.generate(net, torch.full((1, 1, 1, 1), -1.3), torch.zeros(1).long(), solver=solver, steps=50)
        assert abs(out.item() - (1 - left) * 0.7 - left * -1.3) < 1e-6

# ---- REPA --------------------------------------------------------------------------------------------------------------
def test_repa_loss_is_minus_the_mean_cosine():
    answer, features = torch.randn(2, 16, 8), torch.randn(2, 8, 4, 4)
    total = sum(float(a @ f / a.norm() / f.norm()) for image, grid in zip(answer, features) for a, f in zip(image, [grid[:, i // 4, i % 4] for i in range(16)]))
    assert abs(repa.RepaHead.loss(None, answer, {"features": features}) + total / 32) < 1e-6
    finer = features.repeat_interleave(2, 2).repeat_interleave(2, 3)           # another grid is averaged
    assert abs(repa.RepaHead.loss(None, answer, {"features": finer}) + total / 32) < 1e-6

def test_repa_learns_from_a_frozen_encoder_and_leaves_no_trace(work, capsys):
    from test_latents import make
    assert make("rae") == 0 and make("vae") == 0
    flags = [*TINY_FLAGS, "--experiment", "repa", "--teacher", "latents/rae", "--micro-batch", 4, "--log-every", 20]
    assert call(train, *flags, "--steps", 20, "--run", "repa") == 0
    row, config = list(csv.DictReader(open("runs/repa/log.csv")))[-1], json.loads(Path("runs/repa/config.json").read_text())
    assert -1 < float(row["aux"]) < 0.5 and config["options"]["aux_weight"] == 0.5 and config["config"]["features"] == 192
    assert call(sample, "--run", "repa", "--num", 4, "--steps", 1) == 0
    net, _ = model.load_network("runs/repa/checkpoint.pt")
    assert net.state_dict().keys() == model.JiT(net.config).state_dict().keys()
    gathered = train.gather(train.read_flags(list(map(str, [*flags, "--steps", 1]))))
    meta, arrays = data.open_data("data/shapes")
    for depth, after in ((3, 0), (12, 3), (24, 7)):       # after block 4 of 12, 8 of 24
        assert repa.RepaHead(train.settle(gathered | {"depth": depth}, meta, torch.device("cpu"), 1)[1]).after == after
    trainer = train.Trainer(*train.settle(gathered, meta, torch.device("cpu"), 1), torch.device("cpu"))
    teacher = trainer.head.frozen[0]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    trainer.train_step(train.read_ahead(*arrays["train"], trainer))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()) and not any("frozen" in name for name in trainer.head.state_dict())
    x = model.to_float(np.array(arrays["val"][0][:4]))
    assert torch.allclose(trainer.head.prepare({"x": x})["features"], teacher.features(x), atol=1e-4)
    capsys.readouterr()
    assert make("rae", "--overwrite") == 0
    capsys.readouterr()
    assert call(train, *flags, "--steps", 20, "--run", "repa") == 1 and "teacher_id" in capsys.readouterr().err
    for more, words in ((["--teacher", "latents/vae"], "no encoder"), (["--teacher", "nowhere"], "no data set"), (["--teacher", "latents/rae", "--data", "latents/vae", "--patch-size", 1], "not for latents")):
        assert call(train, *TINY_FLAGS, "--experiment", "repa", *more, "--run", "new") in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

# ---- Mixers, the time-dependent norm --------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_against_a_rewrite(layer):
    torch.manual_seed(0)
    config = config_with(num_heads=4, hidden_size=64)
    mixer, x, d = differential.DifferentialAttention(config, layer), torch.randn(2, 16, 64), 16
    cos, sin = model.rotary_table(d, 4, 0)
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    out, start = [], 0.8 - 0.6 * math.exp(-0.3 * layer)
    a1, b1, a2, b2 = mixer.lambdas
    weight = torch.exp((a1 * b1).sum()) - torch.exp((a2 * b2).sum()) + start
    for pair in range(2):
        maps = []
        for head in (2 * pair, 2 * pair + 1):
            part = slice(head * d, (head + 1) * d)
            qh, kh = (model.rotate(norm(value[..., part])[:, :, None], cos, sin)[:, :, 0] for norm, value in ((mixer.q_norm, q), (mixer.k_norm, k)))
            maps.append((qh @ kh.transpose(1, 2) / d**0.5).softmax(dim=-1))
        y = (maps[0] - weight * maps[1]) @ v[..., pair * 2 * d:(pair + 1) * 2 * d]
        out.append(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.out_norm.weight * (1 - start))
    assert (mixer(x, (cos, sin)) - mixer.proj(torch.cat(out, dim=-1))).abs().max() < 1e-5

@pytest.mark.parametrize("kind", ["convnext", "dice"])
def test_convolutions_against_a_rewrite(kind):
    torch.manual_seed(0)
    config = config_with(in_context_len=0)
    mixer, x = model.MIXERS[kind](config, 0), torch.randn(2, 16, 32)
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(32)), mixer.proj.bias.zero_()
        if kind == "dice":
            mixer.strictness.fill_(0.7)
    padded = F.pad(x.view(2, 4, 4, 32), (0, 0, 3, 3, 3, 3))
    branches = {"convnext": 1, "dice": 2}[kind]

    def convolved(hand, channel, row, column):
        place = channel * branches + hand
        return (padded[:, row:row + 7, column:column + 7, channel] * mixer.conv.weight[place, 0]).sum((1, 2)) + mixer.conv.bias[place]
    out = mixer(x).view(2, 4, 4, 32)
    for channel, row, column in ((0, 0, 0), (5, 1, 3), (31, 3, 2)):
        left, right = convolved(0, channel, row, column), convolved(branches - 1, channel, row, column)
        wanted = left if kind == "convnext" else (left + right) / (1 + torch.exp(math.log(1 + math.exp(0.7)) * (left - right)**2))
        assert (out[:, row, column, channel] - wanted).abs().max() < 1e-5

def test_dice_agrees_fades_and_never_overflows():
    mixer = dice.DiceMixer(config_with(in_context_len=0), 0)
    left = torch.randn(1, 32, 4, 4)
    both = lambda l, r: torch.stack([l, r], dim=2).flatten(1, 2)
    assert torch.allclose(mixer.combine(both(left, left)), left)               # f(l, l) = l
    y = both(left.clamp(-1, 1) * 6e4, -left.clamp(-1, 1) * 6e4).half().requires_grad_()
    out = mixer.combine(y)
    out.float().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(y.grad).all() and torch.isfinite(mixer.strictness.grad).all()

def test_time_norm_against_a_rewrite():
    torch.manual_seed(0)
    net = shaken(config_with(norm="td", network="td_norm"))
    z, t, y = inputs()
    seen = {}
    norm = net.blocks[2].norm2
    norm.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    net(z, t, y)
    s = torch.sigmoid(norm.time_map[0] * t + norm.time_map[1])[:, None, None]
    x = seen["x"]
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (s * norm.weight + (1 - s) * norm.weight1)
    assert (seen["out"] - wanted).abs().max() < 1e-5

def test_parameters_by_hand():
    D, base = 32, model.count_parameters(config_with(in_context_len=0))
    d = D // 2
    count = lambda **more: model.count_parameters(config_with(in_context_len=0, **more)) - base
    attention = 3 * D * D + 3 * D + 2 * d + D * D + D
    assert count(mixer="differential") == 4 * (4 * d + 2 * d)                  # four layers
    assert count(mixer="convnext") == 4 * (49 * D + D + D * D + D - attention)
    assert count(mixer="dice") == 4 * (2 * (49 * D + D) + D * D + D + 1 - attention)
    assert count(norm="td", network="td_norm") == 9 * (D + 2)                  # two a block, and the final one
    assert count(network="one_step") == D * D + 256 * D + D + D * D + D
    swiglu = lambda inner: D * 2 * inner + 2 * inner + inner * D + D
    bottleneck = lambda inner: D * d + d + d * inner + inner + inner * D + D
    assert count(ffn="both") == 4 * (swiglu(42) + bottleneck(64) - swiglu(85))                             # half of 128 each

def test_both_ffns_are_summed():
    torch.manual_seed(0)
    net, x = model.FFNS["both"](32, 128, 0.0), torch.randn(2, 5, 32)
    a, b = (x @ net.wide.w12.weight.T + net.wide.w12.bias).chunk(2, dim=-1)
    wide = (a * torch.sigmoid(a) * b) @ net.wide.w3.weight.T + net.wide.w3.bias
    narrow = x
    for layer, act in ((net.narrow[0], F.gelu), (net.narrow[2], F.silu), (net.narrow[4], lambda value: value)):
        narrow = act(narrow @ layer.weight.T + layer.bias)
    assert (net(x) - wide - narrow).abs().max() < 1e-5

def test_a_convolution_keeps_the_variance_whatever_the_width():
    """Initialised as a map of 49 inputs; with D as fan-in the output's variance was 0.12 at width 768."""
    torch.manual_seed(0)
    for kind in ("convnext", "dice"):
        mixer = model.MIXERS[kind](config_with(in_context_len=0, hidden_size=256, image_size=64), 0)
        y = mixer.conv(torch.randn(8, 256, 16, 16))[:, :, 4:12, 4:12]
        assert 0.85 < y.var() < 1.15

def test_layers_are_counted_through_all_stages():
    """lambda0 = 0.8 - 0.6 exp(-0.3 layer), of the cascade's layers and of the wide head's."""
    net = model.build(config_with(network="dimr", mixer="differential", depth=6, in_context_len=0))
    found = [block.attn.start for stage in net.stages for block in stage.blocks if hasattr(block.attn, "start")]
    assert found == [0.8 - 0.6 * math.exp(-0.3 * layer) for layer in (3, 4, 5)]
    head = model.build(config_with(network="ddt", mixer="differential")).head
    assert [block.attn.start for block in head.blocks] == [0.8 - 0.6 * math.exp(-0.3 * layer) for layer in (4, 5)]

# ---- The cascade ------------------------------------------------------------------------------------------------------------
COARSE = dict(in_context_len=0, depth=6)

def test_subtractive_cascade_with_silent_lower_stages_is_the_plain_network():
    net = shaken(config_with(network="dice", **COARSE))
    z, t, y = inputs()
    plain = net.stages[2]
    assert [len(stage.blocks) for stage in net.stages] == [3, 2, 1] and [stage.config.image_size for stage in net.stages] == [4, 8, 16]
    assert not torch.equal(net(z, t, y), plain(z, t, y))
    with torch.no_grad():
        for stage in net.stages[:2]:
            stage.final_layer.linear.weight.zero_(), stage.final_layer.linear.bias.zero_()
    assert torch.equal(net(z, t, y), plain(z, t, y))

@pytest.mark.parametrize("kind", ["dice", "dimr"])
def test_cascade_against_a_rewrite(kind):
    net = shaken(config_with(network=kind, mixer="convnext", **COARSE))
    z, t, y = inputs()
    pool = lambda x, f: x.unflatten(2, (-1, f)).unflatten(4, (-1, f)).mean((3, 5))
    kinds = [type(stage.blocks[0].attn).__name__ for stage in net.stages]
    assert kinds == ["Attention" if kind == "dimr" else "ConvMixer", "ConvMixer", "ConvMixer"]
    outs, tokens = [], None
    for k, stage in enumerate(net.stages):
        part = pool(z, 4 >> k)
        if kind == "dice":
            outs.append(stage(part - (F.interpolate(outs[-1], scale_factor=2, mode="bilinear") if k else 0), t, y))
            continue
        x = stage.x_embedder(part) + stage.pos_embed
        if k:
            side = math.isqrt(tokens.shape[1])
            grown = net.up[k - 1](tokens).view(3, side, side, 2, 2, 32).permute(0, 1, 3, 2, 4, 5).reshape(3, 4 * side**2, 32)
            x = x + grown
        c = (stage.t_embedder(t) + stage.y_embedder(y))[:, None]
        for block in stage.blocks:
            x = block(x, c, stage.rope(0))
        tokens = x
        outs.append(model.unpatchify(stage.final_layer(x, c), 4))
    assert (net(z, t, y) - outs[-1]).abs().max() < 1e-5
    if kind == "dimr":
        out, coarse = net(z, t, y, tap=0)
        assert torch.equal(out, net(z, t, y)) and len(coarse) == 2 and all((a - b).abs().max() < 1e-5 for a, b in zip(coarse, outs))

def test_multiscale_loss_is_zero_for_perfect_stages_and_counts_pixels():
    batch = small_batch(None)
    x, t = batch["x"], batch["t"]
    perfect = [F.avg_pool2d(x, 4), F.avg_pool2d(x, 2)]
    assert dimr.MultiScale.loss(None, perfect, batch) == 0
    off = [perfect[0] + 1, perfect[1] + 1]
    weight = (1 / (1 - t).clamp_min(0.05)**2).mean()
    assert torch.allclose(dimr.MultiScale.loss(None, off, batch), (1 / 16 + 1 / 4) * weight, rtol=1e-4)

# ---- The wide head -----------------------------------------------------------------------------------------------------
WIDE = TINY | dict(network="ddt", head_depth=2, head_width=48)

def test_wide_head_against_a_rewrite():
    """Backbone on z; s = W SiLU(t_emb + tokens); blocks on z embedded again, with s per token; final layer conditioned on s too."""
    torch.manual_seed(0)
    net = model.build(config_with(**WIDE)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "pos_embed" not in name:
                p.copy_(torch.randn(p.shape) * 0.1 + ("norm" in name and name.endswith("weight")))
    z, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([1, 3])
    t_emb, y_emb = net.t_embedder(t), net.y_embedder(y)
    x = net.x_embedder(z) + net.pos_embed
    for i, block in enumerate(net.blocks):
        if i == 1:
            x = torch.cat([y_emb[:, None] + net.in_context_posemb, x], dim=1)
        x = block(x, (t_emb + y_emb)[:, None], net.rope(x.shape[1] - 16))
    s = net.head_condition(F.silu(t_emb[:, None] + x[:, 2:]))
    x = net.head.x_embedder(z) + model.position_table(48, 4)
    for block in net.head.blocks:
        six = block.adaLN_modulation(s).chunk(6, dim=-1)
        assert six[0].shape == (2, 16, 48)                # one condition per token
        x = x + six[2] * block.attn(block.norm1(x) * (1 + six[1]) + six[0], model.rotary_table(16, 4, 0))
        x = x + six[5] * block.mlp(block.norm2(x) * (1 + six[4]) + six[3])
    shift, scale = net.head.final_layer.adaLN_modulation(s).chunk(2, dim=-1)
    wanted = model.unpatchify(net.head.final_layer.linear(net.head.final_layer.norm_final(x) * (1 + scale) + shift), 4)
    assert (net(z, t, y) - wanted).abs().max() < 1e-5
    assert not torch.equal(net(z, t, torch.tensor([0, 3]))[0], wanted[0])      # the class acts, through s alone

def test_wide_head_counts():
    D, W, d = 32, 48, 16                                  # head dim 16: 3 heads of the head
    plain, wide = (model.count_parameters(config_with(**row)) for row in (TINY, WIDE))
    inner = int(4 * W * 2 / 3)
    block = 2 * W + (3 * W * W + 3 * W) + (W * W + W) + 2 * d + (2 * inner * W + 2 * inner) + (inner * W + W) + 6 * (W * W + W)
    head = 8 * 3 * 16 + 8 * W + W + 2 * block + (W + (2 * W * W + 2 * W) + 48 * W + 48)
    assert wide == plain - (D + 2 * D * D + 2 * D + 48 * D + 48) + (D * W + W) + head

def test_a_fresh_wide_head_predicts_zero_and_every_parameter_learns():
    net = model.build(config_with(**WIDE))
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    assert net(z, t, y).abs().max() == 0
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    net(z, t, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)

@pytest.mark.parametrize("solver, evaluations, begin", [("euler", 1, 0.4), ("heun", 2, 0.6)])
def test_reuse(solver, evaluations, begin):
    torch.manual_seed(0)
    net = model.build(config_with(**WIDE)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    noise, labels, calls = torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))

    def images(reuse, **how):
        calls.clear()
        net.config.reuse = reuse
        return sample.generate(net, noise, labels, solver=solver, steps=6, **how), len(calls)
    plain, count = images(1)
    assert count == 6 * evaluations - (solver == "heun")
    fewer, halved = images(2)
    assert halved == 3 * evaluations and not torch.equal(plain, fewer) and (plain - fewer).std() < 0.5 * plain.std()
    assert images(2, cfg=2.0, interval=(begin, 1.0))[1] > halved               # where guidance begins, the batch is another
    assert torch.equal(images(1)[0], plain)
    if solver == "euler":                                 # the class' tokens do not serve the null class
        assert (images(2, cfg=0.0, interval=(0.4, 1.0))[0] - images(2, cfg=1e-4, interval=(0.4, 1.0))[0]).abs().max() < 0.01

def test_a_picture_of_the_way_asks_a_wide_head_anew(there, monkeypatch):
    """Not with the condition that the walk's last step kept: step 3 of 0 to 3 is one that reuses."""
    torch.manual_seed(0)
    net, drawn, real = model.build(config_with(**WIDE)).eval(), [], data.picture
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    monkeypatch.setattr(data, "picture", lambda rows, *more: drawn.append(rows) or real(rows, *more))
    net.config.reuse = 2
    sampler = sample.Sampler(net, [0], 0, vars(sample.Settings(steps=4, solver="euler")), "off", torch.device("cpu"))
    sample.draw_trajectory(sampler, there / "t.png")
    z = sample.noise_for(range(4), (3, 16, 16), 0, 1.0)
    net.begin_step(0, 0.0, 0.25)
    with torch.no_grad():
        x = model.to_pictures(net(z, torch.zeros(4), torch.zeros(4, dtype=torch.int64)))
    assert all(np.array_equal(drawn[0][2 * i + 1][0], x[i]) for i in range(4))

def test_wide_head_trains_resumes_and_samples(work):
    flags = [*TINY_FLAGS, "--experiment", "ddt", "--head-depth", 1, "--head-width", 64, "--reuse", 2, "--aux", "time", "--checkpointing", "--micro-batch", 4, "--save-minutes", 0]
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0
    assert call(train, *flags, "--steps", 3, "--warmup", 0, "--run", "half") == 0
    assert call(train, "--resume", "--run", "half", "--steps", 6, "--preview-every", 0, "--snapshots", 0) == 0
    assert call(sample, "--run", "whole", "--num", 4, "--steps", 4) == 0
    net, _ = model.load_network("runs/whole/checkpoint.pt")
    assert type(net).__name__ == "WideHeadJiT" and net.head.config.hidden_size == 64 and net.config.reuse == 2

# ---- The door: rows, files, paths; what they bring, and what is refused -------------------------------------------------
GRID = ["--patch-size", 4, "--depth", 4, "--num-heads", 2, "--hidden-size", 32]           # a cascade halves a grid of 4 twice

@pytest.mark.parametrize("name", [name for name in NAMES if getattr(model.load_experiment(name), "SETTINGS", None) and name not in ("one_step", "repa", "vae", "rae", "reg")])
def test_every_experiment_trains_resumes_and_samples(work, name):
    """The same command goes on in the middle; 04 needs no flag."""
    flags = [*TINY_FLAGS, *GRID, "--experiment", name, "--micro-batch", 4, "--log-every", 2, "--run", "e"]
    real = train.Recorder.after_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Recorder, "after_step", lambda self: (self.asked.append(1) if self.trainer.step == 4 else None, real(self)))
        assert call(train, *flags, "--steps", 8) == 130
    assert call(train, *flags, "--steps", 8) == 0
    rows = list(csv.DictReader(open("runs/e/log.csv")))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"] and all(math.isfinite(float(row["loss"])) for row in rows)
    assert (float(rows[0]["aux"]) > 0) == (name in ("dimr", "mean_colour"))
    assert call(sample, "--run", "e", "--num", 4, "--steps", 2) == 0
    saved = json.loads(Path("runs/e/config.json").read_text())
    wanted = model.load_experiment(name).SETTINGS
    assert all(saved["config"].get(k, saved["options"].get(k)) == v for k, v in wanted.items() if k not in ("sampling", "steps", "num_heads", "ema", "model"))

def test_experiments_combine_and_rows_too(work):
    assert call(train, *TINY_FLAGS, "--experiment", "exp3,ddt,mean_colour", "--steps", 2, "--num-heads", 2) == 0
    config = json.loads(Path("runs/shapes-exp3-ddt-mean_colour/config.json").read_text())["config"]
    assert (config["patch_embed"], config["network"], config["aux"]) == ("nonlinear", "ddt", "mean_colour")
    assert model.load_network("runs/shapes-exp3-ddt-mean_colour/checkpoint.pt")[1]["experiments"] == ["ddt", "mean_colour"]

@pytest.mark.parametrize("settings,words", [
    ("{'init': 'shapes'}", "cannot say init: it is a flag"), ("{'run': 'x'}", "cannot say run"), ("{'device': 'cpu'}", "cannot say device"), ("{'overwrite': True}", "cannot say overwrite"), ("{'preset': 'photos'}", "cannot say preset"), ("{'experiment': 'exp1'}", "cannot say experiment"), ("{'resume': True}", "cannot say resume"), ("{'classes': ['a']}", "cannot say classes"),
    ("{'ema': 0}", "ema 0: it must be of the type tuple"), ("{'sampling': 1}", "sampling 1: it must be of the type dict"), ("{'data': 5}", "data 5: it must be of the type str"),
    ("{'in_channels': 4}", "cannot say in_channels"), ("{'image_size': 4}", "cannot say image_size"), ("{'sampling': 'heun'}", "sampling 'heun': it must be of the type dict"), ("{1: 2}", "there is no setting 1"), ("{'model': 'JiT-T/99'}", "model 'JiT-T/99' is unknown"),
    ("{'network': 'nope'}", "network 'nope' is unknown"), ("{'objective': 'nope'}", "objective 'nope' is unknown: one of jit, grid"), ("{'lr': __import__('numpy').float64(1e-3)}", "it must be of the type float"), ("{'lr': 0}", "lr 0: give a number in (0, inf)"),
    ("{'rope': 'false'}", "rope 'false': it must be of the type bool"), ("{'warmup': 2.5}", "warmup 2.5: it must be of the type int"), ("{'ema': 0.9}", "ema 0.9: it must be of the type tuple"),
    ("{'ema': ()}", "ema (): it must be of the type tuple (a tuple: of one number or more)"), ("{'ema': [0.9]}", "ema [0.9]: it must be of the type tuple"), ("{'p_mean': '-0.8'}", "p_mean '-0.8': it must be of the type float"), ("{'sampling': {'step': 3}}", "there is no setting step"), ("{'hiddensize': 3}", "there is no setting hiddensize")])
def test_settings_that_are_none(work, capsys, settings, words):
    """Said before the training."""
    Path("own.py").write_text(f"SETTINGS = {settings}")
    assert call(train, *TINY_FLAGS, "--experiment", "./own.py", "--steps", 2) == 2
    assert words in capsys.readouterr().err and not Path("runs").exists()

def test_a_checkpoint_that_could_not_be_read_is_said_at_once(work, capsys):
    Path("own.py").write_text("import numpy as np\nSETTINGS = {'sampling': {'cfg': np.float64(2)}}")
    assert call(train, *TINY_FLAGS, "--experiment", "./own.py", "--steps", 2) == 1 and "is not a checkpoint" in capsys.readouterr().err

def test_what_a_run_may_say_of_sampling():
    assert train.OF_SAMPLING == {e.name for e in dataclasses.fields(sample.Settings)}

def test_an_experiment_that_was_moved_is_found_by_its_name(work, capsys):
    Path("lab").mkdir()
    Path("lab/my_loss.py").write_text("SETTINGS = {'p_mean': -1.0}")
    flags = [*TINY_FLAGS, "--run", "r", "--steps"]
    assert call(train, *flags, 2, "--experiment", "lab/my_loss.py") == 0
    assert capsys.readouterr().out.endswith(f"then run 04_sample.py --run r --experiment {Path('lab/my_loss.py').resolve()}\n")
    Path("lab").rename("lab2")
    assert call(sample, "--run", "r", "--num", 2, "--steps", 1) == 2 and "also takes it from a new place" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 2, "--steps", 1, "--experiment", "lab2/my_loss.py") == 0
    assert call(train, "--run", "r", "--resume", "--steps", 4, "--experiment", "exp1") == 2       # another one is not taken for it
    model.load_recorded(["/old/a.py", "/old/b.py"], "runs/r", "new/a.py,b.py")             # both are given again
    for name in ("/old/a.py", "/", ".", ""):              # nothing was given
        with pytest.raises(data.UsageError, match="never makes us run code"):
            model.load_recorded([name], "runs/r")

def test_the_last_experiment_wins(work):
    Path("z.py").write_text("SETTINGS = {'p_mean': -1.0, 'p_std': 0.5}"), Path("a.py").write_text("SETTINGS = {'p_mean': -2.0}")
    settings = train.gather(train.read_flags(["--experiment", "z.py,a.py"]))
    assert (settings["p_mean"], settings["p_std"]) == (-2.0, 0.5)

def test_an_integer_is_a_float_too(work):
    Path("own.py").write_text("SETTINGS = {'p_mean': -1, 'shift': None, 'sampling': {'cfg': 2}}")
    assert call(train, *TINY_FLAGS, "--experiment", "./own.py", "--steps", 2) == 0

def test_two_networks_do_not_combine(work, capsys):
    assert call(train, *TINY_FLAGS, "--experiment", "ddt,td_norm", "--steps", 2) == 2
    assert "td_norm brings a network, and so does one before it" in capsys.readouterr().err and not Path("runs").exists()

def test_a_row_goes_on_with_resume(work):
    for more in (["--steps", 2], ["--steps", 4, "--resume", "--run", "shapes-exp3"]):
        assert call(train, *TINY_FLAGS, "--experiment", "exp3", *more) == 0
    assert model.read_checkpoint("runs/shapes-exp3/checkpoint.pt")["info"]["step"] == 4

def test_a_file_of_ones_own(work, capsys):
    """By its path; flags of its own stand in --help; it must be passed again, and a checkpoint never chooses it."""
    Path("lab").mkdir()
    text = (FOLDER / "mean_colour.py").read_text().replace("parents[2]", "parents[0]").replace('"mean_colour"] = ', '"mine"] = ').replace('{"aux": "mean_colour"}', '{"aux": "mine"}')
    Path("lab/my_head.py").write_text(text)
    flags = [*TINY_FLAGS, "--experiment", "lab/my_head.py"]
    assert call(train, *flags, "--steps", 4) == 0
    assert float(list(csv.DictReader(open("runs/shapes-my_head/log.csv")))[-1]["aux"]) > 0
    assert call(train, *flags, "--steps", 4) == 0 and "is finished" in capsys.readouterr().out
    again = str(Path("lab/my_head.py").resolve())
    for script, more in ((sample, ["--run", "shapes-my_head", "--num", 4]), (train, ["--run", "shapes-my_head", "--resume", "--steps", 6])):
        assert call(script, *more) in (1, 2)
        error = capsys.readouterr().err
        assert f"pass --experiment '{again}' again" in error and error.count("\n") == 1
        assert call(script, *more, "--experiment", "lab/my_head.py,nosuch") == 2 and "there is no" in capsys.readouterr().err
        assert call(script, *more, "--experiment", "lab/my_head.py") == 0
    state = torch.load("runs/shapes-my_head/checkpoint.pt", weights_only=True)
    Path("lab/evil.py").write_text("open('was_here', 'w')")
    for name in (str(Path("lab/evil.py").resolve()), str(Path("lab/evil").resolve()), "lab/evil.py", "../../lab/evil", "lab/evil"):
        state["info"]["experiments"] = [name]
        torch.save(state, "evil.pt")
        assert call(sample, "--checkpoint", "evil.pt", "--experiment", again) in (1, 2) and not Path("was_here").exists()

def test_flags_of_an_experiment_are_in_its_help(capsys):
    for flags, there in (([], False), (["--experiment", "ddt"], True)):
        with pytest.raises(SystemExit):
            call(train, *flags, "--help")
        text = capsys.readouterr().out
        assert ("--head-depth" in text) == there and "{linear" not in text
    with pytest.raises(SystemExit):
        call(train, "--preset", "cifar10", "--experiment", "convnext", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "attention | " in text and "convnext" in text and "per optimizer step (default: 256)" in text and "width of a token (default: 384)" in text and "learning rate (default: 0.0004)" in text
    with pytest.raises(SystemExit):
        call(train, "--preset", "photos", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate (default: 5e-5 x batch size / 256)" in text and "(default: the data's)" in text and "k, the noise's std (default: image size / 256, at least 1)" in text

BAD = {"1/0": "ZeroDivisionError: division by zero", "def f(:": "SyntaxError", "import nonsense": "No module named 'nonsense'", "x = 1": "has no dict SETTINGS", "SETTINGS = []": "has no dict SETTINGS",
       "SETTINGS = {'hiden_size': 3}": "there is no setting hiden_size", "\n\nraise ValueError('mine')": "line 3", "SETTINGS = {'mixer': 'none of these'}": "is unknown: one of attention"}

@pytest.mark.parametrize("content", BAD)
def test_a_file_that_fails_is_one_line(work, capsys, content):
    Path("mine.py").write_text(content)
    assert call(train, *TINY_FLAGS, "--experiment", "mine.py", "--steps", 2) in (1, 2)
    error = capsys.readouterr().err
    assert BAD[content] in error and error.count("\n") == 1 and not Path("runs").exists()

def test_unknown_names_are_one_line(work, capsys):
    for name in ("nope", "./nope.py", "nope.py", "exp3,nope"):
        assert call(train, *TINY_FLAGS, "--experiment", name) == 2
        error = capsys.readouterr().err
        assert "there is no" in error and "tests/experiments, and to 03_train.py the rows" in error and error.count("\n") == 1

@pytest.mark.parametrize("more, words", [
    (dict(num_heads=1, hidden_size=16, mixer="differential"), "needs pairs"), (dict(mixer="convnext"), "--in-context-len 0"), (dict(mixer="dice"), "--in-context-len 0"),
    (dict(network="dimr", aux="time"), "no auxiliary head"), (dict(network="dimr", depth=3), "needs 4 blocks"), (dict(network="dice", depth=3), "needs 4 blocks"),
    (dict(network="dimr", patch_size=8), "halves twice"), (dict(network="ddt", head_width=50), "not a multiple of 4 x"), (dict(network="ddt", mixer="differential", head_width=16), "needs pairs"),
    (dict(network="one_step", path="cosine"), "linear path"), (dict(network="one_step", aux="time"), "no auxiliary head")])
def test_pairs_that_make_no_sense_are_refused(more, words):
    with pytest.raises(data.UsageError, match=words):
        model.build(config_with(**more))
    for more in (dict(), dict(network="dimr", pred="v"), dict(network="dimr", path="cosine")):
        with pytest.raises(data.UsageError, match="stages of a cascade"):
            dimr.MultiScale(config_with(**more))

# ---- Experiments that are no variant of the five scripts: spiral, width, collapse ---------------------------------------
def test_only_x_prediction_survives_512_dimensions():
    """The spiral is about 3 wide and its turns 0.8 apart; a quarter of that gap still shows the curve."""
    distance = {pred: manifold.experiment(512, pred, steps=120)[1] for pred in "xev"}
    assert distance["x"] < 0.25, distance
    assert distance["e"] > 3 * distance["x"] and distance["v"] > 3 * distance["x"], distance

def test_the_bent_plane_is_curved_and_embeddings_differ_in_the_act_alone(monkeypatch):
    torch.manual_seed(0)
    spiral, place = manifold.spiral(2000), manifold.bend(512)
    values = torch.linalg.svdvals(place(spiral) - place(spiral).mean(dim=0))**2 / 1999
    assert values[:2].sum() < 0.5 * values.sum() and values[:8].sum() < 0.9 * values.sum()                 # of flat ones 1
    assert values[40:].sum() < 1e-3 * values.sum() and 0.7 < values.sum() / spiral.var(dim=0).sum() < 1.4
    nets = []
    monkeypatch.setattr(manifold, "fit", lambda net, dimension, place, *_: nets.append((net, place(spiral))) or (None, 0.0))
    for act in (torch.nn.Identity(), torch.nn.SiLU()):
        manifold.bent_experiment(act, 8, dimension=64, seed=3)
    (linear, x), (silu, same) = nets
    assert torch.equal(x, same) and all(torch.equal(a, b) for a, b in zip(linear.state_dict().values(), silu.state_dict().values(), strict=True))
    z = torch.randn(5, 64)
    inner = z @ linear.embed[0].weight.T
    for net, act in ((linear, lambda value: value), (silu, F.silu)):
        assert (net.embed(z) - act(inner) @ net.embed[2].weight.T - net.embed[2].bias).abs().max() < 1e-5
        assert (net(z, torch.zeros(5), None) - net.layers(F.pad(net.embed(z), (0, 1)))).abs().max() < 1e-5

def test_no_prediction_beats_the_bound_of_its_width():
    """The best rank-2 prediction of correlated data, given everything, loses exactly the bound."""
    x = np.random.default_rng(0).standard_normal((4000, 5)) @ np.diag([3, 2, 1, 0.5, 0.1]) @ np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    centred = x - x.mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    lost = ((centred - u[:, :2] * s[:2] @ v[:2])**2).sum() / (len(x) - 1) / 5
    assert abs(width.bound(x.reshape(1000, 2, 2, 5), 2, 0) - lost) < 1e-9
    assert abs(width.bound(x.reshape(1000, 2, 2, 5), 2, 1) - lost - 3 / 5) < 1e-9

def test_the_order_of_collapse():
    """The plain latent diffusion loss collapses the latent; a slow target holds it up, and asking for the clean latent more so."""
    pictures = collapse.images(700)
    rank = {variant: collapse.experiment(variant, pictures, 30, every=30)[-1][1] for variant in ("naive-v", "ema-x")}
    assert 1.5 * rank["naive-v"] < rank["ema-x"], rank

def test_effective_rank_of_known_spectra():
    """Eight equal directions have rank 8; shares of 3/4 and 1/4 have exp(their entropy); one direction has 1."""
    left, right = torch.linalg.qr(torch.randn(1000, 8))[0], torch.linalg.qr(torch.randn(32, 8))[0]
    for values, rank in (([1.0] * 8, 8.0), ([3.0, 1.0], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))), ([0.5], 1.0)):
        n = len(values)
        assert abs(collapse.effective_rank(left[:, :n] * torch.tensor(values) @ right[:, :n].T) - rank) < 1e-3

SHORT = [*TINY_FLAGS, *GRID, "--steps", 2]

@pytest.mark.parametrize("name", ["paths", "dit", "sd3", "differential", "convnext", "td_norm", "ddt", "mean_colour", "both_ffn"])
def test_the_main_of_a_comparison(work, capsys, name):
    """python tests/experiments/NAME.py, short: a line for each row."""
    module = model.load_experiment(name)
    compare = model.load_experiment("_compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "compare", lambda rows, more, real=compare.compare, **how: real(rows, more, num=12, sampling=["--steps", 2, "--amp", "off"]))
        module.main(*SHORT)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) > 2 and all(line.count("|") == 6 for line in lines)

def test_the_mains_that_draw(there, capsys):
    manifold.main("m.png", dimensions=(2,), steps=3)
    manifold.compare_embeddings(widths=(2,), seeds=1, dimension=64, steps=2)
    collapse.main("c.png", count=600, steps=2)
    assert data.Image.open("m.png").size == (650, 166) and data.Image.open("c.png").width > 100
    said = capsys.readouterr().out
    assert said.count("prediction: mean distance") == 3 and said.count("embedding: distance to the curve") == 2

def test_the_main_of_width_and_of_one_step(work, capsys):
    from test_latents import make
    assert make("rae") == 0 and call(train, *TINY_FLAGS, "--steps", 2) == 0
    width.main("latents/rae", "--steps", 2, "--batch-size", 8, "--amp", "off")
    assert capsys.readouterr().out.count("held-out v-loss") == 6
    real = sample.main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "main", lambda argv: real([*argv, "--num", "12"]))
        one_step.main("--steps", 2, "--batch-size", 8, "--amp", "off", "--log-every", 1)
    assert capsys.readouterr().out.count("FD (classifier features)  ") == 6

# ---- The templates of the README run as they stand there -------------------------------------------------------------
TEMPLATES = re.findall(r"```python\n(.*?)```", (ROOT / "tests" / "experiments" / "README.md").read_text(), re.S)

@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_templates(work, capsys, monkeypatch, number):
    monkeypatch.setattr(sample, "SOLVERS", dict(sample.SOLVERS))
    Path("mine.py").write_text(TEMPLATES[number])
    if "data.SOURCES" in TEMPLATES[number]:
        done = subprocess.run([sys.executable, "mine.py", "--source", "noise", "--size", "16"], cwd=work, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        meta, arrays = data.open_data("data/noise")
        assert meta["classes"] == ["noise"] and arrays["train"][0].shape == (200, 16, 16, 3)
        return
    for steps in (2, 4):
        assert call(train, *TINY_FLAGS, "--experiment", "mine.py", "--save-minutes", 0, "--run", "mine", "--steps", steps, *(["--resume"] if steps == 4 else [])) == 0, capsys.readouterr().err
    assert call(sample, "--run", "mine", "--experiment", "mine.py", "--num", 2, "--steps", 2) == 0, capsys.readouterr().err
    if "sample.SOLVERS" in TEMPLATES[number]:             # Euler without the clamp is DDIM
        assert call(sample, "--run", "mine", "--solver", "ddim", "--out", "ddim", "--num", 2, "--steps", 2, "--experiment", "mine.py") == 0
        for name in ("0000000.png", "0000001.png"):
            assert np.abs(np.array(Image.open(f"ddim/{name}")).astype(int) - np.array(Image.open(f"runs/mine/samples/{name}"))).max() <= 1

def test_the_tangent_is_the_velocity_and_the_log_has_the_times_used(monkeypatch):
    net, batch, seen, real = shaken(config_with(**PAIR)), small_batch(None), [], one_step.mean_flow_target
    spans = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.9, 0.6, 0.3, 0.4])
    monkeypatch.setattr(one_step, "draw_spans", lambda t: spans)
    monkeypatch.setattr(one_step, "mean_flow_target", lambda *args: seen.append(args) or real(*args))
    one_step.one_step_objective(trainer_of(net), batch)
    u, z, t, r, _, tangent = seen[0]
    with torch.no_grad():
        assert torch.equal(r, spans[1][:2]) and torch.allclose(tangent, u(z, t, t)) and not torch.allclose(tangent, u(z, t, r), atol=1e-3)
    assert torch.equal(batch["t"], spans[0])

def test_a_comparison_shows_the_held_out_loss(there, monkeypatch, capsys):
    compare = model.load_experiment("_compare")
    monkeypatch.setattr(compare, "call", lambda *args: None)
    Path("runs/compare-x-y").mkdir(parents=True)
    Path("runs/compare-x-y/log.csv").write_text("step,images,loss,held_out,images_per_s\n300,9600,9,8,300\n600,19200,1,2,340\n")
    Path("runs/compare-x-y/metrics.json").write_text(json.dumps({"fd": 3.0, "class_accuracy": 0.5}))
    assert compare.compare({"x y": []}) == {"x y": (2.0, 3.0, 0.5)} and capsys.readouterr().out.endswith("| x y | 100 | 2.000 | 3.0 | 0.50 |\n")

def test_numbers_of_the_papers_in_experiments():
    """DiT's and SD3's objectives; the weight of an error of x, 1 / (1-t)^2 at the times of the held-out loss."""
    dit, sd3 = model.load_experiment("dit").SETTINGS, model.load_experiment("sd3").SETTINGS
    assert {name: dit.get(name) for name in ("pred", "loss", "path", "times", "sampling")} == {"pred": "e", "loss": "e", "path": "ddpm-linear", "times": "uniform", "sampling": {"solver": "ddpm", "steps": 250, "shift": None}}
    assert {name: sd3.get(name) for name in ("pred", "loss", "path", "p_mean", "p_std")} == {"pred": "v", "loss": "v", "path": "linear", "p_mean": 0.0, "p_std": 1.0}
    t = torch.sigmoid(torch.distributions.Normal(-0.8, 0.8).icdf((torch.arange(256) + 0.5) / 256))
    assert width.weight_of_x() == pytest.approx((1 / (1 - t).clamp_min(0.05)**2).mean().item(), rel=1e-4)

def test_the_gap_counts_what_is_left_out():
    half, whole = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert manifold.gap(half, whole) == manifold.gap(whole, half) == 1.0

def test_settings_of_experiments_that_nothing_shows():
    assert one_step.SETTINGS["ema"] == (0.995,) and dimr.MultiScale.weight == 1.0 and repa.RepaHead.weight == 0.5

def test_a_path_needs_no_suffix(there):
    Path("lab").mkdir(), Path("lab/plain.py").write_text("SETTINGS = {'depth': 3}\n")
    assert model.experiment_name("lab/plain") == str(there.resolve() / "lab" / "plain") and model.load_experiment("lab/plain").SETTINGS == {"depth": 3}
    assert model.experiment_name(str(FOLDER / "ddt.py")) == "ddt" and model.load_experiment("lab/plain") is model.load_experiment("lab/plain.py")           # run once

# ---- Each main() compares what it says, and each file brings what the README says --------------------------------------
ROWS = {
    "paths": {"linear": [], "cosine": ["--experiment", "paths", "--path", "cosine"], "ddpm-linear": ["--experiment", "paths", "--path", "ddpm-linear"],
              "ddpm-cosine": ["--experiment", "paths", "--path", "ddpm-cosine"]},
    "dimr": {"JiT, 16 tokens": [], "DICE, 64 tokens": ["--experiment", "dice"], "DiMR, 64 tokens": ["--experiment", "dimr"]},
    "ddt": {"JiT": [], "DDT": ["--experiment", "ddt", "--depth", 4, "--head-depth", 2], "DDT, reuse 2": ["--experiment", "ddt", "--depth", 4, "--head-depth", 2, "--reuse", 2],
            "DDT, reuse 4": ["--experiment", "ddt", "--depth", 4, "--head-depth", 2, "--reuse", 4]},
    "differential": {"three heads": [], "six heads": ["--num-heads", 6], "differential": ["--experiment", "differential"]},
    "convnext": {"attention": [], "no context tokens": ["--in-context-len", 0], "ConvNeXt": ["--experiment", "convnext"]},
    "both_ffn": {"SwiGLU": [], "bottleneck": ["--ffn", "bottleneck"], "both": ["--experiment", "both_ffn"]},
    "mean_colour": {"JiT": [], "mean colour": ["--experiment", str(FOLDER / "mean_colour.py")]},
    "td_norm": {"RMSNorm": [], "TD-norm": ["--experiment", "td_norm"]},
    "repa": {"JiT": [], "REPA": ["--experiment", "repa"]},
    "dit": {"JiT": [], "SD3's objective": ["--experiment", "sd3"], "DiT": ["--experiment", "dit"]},
}
ROWS |= {"dice": ROWS["dimr"], "sd3": ROWS["dit"]}
REGISTRIES = [(model, "FFNS"), (model, "NORMS"), (model, "MIXERS"), (model, "NETWORKS"), (model, "PATHS"), (model, "AUX_HEADS"), (model, "MODELS"), (train, "OBJECTIVES")]

@pytest.mark.parametrize("name", ROWS)
def test_what_a_main_compares(there, monkeypatch, name):
    """Also as a script, with the flags of the command line, from a place where the project is not on Python's path."""
    asked = []
    for place, registry in REGISTRIES:
        monkeypatch.setattr(place, registry, dict(getattr(place, registry)))   # a file that runs again fills copies
    for own in ("cosine", "ddpm-linear", "ddpm-cosine"):
        model.PATHS.pop(own, None)
    monkeypatch.setattr(model.load_experiment("_compare"), "compare", lambda rows, more, **how: asked.append((rows, more, how)))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "9"]), monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != ROOT])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert asked == [(ROWS[name], ("--steps", "9"), {"sampling": ["--steps", 25]} if name in ("dit", "sd3") else {})] and list(asked[0][0]) == list(ROWS[name])
    assert str(ROOT) in sys.path

@pytest.mark.parametrize("name", [name for name in NAMES if name not in ROWS and name != "reg"])
def test_files_find_the_project(monkeypatch, name):
    for place, registry in REGISTRIES:
        monkeypatch.setattr(place, registry, dict(getattr(place, registry)))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != ROOT])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="experiment")
    assert str(ROOT) in sys.path

def test_settings_and_models_of_experiments():
    wanted = {"one_step": {"network": "one_step", "objective": "one_step", "steps": 1000, "lr": 1.2e-3, "schedule": "cosine", "ema": (0.995,),
                           "sampling": {"solver": "euler", "cfg": 1.0, "steps": 1, "shift": 1.0}},
              "dimr": {"model": "DiMR-T/8", "network": "dimr", "mixer": "convnext", "norm": "td", "aux": "multiscale", "steps": 1600},
              "dice": {"model": "DICE-T/8", "network": "dice", "mixer": "dice", "steps": 1600}, "differential": {"mixer": "differential", "num_heads": 6},
              "convnext": {"mixer": "convnext", "in_context_len": 0}, "td_norm": {"norm": "td", "network": "td_norm"}, "ddt": {"network": "ddt"}, "both_ffn": {"ffn": "both"},
              "paths": {"path": "cosine"}, "mean_colour": {"aux": "mean_colour"}, "repa": {"network": "repa", "aux": "repa"},
              "vae": {"data": "shapes-vae", "depth": 4, "in_context_start": 1, "patch_size": 2, "hidden_size": 96, "steps": 2400, "lr": 4e-3, "noise_scale": 1.0},
              "rae": {"data": "shapes-rae", "depth": 4, "in_context_start": 1, "steps": 1600, "noise_scale": 1.0, "sampling": {"shift": None}}}
    wanted["reg"] = wanted["vae"] | {"data": "shapes-reg"}
    assert {name: model.load_experiment(name).SETTINGS for name in wanted} == wanted
    row = {"image_size": 64, "patch_size": 8, "hidden_size": 192, "depth": 6, "num_heads": 3, "bottleneck_dim": 64, "in_context_start": 2, "in_context_len": 0, "dropout": 0, "noise_scale": 1, "num_classes": 10}
    assert model.MODELS["DiMR-T/8"] == model.MODELS["DICE-T/8"] == row
    within = {(cls.__name__, e.name): (e.default, e.metadata.get("within")) for cls, _ in model.NETWORKS.values() for e in dataclasses.fields(cls) if e not in dataclasses.fields(model.JiTConfig)}
    assert {key: within[key] for key in (("OneStepConfig", "guidance"), ("WideHeadConfig", "head_depth"), ("WideHeadConfig", "head_width"), ("WideHeadConfig", "reuse"))} == {
        ("OneStepConfig", "guidance"): (1.5, "[1, inf)"), ("WideHeadConfig", "head_depth"): (2, "[1, inf)"), ("WideHeadConfig", "head_width"): (0, "[0, inf)"), ("WideHeadConfig", "reuse"): (1, "[1, inf)")}

def test_dimr_brings_the_convolution_that_it_names(monkeypatch):
    monkeypatch.setattr(model, "MIXERS", {"attention": model.Attention}), monkeypatch.setattr(model, "MODELS", dict(model.MODELS))
    monkeypatch.delitem(model.LOADED, FOLDER / "convnext.py")
    runpy.run_path(str(FOLDER / "dimr.py"), run_name="experiment")
    assert "convnext" in model.MIXERS

def test_the_steps_of_a_comparison(there, monkeypatch, capsys):
    """Later flags come before earlier ones; a file of one's own is named again where the checkpoint is read; an error ends all."""
    compare, asked = model.load_experiment("_compare"), []
    assert compare.SHORT == ("--steps", 600, "--ema", 0.99, "--preview-every", 0, "--snapshots", 0)
    parameters = inspect.signature(compare.compare).parameters
    assert {name: p.default for name, p in parameters.items() if name != "rows"} == {"more": (), "num": 500, "sampling": (), "common": compare.SHORT}
    with pytest.raises(SystemExit) as ended:
        compare.call(train, "--steps", "x")
    assert ended.value.code == 2
    monkeypatch.setattr(compare, "call", lambda script, *flags: asked.append((script.__name__, *flags)))
    Path("runs/compare-x").mkdir(parents=True)
    Path("runs/compare-x/log.csv").write_text("step,images,loss,held_out,images_per_s\n600,19200,1,2,340\n")
    Path("runs/compare-x/metrics.json").write_text(json.dumps({"fd": 3.0}))
    capsys.readouterr()
    result = compare.compare({"x": ["--depth", 3, "--experiment", "mine.py"]}, ("--steps", 2000), sampling=["--steps", 5])
    assert asked == [("03_train", *compare.SHORT, "--run", "compare-x", "--depth", 3, "--experiment", "mine.py", "--steps", 2000),
                     ("04_sample", "--run", "compare-x", "--num", 500, "--experiment", "mine.py", "--steps", 5), ("05_eval", "--run", "compare-x", "--metrics", "fd")]
    assert result["x"][:2] == (2.0, 3.0) and math.isnan(result["x"][2])        # a network without classes has no class accuracy
    assert capsys.readouterr().out.startswith("| what | ms a step | held-out loss | FD | class accuracy |\n")

# ---- One step, written a second time --------------------------------------------------------------------------------
@pytest.mark.parametrize("pred", ["x", "v"])
def test_the_objective_of_one_step_written_a_second_time(monkeypatch, pred):
    """Spans with r > t, an odd batch, guidance; loss, log and gradient."""
    net = shaken(config_with(**PAIR, guidance=1.7, pred=pred))
    x, _, _ = inputs(3)
    batch = {"x": x.clamp(-1, 1), "e": torch.randn_like(x), "t": torch.rand(3), "y": torch.tensor([0, 2, 1])}
    t, r = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.9, 0.7, 0.6])
    monkeypatch.setattr(one_step, "draw_spans", lambda times: (t, r))
    loss, error = one_step.one_step_objective(trainer_of(net), dict(batch))
    loss.backward()
    gradient = net.blocks[1].attn.qkv.weight.grad.clone()
    net.zero_grad()
    expand = lambda c: c.view(-1, 1, 1, 1)

    def u(z, t, r, y):
        out = net(z, torch.stack([t, r], dim=1), y)
        return out if pred == "v" else (out - z) / expand((1 - t).clamp_min(0.05))
    z = expand(t) * batch["x"] + expand(1 - t) * batch["e"]
    with torch.no_grad():
        null = u(z, t, t, torch.full((3,), 3))
        v = null + 1.7 * ((batch["x"] - z) / expand(1 - t) - null)
        first, y = slice(0, 2), batch["y"][:2]            # of three, two may span
        with one_step.sdpa_kernel(one_step.SDPBackend.MATH):
            _, du = torch.func.jvp(lambda z, t: u(z, t, r[first], y), (z[first], t[first]), (u(z[first], t[first], t[first], y), torch.ones(2)))
        second = expand(r - t)[first] * du
        v[first] += second * expand((1.5 / second.square().mean((1, 2, 3)).sqrt()).clamp_max(1))
    wanted = (u(z, t, r, batch["y"]) - v).square().mean((1, 2, 3))
    (wanted / (wanted.detach() + 0.01)).mean().backward()
    assert torch.allclose(error, wanted.detach(), rtol=1e-4) and not error.requires_grad
    assert torch.allclose(gradient, net.blocks[1].attn.qkv.weight.grad, rtol=1e-3, atol=1e-6) and gradient.abs().max() > 0

def test_spans_written_a_second_time():
    for count in (1, 5, 8):
        times, n = torch.rand(count), (count + 1) // 2
        torch.manual_seed(7)
        t, r = one_step.draw_spans(times)
        torch.manual_seed(7)
        chance = torch.rand(3, n)
        for i in range(n):
            begin = 0.0 if chance[0, i] < 0.15 else times[i] / (times[i] + 2 * (1 - times[i]))
            end = 1.0 if chance[1, i] < 0.5 else begin + (1 - begin) * chance[2, i]
            assert torch.isclose(t[i], torch.tensor(float(begin))) and torch.isclose(r[i], torch.tensor(float(end)))
        assert torch.equal(t[n:], times[n:]) and torch.equal(r[n:], times[n:])
    assert one_step.draw_spans(torch.rand(5, device="meta"))[1].device.type == "meta"

def test_when_one_step_needs_a_null_class():
    for more in (dict(num_classes=0, guidance=1.5), dict(guidance=1.0)):
        net, batch = shaken(config_with(**PAIR | more)), small_batch(None)
        batch["y"] = batch["y"] * bool(net.config.num_classes)
        one_step.one_step_objective(trainer_of(net, label_drop=0.0), batch)

def test_recomputing_is_off_inside_and_on_again_after():
    net = shaken(config_with(**PAIR))
    net.blocks[0].forward = marker = lambda *_: None
    with one_step.nothing_recomputed(net):
        assert not any("forward" in vars(block) for block in net.blocks)
    assert net.blocks[0].forward is marker and "forward" not in vars(net.blocks[1])

def test_it_is_the_length_of_a_step_that_is_embedded():
    embed = one_step.SpanEmbed(32)
    with torch.no_grad():
        embed.span_out.copy_(torch.eye(32))
    t, r = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.9])
    plain = model.TimeEmbed(32)
    plain.load_state_dict({name: value for name, value in embed.state_dict().items() if name.startswith("mlp")})
    assert torch.allclose(embed(torch.stack([t, r], dim=1)), plain(t) + embed.span(torch.tensor([0.4, 0.4])), atol=1e-6)

def test_what_the_main_of_one_step_runs(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(model.load_experiment("_compare"), "call", lambda script, *flags: asked.append((script.__name__, *flags)))
    one_step.main("--data", "mine")
    assert asked[:2] == [("03_train", "--experiment", "one_step", "--init", "shapes", "--run", "shapes-onestep", "--data", "mine"),
                         ("03_train", "--init", "shapes", "--steps", 1000, "--lr", 1.2e-3, "--run", "shapes-control", "--data", "mine")]
    wanted = []
    for run in ("shapes-control", "shapes-onestep"):
        for steps in (1, 2, 4):
            wanted += [("04_sample", "--run", run, "--solver", "euler", "--steps", steps, "--out", f"trials/{run}-{steps}"), ("05_eval", "--samples", f"trials/{run}-{steps}", "--metrics", "fd")]
    assert asked[2:] == wanted

# ---- Networks, in particular ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [dict(network="one_step"), dict(network="ddt"), dict(network="dimr", in_context_len=0), dict(network="dice", in_context_len=0)], ids=lambda more: more["network"])
def test_every_configuration_is_checked_as_jits_is(more):
    with pytest.raises(data.UsageError, match="is not a multiple of patch size"):
        config_with(**more | {"image_size": 17})
    with pytest.raises(data.UsageError, match="is not a multiple of 4 x"):
        config_with(**more | {"hidden_size": 36})
    assert config_with(**more | {"in_context_len": 2, "in_context_start": 4}).in_context_len == 0              # there is no fifth block

def test_new_layers_begin_as_jits():
    torch.manual_seed(0)
    cascade, wide = model.build(config_with(network="dimr", **COARSE)), model.build(config_with(**WIDE))
    mixer, both = convnext.ConvMixer(config_with(in_context_len=0), 0), both_ffn.BothFFN(32, 128, 0.2)
    for layer in (*cascade.up, wide.head_condition, mixer.proj):
        bound = (6 / sum(layer.weight.shape))**0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() == 0
    assert mixer.conv.bias.abs().max() == 0 and both.wide.dropout.p == 0.2
    lambdas = differential.DifferentialAttention(config_with(num_heads=2, hidden_size=512), 0).lambdas
    assert abs(lambdas.std() - 0.1) < 0.01
    wide(torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([0]))
    assert wide.kept == (None, None)                      # with gradients nothing is kept from step to step

def test_a_cascade_of_attention_has_context_tokens():
    net = shaken(config_with(network="dimr", mixer="attention", depth=6, in_context_len=2))
    z, t, y = inputs()
    before = net(z, t, y)
    with torch.no_grad():
        net.stages[0].in_context_posemb.add_(1)
    assert not torch.equal(net(z, t, y), before)

def test_multiscale_weighs_each_image_by_its_own_time():
    batch = small_batch(None)
    x, u = batch["x"], 1 / (1 - batch["t"]).clamp_min(0.05)
    off = torch.tensor([0.0, 1.0, 2.0, 3.0])
    answer = [F.avg_pool2d(x, 4) + off.view(4, 1, 1, 1), F.avg_pool2d(x, 2)]
    assert torch.allclose(dimr.MultiScale.loss(None, answer, batch), (u**2 * off**2).mean() / 16, rtol=1e-4)

def test_the_mean_colour_by_definition():
    """Token i, in rows, against the mean of its patch, each channel apart; in fp32, with as many channels as the data."""
    colour = model.load_experiment("mean_colour")
    config = config_with(in_channels=5)
    head = colour.MeanColour(config)
    assert colour.MeanColour.after == 2 and head(torch.randn(2, 16, 32)).shape == (2, 16, 5)
    with model.autocast("bf16", torch.device("cpu")):
        assert head(torch.randn(2, 16, 32)).dtype == torch.float32
    x, answer = torch.randn(2, 5, 16, 16), torch.randn(2, 16, 5)
    total = 0.0
    for image, said in zip(x, answer):
        for token in range(16):
            row, column = divmod(token, 4)
            total += (said[token] - image[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4].mean((1, 2))).square().sum()
    assert torch.allclose(head.loss(answer, {"x": x, "e": torch.randn_like(x)}), total / (2 * 16 * 5), rtol=1e-4)

def test_the_clamp_of_other_paths_is_the_linear_ones():
    assert inspect.signature(model.load_experiment("paths").GeneralPath.conversion).parameters["t_eps"].default == model.T_EPS == 0.05

# ---- Collapse and manifold, in particular ---------------------------------------------------------------------------
def test_how_a_latent_space_is_trained(monkeypatch):
    """Target, mixture, space and pictures of each variant; the pictures looked at are never trained on."""
    pictures = torch.arange(564).view(564, 1, 1, 1).expand(564, 64, 64, 3).contiguous()       # a picture says which it is
    seen = {name: [] for name in ("pictures", "mixed", "graded", "tokens", "slow")}
    real = {"to_float": model.to_float, "mix": model.mix, "grid_loss": train.grid_loss, "lerp": torch._foreach_lerp_, "rank": collapse.effective_rank}
    monkeypatch.setattr(model, "to_float", lambda part: seen["pictures"].append(part[:, 0, 0, 0]) or real["to_float"]((part % 256).to(torch.uint8)))
    monkeypatch.setattr(model, "mix", lambda x, e, t: seen["mixed"].append(x) or real["mix"](x, e, t))
    monkeypatch.setattr(train, "grid_loss", lambda out, batch, config, space: seen["graded"].append((batch["x"], config.pred, space)) or real["grid_loss"](out, batch, config, space))
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, weight: seen["slow"].append(weight) or real["lerp"](a, b, weight))
    monkeypatch.setattr(collapse, "effective_rank", lambda tokens: seen["tokens"].append(tokens) or real["rank"](tokens))
    for variant in collapse.VARIANTS:
        for part in seen.values():
            part.clear()
        (step, rank, std), = collapse.experiment(variant, pictures, 0)
        held_out, trained = seen["pictures"]
        (target, pred, space), mixed, kind = seen["graded"][0], seen["mixed"][0], variant.split("-")[0]
        assert held_out.tolist() == list(range(64, 564)) and trained.max() < 64 and len(trained) == 64
        assert (pred, space) == (variant[-1],) * 2 and mixed.requires_grad and target.requires_grad == (kind == "naive") and (target is mixed) == (kind == "naive")
        assert torch.equal(target, mixed) and seen["slow"] == [0.1]            # at the first step the average is the encoder itself
        assert std == pytest.approx(seen["tokens"][0].std(dim=0).mean().item()) and step == 0 and rank == real["rank"](seen["tokens"][0])
    assert collapse.experiment("ema-x", pictures, 1, every=1) == collapse.experiment("ema-x", pictures, 1, every=1)          # seeded

def test_the_figure_of_collapse_shows_ranks(there, monkeypatch, capsys):
    charts = []
    monkeypatch.setattr(collapse, "images", lambda count: count)
    monkeypatch.setattr(collapse, "experiment", lambda variant, pictures, steps: [(0, 9.0, 0.5), (25, 8.0, 0.4)])
    monkeypatch.setattr(model, "chart", lambda title, label, lines: charts.append((title, label, lines)) or data.Image.new("RGB", (9, 9)))
    collapse.main("c.png")
    assert charts == [("effective rank of the latents", "step", {variant: [(0, 9.0), (25, 8.0)] for variant in collapse.VARIANTS})]
    assert capsys.readouterr().out.startswith("naive-v step 0: rank 9.0, std 0.50\n")

def test_the_spiral_and_the_networks_of_the_manifold(monkeypatch):
    torch.manual_seed(0)
    radius = manifold.spiral(20_000).norm(dim=1)
    assert 1.5 * math.pi / 8 <= radius.min() < 0.6 and 1.75 < radius.max() <= 4.5 * math.pi / 8
    assert [tuple(layer.weight.shape) for layer in manifold.MLP(7, "x").layers if isinstance(layer, torch.nn.Linear)] == [(256, 8)] + [(256, 256)] * 4 + [(7, 256)]
    asked = []
    monkeypatch.setattr(manifold, "fit", lambda net, dimension, place, steps, batch: asked.append((net.config.pred, dimension, steps, batch)) or (place(torch.tensor([[1.0, 2.0]])), 0.5))
    points, distance = manifold.experiment(6, "e", steps=3, batch=5)
    assert torch.allclose(points, torch.tensor([[1.0, 2.0]]), atol=1e-5) and distance == 0.5                   # in the plane of the spiral
    assert manifold.bent_experiment(torch.nn.SiLU(), 4, dimension=64, steps=3, batch=5) == 0.5 and asked == [("e", 6, 3, 5), ("x", 64, 3, 5)]

def test_how_the_manifold_is_fitted(monkeypatch):
    rates, spaces, real = [], [], train.grid_loss

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)
    monkeypatch.setattr(torch.optim, "Adam", Spy)
    monkeypatch.setattr(train, "grid_loss", lambda out, batch, config, space: spaces.append((config.pred, space)) or real(out, batch, config, space))
    manifold.fit(manifold.MLP(2, "e"), 2, lambda points: points, 4, 8)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4]) and spaces == [("e", "v")] * 4

def test_the_figure_and_the_table_of_the_manifold(there, monkeypatch, capsys):
    asked, dots = [], []
    monkeypatch.setattr(manifold, "experiment", lambda dimension, pred, steps: asked.append((dimension, pred, steps)) or (torch.tensor([[1.0, -2.0]]), 0.25))
    monkeypatch.setattr(manifold.ImageDraw.ImageDraw, "ellipse", lambda self, box, fill: dots.append((box, fill)))
    manifold.main("m.png", dimensions=(2, 8), steps=7)
    assert asked == [(dimension, pred, 7) for dimension in (2, 8) for pred in "xev"]
    assert [box for box, fill in dots if fill == "navy"] == [(50 + 150 * c + 75 + 30 - 1, 16 + 150 * r + 75 - 60 - 1, 50 + 150 * c + 75 + 30 + 1, 16 + 150 * r + 75 - 60 + 1) for r in (0, 1) for c in (1, 2, 3)]
    capsys.readouterr(), asked.clear()
    monkeypatch.setattr(manifold, "bent_experiment", lambda act, width, seed, **more: asked.append((type(act).__name__, width, seed, more)) or seed / 4)
    manifold.compare_embeddings(widths=(8,), seeds=2, steps=5)
    assert asked == [(act, 8, seed, {"steps": 5}) for act in ("Identity", "SiLU") for seed in (0, 1)]
    assert capsys.readouterr().out == "".join(f"bent plane, bottleneck 8, {name} embedding: distance to the curve 0.000, 0.250\n" for name in ("linear", "SiLU"))

# ---- REPA, DiT's blocks, the norm of time, the width ----------------------------------------------------------------
class NoTeacher(types.SimpleNamespace):
    def to(self, device):
        self.asked.append(device.type)
        return self

def made_by(monkeypatch, **coder):
    monkeypatch.setattr(data, "open_data", lambda folder: ({"id": "0a", "channels": 24, **({"coder": coder} if coder else {})}, {}))

def test_who_can_be_a_teacher(monkeypatch):
    """An RAE for images of the same size, a DINOv2 for any; and only where there is something to learn."""
    wanted = config_with(network="repa", aux="none", teacher="x")              # no such data set: sampling does not need it
    assert wanted.folder() == Path("data/x") and wanted.teacher_id is None
    for coder, words in (({}, "has no encoder to learn from"), (dict(kind="vae", size=16), "has no encoder to learn from"), (dict(kind="rae", size=8), "images of 8 pixels"), (dict(kind="rae", size=32), "images of 32 pixels"),
                         (dict(kind="rae", size=16), None), (dict(kind="dinov2", size=64), None)):
        made_by(monkeypatch, **coder)
        if words:
            with pytest.raises(data.UsageError, match=words):
                config_with(network="repa", aux="repa", teacher="x")
        else:
            config = config_with(network="repa", aux="repa", teacher="x")
            assert (config.teacher_id, config.features) == ("0a", 24)
    with pytest.raises(data.UsageError, match="is not a multiple of 4 x"):
        config_with(network="repa", aux="repa", teacher="x", hidden_size=36)

@pytest.mark.parametrize("width,inner", [(32, 128), (640, 2048)])
def test_the_head_of_repa(monkeypatch, width, inner):
    made_by(monkeypatch, kind="dinov2", size=64)
    teacher = NoTeacher(asked=[], features=lambda x: x * 2)
    monkeypatch.setattr(model, "load_coder", lambda folder, coder: teacher)
    head = repa.RepaHead(config_with(network="repa", aux="repa", teacher="x", hidden_size=width))
    assert [type(part).__name__ for part in head.mlp] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [tuple(part.weight.shape) for part in head.mlp if isinstance(part, torch.nn.Linear)] == [(inner, width), (inner, inner), (24, inner)]
    batch = head.prepare({"x": torch.ones(1, 3, 4, 4, device="meta")})
    assert teacher.asked == ["meta"] and batch["features"].device.type == "meta"

def test_blocks_of_dit_and_sd3():
    dit, sd3 = model.load_experiment("dit"), model.load_experiment("sd3")
    blocks = {"norm": "layernorm", "ffn": "gelu", "rope": False, "qk_norm": False, "in_context_len": 0, "bottleneck_dim": 0}
    assert dit.SETTINGS == blocks | {"pred": "e", "loss": "e", "path": "ddpm-linear", "times": "uniform", "sampling": {"solver": "ddpm", "steps": 250, "shift": None}}
    assert sd3.SETTINGS == blocks | {"pred": "v", "loss": "v", "path": "linear", "p_mean": 0.0, "p_std": 1.0}
    for name, approximate in (("gelu", "tanh"), ("exact-gelu", "none")):
        ffn = model.FFNS[name](8, 16, 0.3)
        assert [type(part).__name__ for part in ffn] == ["Linear", "GELU", "Dropout", "Linear"] and ffn[1].approximate == approximate and ffn[2].p == 0.3

def test_the_norm_of_time_begins_to_follow_it_and_lets_heads_in():
    assert td_norm.TimeNorm(4).time_map.tolist() == [1.0, 0.0]                 # with 0 both weights would stay alike
    z, t, y = inputs()
    out, tokens = shaken(config_with(norm="td", network="td_norm"))(z, t, y, tap=1)
    assert out.shape == z.shape and tokens.shape == (3, 16, 32)

def test_the_width_experiment_compares_what_it_says(there, monkeypatch, capsys):
    assert width.CELLS == {"48 wide, v-prediction": ["--pred", "v"], "48 wide, x-prediction": ["--pred", "x"],
                           "48 wide, head of 2 blocks 224 wide, v-prediction": ["--pred", "v", "--experiment", "rae,ddt", "--head-width", 224],
                           "224 wide, v-prediction": ["--pred", "v", "--hidden-size", 224, "--num-heads", 14, "--depth", 3]}
    assert width.NARROW == ["--experiment", "rae", "--hidden-size", 48, "--num-heads", 3, "--lr", 3e-3, "--steps", 600, "--ema", 0.99, "--preview-every", 0, "--snapshots", 0]
    asked = []
    monkeypatch.setattr(model.load_experiment("_compare"), "call", lambda script, *flags: asked.append(flags))
    Path("runs/width-48-wide-x-prediction").mkdir(parents=True)
    Path("runs/width-48-wide-x-prediction/log.csv").write_text("step,loss,held_out\n50,9,\n600,1,2\n")
    assert width.held_out("48 wide, x-prediction", "data/z", "--seed", 3) == 2
    assert asked == [(*width.NARROW, "--data", "data/z", "--run", "width-48-wide-x-prediction", "--pred", "x", "--seed", 3)]
    places = []
    monkeypatch.setattr(data, "open_data", lambda place: places.append(place) or (None, {"train": (np.zeros((6000, 1, 1, 2)), None)}))
    monkeypatch.setattr(width, "bound", lambda images, wide, noise: len(images) / 1000 + wide + 100 * noise)
    monkeypatch.setattr(width, "weight_of_x", lambda: 2.0)
    monkeypatch.setattr(width, "held_out", lambda name, place, *more: 7.0)
    width.main()
    assert places == ["data/shapes-rae"] and capsys.readouterr().out == (
        "bound on the held-out v-loss, v predicted from 48 dimensions: 153.000\nbound on the held-out v-loss, x predicted from 48 dimensions: 106.000\n"
        + "".join(f"{name}: held-out v-loss 7.000\n" for name in width.CELLS))

def test_narrow_latents_are_probed_as_they_are():
    z = np.random.default_rng(0).standard_normal((3, 4, 4, 5)).astype(np.float16)
    assert model.load_experiment("latents").flattened(z, np.arange(3), 9)[0].shape == (3, 80)

NOTEBOOK = """
import runpy, sys
def run(script, *flags):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""

def test_a_notebook_runs_a_script_again_with_its_experiments(work):
    """As %run does: the script is a new module each time, 02 stays; files are read anew, and fill the new script's registries."""
    tiny = [*TINY_FLAGS, "--steps", 2]
    lines = [NOTEBOOK, f"train, tiny = {str(ROOT / '03_train.py')!r}, {list(map(str, tiny))!r}", "run(train, *tiny, '--run', 'base')"]
    lines += [f"run(train, '--experiment', 'one_step', '--init', 'base', '--batch-size', '8', '--amp', 'off', '--steps', '2', '--run', {name!r})" for name in ("one", "two")]
    lines.append(f"run({str(ROOT / '04_sample.py')!r}, '--run', 'two', '--num', '4')")
    for rate in ("0.001", "0.005"):
        own = f"open('seen', 'a').write('{rate} ')\nSETTINGS = {{'p_std': {rate}}}"
        lines += [f"open('mine.py', 'w').write({own!r})", f"run(train, *tiny, '--experiment', './mine.py', '--run', 'mine{rate}')"]
        lines += [f"run({str(ROOT / '04_sample.py')!r}, '--run', 'mine{rate}', '--experiment', './mine.py', '--num', '2', '--steps', '1')"]
    Path("other.py").write_text("import importlib\nm = importlib.import_module('02_model')\nm.FFNS['swiglu'] = m.bottleneck_ffn\nSETTINGS = {'ffn': 'swiglu'}\n")
    for name, more in (("before", ""), ("other", ", '--experiment', 'other.py'"), ("after", "")):
        lines.append(f"run(train, *tiny, '--run', {name!r}{more})")
    lines.append(f"run({str(ROOT / '04_sample.py')!r}, '--run', 'before', '--num', '2', '--steps', '1')")
    Path("cells.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "cells.py"], cwd=work, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert [json.loads(Path(f"runs/mine{rate}/config.json").read_text())["options"]["p_std"] for rate in ("0.001", "0.005")] == [0.001, 0.005]
    before, other, after = (model.read_checkpoint(f"runs/{name}/checkpoint.pt")["model"].keys() for name in ("before", "other", "after"))
    assert before == after != other                       # what other.py put in place of JiT's FFN is gone
    assert Path("seen").read_text().split() == ["0.001", "0.001", "0.005", "0.005"]
