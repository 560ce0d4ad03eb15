"""Sampling as a user sees it: the same pictures whatever the batches, processes, order or interruption; nothing overwritten."""
import json
import runpy
import shutil
import sys
from dataclasses import asdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, TINY_FLAGS, call, data, evaluate, model, randomised, sample, shell, train
from test_model import official

@pytest.fixture
def run(there):
    """A folder holding runs/r/checkpoint.pt: a random network, which shows differences better than a trained one."""
    net = randomised(model.JiTConfig(**TINY))
    Path("runs/r").mkdir(parents=True)
    info = {"step": 10, "images": 80, "decays": [0.9], "classes": ["ring", "star", "dot"], "data": "shapes", "sampling": {"cfg": 2.0, "steps": 4}}
    torch.save({"config": {**TINY}, "info": info, "ema": [net.state_dict()]}, "runs/r/checkpoint.pt")
    return net

def pictures(folder):
    return np.stack([np.array(Image.open(p)) for p in sorted(Path(folder).glob("0*.png"))]).astype(int)

def draw(out, *flags, num=64):
    assert call(sample, "--run", "r", "--num", num, "--amp", "off", "--out", out, *flags) == 0
    return pictures(out)

@pytest.mark.card
def test_same_images_for_any_batch_size(run):
    """To a rare grey level on a CPU; on a GPU, whose products round by the shape, to one."""
    base = draw("a", "--batch-size", 64)
    for size in (1, 7):
        other = draw(f"b{size}", "--batch-size", size)
        assert np.abs(base - other).max() <= 1 and ((base != other).mean() <= 1e-3 or torch.cuda.is_available())
    assert np.array_equal(base, draw("c", "--batch-size", 64))

def test_noise_and_labels_are_a_function_of_seed_and_index():
    a = sample.noise_for(range(10), (3, 4, 4), 7, 2.0)
    assert torch.equal(a[4:6], sample.noise_for([4, 5], (3, 4, 4), 7, 2.0)) and torch.equal(a[[9, 2]], sample.noise_for([9, 2], (3, 4, 4), 7, 2.0))
    assert not torch.equal(a, sample.noise_for(range(10), (3, 4, 4), 8, 2.0)) and len({row.sum().item() for row in a}) == 10
    assert abs(sample.noise_for(range(50), (3, 16, 16), 0, 2.0).std() - 2) < 0.02
    assert not torch.equal(a, sample.noise_for(range(10), (3, 4, 4), 7, 2.0, step=0))

@pytest.mark.parametrize("solver", ["heun", "euler", "ddim", "ddpm"])
def test_every_solver_written_a_second_time(solver):
    """At k = 2, guided inside an interval, on a shifted grid: the noise of each image and step, the labels' turns, the steps."""
    net = randomised(model.JiTConfig(**{**TINY, "noise_scale": 2.0}))
    settings = {"solver": solver, "steps": 4, "cfg": 3.0, "interval": (0.3, 0.9), "t_eps": 0.05, "shift": 2.0}
    made = sample.Sampler(net, [2, 0, 1], 5, settings, "off", torch.device("cpu")).images([4, 6])
    noise = lambda last: 2 * torch.from_numpy(np.stack([np.random.default_rng((5, i, last)).standard_normal((3, 16, 16), dtype=np.float32) for i in (4, 6)]))
    y, z, evaluations = torch.tensor([0, 2]), noise(0), []                     # of images 4 and 6, the second and the first of three
    grid = [s / (s + 2 * (1 - s)) for s in (0, 0.25, 0.5, 0.75, 1)]

    def x_of(z, t, null=False):
        evaluations.append(t)
        with torch.no_grad():
            return net(z, torch.full((2,), t), torch.full_like(y, 3) if null else y)

    def guided(z, t, to):
        value = lambda null: x_of(z, t, null) if to == "x" else (x_of(z, t, null) - z) / max(1 - t, 0.05)
        return 3 * value(False) - 2 * value(True) if 0.3 < t < 0.9 else value(False)
    for step, (t, u) in enumerate(zip(grid, grid[1:])):
        if solver in ("heun", "euler"):
            v = guided(z, t, "v")
            ahead = z + (u - t) * v
            z = z + (u - t) / 2 * (v + guided(ahead, u, "v")) if solver == "heun" and u < 1 else ahead
        else:
            x = guided(z, t, "x")
            e = (z - t * x) / (1 - t)
            if solver == "ddim":
                z = u * x + (1 - u) * e
            else:                                         # q(z_u | z_t, x) of two Gaussians; t < u, so z_u is the cleaner one
                r, s = t / u, (1 - u)**2
                var = (1 - t)**2 - r**2 * s
                z = (var * u * x + s * r * z) / (1 - t)**2 + (s * var / (1 - t)**2)**0.5 * noise(step + 1)
    assert torch.allclose(made, z, atol=2e-4) and len(evaluations) == {"heun": 11, "euler": 6}.get(solver, 6)

def test_no_two_images_share_noise():
    """numpy ignores zeros at the end of a seed: image 0's fresh noise of step s must not be where image s+1 starts."""
    rows = [sample.noise_for(range(6), (4,), 0, 1.0, step) for step in (-1, 0, 1, 2, 3, 4)]
    assert len(torch.cat(rows).unique(dim=0)) == 36

def test_the_sampler_passes_on_what_it_was_asked(run, monkeypatch):
    """Fresh noise by step, noise of std k, the shift of the grid; ancestral noise has the posterior's std, and none at the end."""
    net, steps, scales = randomised(model.JiTConfig(**{**TINY, "noise_scale": 2.0})), [], model.PATHS["linear"].scales
    noise, y, x = torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), lambda z, t: z * 0.3
    sample.generate(net, noise, y, solver="ddpm", steps=3, step_noise=lambda i: steps.append(i) or noise)
    assert steps == [0, 1, 2] and [t for t, _ in sample.walk(net, noise, y, solver="euler", steps=2, shift=3.0)] == pytest.approx([0, 0.25, 1])
    assert torch.equal(sample.ddpm_step(noise, 0.9, 1.0, x, lambda: noise, scales), sample.ddpm_step(noise, 0.9, 1.0, x, lambda: 0.0, scales))
    t, u = 0.5, 0.75                                      # std^2 = (sigma_t^2 - (alpha_t/alpha_u)^2 sigma_u^2) sigma_u^2 / sigma_t^2
    added = sample.ddpm_step(noise, t, u, x, lambda: torch.ones_like(noise), scales) - sample.ddpm_step(noise, t, u, x, lambda: 0.0, scales)
    assert torch.allclose(added, torch.full_like(added, ((0.5**2 - (0.5 / 0.75)**2 * 0.25**2) * 0.25**2 / 0.5**2)**0.5), atol=1e-6)
    monkeypatch.setattr(sample, "walk", lambda net, noise, labels, **more: iter([(1.0, noise)]))
    assert abs(sample.Sampler(net, [0], 0, asdict(sample.Settings()), "off", torch.device("cpu")).images(range(50)).std() - 2) < 0.05
    before = model.fingerprint(net.state_dict())
    next(net.parameters()).data += 1
    assert model.fingerprint(net.state_dict()) != before

