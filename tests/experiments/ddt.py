"""A wide, shallow head: narrow blocks decide what to do, wide ones do it (DDT: Wang et al. 2025; DiT-DH: RAE, section 5).

The backbone's tokens do not become the output.  They are the condition, one per token, of a head of a few blocks:

    s = SiLU(t_emb + backbone(z, t, y)) -> linear map to the head's width;    out = head(z embedded again, s)

The class acts through s alone.  Head as wide as the backbone: DDT.  Wider: DiT-DH, which makes room for v-prediction in
wide feature spaces (width.py).  Since s changes slowly, sampling may keep it for `--reuse` steps; 1 is exact.

departure: DDT has no linear map at equal width, rotary positions instead of the table, and one SiLU less (adaLN has its
own after ours).  DDT's backbone is trained with REPA's loss; here each of the two brings a network, and 03 takes one.

python tests/experiments/ddt.py           against JiT, and with reuse 1, 2, 4: four minutes on two cores
03_train.py --experiment ddt --depth 4 --head-depth 2              (registers NETWORKS ddt)
"""
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
option = data.option

@dataclass
class WideHeadConfig(model.JiTConfig):
    """JiT's settings are the backbone's."""
    head_depth: int = option(2, "blocks of the wide head, after the backbone", "[1, inf)", group="wide head")
    head_width: int = option(0, "its width; 0: as hidden_size", "[0, inf)")
    reuse: int = option(1, "sampling: run the backbone only every N-th step", "[1, inf)")

    def __post_init__(self):
        super().__post_init__()
        self.head()

    def head(self):
        """The head's configuration: attention heads are as wide as the backbone's."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(model.JiTConfig)}
        width = self.head_width or self.hidden_size
        return model.JiTConfig(**settings | {
            "hidden_size": width, "num_heads": max(1, width * self.num_heads // self.hidden_size),
            "depth": self.head_depth, "in_context_len": 0, "dropout": 0.0, "network": "jit", "aux": "none"})

class WideHeadJiT(model.JiT):
    def __init__(self, config):
        super().__init__(config)
        self.head = model.JiT(config.head(), first_layer=config.depth)
        self.head_condition = model.Linear(config.hidden_size, self.head.config.hidden_size)
        del self.final_layer, self.head.t_embedder, self.head.y_embedder       # the other part has them
        self.skip = self.last = False
        self.kept = (None, None)                          # in sampling: (labels, s) of the last step that had them

    def begin_step(self, i, t, t_next):
        self.skip = i % self.config.reuse > 0
        self.last = t_next == 1

    def forward(self, z, t, y, tap=None):
        (labels, s), tapped = self.kept, None                                                      # B, B N head_width
        if not self.skip or s is None or not torch.equal(labels, y):           # another batch: where guidance begins
            t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)
            tokens = self.x_embedder(z) + self.pos_embed
            tokens, tapped = self.transform(tokens, (t_emb + y_emb)[:, None], y_emb, tap)
            s = self.head_condition(F.silu(t_emb[:, None] + tokens))
            self.kept = (None, None) if torch.is_grad_enabled() else (y, s)
        self.skip = self.skip and not self.last           # who asks after the last step, for a picture, asks anew
        tokens, _ = self.head.transform(self.head.x_embedder(z) + self.head.pos_embed, s, None)
        out = model.unpatchify(self.head.final_layer(tokens, s), self.config.patch_size)
        return out if tap is None else (out, tapped)

model.NETWORKS["ddt"] = (WideHeadConfig, WideHeadJiT)
SETTINGS = {"network": "ddt"}

def main(*flags):
    """Also samples the wide-head run with a condition kept for 2 and for 4 steps."""
    rows = {"JiT": [], "DDT": ["--experiment", "ddt", "--depth", 4, "--head-depth", 2]}
    rows |= {f"DDT, reuse {n}": [*rows["DDT"], "--reuse", n] for n in (2, 4)}
    model.load_experiment("_compare").compare(rows, flags)

if __name__ == "__main__":
    main(*sys.argv[1:])
