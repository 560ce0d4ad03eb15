"""The manifold experiment (JiT section 3.3, figure 2): a 2-D spiral put into D dimensions by a fixed matrix.

x-, e- and v-prediction by the same plain MLP, with the loss on v, and one sampler.  Noise and velocity fill all D
dimensions, the data two of them: a network of 256 units can predict x at D = 512, and cannot predict e or v.

A second part bends the plane: x = W sin(F s + b), F, b and W random and fixed, s on the spiral.  Improved JiT (section
4.3.1) says that a linear patch embedding W2 W1 z cannot unroll a curved manifold, and that W2 SiLU(W1 z) can.  Both are
put in front of the same MLP, with x-prediction and the same random numbers.

python tests/experiments/manifold.py [FILE.png]      the figure, 66 s on two cores; the bent plane, 164 s on one
"""
import sys
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model, train, sample = (import_module(name) for name in ("02_model", "03_train", "04_sample"))

DIMENSIONS, STEPS = (2, 8, 16, 512), 1200
WIDTHS, SEEDS = (8, 64), 3                                # of the bottleneck in 512 dimensions
OPTIONS = train.Options(p_mean=0.0, p_std=1.0, shift=1.0)

def spiral(n, generator=None):
    """n points (n,2) on one and a half turns of a spiral."""
    angle = 1.5 * np.pi * (1 + 2 * torch.rand(n, 1, generator=generator))
    return torch.cat([angle * torch.cos(angle), angle * torch.sin(angle)], dim=1) / 8

def bend(dimension, units=64):
    """A random map of the plane into D dimensions that is curved, and keeps the spiral's variance, about."""
    frequencies, phases = 2 * torch.randn(2, units), 2 * np.pi * torch.rand(units)
    basis = torch.linalg.qr(torch.randn(dimension, units))[0]                  # D x units, orthonormal columns

    def place(points):                                                         # n 2
        waves = torch.sin(points @ frequencies + phases)                       # n units
        return 2 * waves / units**0.5 @ basis.T                                # n D
    return place

class MLP(nn.Module):
    """Five ReLU layers of 256 units on (z, t); as the paper's toy.  embed: what z goes through first, to `width`."""

    def __init__(self, dimension, pred, embed=None, width=None):
        super().__init__()
        widths, layers = [(width or dimension) + 1] + [256] * 5, []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(256, dimension))
        self.embed = embed or nn.Identity()
        self.config = types.SimpleNamespace(pred=pred, path="linear", noise_scale=1.0, num_classes=0)

    def forward(self, z, t, y):
        return self.layers(torch.cat([self.embed(z), t[:, None]], dim=1))

def experiment(dimension, pred, steps=STEPS, batch=256, seed=0):
    """Train one network and sample 1000 points: (their 2-D coordinates, their distance from the curve)."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, 2))[0]                      # D x 2, orthonormal columns
    points, distance = fit(MLP(dimension, pred), dimension, lambda points: points @ basis.T, steps, batch)
    return points @ basis, distance

def bent_experiment(act, width, dimension=512, steps=STEPS, batch=256, seed=0):
    """The same on the bent plane, with act in a bottleneck as in PatchEmbed: the distance in D dimensions."""
    torch.manual_seed(seed)
    place = bend(dimension)
    embed = nn.Sequential(nn.Linear(dimension, width, bias=False), act, nn.Linear(width, 256))
    return fit(MLP(dimension, "x", embed, 256), dimension, place, steps, batch)[1]

def fit(net, dimension, place, steps, batch):
    """Train a network on place(points of the spiral) and sample 1000 points: (those (n,D), distance from the curve)."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        x = place(spiral(batch))
        e, t = torch.randn_like(x), train.sample_times(batch, OPTIONS, "cpu")
        out = net(model.mix(x, e, t), t, None)
        loss = train.grid_loss(out, {"x": x, "e": e, "t": t}, net.config, "v").mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = sample.generate(net, torch.randn(1000, dimension), torch.zeros(1000).long(), steps=50, t_eps=0.02)
    return points, gap(points, place(spiral(4000, torch.Generator().manual_seed(1))))

def gap(points, curve):
    """Mean distance to the nearest point of the other set, the larger of both directions.

    One way: samples off the curve; the other: parts of the curve without samples.
    """
    distances = torch.cdist(points, curve)
    return max(distances.min(dim=0).values.mean().item(), distances.min(dim=1).values.mean().item())

def main(path="manifold.png", dimensions=DIMENSIONS, steps=STEPS):
    """Draw ground truth and the three predictions over the dimensions."""
    cell, columns = 150, ("data", "x", "e", "v")
    sheet = Image.new("RGB", (cell * 4 + 50, cell * len(dimensions) + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(columns):
        draw.text((50 + c * cell + 50, 2), title if title == "data" else f"{title}-prediction", fill="black")
    for r, dimension in enumerate(dimensions):
        top = 16 + r * cell
        draw.text((5, top + 70), f"D={dimension}", fill="black")
        for c, pred in enumerate(columns):
            left = 50 + c * cell
            points, distance = (spiral(1000), 0.0) if pred == "data" else experiment(dimension, pred, steps)
            for x, y in points.clamp(-2.4, 2.4).tolist():
                px, py = left + cell / 2 + x * 30, top + cell / 2 + y * 30
                draw.ellipse((px - 1, py - 1, px + 1, py + 1), fill="black" if pred == "data" else "navy")
            draw.rectangle((left, top, left + cell, top + cell), outline="lightgray")
            if pred != "data":
                draw.text((left + 4, top + cell - 14), f"distance {distance:.2f}", fill="gray")
                print(f"D = {dimension:3d}, {pred}-prediction: mean distance to the curve {distance:.3f}", flush=True)
    sheet.save(path)

def compare_embeddings(widths=WIDTHS, seeds=SEEDS, **more):
    """Print a line for each bottleneck and embedding: the distances of all seeds."""
    for width in widths:
        for name, act in (("linear", nn.Identity()), ("SiLU", nn.SiLU())):
            found = [bent_experiment(act, width, seed=seed, **more) for seed in range(seeds)]
            numbers = ", ".join(f"{distance:.3f}" for distance in found)
            print(f"bent plane, bottleneck {width}, {name} embedding: distance to the curve {numbers}", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
    compare_embeddings()