def test_an_image_of_another_size_is_not_packed(run, capsys):
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off") == 0
    Image.new("RGB", (8, 8)).save("runs/r/samples/0000004.png")
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--npz") == 1 and "has the shape (8, 8, 3), not (16, 16, 3)" in capsys.readouterr().err
    assert not Path("runs/r/samples/samples.npz").exists()

def test_a_killed_run_goes_on(run, monkeypatch):
    whole = draw("whole", "--batch-size", 10)
    real, count = sample.walk, []

    def dies(*args, **kwargs):
        count.append(1)
        if len(count) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(sample, "walk", dies)
    assert call(sample, "--run", "r", "--num", 64, "--amp", "off", "--out", "half", "--batch-size", 10) == 130
    assert len(list(Path("half").glob("0*.png"))) == 30
    Path("half/0000003.png").unlink()                      # a hole, in any order
    monkeypatch.setattr(sample, "walk", real)
    assert np.array_equal(draw("half", "--batch-size", 10), whole)

@pytest.mark.parametrize("threads", [1, 8])
def test_any_number_of_threads_writes_the_same_files(run, monkeypatch, threads):
    draw("plain", "--solver", "ddpm")
    monkeypatch.setattr(sample, "THREADS", ThreadPoolExecutor(threads))
    monkeypatch.setattr(sample, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(threads))
    draw("again", "--solver", "ddpm")
    assert [file.read_bytes() for file in sorted(Path("again").iterdir())] == [file.read_bytes() for file in sorted(Path("plain").iterdir())]

@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler"])
def test_every_solver_is_reproducible(run, solver):
    assert np.abs(draw("a", "--solver", solver, "--batch-size", 64) - draw("b", "--solver", solver, "--batch-size", 10)).max() <= 1

def test_two_ranks_make_the_images_of_one(run, monkeypatch):
    """Each rank takes its share of the batches; what they leave is the same folder."""
    whole = draw("whole", "--batch-size", 7)
    net, info = model.load_network("runs/r/checkpoint.pt")
    how = sample.settings_of({}, info, net)
    sampler = sample.Sampler(net, [i % 3 for i in range(64)], 0, how, "off", torch.device("cpu"))
    Path("parts").mkdir()
    for rank, share in ((1, 4 * 7 + 1), (0, 5 * 7)):                   # ten batches, the last of one image
        before = len(list(Path("parts").iterdir()))
        sample.sample_all(sampler, Path("parts"), 7, rank, 2)
        assert len(list(Path("parts").iterdir())) - before == share
    assert np.array_equal(pictures("parts"), whole)

def test_output_forms(run):
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--npz") == 0
    batch = np.load("runs/r/samples/samples.npz", allow_pickle=False)
    assert batch["arr_0"].dtype == np.uint8 and batch["arr_0"].shape == (9, 16, 16, 3) and batch["arr_1"].tolist() == [0, 1, 2] * 3
    assert np.array_equal(batch["arr_0"], pictures("runs/r/samples"))
    record = json.loads(Path("runs/r/samples/samples.json").read_text())
    assert record["cfg"] == 2.0 and record["steps"] == 4 and record["step"] == 10 and Image.open("runs/r/grid.png").width == 3 * 64

def test_fresh_noise_has_the_std_of_the_noise_scale():
    """A network that says 0: all is noise, and twice the noise scale is twice the result."""
    ends = []
    for k in (1.0, 2.0):
        net = model.JiT(model.JiTConfig(**{**TINY, "noise_scale": k})).eval()
        torch.manual_seed(0)
        *_, (_, z), _ = sample.walk(net, k * torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), solver="ddpm", steps=3)
        ends.append(z)
    assert torch.allclose(2 * ends[0], ends[1], atol=1e-6) and ends[0].std() > 0.05

@pytest.mark.parametrize("lost,num", [("0000003", 4), ("0000031", 40)])
def test_an_error_of_any_file_is_not_lost(run, monkeypatch, capsys, lost, num):
    """Of the last batch, and of one in the middle with an image that the grid does not show."""
    real = Image.Image.save

    def full(image, path, *more, **how):
        if lost in str(path):
            raise OSError(28, "No space left on device")
        return real(image, path, *more, **how)
    monkeypatch.setattr(Image.Image, "save", full)
    assert call(sample, "--run", "r", "--num", num, "--amp", "off", "--batch-size", 4, "--out", "a") == 1 and "No space left" in capsys.readouterr().err

def test_another_seed_is_another_set(run, capsys):
    draw("a", "--npz", num=4)
    assert Path("a/samples.npz").exists() and not Path("a/arr_0.npy").exists()
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--seed", 1) == 1 and "seed 0, now 1" in capsys.readouterr().err
    draw("a", "--seed", 1, "--overwrite", num=4)
    assert not Path("a/samples.npz").exists()             # of other settings

def test_an_older_record_lacks_a_setting(run, capsys):
    """What 04 did not know then was as its default is now."""
    draw("a", num=4)
    record = json.loads(Path("a/samples.json").read_text())
    del record["t_eps"]
    Path("a/samples.json").write_text(json.dumps(record))
    made = [path.stat().st_mtime_ns for path in sorted(Path("a").glob("*.png"))]
    draw("a", num=4)
    assert made == [path.stat().st_mtime_ns for path in sorted(Path("a").glob("*.png"))]
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--t-eps", 0.02) == 1 and "t_eps 0.05, now 0.02" in capsys.readouterr().err

def test_samples_are_neither_overwritten_nor_ignored(run, capsys):
    draw("out", num=4)
    before = [path.stat().st_mtime_ns for path in Path("out").glob("*.png")]
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out") == 0
    assert before == [path.stat().st_mtime_ns for path in Path("out").glob("*.png")]
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out", "--cfg", 3) == 1
    assert "(cfg 2.0, now 3.0): pass --overwrite to replace them, or --out" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out", "--cfg", 3, "--overwrite") == 0 and np.array_equal(pictures("out"), draw("fresh", "--cfg", 3, num=4))
    Path("mine").mkdir()
    Image.new("RGB", (9, 9)).save("mine/holiday.png")
    assert call(sample, "--run", "r", "--num", 4, "--out", "mine", "--overwrite") == 1 and "did not write" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 4, "--out", "mine/holiday.png") == 1 and "Not a directory" in capsys.readouterr().err

