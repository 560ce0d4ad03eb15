"""Differential attention (Ye et al. 2024, eq. 1-3): what both attention maps of a pair look at cancels.

    (softmax(q1 k1 / sqrt(d)) - lambda softmax(q2 k2 / sqrt(d))) v,    lambda = exp(a1.b1) - exp(a2.b2) + lambda0

A pair of heads has values twice as wide and one output; each layer has one lambda, learned through four vectors, that
begins at lambda0 = 0.8 - 0.6 exp(-0.3 layer).  An RMSNorm per pair and the factor 1 - lambda0 keep the scale.  All
other parameters are those of attention with twice as many, half as wide heads: so compare it with those.

python tests/experiments/differential.py      against three and six plain heads, 600 steps: three minutes on two cores
03_train.py --experiment differential         (registers MIXERS differential)
"""
import math
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")

class DifferentialAttention(model.Attention):
    def __init__(self, config, layer):
        data.refuse(config.num_heads % 2, f"{config.num_heads} heads: differential attention needs pairs")
        super().__init__(config, layer)
        d = self.head_dim
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas = nn.Parameter(torch.randn(4, d) * 0.1)
        self.out_norm = model.RMSNorm(2 * d)

    def forward(self, x, rope=None):                                                               # B L D
        q, k, v = self.split(x, rope)                                                              # B h L d, each
        v = torch.cat([v[:, ::2], v[:, 1::2]], dim=-1).repeat_interleave(2, dim=1)                 # B h L 2d
        first, second = model.attend(q, k, v).unflatten(1, (-1, 2)).unbind(2)                      # B h/2 L 2d
        a1, b1, a2, b2 = self.lambdas
        weight = (a1 @ b1).exp() - (a2 @ b2).exp() + self.start
        out = self.out_norm(first - weight * second) * (1 - self.start)
        return self.proj(out.transpose(1, 2).flatten(2))                                           # B L D

model.MIXERS["differential"] = DifferentialAttention
SETTINGS = {"mixer": "differential", "num_heads": 6}      # an even number; the shapes' network has three

def main(*flags):
    rows = {"three heads": [], "six heads": ["--num-heads", 6], "differential": ["--experiment", "differential"]}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
