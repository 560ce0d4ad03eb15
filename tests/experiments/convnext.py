"""ConvNeXt's mixer (Liu et al. 2022) in place of attention: a depthwise 7 x 7 convolution of the token grid.

Each channel of a token looks at the same channel of the 49 tokens around it, with weights that do not depend on what is
there.  Context tokens have no place in a grid, so the class acts through adaLN alone.

departure: only the mixer of a ConvNeXt block, and a linear map after it, as attention has; norm, FFN and conditioning
are JiT's.  The convolution begins with a std of 1/7, the rest as in JiT, where ConvNeXt has 0.02 for all.

python tests/experiments/convnext.py      against attention with and without context, 600 steps: three minutes
03_train.py --experiment convnext         (registers MIXERS convnext)
"""
import sys
from importlib import import_module
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")

class ConvMixer(nn.Module):
    """mixer(x (B,N,D), rope) -> (B,N,D); `branches` convolutions side by side, which combine() makes one."""
    branches = 1

    def __init__(self, config, layer):
        super().__init__()
        data.refuse(config.in_context_len, "a convolution works on the image's grid, in which context tokens have no "
                    "place: pass --in-context-len 0")
        D, self.side = config.hidden_size, config.image_size // config.patch_size
        self.conv = nn.Conv2d(D, self.branches * D, 7, padding=3, groups=D)
        nn.init.normal_(self.conv.weight, std=49**-0.5)   # each output has 49 inputs, whatever D: its variance stays
        nn.init.zeros_(self.conv.bias)
        self.proj = model.Linear(D, D)

    def forward(self, x, rope=None):                                                               # B N D
        y = self.conv(x.transpose(1, 2).unflatten(2, (self.side, -1)))                             # B branches*D h w
        return self.proj(self.combine(y).flatten(2).transpose(1, 2))                               # B N D

    def combine(self, y):
        return y

model.MIXERS["convnext"] = ConvMixer
SETTINGS = {"mixer": "convnext", "in_context_len": 0}

def main(*flags):
    rows = {"attention": [], "no context tokens": ["--in-context-len", 0], "ConvNeXt": ["--experiment", "convnext"]}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
