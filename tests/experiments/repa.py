"""REPA (Yu et al. 2024, section 3.2): do the tokens know what a frozen encoder sees in the clean image?

The image tokens after a third of the blocks (block 4 of 12, 8 of 24; REPA takes the 8th of XL's 28, too), through an
MLP of three linear maps, are compared with the encoder's patch features of the clean image: loss = - mean over patches
of their cosine, weight 0.5.  Nothing of it is left in sampling.  The teacher is the encoder of a latent set: rae.py's,
or DINOv2.

departure: the target are features after the last LayerNorm without its affine part, as RAE takes them.

python tests/experiments/rae.py && python tests/experiments/repa.py      against JiT, 600 steps: two minutes on two cores
03_train.py --experiment repa --teacher shapes-rae                       (registers NETWORKS and AUX_HEADS repa)
"""
import math
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
option = data.option

@dataclass
class RepaConfig(model.JiTConfig):
    """JiT's network; what the head needs is worked out when it is used, in training."""
    teacher: str = option("shapes-rae", "a latent set, data/NAME, whose RAE or DINOv2 encoder is imitated", group="REPA")
    teacher_id: str = None
    features: int = 0                                     # channels of the teacher's features

    def __post_init__(self):
        super().__post_init__()
        if self.aux == "repa":
            meta, _ = data.open_data(self.folder())
            made_by = meta.get("coder", {})
            data.refuse(made_by.get("kind") not in ("rae", "dinov2"), f"{self.folder()} has no encoder to learn from: "
                        "make it by tests/experiments/rae.py")
            data.refuse(self.in_channels != 3, "--aux repa is for images, not for latents")
            data.refuse(made_by["kind"] == "rae" and made_by["size"] != self.image_size,
                        f"--teacher: its encoder is for images of {made_by['size']} pixels")
            self.teacher_id, self.features = meta["id"], meta["channels"]

    def folder(self):
        return model.folder_of(self.teacher, "data")

class RepaHead(model.AuxHead):
    weight = 0.5

    def __init__(self, config):
        super().__init__(config)
        self.after, D = config.depth // 3 - 1, config.hidden_size              # block 4 of 12, 8 of 24
        inner = min(2048, 4 * D)
        self.mlp = nn.Sequential(model.Linear(D, inner), nn.SiLU(), model.Linear(inner, inner), nn.SiLU(),
                                 model.Linear(inner, config.features))
        meta, _ = data.open_data(config.folder())
        self.frozen = [model.load_coder(config.folder(), meta["coder"])]       # in a list: no part of this module

    def prepare(self, batch):
        teacher = self.frozen[0].to(batch["x"].device)
        with torch.no_grad():
            return batch | {"features": teacher.features(batch["x"])}                              # B F h w

    def forward(self, tokens):
        return self.mlp(tokens).float()                                                            # B N F

    def loss(self, answer, batch):
        """Features are averaged or repeated to the token grid where that is another."""
        side = math.isqrt(answer.shape[1])
        wanted = F.adaptive_avg_pool2d(batch["features"].float(), side).flatten(2).transpose(1, 2)
        return -F.cosine_similarity(answer, wanted, dim=-1).mean()

model.NETWORKS["repa"] = (RepaConfig, model.JiT)
model.AUX_HEADS["repa"] = RepaHead
SETTINGS = {"network": "repa", "aux": "repa"}

def main(*flags):
    model.load_experiment("_compare").compare({"JiT": [], "REPA": ["--experiment", "repa"]}, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
