"""Latent spaces: coders against closed forms and the original, latent sets through all five scripts, the wide head."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY, TINY_FLAGS, call, data, evaluate, model, sample, train

TINY_DINO = np.load(Path(__file__).parent / "dinov2_tiny.npz")
LATENT_FLAGS = [*TINY_FLAGS, "--patch-size", 1, "--steps", 4, "--log-every", 2]

@pytest.fixture
def weights(tmp_path):
    """The tiny network in the official file's form, as a file."""
    torch.save({k[6:]: torch.from_numpy(TINY_DINO[k]) for k in TINY_DINO.files if k.startswith("state.")}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"

def make(coder, *more, name=None, root="data/shapes"):
    return call(data, "--source", "latents", "--root", root, "--coder", coder, "--coder-steps", 3, "--name", name or coder, "--out", "latents", *more)

# ---- DINOv2 ----------------------------------------------------------------------------------------------------------
def test_dinov2_agrees_with_the_original(weights):
    sizes, state = model.read_dinov2(weights)
    net = model.DINOv2(256, 10, **sizes | {"heads": int(TINY_DINO["heads"])}).eval()
    net.encoder.load_state_dict(state)
    with torch.no_grad():
        extra, features = net.encoder(torch.from_numpy(TINY_DINO["x"]))
    assert features.shape == (2, 48, 16, 16) and extra.shape == (2, 5, 48)
    assert (features.flatten(2).transpose(1, 2) - torch.from_numpy(TINY_DINO["latents"])).abs().max() < 1e-5
    assert (extra[:, :1] - torch.from_numpy(TINY_DINO["cls"])).abs().max() < 1e-5

def official_shapes(hidden=768, depth=12):
    """Names and shapes of dinov2_vitb14_reg4_pretrain.pth."""
    block = {"norm1.weight": (hidden,), "norm1.bias": (hidden,), "attn.qkv.weight": (3 * hidden, hidden), "attn.qkv.bias": (3 * hidden,),
             "attn.proj.weight": (hidden, hidden), "attn.proj.bias": (hidden,), "ls1.gamma": (hidden,), "norm2.weight": (hidden,), "norm2.bias": (hidden,),
             "mlp.fc1.weight": (4 * hidden, hidden), "mlp.fc1.bias": (4 * hidden,), "mlp.fc2.weight": (hidden, 4 * hidden), "mlp.fc2.bias": (hidden,), "ls2.gamma": (hidden,)}
    return {"cls_token": (1, 1, hidden), "pos_embed": (1, 1370, hidden), "register_tokens": (1, 4, hidden), "mask_token": (1, hidden),
            "patch_embed.proj.weight": (hidden, 3, 14, 14), "patch_embed.proj.bias": (hidden,), "norm.weight": (hidden,), "norm.bias": (hidden,),
            **{f"blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}}

def test_the_official_file_fills_the_network():
    shapes = official_shapes()
    assert official_shapes(48, 2) == {k[6:]: TINY_DINO[k].shape for k in TINY_DINO.files if k.startswith("state.")}
    net = model.DINOv2(256, 1000)
    assert (net.side, net.channels) == (16, 768)
    net.encoder.load_state_dict(model.convert_dinov2({k: torch.zeros(v) for k, v in shapes.items()}, 12))
    block = {k: torch.full(v, float(i)) for i, (k, v) in enumerate(shapes.items()) if k.startswith("blocks.11.")}
    bias = model.convert_dinov2({k: torch.zeros(v) for k, v in shapes.items()} | block, 12)["blocks.11.adaLN_modulation.bias"][::768]
    names = ("norm1.bias", "norm1.weight", "ls1.gamma", "norm2.bias", "norm2.weight", "ls2.gamma")
    assert [v.item() for v in bias] == [block[f"blocks.11.{n}"].flatten()[0].item() - n.endswith("weight") for n in names]

@pytest.mark.parametrize("fault", ["names", "no registers", "swiglu", "pickle", "text", "missing"])
def test_another_file_is_refused_in_one_line(there, weights, capsys, fault):
    state = torch.load(weights)
    if fault == "pickle":
        state["x"] = Path("x")
    torch.save({"names": {"model": 1}, "no registers": {k: v for k, v in state.items() if k != "register_tokens"}, "swiglu": {k.replace("fc1", "w12"): v for k, v in state.items()},
                "pickle": state}.get(fault, {}), "odd.pth")
    if fault == "text":
        Path("odd.pth").write_text("not weights")
    assert call(data, "--size", 32, "--count", 100, "--workers", 1) == 0
    capsys.readouterr()
    assert make("dinov2", "--weights", "nowhere.pth" if fault == "missing" else "odd.pth") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "does not hold a DINOv2 with registers" in error and not Path("latents/dinov2").exists()

def test_pixels_are_prepared_as_dinov2_wants_them():
    """224 pixels, and (pixel of 0..1 - mean) / std; bicubic, as PIL has it where nothing shrinks."""
    net = model.DINOv2(64, 10, hidden=48, depth=1, heads=3)
    colour = torch.tensor([0.2, 0.5, 0.9])
    out = net.prepare((colour * 2 - 1).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    wanted = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert out.shape == (1, 3, 224, 224) and (out - wanted.view(1, 3, 1, 1)).abs().max() < 1e-5
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    middle = net.prepare(ramp)[0, 0, 100, 20:-20] * 0.229 + 0.485
    wanted = torch.tensor([(((i + 0.5) * 64 / 224 - 0.5) / 63) for i in range(20, 204)])
    assert (middle - wanted).abs().max() < 1e-3

# ---- Closed forms ----------------------------------------------------------------------------------------------------
def test_kl_and_reparameterisation():
    mean, log_var = torch.randn(5, 4) * 2, torch.randn(5, 4)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0))
    assert (model.gaussian_kl(mean, log_var) - wanted).abs().max() < 1e-5
    draws = torch.stack([model.reparameterise(torch.tensor(1.5), torch.tensor(2.0)) for _ in range(20_000)])
    assert abs(draws.mean() - 1.5) < 0.08 and abs(draws.var() / np.exp(2.0) - 1) < 0.05
    mean, log_var = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    model.reparameterise(mean, log_var).sum().backward()
    assert mean.grad == 1 and log_var.grad != 0

def test_vae_loss_is_l1_and_the_kl_per_pixel_number():
    torch.manual_seed(0)
    net, x = model.VAE(16, 3), torch.rand(2, 3, 16, 16)
    mean, log_var = net.encoder(x).chunk(2, dim=1)
    torch.manual_seed(1)
    z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
    wanted = (net.decoder(z) - x).abs().mean() + 1e-4 * 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum() / (2 * 3 * 16 * 16)
    torch.manual_seed(1)
    assert abs(net.encoder_loss(x, None) - wanted) < 1e-6

def test_rae_encoder_never_sees_masked_patches_and_the_decoder_loss_leaves_it_alone():
    torch.manual_seed(0)
    net, x = model.RAE(16, 3), torch.rand(2, 3, 16, 16)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True
    other = x.clone()
    other[:, :, 4:8, 4:8] = 0.0                           # patch 5 of 4 x 4 patches of 4 pixels
    assert torch.equal(net.encoder(x, masked)[1], net.encoder(other, masked)[1])
    assert not torch.equal(net.encoder(x)[1], net.encoder(other)[1])
    net.decoder_loss(x, None).backward()
    assert all(p.grad is None for p in net.encoder.parameters()) and all(p.grad is not None for p in net.decoder.parameters())
    net.encoder_loss(x, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None for p in net.encoder.parameters() if p.numel())

def test_time_shift_of_feature_spaces():
    """RAE: sqrt(m / 4096); 6.93 for DINOv2-B at 256 pixels."""
    assert model.latent_shift({"kind": "dinov2"}, 768 * 16 * 16) == pytest.approx(6.93, abs=0.01)
    assert model.latent_shift({"kind": "rae"}, 1024) == 0.5 and model.latent_shift({"kind": "vae"}, 1024) == model.latent_shift(None, 3072) == 1.0

@pytest.mark.parametrize("size, classes, kind", [(18, 3, "vae"), (16, 3, "dinov2"), (96, 3, "dinov2")])
def test_sizes_that_do_not_halve_are_refused(size, classes, kind):
    with pytest.raises(ValueError, match="do not become"):
        model.CODERS[kind](size, classes)

# ---- A latent set through the five scripts -----------------------------------------------------------------------------
@pytest.mark.parametrize("coder", ["vae", "rae"])
def test_latents_from_pixels_to_scores(work, capsys, coder):
    assert make(coder) == 0
    meta, arrays = data.open_data(f"latents/{coder}")
    z, labels = arrays["train"]
    pixels = data.open_data("data/shapes")[1]
    assert z.dtype == np.float16 and z.shape == (200, 4, 4, {"vae": 4, "rae": 192}[coder]) and np.array_equal(labels, pixels["train"][1])
    assert {"channels", "mean", "std", "coder", "psnr"} <= meta.keys() and meta["coder"]["pixels"] == "data/shapes"
    assert np.abs(z.astype(np.float64).mean((0, 1, 2))).max() < 0.02 and np.abs(z.astype(np.float64).std((0, 1, 2)) - 1).max() < 0.02
    net = model.load_coder(f"latents/{coder}", meta["coder"])
    x = model.to_float(np.array(pixels["val"][0]))
    raw = net.features(x)                                 # normalised, stored in half precision, and back
    back = net.encode(x).half().float() * torch.tensor(meta["std"]).view(1, -1, 1, 1) + torch.tensor(meta["mean"]).view(1, -1, 1, 1)
    assert (back - raw).abs().max() < 1e-3 * raw.abs().max().clamp_min(1)
    assert np.abs(arrays["val"][0].astype(np.float32) - net.encode(x).permute(0, 2, 3, 1).numpy()).max() < 1e-2
    with np.load(f"latents/{coder}/reconstructions.npz") as file:
        made = file["arr_0"]
    assert meta["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(made - pixels["val"][0].astype(np.float64)).mean()), abs=1e-3)
    assert Image.open(f"latents/{coder}/preview.png").size[1] == 9 * 64
    assert make(coder) == 0 and "nothing to do" in capsys.readouterr().out
    flags = [*LATENT_FLAGS, "--data", f"latents/{coder}", "--run", "z"]
    assert call(train, *flags, "--snapshots", 2) == 0
    config = json.loads(Path("runs/z/config.json").read_text())
    assert config["config"] | {"in_channels": z.shape[3], "patch_size": 1, "bottleneck_dim": 0, "noise_scale": 2.0} == config["config"] and config["options"]["flip"] is False
    assert config["options"]["shift"] == pytest.approx({"vae": 1.0, "rae": (192 * 16 / 4096)**0.5}[coder])
    assert Image.open("runs/z/preview/0000004.png").size[1] == 8 * 64 + 16                                # decoded: 16 pixels, shown as 64
    assert call(train, *flags, "--snapshots", 2) == 0 and "is finished" in capsys.readouterr().out
    how = ["--run", "z", "--num", 30, "--steps", 2, "--amp", "off"]
    assert call(sample, *how) == 0 and call(sample, *how, "--trajectory") == 0 and call(sample, *how, "--evolution") == 0
    record = json.loads(Path("runs/z/samples/samples.json").read_text())
    assert (record["data"], record["size"]) == ("data/shapes", 16) and np.asarray(Image.open("runs/z/samples/0000003.png")).shape == (16, 16, 3)
    saved, info = model.load_network("runs/z/checkpoint.pt")
    assert info["sampling"]["shift"] == 3.0               # the preset's own comes before the data's
    noise = sample.noise_for([3], (z.shape[3], 4, 4), 0, 2.0)
    settings = sample.HOW | info["sampling"] | {"steps": 2}
    fresh = sample.generate(saved, noise, torch.tensor([3]), step_noise=lambda i: sample.noise_for([3], (z.shape[3], 4, 4), 0, 2.0, i), **settings)
    picture = model.to_pictures(net.decoder(fresh * net.std + net.mean))[0]
    assert np.abs(picture.astype(int) - np.asarray(Image.open("runs/z/samples/0000003.png"))).max() <= 1
    assert call(evaluate, "--run", "z", "--metrics", "fd") == 0
    assert json.loads(Path("runs/z/metrics.json").read_text())["reference"] == "data/shapes"
    assert call(evaluate, "--samples", f"latents/{coder}/reconstructions.npz", "--reference", "shapes", "--metrics", "fd") == 0

def test_the_shift_of_the_data_is_used_in_sampling_too(work):
    assert make("rae") == 0
    options, network = train.resolve(data.parse([*map(str, LATENT_FLAGS), "--preset", "photos", "--data", "latents/rae"], "", train.Options, model.JiTConfig))
    meta, _ = data.open_data("latents/rae")
    config = train.fill_defaults(options, network, meta, torch.device("cpu"), 1)
    shift = (192 * 16 / 4096)**0.5
    assert options.shift == pytest.approx(shift) and train.Trainer(options, config, torch.device("cpu")).weights()["info"]["sampling"]["shift"] == options.shift
    assert config.bottleneck_dim == 0 and config.noise_scale == 1.0 and config.in_channels == 192

def test_dinov2_latents(there, weights, capsys):
    assert call(data, "--size", 32, "--count", 100, "--workers", 1) == 0
    assert make("dinov2", "--weights", weights) == 0
    meta, arrays = data.open_data("latents/dinov2")
    state = torch.load("latents/dinov2/coder.pt", weights_only=True)
    assert meta["size"] == 16 and meta["channels"] == 48 and state["arguments"]["depth"] == 2
    assert torch.equal(state["weights"]["encoder.blocks.0.attn.qkv.weight"], torch.from_numpy(TINY_DINO["state.blocks.0.attn.qkv.weight"]))        # frozen

def test_a_coder_that_is_missing_or_another_is_refused_in_one_line(work, capsys):
    assert make("vae") == 0 and make("vae", "--seed", 3, name="other") == 0
    assert call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "z") == 0
    coder = Path("latents/vae/coder.pt")
    kept, _ = coder.read_bytes(), capsys.readouterr()
    for content, words in ((Path("latents/other/coder.pt").read_bytes(), "is not the coder that made"), (b"junk", "cannot read"), (None, "cannot read"), ("nan", "NaN or infinity")):
        coder.write_bytes(kept if content == "nan" else content) if content else coder.unlink()
        if content == "nan":
            state = torch.load(coder, weights_only=True)
            state["weights"]["mean"][:] = float("nan")
            torch.save(state, coder)
        for script, args in ((sample, ["--run", "z", "--num", 4]), (sample, ["--run", "z", "--trajectory"]), (train, [*LATENT_FLAGS, "--data", "latents/vae", "--run", "new"])):
            assert call(script, *args) == 1
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and words in error and not Path("runs/z/samples").exists()
    coder.write_bytes(kept)
    assert call(sample, "--run", "z", "--num", 4, "--steps", 1) == 0

def test_what_makes_no_sense_for_latents_is_refused_in_one_line(work, capsys):
    assert make("vae") == 0
    capsys.readouterr()
    for code, words, run in (
            (1, "holds latents", lambda: make("rae", root="latents/vae")),
            (2, "--size, --fraction", lambda: make("rae", "--size", 8)),
            (2, "--weights FILE", lambda: make("dinov2")),
            (2, "--weights FILE", lambda: make("vae", "--weights", "x.pth")),
            (2, "a name of their own", lambda: call(data, "--source", "latents", "--root", "data/shapes", "--coder", "vae", "--name", "shapes", "--overwrite")),
            (1, "holds latents", lambda: call(evaluate, "--samples", "latents/vae", "--reference", "latents/vae")),
            (2, "needs --root", lambda: call(data, "--source", "latents", "--coder", "vae")),
            (2, "are for --source latents", lambda: call(data, "--coder", "vae")),
            (1, "another data set", lambda: make("rae", name="vae")),
            (2, "is for images, not for latents", lambda: call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "z", "--aux", "rotation")),
            (2, "--reuse", lambda: call(sample, "--run", "z", "--reuse", 2))):
        if "--reuse" in words:
            assert call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "z") == 0
            capsys.readouterr()
        assert run() == code, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

