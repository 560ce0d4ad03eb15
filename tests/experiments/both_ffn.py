"""Both feed-forward networks at once: SwiGLU's many channels, and Improved JiT's bottleneck beside them, summed.

Improved JiT ends with a plan (section 5): a model of high capacity, for variety, and one with a bottleneck, for
fidelity, trained together and fused.  (Its sentence has the two the other way round; its Table 1 has them so.)  The
smallest form of it lies in each block:

    FFN(x) = SwiGLU(x) + bottleneck(x),    each with half the inner width

At D = 192 that is 7.5 D^2 weights instead of SwiGLU's 8 and the bottleneck's 6.5.

departure: two branches of one network; the paper speaks of two models and says nothing of how they are fused.

python tests/experiments/both_ffn.py      against each of the two alone, 600 steps: 11 min, one busy thread
03_train.py --experiment both_ffn         (registers FFNS both)
"""
import sys
from importlib import import_module
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")

class BothFFN(nn.Module):
    def __init__(self, hidden, inner, dropout):
        super().__init__()
        self.wide = model.SwiGLU(hidden, inner // 2, dropout)
        self.narrow = model.bottleneck_ffn(hidden, inner // 2, dropout)

    def forward(self, x):
        return self.wide(x) + self.narrow(x)

model.FFNS["both"] = BothFFN
SETTINGS = {"ffn": "both"}

def main(*flags):
    rows = {"SwiGLU": [], "bottleneck": ["--ffn", "bottleneck"], "both": ["--experiment", "both_ffn"]}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
