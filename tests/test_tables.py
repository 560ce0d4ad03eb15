"""Every preset, size and default, written a second time: to change one is a decision, never a slip of the pen."""
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import data, evaluate, model, sample, train

PRESETS = {
    "shapes": dict(data="shapes", model="JiT-T/16", batch_size=32, steps=4600, lr=7e-3, schedule="cosine", ema=(0.998,), noise_scale=2.0, p_mean=-0.9, p_std=1.0),
    "cifar10": dict(data="cifar10", model="JiT-S/4", batch_size=256, epochs=200, lr=4e-4, ema=(0.9999, 0.999)),
    "cifar10-cpu": dict(data="cifar10", model="JiT-T/8", batch_size=32, steps=1000, lr=3e-3, schedule="cosine", ema=(0.998,)),
    "imagenette": dict(data="imagenette-160", model="JiT-S/16", patch_size=16, batch_size=256, lr=4e-4, ema=(0.9999, 0.999)),
    "photos": dict(data="photos", model="JiT-S/16", batch_size=128, ema=(0.9999, 0.999)),
    "imagenet-B": dict(data="imagenet", model="JiT-B/16"),
    "imagenet-L": dict(data="imagenet", model="JiT-L/16"),
    "imagenet-H": dict(data="imagenet", model="JiT-H/16"),
    "1percent": dict(data="imagenet-1percent", model="JiT-B/16", batch_size=1200, epochs=1000, ema=(0.999,)),
}
SAMPLING = {
    "shapes": dict(solver="ddpm", steps=25, cfg=1.5, shift=3.0),
    "cifar10": dict(cfg=2.0, interval=(0.1, 1.0)),
    "cifar10-cpu": dict(steps=8, cfg=2.0),
    "imagenette": dict(cfg=2.5, interval=(0.1, 1.0)),
    "imagenet-B": dict(cfg=2.9, interval=(0.1, 1.0)),
    "imagenet-L": dict(cfg=2.4, interval=(0.1, 1.0)),
    "imagenet-H": dict(cfg=2.2, interval=(0.1, 1.0)),
    "1percent": dict(solver="euler", steps=25, cfg=2.9, interval=(0.1, 1.0)),
}
DEFAULTS = {
    data.Options: dict(source="shapes", root=None, size=None, count=20000, fraction=1.0, val_fraction=0.1, seed=0, name=None, out=Path("data"), overwrite=False),
    model.JiTConfig: dict(image_size=256, patch_size=16, in_channels=3, hidden_size=768, depth=12, num_heads=12, mlp_ratio=4.0, num_classes=1000, bottleneck_dim=128,
                          in_context_len=32, in_context_start=4, dropout=0.0, noise_scale=1.0, pred="x", path="linear", patch_embed="linear", ffn="swiglu",
                          norm="rmsnorm", mixer="attention", network="jit", rope=True, qk_norm=True, aux="none"),
    train.Options: dict(preset="shapes", experiment="", data="shapes", run=None, steps=None, epochs=600.0, seed=0, init=None, model="JiT-B/16", loss="v",
                        times="logit-normal", p_mean=-0.8, p_std=0.8, shift=None, label_drop=0.1, flip=True, aux_weight=None, objective="jit", batch_size=1024,
                        micro_batch=None, lr=None, schedule="constant", warmup=None, weight_decay=0.0, ema=(0.9999, 0.9996), amp=None, compile=None, record=False,
                        checkpointing=False, device=None, resume=False, dry_run=False, overwrite=False, log_every=50, preview_every=1000, save_minutes=5.0,
                        snapshots=8, sampling=None, classes=None, data_id=None, coder=None),
    sample.Settings: dict(solver="heun", steps=50, cfg=1.0, interval=(0.0, 1.0), t_eps=0.05, shift=1.0),
    sample.Options: dict(run="shapes", checkpoint=None, experiment="", ema=0, num=1000, labels=None, seed=0, out=None, npz=False, trajectory=False, overwrite=False,
                         batch_size=100, device=None, amp=None, compile=False),
    evaluate.Options: dict(run="shapes", samples=None, split="train", reference=None, metrics="fd,sfd,is,kid,precision,recall", features="classifier",
                           inception_weights=None, table=None, out=None, batch_size=100, device=None),
}
SIZES = {  # image, patch, width, depth, heads, bottleneck, first block with context, context tokens, dropout, noise scale, classes
    "JiT-T/8": (32, 8, 192, 6, 3, 48, 2, 4, 0, 1, 10), "JiT-T/16": (64, 16, 192, 6, 3, 64, 2, 4, 0, 1, 10),
    "JiT-S/4": (32, 4, 384, 12, 6, 48, 4, 8, 0, 1, 10), "JiT-S/16": (256, 16, 384, 12, 6, 128, 4, 32, 0, 1, 1000),
    "JiT-B/4": (64, 4, 768, 12, 12, 128, 4, 32, 0, 1, 1000), "JiT-B/16": (256, 16, 768, 12, 12, 128, 4, 32, 0, 1, 1000),
    "JiT-B/32": (512, 32, 768, 12, 12, 128, 4, 32, 0, 2, 1000), "JiT-B/64": (1024, 64, 768, 12, 12, 128, 4, 32, 0, 4, 1000),
    "JiT-L/16": (256, 16, 1024, 24, 16, 128, 8, 32, 0, 1, 1000), "JiT-L/32": (512, 32, 1024, 24, 16, 128, 8, 32, 0, 2, 1000),
    "JiT-H/16": (256, 16, 1280, 32, 16, 256, 10, 32, 0.2, 1, 1000), "JiT-H/32": (512, 32, 1280, 32, 16, 256, 10, 32, 0.2, 2, 1000),
    "JiT-G/16": (256, 16, 1664, 40, 16, 256, 10, 32, 0.2, 1, 1000),
}

