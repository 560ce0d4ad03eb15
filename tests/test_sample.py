"""Sampling as a user sees it: the same pictures whatever the batches, processes, order or interruption; nothing overwritten."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, TINY_FLAGS, call, evaluate, model, randomised, sample, train
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


def test_same_images_for_any_batch_size(run):
    base = draw("a", "--batch-size", 64)
    for size in (1, 7):
        other = draw(f"b{size}", "--batch-size", size)
        assert np.abs(base - other).max() <= 1 and (base != other).mean() <= 1e-3
    assert np.array_equal(base, draw("c", "--batch-size", 64))


def test_noise_and_labels_are_a_function_of_seed_and_index():
    a = sample.noise_for(range(10), (3, 4, 4), 7, 2.0)
    assert torch.equal(a[4:6], sample.noise_for([4, 5], (3, 4, 4), 7, 2.0)) and torch.equal(a[[9, 2]], sample.noise_for([9, 2], (3, 4, 4), 7, 2.0))
    assert not torch.equal(a, sample.noise_for(range(10), (3, 4, 4), 8, 2.0)) and len({row.sum().item() for row in a}) == 10
    assert abs(sample.noise_for(range(50), (3, 16, 16), 0, 2.0).std() - 2) < 0.02
    assert not torch.equal(a, sample.noise_for(range(10), (3, 4, 4), 7, 2.0, step=0))


def test_a_killed_run_goes_on(run, monkeypatch):
    whole = draw("whole", "--batch-size", 10)
    real, count = sample.draw_batch, []

    def dies(*args, **kwargs):
        count.append(1)
        if len(count) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(sample, "draw_batch", dies)
    assert call(sample, "--run", "r", "--num", 64, "--amp", "off", "--out", "half", "--batch-size", 10) == 1
    assert len(list(Path("half").glob("0*.png"))) == 30
    Path("half/000003.png").unlink()                      # a hole, in any order
    monkeypatch.setattr(sample, "draw_batch", real)
    assert np.array_equal(draw("half", "--batch-size", 10), whole)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler"])
def test_every_solver_is_reproducible(run, solver):
    assert np.abs(draw("a", "--solver", solver, "--batch-size", 64) - draw("b", "--solver", solver, "--batch-size", 10)).max() <= 1


def test_two_ranks_make_the_images_of_one(run, monkeypatch):
    """Each rank takes its share of the batches; what they leave is the same folder."""
    whole = draw("whole", "--batch-size", 7)
    for rank, share in ((1, 4 * 7 + 1), (0, 5 * 7)):                   # ten batches, the last of one image
        net, info = model.load_network("runs/r/checkpoint.pt")
        args = sample.parse_args(["--run", "r", "--num", "64", "--batch-size", "7"])
        s = sample.settle(args, info, net.config)
        Path("parts").mkdir(exist_ok=True)
        made = sample.sample_all(net, net, [i % 3 for i in range(64)], Path("parts"), s, args, torch.device("cpu"), torch.autocast("cpu", enabled=False), rank, 2)
        assert made == share
    assert np.array_equal(pictures("parts"), whole)


def test_output_forms(run):
    assert call(sample, "--run", "r", "--num", 9, "--amp", "off", "--npz") == 0
    batch = np.load("runs/r/samples/samples.npz", allow_pickle=False)
    assert batch["arr_0"].dtype == np.uint8 and batch["arr_0"].shape == (9, 16, 16, 3) and batch["arr_1"].tolist() == [0, 1, 2] * 3
    assert np.array_equal(batch["arr_0"], pictures("runs/r/samples"))
    record = json.loads(Path("runs/r/samples/samples.json").read_text())
    assert record["cfg"] == 2.0 and record["steps"] == 4 and record["step"] == 10 and Image.open("runs/r/grid.png").width == 3 * 64


def test_samples_are_neither_overwritten_nor_ignored(run, capsys):
    draw("out", num=4)
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out") == 0 and "0 new" in capsys.readouterr().out
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out", "--cfg", 3) == 1
    assert "cfg: 2.0, now 3.0" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 4, "--amp", "off", "--out", "out", "--cfg", 3, "--overwrite") == 0
    Path("mine").mkdir()
    Image.new("RGB", (9, 9)).save("mine/holiday.png")
    assert call(sample, "--run", "r", "--num", 4, "--out", "mine", "--overwrite") == 1 and "did not write" in capsys.readouterr().err
    assert call(sample, "--run", "r", "--num", 4, "--out", "mine/holiday.png") == 1 and "did not write" in capsys.readouterr().err


def test_official_checkpoint_is_sampled(there, monkeypatch):
    monkeypatch.setitem(model.MODELS, "JiT-tiny", TINY)
    net = randomised(model.JiTConfig(**TINY))
    official(there / "official.pth", net)
    assert call(sample, "--checkpoint", "official.pth", "--num", 5, "--steps", 3, "--labels", "2x5", "--cfg", 2.9, "--interval", "0.1,1", "--amp", "off") == 0
    noise = sample.noise_for(range(5), (3, 16, 16), 0, 1.0)
    expected = sample.generate(net, noise, torch.full((5,), 2), steps=3, cfg=2.9, interval=(0.1, 1.0))
    assert np.array_equal(pictures("samples"), model.to_uint8(expected).permute(0, 2, 3, 1).numpy())
    assert call(sample, "--checkpoint", "official.pth", "--num", 5, "--steps", 3, "--ema", 1, "--out", "other", "--amp", "off") == 0


def test_labels_grammar():
    names = ["ring", "star", "4x4"]
    assert sample.parse_labels("all", 5, names, 3) == [0, 1, 2, 0, 1]
    assert sample.parse_labels("star", 3, names, 3) == [1, 1, 1] and sample.parse_labels("2,ring", 4, names, 3) == [2, 0, 2, 0]
    assert sample.parse_labels("1x2,ring", None, names, 3) == [1, 1, 0] and sample.parse_labels("4x4", 1, names, 3) == [2]
    assert sample.parse_labels("207x16", None, [], 1000) == [207] * 16 and len(sample.parse_labels("all", None, [], 1000)) == 1000
    for wrong in ("moon", "3", "-1", "", "x3"):
        with pytest.raises(ValueError, match="is no class"):
            sample.parse_labels(wrong, None, names, 3)


def test_pictures_of_the_process(work, capsys):
    assert call(train, *TINY_FLAGS, "--steps", 6, "--snapshots", 3, "--run", "p") == 0
    assert call(sample, "--run", "p", "--steps", 12, "--trajectory", "--labels", "star,3") == 0 and call(sample, "--run", "p", "--steps", 2, "--evolution") == 0
    for name in ("trajectory", "evolution"):
        assert Image.open(f"runs/p/{name}.png").width > 100 and Image.open(f"runs/p/{name}.gif").n_frames > 2
    assert call(sample, "--run", "p", "--evolution", "--ema", -1) == 1 and "averaged weights only" in capsys.readouterr().err


def test_benchmark_speaks(run, capsys):
    assert call(sample, "--run", "r", "--benchmark", "--batch-size", 4, "--steps", 5, "--amp", "off") == 0
    out = capsys.readouterr().out
    assert "9 network evaluations" not in out and "18 network evaluations per image" in out and "images/s" in out and "two separate passes" in out


@pytest.mark.parametrize("flags,words,code", [
    (["--steps", -1], "above 0", 2), (["--interval", "0.5"], "two times", 2), (["--interval", "0.9,0.1"], "two times", 2), (["--solver", "rk4"], "choice", 2), (["--labels", "moon"], "is no class", 2),
    (["--ema", 3], "sets of weights", 1), (["--run", "nope"], "train one first", 1), (["--checkpoint", "x.pth"], "no checkpoint at x.pth", 1), (["--seed", -1], "from 0 on", 2),
    (["--evolution"], "no snapshots", 1), (["--device", "gpu"], "give cuda or cpu", 2), (["--labels", "3x0"], "a count of 0", 2), (["--num", 0], "above 0", 2)])
def test_wrong_requests(run, capsys, flags, words, code):
    assert call(sample, *(["--run", "r"] if "--run" not in flags else []), *flags) == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not Path("runs/r/samples").exists()


def test_guidance_without_classes_is_refused(there, capsys):
    config = {**TINY, "num_classes": 0}
    torch.save({"config": config, "info": {}, "ema": [randomised(model.JiTConfig(**config)).state_dict()]}, "u.pt")
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--cfg", 2) == 2 and "nothing to guide" in capsys.readouterr().err
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2, "--labels", "1") == 2 and "without classes" in capsys.readouterr().err
    assert call(sample, "--checkpoint", "u.pt", "--num", 2, "--steps", 2) == 0


def test_an_unconditional_run_has_no_class_accuracy(work):
    """The data set has classes, the network has not: its images are of none of them."""
    assert call(train, *TINY_FLAGS, "--steps", 2, "--unconditional") == 0 and call(sample, "--num", 20, "--steps", 2, "--amp", "off") == 0
    assert json.loads(Path("runs/shapes/samples/samples.json").read_text())["classes"] == []
    assert call(evaluate) == 0 and "class_accuracy" not in json.loads(Path("runs/shapes/metrics.json").read_text())