def test_pixels_packed_anew_make_other_latents(work, capsys):
    assert call(data, "--size", 16, "--count", 150, "--workers", 1, "--name", "mine") == 0 and make("vae", root="data/mine") == 0
    assert call(data, "--size", 16, "--count", 160, "--workers", 1, "--name", "mine", "--overwrite") == 0
    assert make("vae", root="data/mine") == 1 and "has changed since" in capsys.readouterr().err
    assert make("vae", "--overwrite", root="data/mine") == 0 and len(data.open_data("latents/vae")[1]["train"][1]) == 160

def test_encoding_goes_on_where_it_was(work, monkeypatch):
    encode = data.LatentSet.encode

    def stop_at_val(self, jobs):
        if jobs[0][0] == "val":
            raise KeyboardInterrupt
        return encode(self, jobs)
    monkeypatch.setattr(data.LatentSet, "encode", stop_at_val)
    assert make("vae") == 130 and not Path("latents/vae").exists()
    coder = Path("latents/vae.partial/coder.pt").read_bytes()
    seen = []
    monkeypatch.setattr(data.LatentSet, "encode", lambda self, jobs: seen.extend(jobs) or encode(self, jobs))
    assert make("vae") == 0 and {split for split, _ in seen} == {"val"} and Path("latents/vae/coder.pt").read_bytes() == coder

