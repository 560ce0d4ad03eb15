"""What grew around JiT: one-step generation, representation losses, mixers, the cascade; each against a closed form or a rewrite."""
import csv
import json
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, TINY_FLAGS, call, data, evaluate, model, sample, train
from test_train import torchrun, weights

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
    target = train.mean_flow_target(exact_u, z, t, r, exact_v(z, t), exact_v(z, t), cap=1e9)
    assert (target - exact_u(z, t, r)).abs().max() < 1e-6
    wrong = train.mean_flow_target(exact_u, z, t, r, exact_v(z, t), 0 * z, cap=1e9)                       # not along the path
    assert (wrong - exact_u(z, t, r)).abs().max() > 0.01

def test_one_step_of_a_gaussian_ends_where_the_path_does():
    def net(z, t, y):                                     # predicts x(z, t, r) = z + (1-t) u
        t, r = (time.double() for time in t.unbind(1))
        flat = z.double().flatten(1)
        return (flat + (1 - t)[:, None] * exact_u(flat, t, r)).view_as(z).float()
    net.config = types.SimpleNamespace(pred="x", path="linear", noise_scale=1.0, num_classes=0, two_times=True)
    noise = torch.randn(5, 3, 4, 4)
    for steps in (1, 2, 5):
        images = sample.generate(net, noise, torch.zeros(5).long(), solver="euler", steps=steps, t_eps=1e-3)
        assert (images - S * noise).abs().max() < 1e-6 * max(1, 10 * (steps - 1)), steps

def test_the_second_term_is_capped_per_image():
    u = lambda z, t, r: z * (t * torch.tensor([1.0, 100.0]))[:, None]
    z, t, r = torch.ones(2, 4), torch.zeros(2), torch.ones(2)
    assert torch.allclose(train.mean_flow_target(u, z, t, r, 0 * z, 0 * z), torch.tensor([[1.0], [1.5]]).expand(2, 4))

def test_spans():
    torch.manual_seed(0)
    times = torch.rand(40_000)
    t, r = train.draw_spans(times)
    first, rest = slice(0, 20_000), slice(20_000, None)
    assert torch.equal(t[rest], times[rest]) and torch.equal(r[rest], t[rest]) and (r >= t).all() and (r <= 1).all()
    assert abs((r[first] == 1).float().mean() - 0.5) < 0.02 and abs((t[first] == 0).float().mean() - 0.15) < 0.02
    where = (t[first] > 0) & (r[first] < 1)
    assert abs(((r - t) / (1 - t))[first][where].mean() - 0.5) < 0.02          # the ends in between are uniform

def small_batch(config):
    x, t, y = inputs(4)
    return {"x": x.clamp(-1, 1), "e": torch.randn_like(x), "t": t, "y": torch.tensor([0, 1, 3, 2]), "turns": y}

PAIR = TINY | dict(two_times=True)

def test_without_spans_and_guidance_it_is_the_jit_loss(monkeypatch):
    monkeypatch.setattr(train, "draw_spans", lambda t: (t, t))
    config = model.JiTConfig(**PAIR)
    net, batch = shaken(config), small_batch(config)
    options, off = train.Options(guidance=1.0), model.autocast("off", torch.device("cpu"))
    loss, error, _ = train.mean_flow_loss(net, batch, options, config, off)
    _, wanted, _ = train.training_loss(net, batch, train.Options(aux_weight=0.1), config, off)
    assert torch.allclose(error, wanted, rtol=1e-5) and torch.allclose(loss, (error / (error + 0.01)).mean())
    _, guided, _ = train.mean_flow_loss(net, batch, train.Options(guidance=2.0), config, off)
    assert guided[2] == error[2] and (guided[[0, 1, 3]] != error[[0, 1, 3]]).all()                         # index 2 has no class

