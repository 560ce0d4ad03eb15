"""DiMR (Liu et al. 2024): a cascade of networks, from a quarter of the resolution to the whole, in one pass.

Stages at 1/4, 1/2 and 1 of the image, with 1/2, 1/3 and the rest of the blocks: much depth where tokens are few.  Each
stage's tokens, through a linear map and a pixel shuffle, are ADDED to the next one's.  The coarsest stage has attention,
the others a convolution (convnext.py); norms follow the time (td_norm.py).  Every stage predicts an image of its own
size and is graded: the coarse ones against the averaged image, by their share of the pixels (1/16, 1/4).

departure: in pixels and small; DiMR-XL/2R has two stages (the coarse one weighs 1/4, its share of the pixels), hands up
the outputs of every block, and has long skips.

python tests/experiments/dimr.py          against JiT and DICE, 600 steps: four minutes on two cores
03_train.py --experiment dimr             (registers NETWORKS dimr, AUX_HEADS multiscale, MODELS DiMR-T/8)
"""
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
model.load_experiment("convnext")
td_norm = model.load_experiment("td_norm")

@dataclass
class CascadeConfig(model.JiTConfig):
    """image_size, depth: of the whole cascade."""

    def __post_init__(self):
        super().__post_init__()
        if self.network == "jit":                         # one of its stages
            return
        grid = self.image_size // self.patch_size
        data.refuse(grid % 4 or self.depth < 4, f"a cascade needs 4 blocks ({self.depth}) and a grid of patches that "
                    f"halves twice ({grid}): see --depth, --patch-size")
        data.refuse(self.aux not in ("none", "multiscale"), "a cascade takes no auxiliary head but multiscale")

class Cascade(nn.Module):
    """Three JiTs.  A subclass says how one stage's result reaches the next."""

    def __init__(self, config, mixers):
        super().__init__()
        self.config = config
        depths = [config.depth // 2, config.depth // 3, config.depth - config.depth // 2 - config.depth // 3]
        stages, first_layer = [], 0
        for k, (depth, mixer) in enumerate(zip(depths, mixers)):
            size = config.image_size * 2**k // 4
            stage = replace(config, network="jit", aux="none", image_size=size, depth=depth, mixer=mixer)
            stages.append(model.JiT(stage, first_layer))
            first_layer += depth
        self.stages = nn.ModuleList(stages)

class DiMR(Cascade):
    def __init__(self, config):
        super().__init__(config, ["attention", config.mixer, config.mixer])
        D = config.hidden_size
        self.up = nn.ModuleList(model.Linear(D, 4 * D) for _ in range(2))

    def forward(self, z, t, y, tap=None):
        """With a tap: (prediction, those of the coarse stages)."""
        td_norm.set_time(self, t)
        tokens, outs = None, []
        for k, stage in enumerate(self.stages):
            t_emb, y_emb = stage.t_embedder(t), stage.y_embedder(y)
            c = (t_emb + y_emb)[:, None]                                                           # B 1 D
            x = stage.x_embedder(F.avg_pool2d(z, 4 // 2**k)) + stage.pos_embed                     # B N_k D
            if k:
                grown = model.unpatchify(self.up[k - 1](tokens), 2)                                # twice the side
                x = x + grown.flatten(2).transpose(1, 2)
            tokens, _ = stage.transform(x, c, y_emb)
            outs.append(model.unpatchify(stage.final_layer(tokens, c), self.config.patch_size))
        return outs[-1] if tap is None else (outs[-1], outs[:-1])

class MultiScale(model.AuxHead):
    """Grades the coarse stages, in v-space like the main loss.  answer: [(B,C,H/4,W/4), (B,C,H/2,W/2)]."""
    weight = 1.0

    def __init__(self, config):
        super().__init__(config)
        data.refuse(config.network != "dimr" or config.pred != "x" or config.path != "linear",
                    "multiscale grades the stages of a cascade that predicts x on the linear path")

    def forward(self, outs):
        return outs

    def loss(self, answer, batch):
        x, total = batch["x"], 0.0
        u, _ = model.conversion("x", "v", batch["t"])
        for out in answer:
            wanted = F.adaptive_avg_pool2d(x, out.shape[-1])
            error = (out.float() - wanted).square().flatten(1).mean(dim=1)                         # B
            total = total + out[0].numel() / x[0].numel() * (u**2 * error).mean()
        return total

model.NETWORKS["dimr"] = (CascadeConfig, DiMR)
model.AUX_HEADS["multiscale"] = MultiScale
model.MODELS["DiMR-T/8"] = model.MODELS["JiT-T/16"] | {"patch_size": 8, "in_context_len": 0}
SETTINGS = {"model": "DiMR-T/8", "network": "dimr", "mixer": "convnext", "norm": "td", "aux": "multiscale",
            "steps": 1600}

def main(*flags):
    rows = {"JiT, 16 tokens": [], "DICE, 64 tokens": ["--experiment", "dice"], "DiMR, 64 tokens": ["--experiment", "dimr"]}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