def test_presets_and_what_they_recommend_for_sampling():
    assert train.PRESETS == PRESETS and train.SAMPLING == SAMPLING

@pytest.mark.parametrize("options", DEFAULTS, ids=lambda cls: f"{cls.__module__}-{cls.__name__}")
def test_defaults(options):
    assert {entry.name: entry.default for entry in fields(options) if entry.name != "workers"} == DEFAULTS[options]

def test_sizes():
    names = "image_size patch_size hidden_size depth num_heads bottleneck_dim in_context_start in_context_len dropout noise_scale num_classes".split()
    rows = {name: tuple(row[column] for column in names) for name, row in model.MODELS.items() if name in SIZES}
    assert rows == SIZES and all(len(model.MODELS[name]) == len(names) for name in SIZES)

def test_numbers_of_the_paper_that_stand_alone():
    assert model.T_EPS == 0.05 and train.BINS == 5 and train.MAX_BAD == 10
    assert (evaluate.KEPT, evaluate.NEIGHBOURS) == (50_000, 10_000) and evaluate.WEIGHTS_HASH == "6726825d"
    assert model.AuxHead.weight == 0.1 and model.AuxHead.after == -1
    assert data.ARCHIVES == {
        "cifar10": (32, "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        "imagenette-160": (160, "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
        "imagenette-320": (320, "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3")}
    assert data.CIFAR_CLASSES == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert [line.split()[1] for line in data.IMAGENETTE_CLASSES.split("\n") if line] == ["tench", "springer", "cassette", "chainsaw", "church", "horn", "truck",
                                                                                        "pump", "golf", "parachute"]
    arguments = lambda function: {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    assert arguments(evaluate.kernel_distance) == {"subsets": 100, "size": 1000} and arguments(evaluate.inception_score) == {"splits": 10}
    assert arguments(evaluate.share_inside) == {"k": 3, "block": 1000}
    assert arguments(sample.walk) == {"solver": "heun", "steps": 50, "cfg": 1.0, "interval": (0.0, 1.0), "t_eps": 0.05, "shift": 1.0, "step_noise": None}

# image size, images -> steps, learning rate, warm-up, patch, noise scale: what presets leave open, worked out by hand
SETTLED = {
    "shapes": (64, 20_000, 4600, 7e-3, 230, 16, 2.0),                          # 5 epochs are 3125 steps; a twentieth is 230
    "cifar10": (32, 50_000, 39_062, 4e-4, 977, 4, 1.0),                        # 200 epochs of 195.3 steps; 5 epochs are 977
    "imagenette": (160, 9469, 22_193, 4e-4, 185, 16, 1.0),
    "photos": (512, 900, 4219, 2.5e-5, 35, 32, 2.0),
    "1percent": (256, 12_811, 10_676, 5e-5 * 1200 / 256, 53, 16, 1.0),
}

@pytest.mark.parametrize("preset", SETTLED)
def test_what_a_preset_leaves_open(preset):
    size, images, *expected = SETTLED[preset]
    meta = {"size": size, "classes": ["a"] * 10, "counts": {"train": images}, "id": "1"}
    options, config = train.settle(train.gather(train.read_flags(["--preset", preset])), meta, model.torch.device("cpu"), 1)
    assert [options.steps, options.lr, options.warmup, config.patch_size, config.noise_scale] == pytest.approx(expected)
    assert options.sampling == SAMPLING.get(preset, {}) and options.ema == PRESETS[preset]["ema"] and config.num_classes == 10
    options, _ = train.settle(train.gather(train.read_flags(["--preset", preset, "--epochs", "3"])), meta, model.torch.device("cpu"), 1)
    assert options.steps == round(3 * images / options.batch_size)             # --epochs after a preset's steps

def test_imagenettes_class_folders():
    """The ten folders of the archive."""
    assert [line.split()[0] for line in data.IMAGENETTE_CLASSES.split("\n") if line] == [
        f"n0{number}" for number in (1440764, 2102040, 2979186, 3000684, 3028079, 3394916, 3417042, 3425413, 3445777, 3888257)]

WITHIN = {
    data.Options: dict(size="[8, 4096]", count="[100, 10000000]", fraction="(0, 1]", val_fraction="(0, 1)", seed="[0, 1e18]", workers="[1, inf)"),
    model.JiTConfig: dict(patch_size="[1, inf)", hidden_size="[1, 100000]", depth="[1, 10000]", num_heads="[1, inf)",
                          mlp_ratio="(0, 1000]", num_classes="[0, inf)", bottleneck_dim="[0, 100000]", in_context_len="[0, 100000]", in_context_start="[0, inf)",
                          dropout="[0, 1)", noise_scale="(0, 1000]"),
    train.Options: dict(steps="[1, 1e15]", epochs="(0, 1e9]", seed="[0, 1e18]", p_std="(0, 100]", shift="[0.001, 1000]", label_drop="[0, 1)", aux_weight="[0, 10000]",
                        batch_size="[1, 1000000]", micro_batch="[1, inf)", lr="(0, inf)", warmup="[0, 1e15]", weight_decay="[0, 1000]", ema="[0, 1)",
                        log_every="[1, inf)", preview_every="[0, inf)", save_minutes="[0, inf)", snapshots="[0, inf)"),
    sample.Settings: dict(steps="[1, 100000]", interval="[0, 1]", t_eps="(0, 1)", shift="[0.001, 1000]"),
    sample.Options: dict(ema="[-1, inf)", num="[1, 10000000]", seed="[0, 1e18]", batch_size="[1, inf)"),
    evaluate.Options: dict(batch_size="[1, inf)"),
}

@pytest.mark.parametrize("options", WITHIN, ids=lambda cls: f"{cls.__module__}-{cls.__name__}")
def test_what_numbers_may_be(options):
    assert {e.name: e.metadata["within"] for e in fields(options) if e.metadata and e.metadata["within"] != "(-inf, inf)"} == WITHIN[options]

def test_what_may_differ_when_a_run_goes_on_and_what_is_no_flag():
    internal = {e.name for e in fields(train.Options) if not e.metadata}
    assert train.WITH_RESUME - train.MAY_DIFFER == {"steps", "epochs", "lr", "amp", "warmup"} and train.MAY_DIFFER <= {e.name for e in fields(train.Options)}
    assert train.MAY_DIFFER == {"data", "run", "micro_batch", "compile", "record", "checkpointing", "device", "resume", "dry_run", "overwrite", "log_every", "preview_every",
                         "save_minutes", "snapshots", "sampling"}
    assert internal == {"objective", "record", "sampling", "classes", "data_id", "coder"} and [e.name for e in fields(model.JiTConfig) if not e.metadata] == ["image_size", "in_channels"]
    assert all(e.metadata for cls in (data.Options, sample.Options, sample.Settings, evaluate.Options) for e in fields(cls))

OF_FUNCTIONS = {  # what a function takes if it is not told
    data: {"arc": (0.0, 2.0, 0.0), "picture": ((), ()), "write": ("la", "black")},
    model: {"RMSNorm.__init__": (1e-6,), "conversion": (0.05,), "convert": ("linear", 0.05), "load_network": (0, ""), "to_float": ("cpu",), "autocast": (True,), "reading": ("",), "chart": (False,)},
    train: {"Trainer.__init__": (0, 1, None)},
    sample: {"predict": ("v", 0.05), "guided": (1.0, (0.0, 1.0), "v", 0.05), "noise_for": (-1,), "Sampler.__init__": (None,)},
    evaluate: {"inception_score": (10,), "kernel_distance": (100, 1000), "share_inside": (3, 1000), "Inception.chain": (1, True), "Inception.mixed": (None, 1), "ImageSet.__init__": ("train",)},
}

@pytest.mark.parametrize("module", OF_FUNCTIONS, ids=lambda module: module.__name__)
def test_what_functions_take_by_default(module):
    for name, values in OF_FUNCTIONS[module].items():
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters.values()
        found = [p.default for p in parameters if p.default is not p.empty]
        assert (name, *found) == (name, *values) and [type(value) for value in found] == [type(value) for value in values]

def test_constants():
    assert train.SUMMED == ["loss_t0.0", "loss_t0.2", "loss_t0.4", "loss_t0.6", "loss_t0.8", "aux", "grad_norm"]
    assert (model.T_EPS, train.BINS, train.MAX_BAD, evaluate.KEPT, evaluate.NEIGHBOURS) == (0.05, 5, 10, 50_000, 10_000)
    assert data.HIDDEN == (".", "@eaDir", "@Recycle", "@recycle", "@Recently", "@tmp", "@__thumb", "@appstore", "@Transcode", "#Recycle", "#recycle", "#snapshot", "$RECYCLE", "$Recycle", "__MACOSX", "__pycache__", "lost+found", "System Volume") and data.FORMATS == "JPEG PNG WEBP BMP GIF TIFF PPM".split()
    assert [(head.after, head.weight) for head in (model.AuxHead, model.TimeHead, model.RotationHead)] == [(-1, 0.1)] * 3 and (model.TimeHead.outputs, model.RotationHead.outputs) == (1, 4)
    assert evaluate.WEIGHTS_URL == "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

def test_what_flags_may_be():
    """All choices that are written out; those of registries grow with them."""
    amp = ("bf16", "fp16", "off")
    choices = {e.name: tuple(e.metadata["choices"]()) for cls in (train.Options, sample.Options, sample.Settings, evaluate.Options, model.JiTConfig) for e in fields(cls) if e.metadata.get("choices")}
    assert {name: choices[name] for name in ("loss", "times", "schedule", "amp", "split", "features", "pred", "patch_embed")} == {
        "loss": ("x", "e", "v"), "times": ("logit-normal", "uniform"), "schedule": ("constant", "cosine"), "amp": amp, "split": ("train", "val"),
        "features": ("classifier", "inception"), "pred": ("x", "e", "v"), "patch_embed": ("linear", "nonlinear")} and tuple(sample.SOLVERS) == ("heun", "euler", "ddim", "ddpm")
    assert [tuple(e.metadata["choices"]()) for cls in (train.Options, sample.Options) for e in fields(cls) if e.name == "amp"] == [amp, amp]
    registries = {"preset": train.PRESETS, "model": model.MODELS, "path": model.PATHS, "ffn": model.FFNS, "norm": model.NORMS,
                  "mixer": model.MIXERS, "network": model.NETWORKS, "aux": model.AUX_HEADS}
    assert all(choices[name] == tuple(registry) for name, registry in registries.items()) and tuple(data.Options().__dataclass_fields__["source"].metadata["choices"]()) == tuple(data.SOURCES)
