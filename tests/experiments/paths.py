"""Other ways from noise to data: SiT's cosine path, and DDPM's two.

A path mixes image and noise, z = alpha(t) x + sigma(t) e, and its velocity is v = alpha' x + sigma' e.  These are two
linear equations in x and e, so any two of x, e, v and z give the others:

    z = alpha  x + sigma  e          x = (sigma' z - sigma  v) / det
    v = alpha' x + sigma' e          e = (alpha  v - alpha' z) / det       det = alpha sigma' - sigma alpha'

The linear path is alpha = t, sigma = 1 - t, det = -1.  DDPM's paths keep the variance, sigma^2 = 1 - alpha^2.

departure: sigma' of DDPM's paths is infinite at t = 1, where sigma = 0; within 1e-4 of it we hold sigma at 1e-4 in that
one denominator.  Samplers never evaluate there, and no time of training comes so near but by a rare chance.

python tests/experiments/paths.py       the four paths compared, 600 steps each: about four minutes on two cores
03_train.py --experiment paths --path cosine | ddpm-linear | ddpm-cosine      (registers PATHS)
"""
import math
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")

class GeneralPath:
    """The functions of 02_model.py's linear path, for any coefficients(t) -> (alpha, sigma, alpha', sigma') in fp64."""

    def __init__(self, coefficients):
        self.coefficients = coefficients

    def at(self, t, like):
        return [model.expand(c.float(), like) for c in self.coefficients(t.double())]

    def mix(self, x, e, t):
        alpha, sigma, _, _ = self.at(t, x)
        return alpha * x + sigma * e

    def velocity_target(self, x, e, t):
        _, _, d_alpha, d_sigma = self.at(t, x)
        return d_alpha * x + d_sigma * e

    def scales(self, t):
        """alpha and sigma at one time, floats."""
        alpha, sigma, _, _ = self.coefficients(torch.tensor(t, dtype=torch.float64))
        return alpha.item(), sigma.item()

    def conversion(self, kind, to, t, t_eps=model.T_EPS):
        """(u, b) with to = u * value + b * z.  Denominators alpha and sigma, which vanish at an end, are clamped."""
        alpha, sigma, d_alpha, d_sigma = (c.float() for c in self.coefficients(t.double()))
        det = alpha * d_sigma - sigma * d_alpha
        noise, image = sigma.clamp_min(t_eps), alpha.clamp_min(t_eps)
        formulas = {
            ("x", "v"): (-det / noise, d_sigma / noise),
            ("x", "e"): (-alpha / noise, 1 / noise),
            ("v", "x"): (-sigma / det, d_sigma / det),
            ("v", "e"): (alpha / det, -d_alpha / det),
            ("e", "x"): (-sigma / image, 1 / image),
            ("e", "v"): (det / image, d_alpha / image),
        }
        return formulas.get((kind, to), (torch.ones_like(t), torch.zeros_like(t)))

# ---- Their coefficients ----------------------------------------------------------------------------------------------
def cosine(t):
    """SiT's "GVP": a quarter of a circle."""
    alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    return alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha

def keep_variance(alpha, d_alpha):
    """sigma = sqrt(1 - alpha^2), and so sigma' = -alpha alpha' / sigma."""
    sigma = (1 - alpha**2).clamp_min(0).sqrt()
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp_min(1e-4)

def ddpm_linear(t):
    """The continuous form of DDPM's linear betas, from 0.1 to 20 (Song et al. 2021, eq. 33)."""
    n = 1 - t                                             # the papers' time: 0 is data
    alpha = torch.exp(-n**2 * (20 - 0.1) / 4 - n * 0.1 / 2)
    return keep_variance(alpha, alpha * (n * (20 - 0.1) / 2 + 0.1 / 2))

def ddpm_cosine(t):
    """Nichol & Dhariwal 2021, eq. 17."""
    angle, last = (1 - t + 0.008) / 1.008 * math.pi / 2, 0.008 / 1.008 * math.pi / 2
    d_alpha = torch.sin(angle) / math.cos(last) * math.pi / 2 / 1.008
    return keep_variance(torch.cos(angle) / math.cos(last), d_alpha)

model.PATHS |= {"cosine": GeneralPath(cosine), "ddpm-linear": GeneralPath(ddpm_linear),
                "ddpm-cosine": GeneralPath(ddpm_cosine)}
SETTINGS = {"path": "cosine"}

def main(*flags):
    rows = {"linear": []} | {name: ["--experiment", "paths", "--path", name] for name in list(model.PATHS)[1:]}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
