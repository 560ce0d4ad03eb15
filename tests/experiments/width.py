"""The width experiment: with 192 channels, a network 48 wide can predict clean latents, and cannot predict velocities.

The last layer of a network is a linear map from its width to the channels, so all its predictions lie in a space of
`width` dimensions (and a constant).  Of a target with covariance S, whatever comes before that layer, at least the
eigenvalues of S beyond the width are lost:

    error per channel  >=  (sum of the eigenvalues of S from the (width+1)-th on) / channels

For x, S = Cov(x), whose eigenvalues fall off quickly.  For v = x - e, S = Cov(x) + I: the noise has no direction that
could be left out: with a single image Cov(x) = 0, and the bound for v is still 1 - width / channels = 0.75, which is why
RAE finds that a narrow DiT "cannot even overfit one sample".  A wide head (ddt.py) is the other way out.

python tests/experiments/rae.py && python tests/experiments/width.py [data/shapes-rae]      four trainings: 110 s
"""
import csv
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model, train = (import_module(name) for name in ("01_data", "02_model", "03_train"))

CELLS = {  # name: flags on top of --experiment rae
    "48 wide, v-prediction": ["--pred", "v"],
    "48 wide, x-prediction": ["--pred", "x"],
    "48 wide, head of 2 blocks 224 wide, v-prediction": ["--pred", "v", "--experiment", "rae,ddt", "--head-width", 224],
    "224 wide, v-prediction": ["--pred", "v", "--hidden-size", 224, "--num-heads", 14, "--depth", 3],
}
NARROW = ["--experiment", "rae", "--hidden-size", 48, "--num-heads", 3, "--lr", 3e-3, "--steps", 600, "--ema", 0.99,
          "--preview-every", 0, "--snapshots", 0]

def bound(latents, width, noise):
    """What a prediction from `width` dimensions loses of x (noise 0) or of v = x - e (noise 1), per channel.

    latents: (N,h,w,C).
    """
    tokens = np.asarray(latents, dtype=np.float64).reshape(-1, latents.shape[-1])
    values = np.linalg.eigvalsh(np.cov(tokens.T) + noise * np.eye(tokens.shape[1]))
    return values[:-width].sum() / tokens.shape[1]

def weight_of_x():
    """Mean of 1 / max(1-t, 0.05)^2 over the times of 03_train.held_out_loss: what an error of x counts in v-space."""
    times = torch.sigmoid(torch.special.ndtri((torch.arange(256) + 0.5) / 256) * 0.8 - 0.8)
    return model.conversion("x", "v", times)[0].square().mean().item()

def held_out(name, place, *more):
    """Train one cell of the table; the held-out loss in v-space of its averaged weights."""
    run = "width-" + name.replace(" ", "-").replace(",", "")
    model.load_experiment("_compare").call(train, *NARROW, "--data", place, "--run", run, *CELLS[name], *more)
    return float(list(csv.DictReader(open(f"runs/{run}/log.csv")))[-1]["held_out"])

def main(place="data/shapes-rae", *more):
    images = data.open_data(place)[1]["train"][0][:5000]
    for pred, noise, weight in (("v", 1, 1.0), ("x", 0, weight_of_x())):
        lost = weight * bound(images, 48, noise)
        print(f"bound on the held-out v-loss, {pred} predicted from 48 dimensions: {lost:.3f}", flush=True)
    for name in CELLS:
        print(f"{name}: held-out v-loss {held_out(name, place, *more):.3f}", flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
