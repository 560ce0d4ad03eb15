"""The DSD experiment: encoder, denoiser and decoder trained together; what keeps the latents from collapsing.

python tests/test_collapse.py [FILE.png]      six trainings of 300 steps, a figure and a table; a minute and three quarters on two cores
A diffusion loss that may change its own target has a cheap way down: latents of few directions are easy to predict.  Two remedies are compared, a
target through which no gradient flows (from the encoder itself, or from its slow average), and asking for the clean latent instead of the velocity.
Rank is exp(entropy of the normalised singular values) of held-out latents, at most 32; std is that of a channel, at most 1 after the LayerNorm.
"""
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import data, model, train

SIDE, PATCH, WIDTH, CHANNELS, BATCH = 4, 16, 96, 32, 64
OPTIONS = train.Options(p_mean=0.0, p_std=1.0, shift=1.0)
VARIANTS = ("naive-v", "naive-x", "stop-v", "stop-x", "ema-v", "ema-x")

class Encoder(nn.Module):
    """Images -> latents (B,32,4,4), every token with mean 0 and variance 1: their scale alone cannot shrink."""

    def __init__(self):
        super().__init__()
        self.vit, self.narrow = model.ViT(SIDE, PATCH, WIDTH, 2, 3), nn.Conv2d(WIDTH, CHANNELS, 1)

    def forward(self, x):
        z = self.narrow(self.vit(x)[1])
        return F.layer_norm(z.permute(0, 2, 3, 1), (CHANNELS,)).permute(0, 3, 1, 2)

def effective_rank(tokens):
    """exp(entropy) of the singular values of (N,D), normalised to sum 1.  Not centred: tokens that are all the same have rank 1."""
    p = torch.linalg.svdvals(tokens)
    p = p / p.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()

def images(count):
    return torch.from_numpy(np.stack([data.draw_shape((0, i, SIDE * PATCH)) for i in range(count)]))

def experiment(variant, pictures, steps, every=25, seed=0):
    """Train one variant; returns [(step, rank, std)] of the last 500 pictures' latents."""
    torch.manual_seed(seed)
    target_of, pred = variant.split("-")
    encoder, decoder = Encoder(), nn.Sequential(nn.Conv2d(CHANNELS, 3 * PATCH**2, 1), nn.PixelShuffle(PATCH))
    config = model.JiTConfig(image_size=SIDE, patch_size=1, in_channels=CHANNELS, hidden_size=WIDTH, depth=2, num_heads=3, num_classes=0, bottleneck_dim=0,
                             in_context_len=0, pred=pred)
    net, average = model.JiT(config), copy.deepcopy(encoder).requires_grad_(False)
    optimizer, curve = torch.optim.AdamW([p for part in (encoder, decoder, net) for p in part.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.95)), []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                tokens = encoder(model.to_float(pictures[-500:])).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
            curve.append((step, effective_rank(tokens), tokens.std(dim=0).mean().item()))
        x = model.to_float(pictures[torch.randint(len(pictures) - 500, (BATCH,))])
        z = encoder(x)
        target = {"naive": lambda: z, "stop": lambda: z.detach(), "ema": lambda: average(x)}[target_of]()
        batch = {"x": target, "e": torch.randn_like(z), "t": train.sample_times(BATCH, OPTIONS, "cpu")}
        out = net(model.mix("linear", z, batch["e"], batch["t"]), batch["t"], torch.zeros(BATCH, dtype=torch.long))
        loss = train.diffusion_loss(out, batch, config, pred)[0].mean() + (decoder(z) - x).abs().mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():                             # quick at first, then slow
            torch._foreach_lerp_(list(average.parameters()), list(encoder.parameters()), 0.1 if step < 100 else 0.01)
    return curve

def test_the_order_of_collapse():
    """The plain latent diffusion loss collapses the latent; a slow target holds it up, and asking for the clean latent more so."""
    pictures = images(2500)
    rank = {variant: experiment(variant, pictures, 100, every=100)[-1][1] for variant in ("naive-v", "ema-v", "ema-x")}
    assert 1.2 * rank["naive-v"] < rank["ema-v"] and 1.2 * rank["ema-v"] < rank["ema-x"], rank

def test_effective_rank_of_known_spectra():
    """Eight equal directions have rank 8; shares of 3/4 and 1/4 have exp(their entropy); one direction has 1."""
    left, right = torch.linalg.qr(torch.randn(1000, 8))[0], torch.linalg.qr(torch.randn(32, 8))[0]
    for values, rank in (([1.0] * 8, 8.0), ([3.0, 1.0], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))), ([0.5], 1.0)):
        n = len(values)
        assert abs(effective_rank(left[:, :n] * torch.tensor(values) @ right[:, :n].T) - rank) < 1e-3

def main(path):
    """Train all variants; print a table, draw the ranks over the steps."""
    pictures, curves = images(5500), {}
    for variant in VARIANTS:
        curves[variant] = experiment(variant, pictures, 300)
        print(variant, ", ".join(f"step {step}: rank {rank:.1f}, std {std:.2f}" for step, rank, std in curves[variant][::4]), flush=True)
    data.save_picture(path, data.chart("effective rank of the latents", "step", {name: [point[:2] for point in curve] for name, curve in curves.items()}))

if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "collapse.png"))
