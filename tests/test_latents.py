"""Latent spaces: coders against closed forms and the original, latent sets through all five scripts, the wide head."""
import dataclasses
import inspect
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY, TINY_FLAGS, call, data, evaluate, model, sample, train

latents, vae, rae, reg = (model.load_experiment(name) for name in ("latents", "vae", "rae", "reg"))
TINY_DINO = np.load(Path(__file__).parent / "dinov2_tiny.npz")
LATENT_FLAGS = [*TINY_FLAGS, "--patch-size", 1, "--steps", 4, "--log-every", 2]

@pytest.fixture
def weights(tmp_path):
    """The tiny network in the official file's form, as a file."""
    torch.save({k[6:]: torch.from_numpy(TINY_DINO[k]) for k in TINY_DINO.files if k.startswith("state.")}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"

def make(coder, *more, name=None, root="data/shapes"):
    """python tests/experiments/vae.py or rae.py, three steps."""
    script = vae if coder == "vae" else rae
    return call(script, "--data", root, "--steps", 3, "--name", name or coder, "--out", "latents", *more)

def test_latents_behind_a_link_are_packed_where_they_lie(work):
    """On another disk, say."""
    assert make("vae") == 0
    Path("disk").mkdir(), Path("latents/vae").rename("disk/vae"), Path("latents/vae").symlink_to("../disk/vae")
    before = data.open_data("latents/vae")[0]["id"]
    assert make("vae", "--overwrite") == 0
    assert Path("latents/vae").is_symlink() and data.open_data("disk/vae")[0]["id"] != before and Path("disk/vae/coder.pt").exists()

# ---- DINOv2 ----------------------------------------------------------------------------------------------------------
def test_dinov2_agrees_with_the_original(weights):
    sizes, state = rae.read_dinov2(weights)
    net = rae.DINOv2(256, 10, **sizes | {"heads": int(TINY_DINO["heads"])}).eval()
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
    net = rae.DINOv2(256, 1000)
    assert (net.side, net.channels) == (16, 768)
    net.encoder.load_state_dict(rae.convert_dinov2({k: torch.zeros(v) for k, v in shapes.items()}, 12))
    block = {k: torch.full(v, float(i)) for i, (k, v) in enumerate(shapes.items()) if k.startswith("blocks.11.")}
    bias = rae.convert_dinov2({k: torch.zeros(v) for k, v in shapes.items()} | block, 12)["blocks.11.adaLN_modulation.bias"][::768]
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
    net = rae.DINOv2(64, 10, hidden=48, depth=1, heads=3)
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
    assert (vae.gaussian_kl(mean, log_var) - wanted).abs().max() < 1e-5
    draws = torch.stack([vae.reparameterise(torch.tensor(1.5), torch.tensor(2.0)) for _ in range(20_000)])
    assert abs(draws.mean() - 1.5) < 0.08 and abs(draws.var() / np.exp(2.0) - 1) < 0.05
    mean, log_var = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    vae.reparameterise(mean, log_var).sum().backward()
    assert mean.grad == 1 and log_var.grad != 0

def test_vae_loss_is_l1_and_the_kl_per_pixel_number():
    torch.manual_seed(0)
    net, x = vae.VAE(16, 3), torch.rand(2, 3, 16, 16)
    mean, log_var = net.encoder(x).chunk(2, dim=1)
    torch.manual_seed(1)
    z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
    wanted = (net.decoder(z) - x).abs().mean() + 1e-4 * 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum() / (2 * 3 * 16 * 16)
    torch.manual_seed(1)
    assert abs(net.encoder_loss(x, None) - wanted) < 1e-6

def test_rae_encoder_never_sees_masked_patches_and_the_decoder_loss_leaves_it_alone():
    torch.manual_seed(0)
    net, x = rae.RAE(16, 3), torch.rand(2, 3, 16, 16)
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

def test_the_log_variance_is_clamped():
    torch.manual_seed(0)
    net = vae.VAE(16, 3)
    with torch.no_grad():
        net.encoder[-1].bias[4:] = 500.0
    assert net.moments(torch.rand(2, 3, 16, 16))[1].max() == 20 and torch.isfinite(net.encoder_loss(torch.rand(2, 3, 16, 16), None))

def test_time_shift_of_feature_spaces():
    """RAE: sqrt(m / 4096); 6.93 for DINOv2-B at 256 pixels."""
    assert rae.DINOv2(256, 1000, depth=1).shift == pytest.approx(6.93, abs=0.01)
    assert rae.RAE(64, 10).shift == pytest.approx((192 * 16 / 4096)**0.5) and vae.VAE(64, 10).shift == 1.0

def test_the_probe_is_a_ridge_regression():
    """Against least squares with sqrt(n penalty) I below the data; the constant is not punished."""
    random, classes = np.random.default_rng(0), 3
    labels = random.integers(0, classes, 500)
    z = (random.standard_normal((500, 2, 2, 5)) + 2).astype(np.float16)
    z[:, 1, 0, 2] += labels == 1                          # in one place of one channel
    arrays = {"train": (z[:300], labels[:300]), "val": (z[300:], labels[300:])}
    flat, hot = z.reshape(500, 20).astype(np.float64), np.eye(classes)[labels]
    mean, shares = flat[:300].mean(axis=0), hot[:300].mean(axis=0)
    def solved(penalty):
        below = np.sqrt(300 * penalty) * np.eye(20)
        return np.linalg.lstsq(np.vstack([flat[:300] - mean, below]), np.vstack([hot[:300] - shares, np.zeros((20, classes))]), rcond=None)[0]
    for penalty in (1e-3, 1.0):
        w = latents.ridge(torch.from_numpy(flat[:300] - mean).float(), torch.from_numpy(hot[:300] - shares).float(), penalty)
        assert np.abs(w.numpy() - solved(penalty)).max() < 1e-5
    right = ((flat[300:] - mean) @ solved(1e-3) + shares).argmax(axis=1) == labels[300:]
    assert latents.linear_probe(arrays, classes) == pytest.approx(right.mean()) and 0.4 < right.mean() < 0.7
    assert latents.linear_probe(arrays | {"val": (z[:0], labels[:0])}, classes) > right.mean()             # nothing held out

def test_the_probe_averages_what_is_too_wide():
    z = np.random.default_rng(0).standard_normal((3, 4, 4, 1000)).astype(np.float16)
    flat, labels = latents.flattened(z, np.arange(3), 2)
    assert len(labels) == 2 and flat.shape == (2, 4000)
    wanted = z[labels].astype(np.float32).reshape(2, 2, 2, 2, 2, 1000).mean((2, 4)).transpose(0, 3, 1, 2)  # quarters of the grid
    assert np.abs(flat.numpy() - wanted.reshape(2, 4000)).max() < 1e-3

@pytest.mark.parametrize("size, classes, kind", [(18, 3, "vae"), (16, 3, "dinov2"), (96, 3, "dinov2")])
def test_sizes_that_do_not_halve_are_refused(size, classes, kind):
    with pytest.raises(ValueError, match="do not become"):
        {"vae": vae.VAE, "dinov2": rae.DINOv2}[kind](size, classes)

# ---- A latent set through the five scripts -----------------------------------------------------------------------------
@pytest.mark.parametrize("coder", ["vae", "rae"])
def test_latents_from_pixels_to_scores(work, capsys, coder):
    assert make(coder) == 0
    meta, arrays = data.open_data(f"latents/{coder}")
    z, labels = arrays["train"]
    pixels = data.open_data("data/shapes")[1]
    assert z.dtype == np.float16 and z.shape == (200, 4, 4, {"vae": 4, "rae": 192}[coder]) and np.array_equal(labels, pixels["train"][1])
    assert {"channels", "mean", "std", "coder", "psnr", "linear_probe"} <= meta.keys() and meta["coder"]["pixels"] == "data/shapes" and meta["coder"]["experiment"] == coder
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
    flags = [*LATENT_FLAGS, "--experiment", coder, "--data", f"latents/{coder}", "--run", "z", "--noise-scale", 2]
    assert call(train, *flags, "--snapshots", 2) == 0
    config = json.loads(Path("runs/z/config.json").read_text())
    assert config["config"] | {"in_channels": z.shape[3], "patch_size": 1, "bottleneck_dim": 0, "noise_scale": 2.0} == config["config"] and config["options"]["flip"] is False
    assert config["options"]["shift"] == pytest.approx({"vae": 1.0, "rae": (192 * 16 / 4096)**0.5}[coder])
    assert Image.open("runs/z/preview/0000004.png").size[1] == 8 * 64 + 16                                # decoded: 16 pixels, shown as 64
    assert call(train, *flags, "--snapshots", 2) == 0 and "is finished" in capsys.readouterr().out
    how = ["--run", "z", "--num", 30, "--steps", 2, "--amp", "off"]
    assert call(sample, *how) == 0 and call(sample, *how, "--trajectory") == 0
    record = json.loads(Path("runs/z/samples/samples.json").read_text())
    assert (record["data"], record["size"]) == ("data/shapes", 16) and np.asarray(Image.open("runs/z/samples/0000003.png")).shape == (16, 16, 3)
    saved, info = model.load_network("runs/z/checkpoint.pt")
    assert info["sampling"]["shift"] == pytest.approx({"vae": 3.0, "rae": (192 * 16 / 4096)**0.5}[coder])     # of the preset, of the data
    noise = sample.noise_for([3], (z.shape[3], 4, 4), 0, 2.0)
    settings = asdict(sample.Settings()) | info["sampling"] | {"steps": 2}
    fresh = sample.generate(saved, noise, torch.tensor([3]), step_noise=lambda i: sample.noise_for([3], (z.shape[3], 4, 4), 0, 2.0, i), **settings)
    picture = model.to_pictures(net.decoder(fresh * net.std + net.mean))[0]
    assert np.abs(picture.astype(int) - np.asarray(Image.open("runs/z/samples/0000003.png"))).max() <= 1
    assert call(evaluate, "--run", "z", "--metrics", "fd") == 0
    assert json.loads(Path("runs/z/metrics.json").read_text())["reference"] == "data/shapes"
    assert call(evaluate, "--samples", f"latents/{coder}/reconstructions.npz", "--reference", "shapes", "--metrics", "fd") == 0

def test_reg_is_a_vae_and_a_token(work, capsys):
    """Also the names of data sets that --name does not say."""
    out = ["--steps", 3, "--out", "latents"]
    assert call(rae, *out) == 0 and call(vae, *out) == 0 and call(reg, "--encoder", "latents/shapes-rae", *out) == 0
    meta, arrays = data.open_data("latents/shapes-reg")
    assert 0 <= meta["linear_probe"] <= 1 and capsys.readouterr().out.count("trained with labels") == 2
    ours, plain, teacher = (model.load_coder(f"latents/shapes-{name}", data.open_data(f"latents/shapes-{name}")[0]["coder"]) for name in ("reg", "vae", "rae"))
    images = data.open_data("data/shapes")[1]["train"][0]
    x = model.to_float(np.array(images))
    z, token = ours.encode(x), teacher.features(x)[:, :32].mean((2, 3))
    assert z.shape == (200, 36, 4, 4) and torch.equal(z[:, :4], plain.encode(x))                           # the VAE of the same seed
    token = (token - token.mean(dim=0)) / token.std(dim=0)
    assert (z[:, 4:] * 4 - token[:, :, None, None]).abs().max() < 0.05         # std 1/side, the same everywhere
    assert np.abs(arrays["train"][0].astype(np.float32) - z.permute(0, 2, 3, 1).numpy()).max() < 1e-2
    assert torch.equal(ours.decode(z), plain.decode(z[:, :4])) and torch.equal(ours.decode(z), ours.decode(torch.cat([z[:, :4], -z[:, 4:]], dim=1)))
    assert call(train, *LATENT_FLAGS, "--experiment", "reg", "--data", "latents/shapes-reg", "--run", "z") == 0
    assert call(sample, "--run", "z", "--num", 4, "--steps", 1) == 0 and np.asarray(Image.open("runs/z/samples/0000003.png")).shape == (16, 16, 3)
    capsys.readouterr()
    assert call(reg, "--encoder", "latents/shapes-vae", *out) == 2 and "no encoder made by" in capsys.readouterr().err

def test_dice_subtracts_noise_in_latents(work):
    assert make("vae") == 0
    flags = [*LATENT_FLAGS, "--data", "latents/vae", "--pred", "e", "--noise-scale", 1, "--depth", 4, "--num-heads", 2, "--in-context-len", 0]
    assert call(train, *flags, "--experiment", "vae,dice", "--run", "z") == 0 and call(sample, "--run", "z", "--num", 2, "--steps", 1) == 0
    net, _ = model.load_network("runs/z/checkpoint.pt")
    assert [stage.config.image_size for stage in net.stages] == [1, 2, 4] and net.config.pred == "e" and net.config.mixer == "dice"

def test_the_shift_of_the_data_is_used_in_sampling_too(work):
    assert make("rae") == 0
    meta, _ = data.open_data("latents/rae")
    def settled(*flags):
        gathered = train.gather(train.read_flags([*map(str, LATENT_FLAGS), "--preset", "photos", "--data", "latents/rae", *flags]))
        return train.settle(gathered, meta, torch.device("cpu"), 1)
    options, config = settled()
    shift = (192 * 16 / 4096)**0.5
    assert options.shift == pytest.approx(shift) and train.sampling_state(train.Trainer(options, config, torch.device("cpu")))["info"]["sampling"]["shift"] == options.shift
    assert config.bottleneck_dim == 0 and config.noise_scale == 1.0 and config.in_channels == 192
    assert settled("--shift", "2")[0].shift == 2.0        # a flag comes first

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
    for content, words in ((Path("latents/other/coder.pt").read_bytes(), "is not the coder that made"), (b"junk", "cannot read"), (None, "cannot read"),
                           (kept[:len(kept) // 2] + bytes([kept[len(kept) // 2] ^ 64]) + kept[len(kept) // 2 + 1:], "cannot read"), ("nan", "NaN or infinity")):
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
    meta = Path("latents/vae/meta.json")
    good = json.loads(meta.read_text())
    for spoiled in (None, "vae", {}, *({name: value for name, value in good["coder"].items() if name != missing} for missing in ("experiment", "id", "pixels", "pixels_id", "size"))):
        meta.write_text(json.dumps(good | {"coder": spoiled}))
        assert call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "new") == 1 and "is not of the type" in capsys.readouterr().err and not Path("runs/new").exists()

def test_what_makes_no_sense_for_latents_is_refused_in_one_line(work, capsys):
    assert make("vae") == 0
    capsys.readouterr()
    for code, words, run in (
            (1, "holds latents", lambda: make("rae", root="latents/vae")),
            (2, "is the data set of the pixels", lambda: call(vae, "--data", "shapes", "--name", "shapes", "--overwrite")),
            (1, "holds latents", lambda: call(evaluate, "--samples", "latents/vae", "--reference", "latents/vae")),
            (1, "other settings", lambda: make("rae", name="vae")),
            (2, "is for images, not for latents", lambda: call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "z", "--aux", "rotation"))):
        assert run() == code, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

def test_pixels_packed_anew_make_other_latents(work, capsys):
    assert call(data, "--size", 16, "--count", 150, "--workers", 1, "--name", "mine") == 0 and make("vae", root="data/mine") == 0
    assert call(data, "--size", 16, "--count", 160, "--workers", 1, "--name", "mine", "--overwrite") == 0
    assert make("vae", root="data/mine") == 1 and "was made with other settings (pixels" in capsys.readouterr().err
    assert make("vae", "--overwrite", root="data/mine") == 0 and len(data.open_data("latents/vae")[1]["train"][1]) == 160

def test_an_interrupted_latent_set_leaves_nothing(work, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(latents, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert make("vae") == 130 and not list(Path("latents").glob("vae*"))
    assert make("vae") == 0

def test_the_losses_of_the_rae_by_hand():
    """Masked patches alone are reconstructed; the decoder's noise is uniform up to 0.8."""
    torch.manual_seed(0)
    net, x, y = rae.RAE(16, 3), torch.rand(2, 3, 16, 16), torch.tensor([0, 2])
    torch.manual_seed(1)
    masked = torch.rand(2, 16) < 0.5
    tokens = net.encoder(x, masked)[1].flatten(2).transpose(1, 2)
    error = (net.pixel_head(tokens) - model.patchify(x, 4)).abs().mean(dim=-1)
    wanted = F.cross_entropy(net.class_head(tokens.mean(dim=1)), y) + error[masked].mean()
    torch.manual_seed(1)
    assert abs(net.encoder_loss(x, y) - wanted) < 1e-6
    torch.manual_seed(1)
    z, sigma = net.encode(x), torch.rand(2, 1, 1, 1) * 0.8
    wanted = (net.decode(z + sigma * torch.randn_like(z)) - x).abs().mean()
    torch.manual_seed(1)
    assert abs(net.decoder_loss(x, y) - wanted) < 1e-6

def test_heads_of_the_official_dinov2(there):
    """64 channels a head: S has 6, B 12, L 16."""
    heads = []
    for hidden in (384, 768, 1024):
        torch.save({name: torch.zeros(()).expand(shape) for name, shape in official_shapes(hidden, 1).items()}, "dino.pth")
        heads.append(rae.read_dinov2("dino.pth")[0]["heads"])
    assert heads == [6, 12, 16]

def test_a_coder_is_mirrored_left_to_right_and_measured_on_all_classes(monkeypatch):
    class Stub(torch.nn.Module):
        decoder_loss = None

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def encoder_loss(self, x, y):
            seen.append(x)
            return self.p.sum()
    seen, rows = [], []
    monkeypatch.setattr(latents, "measure", lambda coder, images, chosen, device: rows.extend(chosen))
    images = np.zeros((8, 8, 3), np.uint8)
    images[:, 0] = 255                                    # the left column
    latents.train_coder(Stub(), np.broadcast_to(images, (30_000, 8, 8, 3)), np.arange(30_000) // 3_000, 0, 2, torch.device("cpu"))
    assert (seen[0][..., 0] == 1).all() and (seen[1][..., -1] == 1).all() and seen[1][..., 0].max() == -1
    assert len(rows) == 10_000 and np.bincount(np.array(rows) // 3_000, minlength=10).min() > 800                   # they lie sorted by class

def test_latents_as_samples_npz(work):
    """Decoded pixels, not latents."""
    assert make("vae") == 0 and call(train, *LATENT_FLAGS, "--data", "latents/vae", "--run", "z") == 0
    assert call(sample, "--run", "z", "--num", 4, "--steps", 1, "--npz") == 0 and np.load("runs/z/samples/samples.npz")["arr_0"].shape == (4, 16, 16, 3)

def test_reconstructions_have_their_own_labels(there):
    class Stub:
        side, channels = 4, 3
        encode = lambda self, x: F.avg_pool2d(x, 2)
        decode = lambda self, z: F.interpolate(z, scale_factor=2)
    labels = np.arange(3000) // 300                       # sorted, as packed folders are; the image's colour is its label
    images = np.broadcast_to((labels * 20).astype(np.uint8)[:, None, None, None], (3000, 8, 8, 3))
    latents.show(Stub(), {"val": (images, labels)}, Path("."), torch.device("cpu"))
    with np.load("reconstructions.npz") as file:
        assert len(file["arr_1"]) == 2000 and np.array_equal(file["arr_0"][:, 0, 0, 0], file["arr_1"] * 20)

def test_what_the_coders_recommend():
    """Latents of std 1 take noise of std 1; a quarter of the side up to 128 pixels, then an eighth."""
    assert vae.SETTINGS["noise_scale"] == rae.SETTINGS["noise_scale"] == 1.0
    assert [vae.VAE(size, 3).side for size in (64, 128, 256)] == [16, 32, 32]

def test_a_latent_set_never_chooses_our_code(there):
    Path("evil.py").write_text("open('was_here', 'w')")
    with pytest.raises(ValueError, match="an experiment of your own"):
        model.load_coder("d", {"experiment": str(Path("evil.py").resolve())})
    assert not Path("was_here").exists()

def test_another_seed_is_another_coder(work, capsys):
    assert make("vae") == 0 and make("vae", "--seed", 3) == 1 and "seed 0, now 3" in capsys.readouterr().err

# ---- Coders, layer by layer and step by step ------------------------------------------------------------------------
def test_layers_of_the_convolutional_coders():
    kinds = lambda net: [type(part).__name__ for part in net]
    shapes = lambda net: [tuple(part.weight.shape) for part in net if isinstance(part, torch.nn.Conv2d)]
    down, up = latents.shrink(8, 8), latents.grow(8, 4)
    assert kinds(down) == ["Conv2d"] + ["GroupNorm", "SiLU", "Conv2d"] * 3 and shapes(down) == [(32, 3, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (8, 128, 3, 3)]
    assert kinds(up) == ["Conv2d"] + ["GroupNorm", "SiLU", "Conv2d", "PixelShuffle"] * 2 + ["GroupNorm", "SiLU", "Conv2d", "SiLU", "Conv2d", "PixelShuffle"]
    assert shapes(up) == [(96, 4, 1, 1), (256, 96, 3, 3), (160, 64, 3, 3), (40, 40, 3, 3), (12, 40, 3, 3)]

class Images:
    """Says which rows are asked for; an image is its own number."""
    def __init__(self, count):
        self.rows, self.count = [], count

    def __len__(self):
        return self.count

    def __getitem__(self, rows):
        self.rows.append(rows)
        return np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 4, 4, 3)).copy()

def test_the_training_of_a_coder_written_a_second_time(monkeypatch, bars):
    """Batches, each image with its label; a rate that warms up and falls to zero; the encoder, then, measured, the decoder."""
    done, rates, images, labels = [], [], Images(200), np.arange(200) * 3

    class Spy(torch.optim.AdamW):
        def zero_grad(self, *args, **more):
            done.append(("zero", args, more))
            super().zero_grad(*args, **more)

        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            done.append("step")
            return super().step(closure)

    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def encoder_loss(self, x, y):
            assert torch.equal(y, torch.round((x[:, 0, 0, 0] + 1) * 127.5).long() * 3)
            done.append(("encoder", len(x)))
            return self.p.sum()

        def decoder_loss(self, x, y):
            done.append(("decoder", len(x)))
            return self.p.sum()
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(latents, "measure", lambda coder, images, rows, device: done.append(("measure", sorted(rows) == list(range(200)))))
    latents.train_coder(Stub(), images, labels, 7, 60, torch.device("cpu"))
    steps = lambda part, batch: [(part, batch), ("zero", (), {}), "step"] * 60
    assert done == steps("encoder", 64) + [("measure", True)] + steps("decoder", 32) and set(bars) == {(60, 60)}
    assert rates == pytest.approx([2e-3 * min(1, (i + 1) / 50) * (1 - i / 60) for i in range(60)] * 2)
    random = np.random.default_rng(7)
    wanted = [np.sort(random.integers(0, 200, 64)) for _ in range(60)]
    random.permutation(200)
    wanted += [np.sort(random.integers(0, 200, 32)) for _ in range(60)]
    assert all(np.array_equal(a, b) for a, b in zip(images.rows, wanted, strict=True))

class OnMeta:
    """A coder that says where it is asked, and answers on the CPU."""
    side, channels = 2, 3

    def __init__(self):
        self.asked, self.noise = [], None

    def encode(self, x):
        self.asked.append(x.device.type)
        return torch.zeros(len(x), 3, 2, 2)

    def decode(self, z):
        self.asked.append(z.device.type)
        return torch.zeros(len(z), 3, 4, 4)

def test_coders_work_on_the_device(there, monkeypatch):
    """On meta, whose tensors meet no others."""
    meta, asked = torch.device("meta"), []

    class Stub(torch.nn.Module):
        decoder_loss = None

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1, device=meta))
            self.mean = self.std = torch.zeros(1, 3, 1, 1, device=meta)

        def features(self, x):
            asked.append(x.device.type)
            return x

        def encoder_loss(self, x, y):
            asked.extend([x.device.type, y.device.type])
            return self.p.sum()
    monkeypatch.setattr(model, "autocast", lambda *_: nullcontext()), monkeypatch.setattr(model, "choose_precision", lambda *_: "off")
    latents.train_coder(Stub(), Images(64), np.arange(64), 0, 1, meta)
    assert asked == ["meta"] * 3
    coder = OnMeta()
    assert len(list(latents.encoded(coder, Images(5), "x", meta))) == 5 and coder.asked == ["meta"]
    coder.asked.clear()
    latents.show(coder, {"val": (np.zeros((5, 4, 4, 3), np.uint8), np.arange(5))}, Path("."), meta)
    assert coder.asked == ["meta", "cpu", "meta"]         # images to encode, latents as encode() gave them, noise to decode
    drawn, real = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: drawn.append(how["device"].type) or real(*shape, **how))
    net, x = rae.RAE(16, 3), torch.rand(2, 3, 16, 16, device=torch.device("cpu"))
    net.encoder_loss(x, torch.tensor([0, 2])), net.to("meta").decoder_loss(x.to("meta"), None)
    assert drawn == ["cpu", "cpu", "meta"]

def test_a_set_is_made_from_seed_and_steps_on_the_device(work, monkeypatch):
    asked = []

    def enough(coder, images, labels, seed, steps, device):
        asked.append((seed, steps, device.type))
        raise KeyboardInterrupt
    monkeypatch.setattr(latents, "train_coder", enough)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, device: asked.append(("to", device.type)) or net)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: asked.append(("seeded", seed)))
    assert make("vae", "--seed", 5) == 130 and asked == [("seeded", 6), ("to", "cpu"), (6, 3, "cpu")]

