"""A representation autoencoder (RAE, Zheng et al. 2025): latents that understand images, and a decoder that learns to draw.

A VAE's encoder is made so that images can be given back.  An RAE reverses this: its encoder was trained to know what is
in an image, and is frozen; a decoder then learns to draw from its features, noised a little, std up to 0.8, so that it
forgives what a diffusion model gets slightly wrong.  Diffusion on such wide features shifts time by sqrt(m / 4096), m
numbers in a latent (RAE, section 4.2).

departure: published RAEs take DINOv2, SigLIP or MAE.  Without their weights the encoder is made here: a small ViT that
learns to name the class and to reconstruct masked patches.  So it was trained with labels; it is not the network that
scores the pictures.  sigma of the decoder's noise is uniform, as in RAE's code (its text: |N(0, 0.8^2)|).

python tests/experiments/rae.py           makes data/shapes-rae: 192 x 4 x 4 features, 85 s on two cores
python tests/experiments/rae.py --data photos --weights dinov2_vitb14_reg4_pretrain.pth        on DINOv2: photos-dinov2
03_train.py --experiment rae && 04_sample.py --run shapes-rae && 05_eval.py --run shapes-rae
"""
import math
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
latents, dit = model.load_experiment("latents"), model.load_experiment("dit")

class ViT(nn.Module):
    """A Vision Transformer of 02_model.py's blocks: images (B,3,H,W) -> (extra tokens (B,E,D), features (B,D,h,w)).

    A ViT block is Block under a constant condition: LayerNorm's affine map and LayerScale (DINOv2) are shift, scale and
    gate.  extra: class and register tokens in front.  The last LayerNorm has no affine map.          (RAE, section 3)
    """

    def __init__(self, side, patch, hidden, depth, heads, extra=0):
        super().__init__()
        config = model.JiTConfig(image_size=side, patch_size=1, hidden_size=hidden, depth=depth, num_heads=heads,
                                 rope=False, qk_norm=False, norm="layernorm", ffn="exact-gelu", in_context_len=0)
        self.embed = nn.Conv2d(3, hidden, patch, patch)
        self.pos_embed = nn.Parameter(model.position_table(hidden, side))
        self.extra = nn.Parameter(torch.zeros(1, extra, hidden))
        self.blocks = nn.ModuleList(model.Block(config) for _ in range(depth))
        for block in self.blocks:
            block.adaLN_modulation = Constant(hidden)
        self.norm = dit.plain_layernorm(hidden)

    def forward(self, x, masked=None):
        """masked: (B,N) bool, patches whose content is hidden."""
        x = self.embed(x)                                                                          # B D h w
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)                                        # B N D
        if masked is not None:
            x = x.masked_fill(masked[..., None], 0.0)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x + self.pos_embed], dim=1)              # B E+N D
        for block in self.blocks:
            x = block(x, None)
        x, extra = self.norm(x.float()), self.extra.shape[1]
        return x[:, :extra], x[:, extra:].transpose(1, 2).unflatten(2, grid)

class Constant(nn.Module):
    """In place of adaLN's map: shift, scale and gate, twice, the same for every image."""

    def __init__(self, hidden):
        super().__init__()
        nothing, half = torch.zeros(hidden), torch.full((hidden,), 0.5)
        self.bias = nn.Parameter(torch.cat([nothing, nothing, half, nothing, nothing, half]))

    def forward(self, c):
        return self.bias

