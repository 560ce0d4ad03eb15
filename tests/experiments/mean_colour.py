"""An example to copy: a head of your own, in twenty lines.  What colour is the image, on average?

A head gets the image tokens after one block, in training only, and its loss is added to the diffusion loss, times
`weight` (--aux-weight).  This one asks every token for the mean colour of its patch.

python tests/experiments/mean_colour.py       against no head, 600 steps: two minutes on two cores
03_train.py --experiment mean_colour          (registers AUX_HEADS mean_colour; a copy elsewhere: --experiment my_head.py)
"""
import sys
from importlib import import_module
from pathlib import Path

import torch.nn.functional as F

sys.path += map(str, Path(__file__).resolve().parents)    # the project is in one of the folders above this file
model = import_module("02_model")

class MeanColour(model.AuxHead):
    after = 2                                             # the third block's tokens; -1: the last's

    def __init__(self, config):
        super().__init__(config)
        self.patch = config.patch_size
        self.colour = model.Linear(config.hidden_size, config.in_channels)

    def forward(self, tokens):                                                                     # B N D
        return self.colour(tokens).float()                                                         # B N C

    def loss(self, answer, batch):
        wanted = F.avg_pool2d(batch["x"], self.patch)                                              # B C h w
        return F.mse_loss(answer, wanted.flatten(2).transpose(1, 2))

model.AUX_HEADS["mean_colour"] = MeanColour
SETTINGS = {"aux": "mean_colour"}

def main(*flags):
    model.load_experiment("_compare").compare({"JiT": [], "mean colour": ["--experiment", __file__]}, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