def test_files_of_coders_are_read_on_any_machine(work, monkeypatch):
    assert make("vae") == 0
    asked, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: asked.append(how) or real(path, **how))
    model.load_coder("latents/vae", data.open_data("latents/vae")[0]["coder"])
    assert asked == [{"map_location": "cpu", "weights_only": True}]

def test_what_a_latent_set_records(work, monkeypatch, capsys):
    """Its steps, a probe of the latents themselves; where the pixels are is known however they are called."""
    probed = []
    monkeypatch.setattr(latents, "linear_probe", lambda arrays, classes: probed.append(({k: (np.array(z), y) for k, (z, y) in arrays.items()}, classes)) or 0.5)
    assert make("vae") == 0 and "names the class of 50.0% of the held-out images\n" in capsys.readouterr().out
    (arrays, classes), (meta, stored) = probed[0], data.open_data("latents/vae")
    assert classes == 10 and all(np.array_equal(arrays[split][0], stored[split][0]) and np.array_equal(arrays[split][1], stored[split][1]) for split in ("train", "val"))
    assert len(arrays["val"][0]) == 100 and meta["linear_probe"] == 0.5 and (meta["coder"]["kind"], meta["coder"]["experiment"]) == ("vae", "vae")
    assert call(vae, "--data", "shapes", "--steps", 4, "--name", "vae", "--out", "latents") == 1 and "(steps 3, now 4)" in capsys.readouterr().err
    assert call(vae, "--data", Path("data/shapes").resolve(), "--name", "shapes", "--steps", 1, "--overwrite") == 2 and "is the data set of the pixels" in capsys.readouterr().err
    places = []

    def enough(folder):
        places.append(folder)
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "locked", enough)
    monkeypatch.chdir("data/shapes")
    assert call(vae, "--data", ".", "--out", "..") == 130 and places == [Path("../shapes-vae")]