def test_official_checkpoint_is_sampled(there, monkeypatch):
    monkeypatch.setitem(model.MODELS, "JiT-tiny", TINY)
    net = randomised(model.JiTConfig(**TINY))
    official(there / "official.pth", net)
    assert call(sample, "--checkpoint", "official.pth", "--num", 5, "--steps", 3, "--labels", "2", "--cfg", 2.9, "--interval", "0.1,1", "--amp", "off") == 0
    noise = sample.noise_for(range(5), (3, 16, 16), 0, 1.0)
    expected = sample.generate(net, noise, torch.full((5,), 2), steps=3, cfg=2.9, interval=(0.1, 1.0))
    assert np.array_equal(pictures("samples"), model.to_uint8(expected).permute(0, 2, 3, 1).numpy())
    assert call(sample, "--checkpoint", "official.pth", "--num", 5, "--steps", 3, "--ema", 1, "--out", "other", "--amp", "off") == 0
    assert json.loads(Path("other/samples.json").read_text())["ema"] == 1

def test_labels_grammar():
    names = ["ring", "star", "4x4"]
    assert sample.parse_labels("all", 5, names, 3) == [0, 1, 2, 0, 1]
    assert sample.parse_labels("star", 3, names, 3) == [1, 1, 1] and sample.parse_labels("2, ring", 4, names, 3) == [2, 0, 2, 0]
    assert sample.parse_labels("4x4", 1, names, 3) == [2] and len(sample.parse_labels("all", 1000, [], 1000)) == 1000
    for wrong in ("moon", "3", "-1", "", "1x99999999999", "²"):
        with pytest.raises(data.UsageError, match="is not a class"):
            sample.parse_labels(wrong, 3, names, 3)

def test_labels_by_one_rule():
    """Where classes are called by numbers, a number is a name; id: is always an id; a name may hold a comma, or be "all"."""
    numbers = ["1", "10", "2", "tench, Tinca tinca", "all"]
    assert sample.parse_labels("1,2,id:1", 3, numbers, 5) == [0, 2, 1] and sample.parse_labels("all", 2, numbers, 5) == [4, 4]
    assert sample.parse_labels("tench, Tinca tinca", 1, numbers, 5) == sample.parse_labels('"tench, Tinca tinca"', 1, numbers, 5) == [3]
    assert sample.parse_labels('10, "tench, Tinca tinca"', 2, numbers, 5) == [1, 3] and sample.parse_labels(None, 6, numbers, 5) == [0, 1, 2, 3, 4, 0]
    assert sample.parse_labels("10\ntench, Tinca tinca\n", 3, ["10", "tench", "Tinca tinca"], 3) == [0, 1, 2]
    with pytest.raises(data.UsageError, match="'0' is not a class; ids: id:0 to id:4"):
        sample.parse_labels("0", 1, numbers, 5)

@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n"], ids=["empty", "cut"])
def test_a_sample_that_does_not_end_as_a_picture_is_made_again(run, damage):
    whole = draw("a", num=9)
    Path("a/0000004.png").write_bytes(damage)
    assert np.array_equal(draw("a", num=9), whole)

def test_a_foreign_picture_is_not_replaced(run, capsys):
    Image.new("RGB", (9, 9)).save("a-grid.png")
    before = Path("a-grid.png").read_bytes()
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--out", "a") == 1 and "not drawn by these scripts" in capsys.readouterr().err
    assert Path("a-grid.png").read_bytes() == before
    Path("a-grid.png").unlink()
    assert draw("a", num=9).shape[0] == draw("a", num=9).shape[0] == 9

