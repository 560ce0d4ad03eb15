"""The manifold experiment (JiT section 3.3, figure 2): a 2-D spiral put into D dimensions, x-, e- and v-prediction, one loss, one sampler.

python tests/test_manifold.py [FILE.png]      trains the twelve networks and draws the figure; about a minute and a quarter on two cores
The network is a plain MLP; path, loss, conversion and sampler are the functions that the images use.
"""
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import model, sample, train

DIMENSIONS, STEPS = (2, 8, 16, 512), 1200
OPTIONS = train.Options(p_mean=0.0, p_std=1.0, shift=1.0)

def spiral(n, generator=None):
    """n points (n,2) on one and a half turns of a spiral."""
    angle = 1.5 * np.pi * (1 + 2 * torch.rand(n, 1, generator=generator))
    return torch.cat([angle * torch.cos(angle), angle * torch.sin(angle)], dim=1) / 8

class MLP(nn.Module):
    """Five ReLU layers of 256 units on (z, t); as the paper's toy."""

    def __init__(self, dimension, pred):
        super().__init__()
        widths = [dimension + 1] + [256] * 5
        self.layers = nn.Sequential(*(part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.ReLU())), nn.Linear(256, dimension))
        self.config = types.SimpleNamespace(pred=pred, path="linear", noise_scale=1.0, num_classes=0)

    def forward(self, z, t, y):
        return self.layers(torch.cat([z, t[:, None]], dim=1))

def experiment(dimension, pred, steps=STEPS, batch=256, seed=0):
    """Train one network and sample 1000 points: (their 2-D coordinates, mean distance to the curve in D dimensions, the larger of both directions)."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, 2))[0]                               # D x 2, orthonormal columns
    net = MLP(dimension, pred)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        x = spiral(batch) @ basis.T
        e, t = torch.randn_like(x), train.sample_times(batch, OPTIONS, "cpu")
        out = net(model.mix("linear", x, e, t), t, None)
        loss = train.diffusion_loss(out, {"x": x, "e": e, "t": t}, net.config, "v")[0].mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = sample.generate(net, torch.randn(1000, dimension), torch.zeros(1000).long(), steps=50, t_eps=0.02)
    curve = spiral(4000, torch.Generator().manual_seed(1)) @ basis.T
    gaps = torch.cdist(points, curve)                     # both ways: samples off the curve, and parts of the curve without samples
    return points @ basis, max(gaps.min(dim=0).values.mean().item(), gaps.min(dim=1).values.mean().item())

def test_only_x_prediction_survives_512_dimensions():
    """The spiral is about 3 wide and its turns 0.8 apart; a quarter of that gap still shows the curve."""
    distance = {pred: experiment(512, pred, steps=700)[1] for pred in ("x", "e", "v")}
    assert distance["x"] < 0.25, distance
    assert distance["e"] > 3 * distance["x"] and distance["v"] > 3 * distance["x"], distance

def main(path):
    """Draw ground truth and the three predictions over the four dimensions."""
    from PIL import Image, ImageDraw
    cell, columns = 150, ("data", "x", "e", "v")
    sheet = Image.new("RGB", (cell * 4 + 50, cell * len(DIMENSIONS) + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(columns):
        draw.text((50 + c * cell + 50, 2), title if title == "data" else f"{title}-prediction", fill="black")
    for r, dimension in enumerate(DIMENSIONS):
        draw.text((5, 16 + r * cell + 70), f"D={dimension}", fill="black")
        for c, pred in enumerate(columns):
            points, distance = (spiral(1000), 0.0) if pred == "data" else experiment(dimension, pred)
            for x, y in points.clamp(-2.4, 2.4).tolist():
                px, py = 50 + c * cell + cell / 2 + x * 30, 16 + r * cell + cell / 2 + y * 30
                draw.ellipse((px - 1, py - 1, px + 1, py + 1), fill="black" if pred == "data" else "navy")
            draw.rectangle((50 + c * cell, 16 + r * cell, 50 + (c + 1) * cell, 16 + (r + 1) * cell), outline="lightgray")
            if pred != "data":
                draw.text((50 + c * cell + 4, 16 + (r + 1) * cell - 14), f"distance {distance:.2f}", fill="gray")
                print(f"D = {dimension:3d}, {pred}-prediction: mean distance to the curve {distance:.3f}", flush=True)
    sheet.save(path)

if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1] if len(sys.argv) > 1 else "manifold.png")