@pytest.mark.parametrize("coder", ["vae", "rae"])
@pytest.mark.parametrize("classes", [(), ("only",)], ids=["unlabelled", "one class"])
def test_a_single_image_without_much_of_a_label(there, coder, classes):
    """Nothing held out, channels that do not vary, no classes to tell apart."""
    Path("in", *classes).mkdir(parents=True)
    Image.new("RGB", (16, 16), "teal").save(Path("in", *classes, "a.png"))
    assert call(data, "--source", "folder", "--root", "in", "--size", 16, "--name", "one", "--workers", 1) == 0
    assert make(coder, root="data/one") == 0
    meta, arrays = data.open_data(f"latents/{coder}")
    assert meta["linear_probe"] is None and np.isfinite(arrays["train"][0]).all() and meta["counts"] == {"train": 1, "val": 0}

def test_the_preview_of_a_coder(there, monkeypatch):
    """A row of images above what came back of them, four times, and what is decoded from N(0, 1)."""
    class Stub:
        side, channels = 4, 3
        encode = lambda self, x: F.avg_pool2d(x, 2)

        def decode(self, z):
            seen.append(z)
            return -F.interpolate(z, scale_factor=2)
    drawn, seen = [], []
    monkeypatch.setattr(data, "picture", lambda rows, names: drawn.append((rows, names)) or Image.new("RGB", (9, 9)))
    images = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None] * 5, (50, 8, 8, 3))
    latents.show(Stub(), {"val": (images, np.arange(50))}, Path("."), torch.device("cpu"))
    rows, names = drawn[0]
    assert names == ["image", "decoded"] * 4 + ["noise"] and len(rows) == 9
    for real, made in zip(rows[:8:2], rows[1:8:2]):
        assert np.array_equal(255 - np.array(real), np.array(made)) and len(real) == 10
    noise = np.random.default_rng(0).standard_normal((10, 4, 4, 3)).astype(np.float16)
    assert np.array_equal(seen[-1].permute(0, 2, 3, 1).numpy(), noise.astype(np.float32))

