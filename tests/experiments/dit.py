"""DiT (Peebles & Xie 2023) in JiT's frame: what the Transformer of latent diffusion looked like before.

Against JiT: LayerNorm without learned weights instead of RMSNorm, a GELU FFN instead of SwiGLU, no rotary embedding, no
norm of q and k, no context tokens, no bottleneck in the patch embedding; it predicts the noise on DDPM's linear path,
with the loss on the noise and uniform times, and is sampled by DDPM in 250 steps.

departure: DiT also learns the variance of its ancestral sampler; this one takes the posterior's.  DiT works on latents
(--experiment vae,dit); on pixel patches wider than a token, predicting noise fails, and that is JiT's point.

python tests/experiments/dit.py         DiT, SD3 and JiT on the shapes' pixels, 600 steps each: three minutes on two cores
03_train.py --experiment dit            (registers NORMS layernorm, FFNS gelu and exact-gelu; brings paths.py along)
"""
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")
model.load_experiment("paths")

def plain_layernorm(dim):
    """LayerNorm without learned weights: adaLN's scale and shift are its affine map."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

def gelu_ffn(hidden, inner, dropout, approximate="tanh"):
    """DiT's; ViT and DINOv2 have the exact function instead of the approximation."""
    return nn.Sequential(model.Linear(hidden, inner), nn.GELU(approximate), nn.Dropout(dropout),
                         model.Linear(inner, hidden))

model.NORMS["layernorm"] = plain_layernorm
model.FFNS |= {"gelu": gelu_ffn, "exact-gelu": partial(gelu_ffn, approximate="none")}
BLOCKS = {"norm": "layernorm", "ffn": "gelu", "rope": False, "qk_norm": False, "in_context_len": 0, "bottleneck_dim": 0}
SETTINGS = BLOCKS | {"pred": "e", "loss": "e", "path": "ddpm-linear", "times": "uniform",
                     "sampling": {"solver": "ddpm", "steps": 250, "shift": None}}

def main(*flags):
    rows = {"JiT": [], "SD3's objective": ["--experiment", "sd3"], "DiT": ["--experiment", "dit"]}
    model.load_experiment("_compare").compare(rows, flags, sampling=["--steps", 25])

if __name__ == "__main__":
    main(*sys.argv[1:])