def test_guidance_is_built_into_the_target(monkeypatch):
    """v_null + w (v - v_null), v the true velocity and v_null the network's own."""
    monkeypatch.setattr(train, "draw_spans", lambda t: (t, t))
    config = model.JiTConfig(**PAIR)
    net, batch = shaken(config), small_batch(config)
    _, error, _ = train.mean_flow_loss(net, batch, train.Options(guidance=1.7), config, model.autocast("off", torch.device("cpu")))
    z = model.mix("linear", batch["x"], batch["e"], batch["t"])
    ask = lambda y: (net(z, batch["t"], y) - z) / (1 - batch["t"]).clamp_min(0.05)[:, None, None, None]
    null = ask(torch.full((4,), 3))
    target = null + 1.7 * (batch["x"] - batch["e"] - null)
    wanted = (ask(batch["y"]) - target).square().flatten(1).mean(1)
    assert torch.allclose(error[[0, 1, 3]], wanted[[0, 1, 3]].detach(), rtol=1e-4)

def test_derivative_against_a_difference():
    """Forward mode through attention, rotation and norms; the tangent reaches both z and t."""
    net = shaken(model.JiTConfig(**PAIR))
    z, t, y = (part[:2] for part in inputs())
    t, r, h = torch.tensor([0.2, 0.5]), torch.tensor([1.0, 0.8]), 1e-3
    u = lambda z, t, r: train.average_velocity(net, z, t, r, y, net.config)
    tangent = torch.randn_like(z)
    with torch.no_grad():
        turn = train.mean_flow_target(u, z, t, r, 0 * z, tangent, cap=1e9)
        difference = (u(z + h * tangent, t + h, r) - u(z - h * tangent, t - h, r)) / (2 * h) * (r - t).view(2, 1, 1, 1)
    assert (turn - difference).square().mean().sqrt() < 0.02 * difference.square().mean().sqrt()
    assert turn.abs().max() > 0.01

def test_a_trained_jit_begins_as_itself():
    plain = shaken(model.JiTConfig(**TINY))
    net = model.build(model.JiTConfig(**PAIR)).eval()
    train.begin_with(net, plain.state_dict())
    z, t, y = inputs()
    for r in (t, torch.ones(3), (t + 1) / 2):
        assert torch.equal(net(z, torch.stack([t, r], dim=1), y), plain(z, t, y))
    assert torch.equal(net(z, t, y), plain(z, t, y))
    with torch.no_grad():
        net.t_embedder.span_out.add_(0.1)
    assert not torch.equal(net(z, torch.stack([t, torch.ones(3)], dim=1), y), net(z, t, y))

@pytest.mark.parametrize("network", [[], ["--head-depth", 1, "--head-width", 64], ["--checkpointing"]])
def test_from_a_jit_to_one_step(work, capsys, network):
    """Also accumulation, resuming, sampling; a flag stored in the checkpoint is never asked again."""
    assert call(train, *TINY_FLAGS, *[flag for flag in network if flag != "--checkpointing"], "--steps", 8, "--run", "jit") == 0
    flags = ["--objective", "meanflow", "--init", "jit", "--batch-size", 8, "--micro-batch", 4, "--amp", "off", "--preview-every", 0, "--snapshots", 0, "--log-every", 2]
    flags += [flag for flag in network if flag == "--checkpointing"]
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0 and "is finished" in capsys.readouterr().out
    config = json.loads(Path("runs/whole/config.json").read_text())
    assert config["config"]["two_times"] and config["config"]["hidden_size"] == 32 and config["options"]["lr"] == 1.2e-3
    trainer_stop = train.Recorder.after_step
    with pytest.MonkeyPatch.context() as patch:           # stopped at step 3, the same command goes on
        patch.setattr(train.Recorder, "after_step", lambda self: (self.signals.append(1) if self.trainer.step == 3 else None, trainer_stop(self)))
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
    assert call(sample, "--run", "whole", "--num", 4, "--solver", "heun", "--out", "x") == 2 and "--solver euler" in capsys.readouterr().err

def test_one_step_is_one_evaluation(work):
    net = shaken(model.JiTConfig(**PAIR))
    calls, forward = [], net.forward
    net.forward = lambda z, t, y: calls.append(t) or forward(z, t, y)
    noise = torch.randn(2, 3, 16, 16)
    out = sample.generate(net, noise, torch.tensor([0, 1]), solver="euler", steps=1)
    assert len(calls) == 1 and torch.equal(calls[0], torch.tensor([[0.0, 1.0]] * 2))
    assert torch.allclose(out, forward(noise, calls[0], torch.tensor([0, 1])), atol=1e-5)                  # the image is x(z_0, 0, 1)