def test_the_bar_of_the_encoding_counts_images(bars):
    list(latents.encoded(OnMeta(), Images(130), "x", torch.device("cpu")))
    assert set(bars) == {(130, 130)}

def test_what_the_probe_looks_at(monkeypatch):
    asked, real = [], latents.ridge
    monkeypatch.setattr(latents, "ridge", lambda z, y, penalty: asked.append(penalty) or real(z, y, penalty))
    z, labels = np.random.default_rng(0).standard_normal((40, 2, 2, 3)).astype(np.float16), np.arange(40) // 10
    latents.linear_probe({"train": (z, labels), "val": (z, labels)}, 4)
    assert asked == [1e-3] and inspect.signature(latents.linear_probe).parameters["most"].default == 10_000
    flat, of_which = latents.flattened(z, labels, 12)
    chosen = np.sort(np.random.default_rng(0).permutation(40)[:12])            # they lie sorted by class
    assert np.array_equal(of_which, labels[chosen]) and np.array_equal(flat, z[chosen].transpose(0, 3, 1, 2).reshape(12, 12).astype(np.float32))

def test_options_of_the_coders():
    assert {e.name: (e.default, e.metadata["within"]) for e in dataclasses.fields(rae.Options)} == {
        "data": ("shapes", "(-inf, inf)"), "name": (None, "(-inf, inf)"), "steps": (800, "[1, inf)"), "seed": (0, "[0, 1e18]"), "out": (Path("data"), "(-inf, inf)"),
        "overwrite": (False, "(-inf, inf)"), "weights": (None, "(-inf, inf)")}
    assert {e.name: e.default for e in dataclasses.fields(reg.Options)}["encoder"] == "shapes-rae"
    with pytest.raises(ValueError, match="pack them at another --size, such as 64$"):
        rae.DINOv2(96, 3)