# ---- The wide head -----------------------------------------------------------------------------------------------------
WIDE = TINY | dict(head_depth=2, head_width=48)

def test_no_head_is_jit_bit_for_bit():
    net = model.build(model.JiTConfig(**TINY))
    wide = model.build(model.JiTConfig(**TINY, head_width=32))
    assert type(wide) is model.JiT and wide.state_dict().keys() == net.state_dict().keys()

def test_wide_head_against_a_rewrite():
    """Backbone on z; s = W SiLU(t_emb + tokens); blocks on z embedded again, with s per token; final layer conditioned on s too."""
    config = model.JiTConfig(**WIDE)
    torch.manual_seed(0)
    net = model.build(config).eval()
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
    plain, wide = (model.count_parameters(model.JiTConfig(**row)) for row in (TINY, WIDE))
    inner = int(4 * W * 2 / 3)
    block = 2 * W + (3 * W * W + 3 * W) + (W * W + W) + 2 * d + (2 * inner * W + 2 * inner) + (inner * W + W) + 6 * (W * W + W)
    head = 8 * 3 * 16 + 8 * W + W + 2 * block + (W + (2 * W * W + 2 * W) + 48 * W + 48)
    assert wide == plain - (D + 2 * D * D + 2 * D + 48 * D + 48) + (D * W + W) + head