def test_init_that_does_not_fit_is_refused_in_one_line(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 1, "--run", "jit") == 0
    assert call(data, "--size", 32, "--count", 100, "--workers", 1, "--name", "big") == 0
    capsys.readouterr()
    for more, words in ((["--init", "nowhere"], "no checkpoint"), (["--init", "jit", "--hidden-size", 64], "leave out --hidden-size"), (["--init", "jit", "--pred", "v"], "leave out --pred"),
                        (["--init", "jit", "--experiment", "dit"], "leave out --experiment"), (["--init", ""], "no checkpoint"),
                        (["--init", "jit", "--objective", "meanflow", "--micro-batch", 1], "is odd"), (["--init", "jit", "--objective", "meanflow", "--loss", "x"], "--loss v"),
                        (["--init", "jit", "--objective", "meanflow", "--label-drop", 0], "--label-drop above 0"),
                        (["--init", "jit", "--data", "big"], "its network is for 16 pixels"), (["--init", "jit", "--objective", "meanflow", "--aux", "time"], "no auxiliary head"),
                        (["--objective", "meanflow", "--path", "cosine"], "linear path")):
        assert call(train, *more, "--batch-size", 8, "--run", "new") in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error
    assert not Path("runs/new").exists()

def test_two_processes_fine_tune_as_one(work):
    """meanflow asks the bare network for its targets, beside DDP's forward."""
    assert call(train, *TINY_FLAGS, "--steps", 4, "--run", "jit") == 0
    flags = ["--objective", "meanflow", "--init", "jit", "--batch-size", 8, "--micro-batch", 4, "--amp", "off", "--preview-every", 0, "--snapshots", 0, "--log-every", 2, "--no-compile"]
    assert call(train, *flags, "--steps", 4, "--run", "one") == 0
    done = torchrun("03_train.py", *flags, "--steps", 4, "--run", "two", cwd=work)
    assert done.returncode == 0, done.stderr
    for a, b in zip(weights("runs/one/checkpoint.pt"), weights("runs/two/checkpoint.pt")):
        assert (a - b).abs().max() < 1e-5

