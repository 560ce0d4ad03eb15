"""TD-norm (DiMR, section 3.3): an RMSNorm whose weight moves with time.

    weight(t) = s p0 + (1 - s) p1,    s = sigmoid(a t + b),    p0, p1 per channel, a and b two numbers

adaLN computes 6 D signals per block from (t, y) with a D x 6D matrix; this norm follows the time with 2 D + 2 numbers.

departure: DiMR's is a LayerNorm that moves its shift too (in its released blocks an RMSNorm without one, a and b per
channel), in place of adaLN; here adaLN stays beside it.

python tests/experiments/td_norm.py       against the plain norm, 600 steps: two minutes on two cores
03_train.py --experiment td_norm          (registers NORMS td, NETWORKS td_norm)
"""
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")

class TimeNorm(model.RMSNorm):
    """t (B,) is set by the network before each pass."""

    def __init__(self, dim):
        super().__init__(dim)
        self.weight1 = nn.Parameter(torch.ones(dim))
        self.time_map = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.t = None

    def forward(self, x):                                                                          # B L D
        s = torch.sigmoid(self.time_map[0] * model.expand(self.t.float(), x) + self.time_map[1])   # B 1 1
        x = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return x * (s * self.weight + (1 - s) * self.weight1)

def set_time(net, t):
    """Tell every TimeNorm of a network the time."""
    for module in net.modules():
        if isinstance(module, TimeNorm):
            module.t = t

class TimedJiT(model.JiT):
    """A JiT that tells its norms the time."""

    def forward(self, z, t, y, tap=None):
        set_time(self, t)
        return super().forward(z, t, y, tap)

model.NORMS["td"] = TimeNorm
model.NETWORKS["td_norm"] = (model.JiTConfig, TimedJiT)
SETTINGS = {"norm": "td", "network": "td_norm"}

def main(*flags):
    model.load_experiment("_compare").compare({"RMSNorm": [], "TD-norm": ["--experiment", "td_norm"]}, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