def test_vits_are_built_as_said():
    half = torch.full((32,), 0.5)
    assert torch.equal(rae.Constant(32).bias, torch.cat([0 * half, 0 * half, half, 0 * half, 0 * half, half]))
    assert [(rae.RAE(size, 3, hidden=12).patch, rae.RAE(size, 3, hidden=12).side) for size in (16, 64, 128)] == [(4, 4), (16, 4), (16, 8)]
    assert rae.DINOv2.decoder_loss is rae.RAE.decoder_loss

def test_a_dinov2_set_says_what_it_is(there, weights, capsys):
    assert call(data, "--size", 32, "--count", 100, "--workers", 1) == 0
    flags = ["--data", "shapes", "--steps", 1, "--out", "latents", "--weights", weights]
    assert call(rae, *flags) == 0
    meta, _ = data.open_data("latents/shapes-dinov2")
    assert meta["recipe"]["weights"] == str(weights.resolve()) and meta["recipe"]["source"] == meta["coder"]["kind"] == "dinov2" and meta["coder"]["experiment"] == "rae"
    assert type(model.load_coder("latents/shapes-dinov2", meta["coder"])).__name__ == "DINOv2"
    Path("other.pth").write_bytes(weights.read_bytes())
    assert call(rae, *flags[:-1], "other.pth") == 1 and "(weights " in capsys.readouterr().err

