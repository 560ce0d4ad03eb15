"""The width experiment: in a space of 192 channels a network of width 48 can predict clean latents, and cannot predict velocities.

python tests/test_width.py [data/shapes-rae]      four trainings of 600 steps, and the bound; about a minute and three quarters on two cores
The last layer is a linear map from the width to the channels, so all predictions lie in a space of `width` dimensions (and a constant).  Of a target
with covariance S, whatever comes before that layer, at least the eigenvalues of S beyond the width are lost:
    error per channel >= (sum of the eigenvalues of S from the (width+1)-th on) / channels          S = Cov(x) for x, Cov(x) + I for v = x - e
Cov(x) of data falls off quickly; the noise in v has no direction that could be left out.
"""
import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import call, data, model, train

CELLS = {  # name: flags on top of the preset shapes-rae
    "48 wide, v-prediction": ["--pred", "v"],
    "48 wide, x-prediction": ["--pred", "x"],
    "48 wide, head of 2 blocks 224 wide, v-prediction": ["--pred", "v", "--head-depth", 2, "--head-width", 224],
    "224 wide, v-prediction": ["--pred", "v", "--hidden-size", 224, "--num-heads", 14, "--depth", 3],
}
NARROW = ["--hidden-size", 48, "--num-heads", 3, "--lr", 3e-3, "--steps", 600, "--ema", 0.99, "--preview-every", 0, "--snapshots", 0]

def bound(latents, width, noise):
    """What a prediction from `width` dimensions loses of x (noise 0) or of v = x - e (noise 1), per channel.  latents: (N,h,w,C)."""
    tokens = np.asarray(latents, dtype=np.float64).reshape(-1, latents.shape[-1])
    values = np.linalg.eigvalsh(np.cov(tokens.T) + noise * np.eye(tokens.shape[1]))
    return values[:-width].sum() / tokens.shape[1]

def weight_of_x():
    """Mean of 1 / max(1-t, 0.05)^2 over the times of 03_train.held_out_loss: what an error of x counts in v-space."""
    times = torch.sigmoid(torch.special.ndtri((torch.arange(256) + 0.5) / 256) * 0.8 - 0.8)
    return model.conversion("x", "v", times)[0].square().mean().item()

def held_out(name, place, steps=()):
    """Train one cell of the table; the held-out loss in v-space of its averaged weights."""
    run = Path("runs") / ("width " + name).replace(" ", "-").replace(",", "")
    assert call(train, "--preset", "shapes-rae", "--data", place, "--run", run.name, *NARROW, *CELLS[name], *steps) == 0
    return float(list(csv.DictReader(open(run / "log.csv")))[-1]["held_out"])

def test_no_prediction_beats_the_bound():
    """The best rank-2 prediction of correlated data, given everything, loses exactly the bound."""
    x = np.random.default_rng(0).standard_normal((4000, 5)) @ np.diag([3, 2, 1, 0.5, 0.1]) @ np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    centred = x - x.mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    lost = ((centred - u[:, :2] * s[:2] @ v[:2])**2).sum() / (len(x) - 1) / 5
    assert abs(bound(x.reshape(1000, 2, 2, 5), 2, 0) - lost) < 1e-9
    assert abs(bound(x.reshape(1000, 2, 2, 5), 2, 1) - lost - 3 / 5) < 1e-9

def main(place):
    images = data.open_data(place)[1]["train"][0][:5000]
    for pred, noise, weight in (("v", 1, 1.0), ("x", 0, weight_of_x())):
        print(f"bound on the held-out v-loss, {pred} predicted from 48 dimensions: {weight * bound(images, 48, noise):.3f}", flush=True)
    for name in CELLS:
        print(f"{name}: held-out v-loss {held_out(name, place):.3f}", flush=True)

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/shapes-rae")