class RAE(latents.Coder):
    saw_labels = True

    def __init__(self, size, classes, hidden=192):
        patch = 16 if size >= 64 else size // 4
        super().__init__(size, size // patch, hidden)
        self.shift = math.sqrt(hidden * self.side**2 / 4096)
        self.patch, self.encoder = patch, ViT(self.side, patch, hidden, depth=4, heads=3)
        self.class_head, self.pixel_head = nn.Linear(hidden, max(1, classes)), nn.Linear(hidden, patch**2 * 3)

    def features(self, x):
        return self.encoder(x)[1]

    def encoder_loss(self, x, y):
        """Name the class, from the mean of the tokens, and reconstruct the half of the patches that is masked."""
        masked = torch.rand(len(x), self.side**2, device=x.device) < 0.5                           # B N
        tokens = self.encoder(x, masked)[1].flatten(2).transpose(1, 2)                             # B N D
        error = (self.pixel_head(tokens).float() - model.patchify(x, self.patch)).abs()            # B N p*p*3
        return F.cross_entropy(self.class_head(tokens.mean(dim=1)).float(), y) + error[masked].mean()

    def decoder_loss(self, x, y):
        """L1 from noised latents.                                                            (RAE, section 4.3)"""
        with torch.no_grad():
            z = self.encode(x)
        sigma = torch.rand(len(z), 1, 1, 1, device=z.device) * 0.8
        return (self.decode(z + sigma * torch.randn_like(z)) - x).abs().mean()

class DINOv2(latents.Coder):
    """RAE on the official DINOv2 with registers: 224 px, 16 x 16 features.  Only the decoder is trained here."""
    decoder_loss = RAE.decoder_loss

    def __init__(self, size, classes, hidden=768, depth=12, heads=12):
        super().__init__(size, 16, hidden)
        self.shift = math.sqrt(hidden * 16**2 / 4096)
        self.encoder = ViT(16, 14, hidden, depth, heads, extra=5)

    def prepare(self, x):
        """Pixels in [-1,1] of any size -> 224 x 224, with ImageNet's mean and std taken out."""
        x = F.interpolate((x.float() + 1) / 2, size=(224, 224), mode="bicubic", align_corners=False)
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)

    def features(self, x):
        return self.encoder(self.prepare(x))[1]

# ---- DINOv2's file ---------------------------------------------------------------------------------------------------
def read_dinov2(path):
    """The official file (dinov2_vitb14_reg, _vits14_reg, _vitl14_reg) -> (sizes for DINOv2, weights for its ViT).

    Positions, 37 x 37 in the file, are scaled to 16 x 16; the class token's own is added to it.  Raises ValueError.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        depth, hidden = len([name for name in state if name.endswith("ls1.gamma")]), state["cls_token"].shape[-1]
        return dict(hidden=hidden, depth=depth, heads=max(1, hidden // 64)), convert_dinov2(state, depth)
    except Exception as error:                            # torch raises many kinds
        raise ValueError(f"{path} does not hold a DINOv2 with registers, as dinov2_vitb14_reg4_pretrain.pth does "
                         f"({type(error).__name__}: {str(error).splitlines()[0][:80]})") from None

def convert_dinov2(state, depth):
    """DINOv2's names -> ViT's.  Raises KeyError for one that is missing."""
    pos = state["pos_embed"]
    grid = pos[:, 1:].transpose(1, 2).unflatten(2, (math.isqrt(pos.shape[1] - 1), -1))             # 1 D 37 37
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    new = {"embed.weight": state["patch_embed.proj.weight"], "embed.bias": state["patch_embed.proj.bias"],
           "extra": torch.cat([state["cls_token"] + pos[:, :1], state["register_tokens"]], dim=1), "pos_embed": grid}
    names = {"attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}     # ours: theirs
    for i in range(depth):
        old = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        for ours, theirs in names.items():
            new |= {f"blocks.{i}.{ours}.{part}": old[f"{theirs}.{part}"] for part in ("weight", "bias")}
        new[f"blocks.{i}.adaLN_modulation.bias"] = torch.cat([
            old["norm1.bias"], old["norm1.weight"] - 1, old["ls1.gamma"],                          # shift, scale, gate
            old["norm2.bias"], old["norm2.weight"] - 1, old["ls2.gamma"]])
    return new

# ---- Making the latents ----------------------------------------------------------------------------------------------
load_coder = partial(latents.load_coder, {"rae": RAE, "dinov2": DINOv2})
SETTINGS = {"data": "shapes-rae", "depth": 4, "in_context_start": 1, "steps": 1600, "noise_scale": 1.0,
            "sampling": {"shift": None}}                      # the data set's own

@dataclass
class Options(latents.Options):
    weights: Path = data.option(None, "the official file of a DINOv2 with registers; default: an encoder made here")

def main(argv=None):
    options = Options(**data.parse(argv, "Make the latents of a representation autoencoder.", Options))

    def dinov2(arguments):
        sizes, weights = read_dinov2(options.weights)
        coder = DINOv2(**arguments, **sizes)
        coder.encoder.load_state_dict(weights)
        return coder, arguments | sizes

    def rae(arguments):
        return RAE(**arguments), arguments
    if options.weights:
        latents.pack(options, "rae", "dinov2", dinov2, {"weights": str(options.weights.resolve())})
    else:
        latents.pack(options, "rae", "rae", rae, {})

if __name__ == "__main__":
    sys.exit(data.run(main))