def test_where_reg_finds_its_encoder(work, monkeypatch, capsys):
    assert call(reg, "--steps", 1) == 1 and "no data set at data/shapes-rae" in capsys.readouterr().err
    assert call(reg, "--encoder", "shapes", "--steps", 1) == 2 and "it has no encoder made by" in capsys.readouterr().err
    out = ["--steps", 1, "--out", "latents"]
    assert call(rae, *out) == 0 and call(reg, "--encoder", "latents/shapes-rae", *out) == 0
    meta = Path("latents/shapes-rae/meta.json")
    assert data.open_data("latents/shapes-reg")[0]["recipe"]["encoder"] == data.open_data("latents/shapes-rae")[0]["id"]
    for size in (8, 32):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"coder": json.loads(meta.read_text())["coder"] | {"size": size}}))
        capsys.readouterr()
        assert call(reg, "--encoder", "latents/shapes-rae", *out, "--name", "odd") == 2 and f"it is for images of {size} pixels" in capsys.readouterr().err

def test_channels_that_do_not_vary_are_measured():
    coder = torch.nn.Module()
    coder.mean, coder.std, coder.features = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), lambda x: torch.full_like(x, 0.1)
    latents.measure(coder, Images(9), np.arange(9), torch.device("cpu"))
    assert torch.allclose(coder.mean, torch.full((1, 3, 1, 1), 0.1)) and torch.allclose(coder.std, torch.full((1, 3, 1, 1), 1e-5**0.5), rtol=1e-3)
