"""DICE (Denoising Cascade): stages that subtract, and a mixer of two convolutions that must agree.

The mixer: two depthwise 7 x 7 convolutions l and r of the same tokens; what they disagree on is faded out,

    f(l, r) = (l + r) sigmoid(-softplus(a) (l - r)^2),    a learned,    f(l, l) = l

The cascade: stages at 1/4, 1/2 and 1 of the resolution; each stage's output, upsampled, is SUBTRACTED from the next
one's input.  One loss, at full resolution.

departure: DICE's f is (l + r) / (1 + exp(a (l-r)^2)), the same for a > 0, but where its exponential overflows (in half
precision above exp(11.09)) its gradient is NaN.
departure: DICE works in latents without patches, and what a stage subtracts is the noise that it predicts; here, in
pixels and patches, it is the clean image.  The last command below is nearer to it.
departure: DICE's first, second and third stage (it does not say whether the finest comes first) are 1 : 2 : 3 wide, with
6, 2 and 1 blocks; here all have one width, and from the coarsest up 3, 2 and 1 blocks.  Its layers begin with a std of
0.02, ours as JiT's.  Cascaded Diffusion, on which it builds, trains a network per stage; this is one.

python tests/experiments/dimr.py          shows it beside DiMR and JiT
03_train.py --experiment dice             (registers MIXERS dice, NETWORKS dice, MODELS DICE-T/8)
03_train.py --experiment dice --network jit --patch-size 16        the mixer alone, in JiT
03_train.py --experiment dice --data shapes-vae --pred e --noise-scale 1       nearer to the original: noise, in latents
"""
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")
convnext, dimr = model.load_experiment("convnext"), model.load_experiment("dimr")

class DiceMixer(convnext.ConvMixer):
    branches = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.strictness = nn.Parameter(torch.zeros(1))    # a

    def combine(self, y):
        left, right = y.float().unflatten(1, (-1, 2)).unbind(2)                                    # B D h w, each
        return (left + right) * torch.sigmoid(-F.softplus(self.strictness) * (left - right).square())

class DICE(dimr.Cascade):
    def __init__(self, config):
        super().__init__(config, [config.mixer] * 3)

    def forward(self, z, t, y, tap=None):
        out = None
        for k, stage in enumerate(self.stages):
            x = F.avg_pool2d(z, 4 // 2**k)                                                         # B C H/4.. W/4..
            if k:
                x = x - F.interpolate(out.float(), scale_factor=2, mode="bilinear")
            out = stage(x, t, y)
        return out

model.MIXERS["dice"] = DiceMixer
model.NETWORKS["dice"] = (dimr.CascadeConfig, DICE)
model.MODELS["DICE-T/8"] = model.MODELS["DiMR-T/8"]
SETTINGS = {"model": "DICE-T/8", "network": "dice", "mixer": "dice", "steps": 1600}

main = dimr.main

if __name__ == "__main__":
    main(*sys.argv[1:])