@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_samples_half_removed_are_made_by_the_same_command(run, monkeypatch, after):
    draw("a", "--npz", num=4)
    removed, real = [], Path.unlink

    def unlink(path, **more):
        if path.parent.name == "a" and sum(other.parent.name == "a" for other in removed) == after:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, **more)
    flags = ["--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--npz", "--seed", 1, "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert call(sample, *flags) == 130
    assert call(sample, *flags) == 0 and np.load("a/samples.npz")["arr_0"].shape == (4, 16, 16, 3)

@pytest.mark.parametrize("name", ["0000000.png", "0000099.png", "thesis.part", "0000000.png.part", "samples.npz", "samples.npz.bak", "arr_0.npy"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_folder_without_our_record_is_not_touched(run, capsys, name, flags):
    """What looks like samples is only ours where samples.json, which is written first, lies beside it."""
    Path("a").mkdir()
    Image.new("RGB", (16, 16), "red").save(f"a/{name}", "png")
    before = Path(f"a/{name}").read_bytes()
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--out", "a", *flags) == 1 and f"holds {name}, which this script did not write: choose another --out" in capsys.readouterr().err
    assert Path(f"a/{name}").read_bytes() == before and len(list(Path("a").iterdir())) == 1

def test_another_programs_record_is_no_permission(run, capsys):
    Path("a").mkdir()
    Path("a/samples.json").write_text('{"labels": []}')
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--out", "a", "--overwrite") == 1 and "weights is not of the type str" in capsys.readouterr().err
    Path("a/samples.json").write_text("[]")
    Image.new("RGB", (16, 16), "red").save("a/0000003.png")
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--out", "a", "--overwrite") == 1 and "samples.json is damaged" in capsys.readouterr().err
    assert Path("a/0000003.png").exists()

def test_numbers_that_are_none_are_never_a_picture(run, capsys):
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--cfg", "1e39", "--out", "a") == 1
    assert "not finite" in capsys.readouterr().err and not list(Path("a").glob("*.png"))
    x, sampler = torch.zeros(2, 3, 16, 16), sample.Sampler(run, [0], 0, {}, "off", torch.device("cpu"))
    for number in ("nan", "inf", "-inf"):
        x[1, 2, 3, 4] = float(number)
        with pytest.raises(ValueError, match="not finite"):
            sampler.pictures(x)

def test_without_a_trained_null_class_there_is_no_guidance(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--label-drop", 0) == 0
    assert call(sample, "--num", 3, "--cfg", 2) == 2 and "--label-drop 0" in capsys.readouterr().err
    assert call(sample, "--num", 3, "--steps", 2) == 0 and ", w 1.0, " in capsys.readouterr().out

def test_pictures_of_the_process(work, monkeypatch, capsys):
    """Columns are spread over all steps; rows have names; --out is honoured."""
    assert call(train, *TINY_FLAGS, "--steps", 6, "--snapshots", 3, "--noise-scale", 2, "--run", "p") == 0
    drawn, real = [], data.picture
    monkeypatch.setattr(data, "picture", lambda rows, titles=(), names=(): drawn.append((rows, list(titles), list(names))) or real(rows, titles, names))
    assert call(sample, "--run", "p", "--solver", "heun", "--steps", 50, "--shift", 1, "--trajectory", "--labels", "star,3") == 0
    rows, titles, names = drawn.pop()
    start = sample.noise_for(range(4), (3, 16, 16), 0, 2.0) / 2              # at k = 2, shown in the range of pictures
    assert all(np.array_equal(row[0], picture) for row, picture in zip(rows[::2], model.to_pictures(start)))
    assert titles[0] == "t = 0.00" and titles[-2:] == ["t = 0.96", "result"] and len(titles) == len(rows[0]) == 10 and names == ["z", "x_pred"] * 4
    assert call(sample, "--run", "p", "--steps", 2, "--trajectory", "--out", "here.png") == 0
    assert Image.open("runs/p/trajectory.png").width > 100 and Image.open("here.png").width > 100
    assert drawn.pop()[1] == ["t = 0.00", "t = 0.25", "result"]                # each step once: --shift 3 of two steps
    Path("copy.py").write_bytes((ROOT / "02_model.py").read_bytes())           # it names the mark, and does not carry it
    for kept in ("runs/p/checkpoint.pt", "runs/p/log.csv", "copy.py"):
        before = Path(kept).read_bytes()
        assert call(sample, "--run", "p", "--steps", 2, "--trajectory", "--out", kept) == 1 and Path(kept).read_bytes() == before
    asked, guided = set(), sample.guided
    monkeypatch.setattr(sample, "guided", lambda net, z, t, labels, cfg, *more: asked.add(cfg) or guided(net, z, t, labels, cfg, *more))
    assert call(sample, "--run", "p", "--steps", 2, "--trajectory", "--cfg", 2.5) == 0 and asked == {2.5}

def test_the_network_shift_of_training_is_recommended(work):
    assert call(train, *TINY_FLAGS, "--steps", 2, "--shift", 2.5, "--preset", "cifar10", "--data", "shapes", "--run", "s") == 0
    assert model.load_network("runs/s/checkpoint.pt")[1]["sampling"]["shift"] == 2.5

def test_a_wrong_recommendation_is_one_line_and_a_flag_overrides_it(run, capsys):
    state = torch.load("runs/r/checkpoint.pt", weights_only=True)
    state["info"]["sampling"]["steps"] = 2.5
    torch.save(state, "runs/r/checkpoint.pt")
    assert call(sample, "--run", "r", "--num", 2) == 2 and "steps 2.5: it must be of the type int" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 2, "--steps", 2) == 0

def test_the_working_directory_is_no_place_for_samples(run, capsys, monkeypatch):
    """Its neighbours, the lock and the grid, take their names from it."""
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert call(sample, "--run", "../runs/r", "--num", 2, "--steps", 2, "--out", ".") == 2 and "give this folder by its name" in capsys.readouterr().err
    assert call(sample, "--run", "../runs/r", "--num", 2, "--steps", 2, "--out", "../empty") == 0 and Path("../empty-grid.png").exists()

def test_two_at_once_are_refused(run, capsys):
    with data.locked(Path("out")):
        done = shell("04_sample.py", "--run", "r", "--num", 4, "--out", "out", cwd=Path("."))
    assert done.returncode == 1 and "another process is writing to out" in done.stderr

def broken(change):
    state = torch.load("runs/r/checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, "broken.pt")

BROKEN = {"image size": (lambda s: s["config"].update(image_size="16"), "broken.pt cannot be used"), "list config": (lambda s: s.update(config=[1]), "broken.pt cannot be used"),
          "dict ema": (lambda s: s.update(ema={"a": 1}), "broken.pt cannot be used"), "scalar weight": (lambda s: s["ema"][0].update({"pos_embed": 3.0}), "broken.pt cannot be used"),
          "infinity": (lambda s: s["ema"][0]["final_layer.linear.bias"].fill_(float("inf")), "holds NaN or infinity"),
          "NaN": (lambda s: s["ema"][0]["final_layer.linear.bias"].fill_(float("nan")), "holds NaN"), "no raw": (lambda s: None, "raw weights, which it does not hold"),
          "unknown setting": (lambda s: s["config"].update(colour=1), "broken.pt cannot be used: TypeError")}

@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line(run, capsys, name):
    broken(BROKEN[name][0])
    assert call(sample, "--checkpoint", "broken.pt", "--ema", -1 if name == "no raw" else 0) == 1 + (name == "no raw")
    error = capsys.readouterr().err
    assert BROKEN[name][1] in error and error.count("\n") == 1 and not Path("samples").exists()

def test_another_ema_than_there_is_is_refused(work, capsys):
    """One set of averages: --ema 1 would be the raw weights."""
    assert call(train, *TINY_FLAGS, "--steps", 2, "--ema", "0.9") == 0
    assert call(sample, "--ema", 1) == 2 and "numbered 0 to 0" in capsys.readouterr().err
    assert call(sample, "--ema", -1, "--num", 2, "--steps", 2) == 0

@pytest.mark.parametrize("flags,words,code", [
    (["--steps", -1], "[1, 100000]", 2), (["--interval", "0.5"], "two times", 2), (["--interval", "0,0.5,1"], "two times", 2), (["--interval", "0.9,0.1"], "two times", 2), (["--interval", "0,2"], "in [0, 1]", 2), (["--solver", "rk4"], "is unknown", 2),
    (["--labels", "moon"], "is not a class", 2), (["--ema", 3], "averaged weights of runs/r/checkpoint.pt are numbered 0 to 0", 2), (["--run", "nope"], "no checkpoint file at runs/nope/checkpoint.pt: train one first (python 03_train.py)", 1), (["--checkpoint", "x.pth"], "no checkpoint file at x.pth", 1), (["--seed", -1], "[0, 1e18]", 2), (["--seed", "9" * 400], "[0, 1e18]", 2),
    (["--device", "gpu"], "give cuda or cpu", 2), (["--num", 0], "[1, 10000000]", 2), (["--num", "9999999999"], "[1, 10000000]", 2), (["--cfg", "nan"], "give a number", 2),
    (["--t-eps", "inf"], "in (0, 1)", 2), (["--shift", "inf"], "in [0.001, 1000]", 2), (["--checkpoint", "notes.txt"], "notes.txt is not a checkpoint: no access, damaged, not written by torch.save", 1)])
def test_wrong_requests(run, capsys, flags, words, code):
    Path("notes.txt").write_text("remember the milk")
    assert call(sample, *(["--run", "r"] if "--run" not in flags else []), *flags) == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not Path("runs/r/samples").exists()

def test_guidance_without_classes_is_refused(there, capsys):
    config = {**TINY, "num_classes": 0}
    torch.save({"config": config, "info": {}, "ema": [randomised(model.JiTConfig(**config)).state_dict()]}, "u.pt")
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--cfg", 2) == 2 and "nothing to guide" in capsys.readouterr().err
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--cfg", 0) == 2 and "nothing to guide" in capsys.readouterr().err
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--labels", "1") == 2 and "without classes" in capsys.readouterr().err
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--cfg", 1) == 0
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2) == 0

def test_an_unconditional_run_has_no_class_accuracy(work):
    """The data set has classes, the network has not: its images are of none of them."""
    assert call(train, *TINY_FLAGS, "--steps", 2, "--num-classes", 0) == 0 and call(sample, "--num", 20, "--steps", 2, "--amp", "off") == 0
    assert json.loads(Path("runs/shapes/samples/samples.json").read_text())["classes"] == []
    assert call(evaluate) == 0 and "class_accuracy" not in json.loads(Path("runs/shapes/metrics.json").read_text())

def test_the_trajectory_ends_with_the_images(work, monkeypatch):
    assert call(train, *TINY_FLAGS, "--steps", 2) == 0
    drawn, real = [], data.picture
    monkeypatch.setattr(data, "picture", lambda rows, *more: drawn.append(rows) or real(rows, *more))
    flags = ["--solver", "euler", "--steps", 3, "--amp", "off"]
    assert call(sample, *flags, "--trajectory") == 0 and call(sample, *flags, "--num", 4, "--batch-size", 4) == 0
    for k in range(4):
        assert all(np.abs(row[-1].astype(int) - pictures("runs/shapes/samples")[k]).max() <= 1 for row in drawn[0][2 * k:2 * k + 2])

def test_a_kill_while_old_samples_are_removed(run, monkeypatch):
    """The record goes last: with it the folder is still ours."""
    draw("a", num=4)
    real = Path.unlink

    def dies(path, **how):
        if path.name == "0000002.png":
            raise KeyboardInterrupt
        return real(path, **how)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--seed", 1, "--overwrite") == 130
    assert np.array_equal(draw("a", "--seed", 1, "--overwrite", num=4), draw("b", "--seed", 1, num=4))

@pytest.mark.parametrize("name", ["samples.json.jit-part", "samples.npz.jit-part", "arr_0.jit-part.jit-part", "arr_0.jit-part", "0000002.png.jit-part"])
def test_what_a_kill_leaves_is_no_foreign_file(run, name):
    """The record is written first: before it there is only a part of it."""
    if name != "samples.json.jit-part":
        draw("a", "--npz", num=4)
    Path("a").mkdir(exist_ok=True), Path("a", name).write_bytes(b"half")
    assert len(draw("a", "--npz", num=4)) == 4

def test_the_trajectory_asks_for_what_was_asked(run, monkeypatch):
    """And no gradients are recorded on the way."""
    asked, real = set(), sample.guided
    monkeypatch.setattr(sample, "guided", lambda net, z, t, labels, cfg, interval, *more: asked.add((torch.is_grad_enabled(), *labels.tolist(), cfg, *interval, *more)) or real(net, z, t, labels, cfg, interval, *more))
    assert call(sample, "--run", "r", "--trajectory", "--labels", "dot,ring", "--cfg", 3, "--interval", "0.3,0.7", "--t-eps", 0.02, "--amp", "off") == 0
    assert asked == {(False, 2, 0, 2, 0, 3.0, 0.3, 0.7, to, 0.02) for to in "vx"}

def test_the_record_says_the_precision_that_was_used(run, monkeypatch, capsys):
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: amp or "bf16")
    assert call(sample, "--run", "r", "--num", 3, "--out", "a") == 0 and json.loads(Path("a/samples.json").read_text())["amp"] == "bf16"
    assert call(sample, "--run", "r", "--num", 3, "--out", "a", "--amp", "off") == 1 and "amp bf16, now off" in capsys.readouterr().err

def test_the_network_runs_in_the_precision_asked_for(run):
    seen = []
    run.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for amp, on in (("bf16", True), ("off", False)):
        seen.clear()
        z = sample.Sampler(run, [0], 0, asdict(sample.Settings()) | {"steps": 2}, amp, torch.device("cpu")).images([0])
        assert seen == [on] * 3 and z.dtype == torch.float32

def test_an_interval_of_nothing_is_refused(run, capsys):
    assert call(sample, "--run", "r", "--num", 2, "--interval", "0.5,0.5") == 2 and "the lower first" in capsys.readouterr().err

def test_the_coder_lies_beside_the_data_set(run, monkeypatch):
    state, asked = torch.load("runs/r/checkpoint.pt", weights_only=True), []
    state["info"] |= {"data": "shapes-vae", "coder": {"experiment": "vae", "pixels": "shapes", "pixels_id": "1", "size": 16, "id": "2"}}
    torch.save(state, "runs/r/checkpoint.pt")
    monkeypatch.setattr(model, "load_coder", lambda folder, made_by: asked.append(folder))
    assert call(sample, "--run", "r", "--num", 2, "--steps", 1, "--amp", "off") == 0 and asked == [Path("data/shapes-vae")]
    assert json.loads(Path("runs/r/samples/samples.json").read_text())["coder"] == "2"

@pytest.mark.parametrize("rank", [0, 1])
def test_processes_wait_for_each_other(run, monkeypatch, rank):
    done = []
    for place, name in ((sample.dist, "barrier"), (sample, "check_folder"), (data, "save_json"), (sample, "sample_all"), (data, "class_picture"), (model, "save_picture")):
        monkeypatch.setattr(place, name, lambda *args, name=name: done.append(f"{name} {args[-2:]}" if name == "sample_all" else name) or 0)
    sampler = sample.Sampler(run, [0], 0, {}, "off", torch.device("cpu"))
    record = asdict(sample.Settings()) | {"num": 1, "classes": [], "size": 16}
    sample.write_samples(sample.Options(out=Path("a")), sampler, record, Path("."), rank, 2)
    assert done == (["check_folder", "barrier", "barrier", "sample_all (1, 2)", "barrier"] if rank else
                    ["check_folder", "barrier", "save_json", "barrier", "sample_all (0, 2)", "barrier", "class_picture", "save_picture"])
    assert Path(".a.lock").exists() == (rank == 0)

def test_the_grid_names_its_classes(run, monkeypatch):
    drawn, real = [], data.picture
    monkeypatch.setattr(data, "picture", lambda rows, titles: drawn.append(titles) or real(rows, titles))
    draw("a", num=6)
    assert drawn == [["ring", "star", "dot"]]

def test_the_last_line_says_what_was_made(run, capsys):
    draw("a", "--seed", 5, num=4)
    assert capsys.readouterr().out == "a: 4 images (ring, star, dot), heun 4 steps, shift 1, w 2.0, seed 5: a-grid.png\n"
    draw("a", "--seed", 5, num=4)
    assert capsys.readouterr().out == "a: 4 images (ring, star, dot), heun 4 steps, shift 1, w 2.0, seed 5: a-grid.png (nothing was missing; --overwrite makes all anew)\n"

def test_all_that_the_network_is_given_lies_on_its_device():
    net, seen = torch.nn.Identity(), []
    net.config = model.JiTConfig(**TINY)
    net.forward = lambda z, t, y: seen.append({value.device.type for value in (z, t, y)}) or z
    sampler = sample.Sampler(net, [0], 0, asdict(sample.Settings(steps=1)), "off", torch.device("cpu"))
    sampler.device = torch.device("meta")
    sampler.images([0])
    assert seen == [{"meta"}]

def test_what_the_network_says_is_reckoned_with_in_fp32():
    assert sample.predict(lambda z, t, y: z.bfloat16(), torch.randn(1, 3, 4, 4), 0.5, None, "x").dtype == torch.float32

def test_network_and_coder_move_to_the_device():
    moved, net, coder = [], torch.nn.Identity(), torch.nn.Identity()
    net.config = model.JiTConfig(**TINY)
    for part, name in ((net, "net"), (coder, "coder")):
        part.to = lambda device, part=part, name=name: moved.append((name, device)) or part
    sample.Sampler(net, [0], 0, {}, "off", torch.device("cpu"), coder=coder)
    assert moved == [("net", torch.device("cpu")), ("coder", torch.device("cpu"))]

@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_draws_the_trajectory(run, monkeypatch, rank):
    monkeypatch.setattr(model, "device_and_processes", lambda name: sample.nullcontext((torch.device("cpu"), rank, 2)))
    assert call(sample, "--run", "r", "--trajectory", "--steps", 1, "--amp", "off") == 0 and Path("runs/r/trajectory.png").exists() == (rank == 0)

def test_little_noise_is_shown_as_it_is(there, monkeypatch):
    drawn, real = [], data.picture
    monkeypatch.setattr(data, "picture", lambda rows, *more: drawn.append(rows) or real(rows, *more))
    net = randomised(model.JiTConfig(**{**TINY, "noise_scale": 0.5}))
    sample.draw_trajectory(sample.Sampler(net, [0], 0, asdict(sample.Settings(steps=1)), "off", torch.device("cpu")), there / "t.png")
    assert np.array_equal(drawn[0][0][0], model.to_pictures(sample.noise_for([0], (3, 16, 16), 0, 0.5))[0])

def test_a_wrong_label_is_told_the_names():
    for names, known in ((["ring", "star"], "names are ring, star \\(one with a comma in quotes\\)"), ([], "names are not known")):
        with pytest.raises(data.UsageError, match=f"ids: id:0 to id:1, {known}$"):
            sample.parse_labels("moon", 1, names, 2)

def test_where_and_how_guidance_acts():
    """The interval is open at both ends, whatever rounding makes of a grid point; below zero it steers away from the class."""
    asked = []
    net = lambda z, t, y: asked.append(y.tolist()) or y.float().reshape(-1, 1, 1, 1) * torch.ones_like(z)      # x is the label
    z, y = torch.zeros(1, 1, 2, 2), torch.tensor([3])
    for t, interval, both in ((0.0, (0.0, 0.7), True), (0.5, (0.0, 0.7), True), (0.7, (0.0, 0.7), False), (0.8, (0.0, 0.7), False),
                              (np.nextafter(0.65, 0), (0.0, 0.65), False), (np.nextafter(0.3, 1), (0.3, 0.7), False), (0.0, (0.1, 1.0), False)):
        asked.clear()
        x = sample.guided(net, z, float(t), y, 2.0, interval, "x")
        assert asked == [[3, 1000] if both else [3]] and (x == (2 * 3 - 1000 if both else 3)).all()
    assert (sample.guided(net, z, 0.5, y, -1.0, (0.0, 1.0), "x") == 1000 - (3 - 1000)).all()
    assert (sample.guided(net, z, 0.5, y, 0.25, (0.0, 1.0), "x") == 1000 + 0.25 * (3 - 1000)).all()

@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_sampler_of_a_command_is_made_of(run, monkeypatch, rank):
    class Made(Exception):
        pass

    def made(*args):
        raise Made(*args)
    monkeypatch.setattr(sample, "Sampler", made)
    monkeypatch.setattr(model, "device_and_processes", lambda name: sample.nullcontext((torch.device("cpu"), rank, 2)))
    monkeypatch.setattr(model, "choose_precision", lambda amp, device: "fp16")
    compiled = []
    monkeypatch.setattr(model.JiT, "compile", lambda net: compiled.append(net))
    with pytest.raises(Made) as found:
        sample.main("--run r --num 4 --seed 7 --compile --labels dot,ring --steps 3".split())
    net, *rest = found.value.args
    assert rest == [[2, 0, 2, 0], 7, {"solver": "heun", "steps": 3, "cfg": 2.0, "interval": (0.0, 1.0), "t_eps": 0.05, "shift": 1.0}, "fp16", torch.device("cpu"), None] and compiled == [net]

def test_images_with_a_damaged_byte_are_made_again(run):
    draw("a", num=4)
    whole = {file: file.read_bytes() for file in Path("a").glob("*.png")}
    for part, (file, content) in zip((20, -60, -20, -5), whole.items()):
        file.write_bytes(content[:part] + bytes([content[part] ^ 1]) + content[len(content[:part]) + 1:])
        assert not sample.is_whole(file)
    Path("a/0000001.png").write_bytes(whole[Path("a/0000001.png")][:-12])                          # cut off before its end
    draw("a", num=4)
    assert {file: file.read_bytes() for file in Path("a").glob("*.png")} == whole

def test_a_solver_of_an_experiment(run, capsys):
    """It is known when its file is loaded; the network of one_step knows euler alone.  Refused before anything is written."""
    Path("mine.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom importlib import import_module\n"
                               "import_module('04_sample').SOLVERS['mine'] = ('v', lambda z, t, t_next, velocity, *_: z + (t_next - t) * velocity(z, t))\nSETTINGS = {}")
    try:
        assert call(sample, "--run", "r", "--num", 2, "--amp", "off", "--steps", 3, "--out", "a", "--experiment", "mine.py", "--solver", "mine") == 0
    finally:
        sample.SOLVERS.pop("mine", None)
    assert np.array_equal(pictures("a"), draw("b", "--solver", "euler", "--steps", 3, num=2))
    assert call(sample, "--run", "r", "--num", 2, "--out", "c", "--solver", "mine") == 2 and "--solver 'mine' is unknown: one of heun, euler, ddim, ddpm" in capsys.readouterr().err
    assert not Path("c").exists()
    run.solvers = ("euler",)
    with pytest.raises(data.UsageError, match="--solver 'heun' is unknown: one of euler"):
        sample.settings_of({}, {"sampling": {}}, run)

def test_samples_are_not_given_up_for_numbers_that_are_none(run, capsys):
    before = draw("a", num=4)
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--overwrite", "--cfg", 1e39) == 1 and "not finite" in capsys.readouterr().err
    assert np.array_equal(pictures("a"), before) and draw("a", num=4).any()

def test_info_of_other_types_is_refused_before_anything_is_removed(run, capsys):
    before, path = draw("a", num=4), Path("runs/r/checkpoint.pt")
    for name, value in (("classes", 5), ("classes", [1, 2, 3]), ("sampling", [1]), ("experiments", 5)):
        state = model.read_checkpoint(path)
        torch.save(state | {"info": state["info"] | {name: value}}, "b.pt")
        assert call(sample, "--checkpoint", "b.pt", "--num", 4, "--out", "a", "--labels", 1, "--overwrite") == 1 and "b.pt cannot be used: " in capsys.readouterr().err
    assert np.array_equal(pictures("a"), before)

@pytest.mark.parametrize("num", [2, 10**12, "x"])
def test_samples_are_as_many_as_their_labels(run, num):
    """Whatever a hand writes into the record."""
    draw("a", num=4)
    record = data.load_json(Path("a/samples.json"), labels=list)
    data.save_json(Path("a/samples.json"), record | {"num": num})
    draw("a", "--overwrite", "--seed", 7, "--batch-size", 1, num=4)
    assert np.array_equal(pictures("a"), draw("b", "--seed", 7, "--batch-size", 1, num=4))

def test_a_lock_that_was_left_inside_does_no_harm(run, capsys):
    draw("a", "--npz", num=4)
    assert call(sample, "--run", "r", "--num", 4, "--out", "a/samples.npz") == 1
    draw("a", "--overwrite", num=4)

def test_an_image_beyond_ours_is_not_removed(run):
    """Called as ours are, and beside them."""
    draw("a", num=4)
    shutil.copy("a/0000000.png", "a/0000004.png")         # not ours by the record; as many are asked for, it is replaced
    assert not np.array_equal(draw("a", "--overwrite", "--seed", 7, "--batch-size", 1, num=5)[4], pictures("a")[0]) and np.array_equal(pictures("a"), draw("b", "--seed", 7, "--batch-size", 1, num=5))
    Path("a/0000005.png").write_bytes(b"mine")
    assert call(sample, "--run", "r", "--num", 3, "--amp", "off", "--out", "a", "--overwrite") == 0
    assert sorted(file.name for file in Path("a").glob("*.png")) == [f"000000{i}.png" for i in (0, 1, 2, 5)] and Path("a/0000005.png").read_bytes() == b"mine"

def test_grids_of_names_with_a_dot(run):
    draw("w-1.25", num=3), draw("w-1.5", num=3)
    assert Path("w-1.25-grid.png").exists() and Path("w-1.5-grid.png").exists()

def test_a_batch_is_packed_image_by_image(run, monkeypatch):
    """From a memory map; and what breaks off leaves the batch of before."""
    given, real = [], np.savez
    monkeypatch.setattr(np, "savez", lambda file, **arrays: given.append(type(arrays["arr_0"])) or real(file, **arrays))
    monkeypatch.setattr(data, "save_rows", lambda path, rows, shape, real=data.save_rows: given.append(hasattr(rows, "__len__")) or real(path, rows, shape))
    draw("a", "--npz", num=4)
    assert given == [False, np.memmap]
    before = Path("a/samples.npz").read_bytes()

    def breaks(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(np, "savez", breaks)
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "a", "--npz") == 1 and Path("a/samples.npz").read_bytes() == before

def test_half_a_picture_has_no_name(run, monkeypatch):
    def half(image, path, *more, **how):
        assert how == {"compress_level": 1}               # more takes several times as long
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(Image.Image, "save", half)
    assert call(sample, "--run", "r", "--num", 3, "--amp", "off", "--out", "a") == 1 and not list(Path("a").glob("*.png"))

def test_a_foreign_file_among_our_samples_is_not_touched(run, capsys):
    draw("a", num=3)
    Path("a/.DS_Store").write_text("a Mac's, that has looked at the pictures")
    draw("a", num=3)
    Path("a/notes.md").write_text("mine")
    for flags in ([], ["--overwrite", "--seed", 1]):
        assert call(sample, "--run", "r", "--num", 3, "--amp", "off", "--out", "a", *flags) == 1 and "holds notes.md" in capsys.readouterr().err
    assert Path("a/notes.md").exists() and len(pictures("a")) == 3

def test_a_new_solver_is_known_everywhere(run, capsys, monkeypatch):
    """experiment: a row of SOLVERS."""
    monkeypatch.setitem(sample.SOLVERS, "mine", ("v", sample.euler_step))
    assert np.array_equal(draw("a", "--solver", "mine", num=3), draw("b", "--solver", "euler", num=3))

def test_an_experiments_solver_is_that_of_the_script(run):
    """One copy of 04: a file of yours adds its row to the SOLVERS that the running script looks into."""
    Path("mine.py").write_text("from importlib import import_module\ns = import_module('04_sample')\ns.SOLVERS['mine'] = ('v', s.euler_step)\nSETTINGS = {}\n")
    state = torch.load("runs/r/checkpoint.pt", weights_only=True)
    state["info"]["sampling"]["solver"] = "mine"
    torch.save(state, "runs/r/checkpoint.pt")
    done = shell("04_sample.py", "--run", "r", "--experiment", "./mine.py", "--num", 3, "--amp", "off", cwd=Path("."))
    assert done.returncode == 0 and ", mine 4 steps" in done.stdout, done.stderr

def test_the_trajectory_shows_the_clean_image_as_it_is(there, monkeypatch):
    """At k = 2 the noised row alone is brought into range; the network runs in the precision of the walk."""
    drawn, seen, real = [], [], data.picture
    monkeypatch.setattr(data, "picture", lambda rows, *more: drawn.append(rows) or real(rows, *more))
    net = randomised(model.JiTConfig(**{**TINY, "noise_scale": 2.0}))
    net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    sampler = sample.Sampler(net, [0], 0, asdict(sample.Settings(steps=1)), "bf16", torch.device("cpu"))
    sample.draw_trajectory(sampler, there / "t.png")
    assert seen == [True, True]
    z, y = sample.noise_for(range(4), (3, 16, 16), 0, 2.0), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        x = model.to_pictures(net(z, torch.zeros(4), y))
    assert all(np.abs(drawn[0][2 * i + 1][0].astype(int) - x[i]).max() <= 3 for i in range(4))

def test_the_state_is_fp32_whatever_the_noise_is(run):
    z = sample.generate(run, torch.randn(2, 3, 16, 16).bfloat16(), torch.tensor([0, 1]), steps=2)
    assert z.dtype == torch.float32

def test_a_network_lies_on_the_device(monkeypatch):
    moved, net = [], torch.nn.Identity()
    net.config = model.JiTConfig(**TINY)
    net.to = lambda device: moved.append(device) or net
    assert sample.Sampler(net, [0], 0, {}, "fp16", torch.device("cpu")).autocast.fast_dtype == torch.float16 and moved == [torch.device("cpu")]

def test_a_long_list_of_names_is_cut():
    with pytest.raises(data.UsageError) as error:
        sample.parse_labels("moon", 1, [f"class number {i}" for i in range(1000)], 1000)
    assert "class number 11" in str(error.value) and "class number 12" not in str(error.value)

def test_a_name_with_a_line_break_is_that_name():
    assert sample.parse_labels('"a\nb",x', 3, ["a\nb", "ab", "x"], 3) == [0, 2, 0] and sample.parse_labels("ab\nx\n", 2, ["a\nb", "ab", "x"], 3) == [1, 2]

def test_whole_lines_about_sampling(run, capsys):
    net = randomised(model.JiTConfig(**TINY))
    for solver, steps in (("heun", 0), ("rk4", 3)):
        with pytest.raises(data.UsageError) as error:
            sample.generate(net, torch.zeros(1, 3, 16, 16), torch.tensor([0]), solver=solver, steps=steps)
        assert str(error.value) == f"solver {solver!r}, {steps} steps: give one of heun, euler, ddim, ddpm, and at least 1 step"
    with pytest.raises(data.UsageError) as error:
        sample.parse_labels("ring,moon", 2, ["ring", "star"], 2)
    assert str(error.value) == "--labels: 'moon' is not a class; ids: id:0 to id:1, names are ring, star (one with a comma in quotes)"
    draw("deep/a", "--seed", 5, num=3)
    assert capsys.readouterr().out == "deep/a: 3 images (ring, star, dot), heun 4 steps, shift 1, w 2.0, seed 5: deep/a-grid.png\n"
    assert call(sample, "--run", "r", "--trajectory", "--steps", 1, "--amp", "off") == 0 and capsys.readouterr().out == "look at runs/r/trajectory.png\n"

def test_values_edited_into_a_checkpoint_are_refused(run, capsys):
    """Averages of one's own are not: they are weights, and no settings."""
    path = Path("runs/r/checkpoint.pt")
    model.save(torch.load(path, weights_only=True), path)
    good = path.read_bytes()
    for part, name, value in (("info", "classes", ["ring"]), ("info", "classes", [1, 2, 3]), ("info", "step", torch.tensor(4)), ("info", "data_id", b"x"), ("info", "sampling", {"cfg": 3.0}),
                              ("config", "noise_scale", 2.0), ("config", "network", "mine")):
        path.write_bytes(good)
        state = torch.load(path, weights_only=True)
        state[part][name] = value
        torch.save(state, path)
        assert call(sample, "--run", "r", "--num", 4) == 1 and "checkpoint.pt: its settings or its log were edited since it was written" in capsys.readouterr().err
    assert not Path("runs/r/samples").exists()
    path.write_bytes(good)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"ema": [{name: value * 0.9 for name, value in state["ema"][0].items()}]}, path)
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off") == 0

