"""The DSD experiment: encoder, denoiser and decoder trained together; what keeps the latents from collapsing.

A diffusion loss that may change its own target has a cheap way down: latents of few directions are easy to predict.  Two
remedies are compared: a target that no gradient reaches (the encoder's own latents, "stop", or those of its slow
average, "ema"), and asking for the clean latent instead of the velocity.  Rank is exp(entropy of the normalised singular
values) of held-out latents, at most 32; std is that of a channel, at most 1 after the LayerNorm.

python tests/experiments/collapse.py [FILE.png]      six trainings of 300 steps, figure and table: 110 s on two cores
"""
import copy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model, train = (import_module(name) for name in ("01_data", "02_model", "03_train"))
rae = model.load_experiment("rae")

SIDE, PATCH, WIDTH, CHANNELS, BATCH = 4, 16, 96, 32, 64
OPTIONS = train.Options(p_mean=0.0, p_std=1.0, shift=1.0)
VARIANTS = ("naive-v", "naive-x", "stop-v", "stop-x", "ema-v", "ema-x")

class Encoder(nn.Module):
    """Images -> latents (B,32,4,4), every token with mean 0 and variance 1: their scale alone cannot shrink."""

    def __init__(self):
        super().__init__()
        self.vit, self.narrow = rae.ViT(SIDE, PATCH, WIDTH, 2, 3), nn.Conv2d(WIDTH, CHANNELS, 1)

    def forward(self, x):
        z = self.narrow(self.vit(x)[1])
        return F.layer_norm(z.permute(0, 2, 3, 1), (CHANNELS,)).permute(0, 3, 1, 2)

def effective_rank(tokens):
    """exp(entropy) of the singular values of (N,D), normalised to sum 1.  Not centred: equal tokens have rank 1."""
    p = torch.linalg.svdvals(tokens)
    p = p / p.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()

def images(count):
    return torch.from_numpy(np.stack([data.draw_shape(0, i, SIDE * PATCH) for i in range(count)]))

def experiment(variant, pictures, steps, every=25, seed=0):
    """Train one variant; returns [(step, rank, std)] of the last 500 pictures' latents."""
    torch.manual_seed(seed)
    target_of, pred = variant.split("-")
    encoder, decoder = Encoder(), nn.Sequential(nn.Conv2d(CHANNELS, 3 * PATCH**2, 1), nn.PixelShuffle(PATCH))
    config = model.JiTConfig(image_size=SIDE, patch_size=1, in_channels=CHANNELS, hidden_size=WIDTH, depth=2, num_heads=3,
                             num_classes=0, bottleneck_dim=0, in_context_len=0, pred=pred)
    net, average = model.JiT(config), copy.deepcopy(encoder).requires_grad_(False)
    parameters = [p for part in (encoder, decoder, net) for p in part.parameters() if p.requires_grad]
    optimizer, curve = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95)), []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                tokens = encoder(model.to_float(pictures[-500:])).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
            curve.append((step, effective_rank(tokens), tokens.std(dim=0).mean().item()))
        x = model.to_float(pictures[torch.randint(len(pictures) - 500, (BATCH,))])
        z = encoder(x)
        target = {"naive": lambda: z, "stop": lambda: z.detach(), "ema": lambda: average(x)}[target_of]()
        batch = {"x": target, "e": torch.randn_like(z), "t": train.sample_times(BATCH, OPTIONS, "cpu")}
        out = net(model.mix(z, batch["e"], batch["t"]), batch["t"], torch.zeros(BATCH, dtype=torch.long))
        loss = train.grid_loss(out, batch, config, pred).mean() + (decoder(z) - x).abs().mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():                             # quick at first, then slow
            torch._foreach_lerp_(list(average.parameters()), list(encoder.parameters()), 0.1 if step < 100 else 0.01)
    return curve

def main(path="collapse.png", count=5500, steps=300):
    """Train all variants; print a table, draw the ranks over the steps."""
    pictures, curves = images(count), {}
    for variant in VARIANTS:
        curves[variant] = experiment(variant, pictures, steps)
        told = [f"step {step}: rank {rank:.1f}, std {std:.2f}" for step, rank, std in curves[variant][::4]]
        print(variant, ", ".join(told), flush=True)
    ranks = {name: [point[:2] for point in curve] for name, curve in curves.items()}
    model.save_picture(Path(path), model.chart("effective rank of the latents", "step", ranks))

if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
