"""Shared by all tests: the five scripts as modules, a tiny configuration, tiny data sets, and a way to run a script."""
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                  # tiny tensors: threads only wait for each other
torch.cuda.is_available()                                 # asked before `exact` hides the GPU: a process is told once what it has
data, model, train, sample, evaluate = (import_module(name) for name in ("01_data", "02_model", "03_train", "04_sample", "05_eval"))

TINY = dict(image_size=16, patch_size=4, hidden_size=32, depth=4, num_heads=2, num_classes=3, bottleneck_dim=8, in_context_len=2,
            in_context_start=1)
TINY_FLAGS = ["--model", "JiT-T/8", "--patch-size", "8", "--hidden-size", "32", "--depth", "3", "--num-heads", "2", "--batch-size", "8", "--lr", "1e-3",
              "--preview-every", "0", "--snapshots", "0", "--log-every", "5", "--amp", "off", "--no-compile"]

def randomised(config, scale=0.1, seed=0):
    """A network whose gates and head are not zero, so that everything in it reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    net = model.JiT(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return net

def call(script, *args):
    """Run a script's main in this process, as the command line would.  Returns the exit code."""
    return data.run(lambda: script.main([str(a) for a in args]))

def shell(*args, cwd, env=None, timeout=300):
    """Run a script as a user does; one thread, so that tests do not fight over the cores."""
    return subprocess.run([sys.executable, ROOT / args[0], *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})

def pytest_configure(config):
    config.addinivalue_line("markers", "card: runs on a GPU where there is one")

@pytest.fixture(autouse=True)
def exact(request, monkeypatch):
    """Most tests compare numbers that only a CPU repeats exactly, so they see no GPU; those marked `card` run as the scripts would."""
    if "card" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A function that an assignment has emptied says so in one line."""
    try:
        return (yield)
    except NotImplementedError as error:
        if not str(error).startswith("exercise "):
            raise
        empty = str(error)
    pytest.fail(empty, pytrace=False)

def said(function, *args, **more):
    """What a call that is refused says."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*args, **more)
    return str(error.value)

@pytest.fixture
def bars(monkeypatch):
    """(images or steps done, total) of each bar that was closed; tqdm may close one twice."""
    closed = []

    class Bar(data.Progress):
        def close(self):
            closed.append((self.n, self.total))
            super().close()
    monkeypatch.setattr(data, "Progress", Bar)
    return closed

@pytest.fixture
def there(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A folder holding data/shapes: 200 shapes of 16 pixels."""
    folder = tmp_path_factory.mktemp("packed")
    old = os.getcwd()
    os.chdir(folder)
    assert call(data, "--size", 16, "--count", 200, "--workers", 1) == 0
    os.chdir(old)
    return folder

@pytest.fixture
def work(packed, tmp_path, monkeypatch):
    """An empty folder with data/shapes in it."""
    (tmp_path / "data").symlink_to(packed / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path

def images_of(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