def test_names_of_a_part_of_the_classes_are_refused(run, capsys):
    """In a file made by hand."""
    state = torch.load("runs/r/checkpoint.pt", weights_only=True)
    state["info"]["classes"] = ["ring"]
    torch.save(state, "runs/r/checkpoint.pt")
    assert call(sample, "--run", "r", "--num", 4) == 1 and "checkpoint.pt cannot be used: it names only a part of its classes" in capsys.readouterr().err
    assert not Path("runs/r/samples").exists()

def test_arrays_beside_the_samples_are_not_ours(run, capsys):
    draw("a", "--npz", num=4)
    assert {path.name for path in Path("a").iterdir()} == {"samples.json", "samples.npz", *(f"000000{i}.png" for i in range(4))}
    np.save("a/arr_0.npy", np.arange(3))
    assert call(sample, "--run", "r", "--num", 4, "--out", "a", "--npz", "--overwrite") == 1 and "a holds arr_0.npy, which this script did not write" in capsys.readouterr().err
    assert np.load("a/arr_0.npy").tolist() == [0, 1, 2]

def test_a_script_that_was_run_in_a_notebook_leaves_a_module_of_its_own(run, monkeypatch):
    """IPython empties the module that %run made: an entry of sys.modules that is it would end the next import of torch's compiler."""
    monkeypatch.setattr(sys, "argv", ["04_sample.py", "--run", "r", "--num", "2", "--steps", "1"])
    monkeypatch.setitem(sys.modules, "04_sample", sample), monkeypatch.setitem(sys.modules, "02_model", model)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "04_sample.py"), run_name="__main__")
    assert done.value.code == 0 and sys.modules["04_sample"].__name__ == "04_sample" and sys.modules["04_sample"] is not sample