def test_a_fresh_wide_head_predicts_zero_and_every_parameter_learns():
    net = model.build(model.JiTConfig(**WIDE))
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
    net = model.build(model.JiTConfig(**WIDE)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    noise, labels, calls = torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))

    def images(**how):
        calls.clear()
        return sample.generate(net, noise, labels, solver=solver, steps=6, **how), len(calls)
    plain, count = images()
    same, again = images(reuse=1)
    assert torch.equal(plain, same) and count == again == 6 * evaluations - (solver == "heun")
    fewer, halved = images(reuse=2)
    assert halved == 3 * evaluations and not torch.equal(plain, fewer) and (plain - fewer).abs().max() < 1
    assert images(reuse=2, cfg=2.0, interval=(begin, 1.0))[1] > halved           # where guidance begins, the batch is another
    assert torch.equal(images()[0], plain)
    if solver == "euler":                                 # the class' tokens do not serve the null class
        how = dict(interval=(0.4, 1.0), reuse=2)
        assert (images(cfg=0.0, **how)[0] - images(cfg=1e-4, **how)[0]).abs().max() < 0.01

def test_wide_head_trains_resumes_and_samples(work):
    flags = [*TINY_FLAGS, "--head-depth", 1, "--head-width", 64, "--aux", "time", "--checkpointing", "--micro-batch", 4, "--save-minutes", 0]
    assert call(train, *flags, "--steps", 6, "--run", "whole") == 0
    assert call(train, *flags, "--steps", 3, "--warmup", 0, "--run", "half") == 0
    assert call(train, "--resume", "--run", "half", "--steps", 6, "--preview-every", 0, "--snapshots", 0) == 0
    assert call(sample, "--run", "whole", "--num", 4, "--steps", 4, "--reuse", 2) == 0
    assert json.loads(Path("runs/whole/samples/samples.json").read_text())["reuse"] == 2
    net, _ = model.load_network("runs/whole/checkpoint.pt")
    assert type(net) is model.WideHeadJiT and net.head.config.hidden_size == 64