# ---- REPA and the dispersive loss ----------------------------------------------------------------------------------------
def test_repa_loss_is_minus_the_mean_cosine():
    answer, features = torch.randn(2, 16, 8), torch.randn(2, 8, 4, 4)
    total = sum(float(a @ f / a.norm() / f.norm()) for image, grid in zip(answer, features) for a, f in zip(image, [grid[:, i // 4, i % 4] for i in range(16)]))
    assert abs(model.RepaHead.loss(answer, {"features": features}) + total / 32) < 1e-6
    finer = features.repeat_interleave(2, 2).repeat_interleave(2, 3)           # another grid is averaged
    assert abs(model.RepaHead.loss(answer, {"features": finer}) + total / 32) < 1e-6

def test_dispersive_loss_by_pairs():
    head = model.DispersiveHead(model.JiTConfig(**TINY))
    tokens = torch.randn(3, 16, 32) / 2
    flat = [image.flatten() / 16 for image in tokens]
    wanted = math.log(sum(math.exp(-float((a - b).square().sum()) / 0.5) for a in flat for b in flat) / 9)
    assert abs(head.loss(head(tokens), {}) - wanted) < 1e-5 and wanted > math.log(1 / 3) + 0.01               # above its floor, all apart

def test_repa_heads_sit_where_the_paper_puts_them():
    for depth, after in ((12, 4), (24, 8)):
        assert model.RepaHead(model.JiTConfig(**TINY | dict(depth=depth, aux_dim=8))).after == after - 1

def test_repa_learns_from_a_frozen_encoder_and_leaves_no_trace(work, capsys):
    make = lambda coder: call(data, "--source", "latents", "--root", "data/shapes", "--coder", coder, "--coder-steps", 3, "--name", coder, "--out", "latents")
    assert make("rae") == 0 and make("vae") == 0
    flags = [*TINY_FLAGS, "--aux", "repa", "--teacher", "latents/rae", "--micro-batch", 4, "--log-every", 20]
    assert call(train, *flags, "--steps", 20, "--run", "repa") == 0
    row, config = list(csv.DictReader(open("runs/repa/log.csv")))[-1], json.loads(Path("runs/repa/config.json").read_text())
    assert -1 < float(row["aux"]) < 0.5 and config["options"]["aux_weight"] == 0.5 and config["config"]["aux_dim"] == 192
    assert call(sample, "--run", "repa", "--num", 4, "--steps", 1) == 0
    assert not any("aux" in name for name in model.load_network("runs/repa/checkpoint.pt")[0].state_dict())
    options, network = train.resolve(data.parse(list(map(str, [*flags, "--steps", 1])), "", train.Options, model.JiTConfig))
    meta, arrays = data.open_data("data/shapes")
    trainer = train.Trainer(options, train.fill_defaults(options, network, meta, torch.device("cpu"), 1), torch.device("cpu"))
    before = {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
    trainer.train_step(train.read_ahead(*arrays["train"], trainer))
    assert all(torch.equal(v, before[k]) for k, v in trainer.teacher.state_dict().items())
    done = torchrun("03_train.py", *flags, "--steps", 4, "--run", "two", cwd=work)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert make("rae") == 0 and call(data, "--source", "latents", "--root", "data/shapes", "--coder", "rae", "--coder-steps", 3, "--name", "rae", "--out", "latents", "--overwrite") == 0
    capsys.readouterr()
    assert call(train, *flags, "--steps", 20, "--run", "repa") == 1 and "--teacher-id" in capsys.readouterr().err
    for more, words in ((["--aux", "repa"], "go together"), (["--teacher", "latents/rae"], "go together"), (["--aux", "repa", "--teacher", "latents/vae"], "no encoder"),
                        (["--aux", "repa", "--teacher", "latents/rae", "--data", "latents/vae", "--patch-size", 1], "not for latents")):
        assert call(train, *TINY_FLAGS, *more, "--run", "new") in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

# ---- Mixers, the time-dependent norm --------------------------------------------------------------------------------------
def config_with(**more):
    return model.JiTConfig(**TINY | more)

@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_against_a_rewrite(layer):
    torch.manual_seed(0)
    config = config_with(num_heads=4, hidden_size=64)
    mixer, x, d = model.DifferentialAttention(config, layer), torch.randn(2, 16, 64), 16
    cos, sin = model.rotary_table(d, 4, 0)
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    out, start = [], 0.8 - 0.6 * math.exp(-0.3 * layer)
    a1, b1, a2, b2 = mixer.lambdas
    weight = torch.exp((a1 * b1).sum()) - torch.exp((a2 * b2).sum()) + start
    for pair in range(2):
        maps = []
        for head in (2 * pair, 2 * pair + 1):
            part = slice(head * d, (head + 1) * d)
            qh, kh = (model.rotate(norm(value[..., part])[:, None], cos, sin)[:, 0] for norm, value in ((mixer.q_norm, q), (mixer.k_norm, k)))
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
    mixer = model.DiceMixer(config_with(in_context_len=0), 0)
    left = torch.randn(1, 32, 4, 4)
    both = lambda l, r: torch.stack([l, r], dim=2).flatten(1, 2)
    assert torch.allclose(mixer.combine(both(left, left)), left)               # f(l, l) = l
    y = both(left.clamp(-1, 1) * 6e4, -left.clamp(-1, 1) * 6e4).half().requires_grad_()
    out = mixer.combine(y)
    out.float().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(y.grad).all() and torch.isfinite(mixer.strictness.grad).all()

def test_time_norm_against_a_rewrite():
    torch.manual_seed(0)
    config = config_with(norm="td")
    net = shaken(config)
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
    assert count(norm="td") == 9 * (D + 2)                                     # two a block, and the final one
    assert count(two_times=True) == D * D + 256 * D + D + D * D + D

# ---- The cascade ------------------------------------------------------------------------------------------------------------
COARSE = dict(in_context_len=0, depth=6)

def test_subtractive_cascade_with_silent_lower_stages_is_the_plain_network():
    net = shaken(config_with(cascade="subtractive", **COARSE))
    z, t, y = inputs()
    plain = net.stages[2]
    assert [len(stage.blocks) for stage in net.stages] == [3, 2, 1] and [stage.config.image_size for stage in net.stages] == [4, 8, 16]
    assert not torch.equal(net(z, t, y), plain(z, t, y))
    with torch.no_grad():
        for stage in net.stages[:2]:
            stage.final_layer.linear.weight.zero_(), stage.final_layer.linear.bias.zero_()
    assert torch.equal(net(z, t, y), plain(z, t, y))

@pytest.mark.parametrize("kind", ["subtractive", "additive"])
def test_cascade_against_a_rewrite(kind):
    net = shaken(config_with(cascade=kind, mixer="convnext", **COARSE))
    z, t, y = inputs()
    pool = lambda x, f: x.unflatten(2, (-1, f)).unflatten(4, (-1, f)).mean((3, 5))
    kinds = [type(stage.blocks[0].attn).__name__ for stage in net.stages]
    assert kinds == ["Attention" if kind == "additive" else "ConvMixer", "ConvMixer", "ConvMixer"]
    outs, tokens = [], None
    for k, stage in enumerate(net.stages):
        part = pool(z, 4 >> k)
        if kind == "subtractive":
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
    out, coarse = net(z, t, y, with_aux=True)
    assert (out - outs[-1]).abs().max() < 1e-5 and all((a - b).abs().max() < 1e-5 for a, b in zip(coarse, outs, strict=False))

def test_multiscale_loss_is_zero_for_perfect_stages_and_counts_pixels():
    batch = small_batch(None)
    x, t = batch["x"], batch["t"]
    perfect = [F.avg_pool2d(x, 4), F.avg_pool2d(x, 2)]
    assert model.MultiScale.loss(perfect, batch) == 0
    off = [perfect[0] + 1, perfect[1] + 1]
    weight = (1 / (1 - t).clamp_min(0.05)**2).mean()
    assert torch.allclose(model.MultiScale.loss(off, batch), (1 / 16 + 1 / 4) * weight, rtol=1e-4)

@pytest.mark.parametrize("preset", ["dice", "dimr"])
def test_cascade_presets_train_resume_and_sample(work, preset):
    flags = ["--preset", preset, "--patch-size", 2, "--hidden-size", 32, "--num-heads", 2, "--batch-size", 8, "--micro-batch", 4, "--lr", "1e-3", "--amp", "off", "--preview-every", 0,
             "--snapshots", 0, "--log-every", 10, "--save-minutes", 0]
    assert call(train, *flags, "--steps", 20) == 0
    rows = list(csv.DictReader(open(f"runs/{preset}/log.csv")))
    assert all(math.isfinite(float(row["loss"])) for row in rows) and (float(rows[0]["aux"]) > 0) == (preset == "dimr")
    assert call(sample, "--run", preset, "--num", 30, "--steps", 2) == 0
    assert call(evaluate, "--run", preset, "--metrics", "fd") == 0

@pytest.mark.parametrize("flags", [["--mixer", "differential"], ["--mixer", "convnext", "--in-context-len", 0], ["--mixer", "dice", "--in-context-len", 0], ["--norm", "td"], ["--aux", "dispersive"],
                                   ["--norm", "td", "--objective", "meanflow"]])
def test_every_variant_trains_and_samples(work, flags):
    assert call(train, *TINY_FLAGS, *flags, "--steps", 20, "--run", "v") == 0
    assert call(sample, "--run", "v", "--num", 4, "--steps", 1) == 0
    assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(open("runs/v/log.csv")))

@pytest.mark.parametrize("more, words", [
    (dict(num_heads=1, mixer="differential"), "needs pairs"), (dict(mixer="convnext"), "in_context_len"), (dict(mixer="dice"), "in_context_len"),
    (dict(cascade="additive", head_depth=1), "no wide head"), (dict(cascade="additive", aux="time"), "no auxiliary head"), (dict(cascade="additive", depth=3), "needs 4 blocks"),
    (dict(cascade="additive", patch_size=8), "halves twice"), (dict(aux="multiscale"), "stages of a cascade"), (dict(cascade="additive", aux="multiscale", pred="v"), "stages of a cascade"),
    (dict(two_times=True, path="cosine"), "linear path"), (dict(head_depth=1, head_width=50), "head_width 50"), (dict(mixer="differential", head_depth=1, head_width=48), "needs pairs"),
    (dict(cascade="additive", aux="multiscale", path="cosine"), "linear path")])
def test_pairs_that_make_no_sense_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        config_with(**more)
