"""02_model.py -- the network: a plain Transformer on large pixel patches (JiT), and the path from noise to data

What this stage teaches: how an image becomes a few long tokens and comes back; how time and class steer every block
(adaLN-Zero, context tokens); and how the three things a network may predict, x, e or v, turn into each other.
Reads nothing, writes nothing.   Run it:   python 02_model.py   (8 s: the table of sizes, then one batch walked through)

TIME RUNS FROM NOISE TO DATA: t = 0 is pure noise, t = 1 is the clean image.  (Stable Diffusion 3, SiT and REPA write it
the other way round.)  With x the image in [-1, 1] and e ~ N(0, k^2 I) noise, k = noise_scale:

    z = t x + (1-t) e        the noised image the network sees                                      (JiT eq. 1)
    v = dz/dt = x - e        the velocity a sampler follows from noise to data                      (JiT eq. 2)
    z and t are known, so x, e and v say the same thing:  x = z + (1-t) v,  e = z - t v,  v = (x - z)/(1-t)

JiT predicts x and is trained with the loss on v: patches of real images fill a small part of the patch space, noise and
velocity fill all of it, and a network narrower than the patch can only hold the former (JiT sections 3.3 and 4.2).

Letters of the shape column:  B images, C channels, H W pixels, p patch size, N = (H/p)(W/p) tokens, L = N + context
tokens, D hidden size, h heads, d = D/h.     Paper: Li & He 2025, "Back to Basics: Let Denoising Generative Models
Denoise", arXiv 2511.13720.  Lines marked "departure:" differ from it on purpose, "subtle:" marks a trap.
"""
import argparse
import ctypes
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter


def parse_args(argv=None):
    """Options of this script.  Parsed before torch is imported, so that --help answers at once."""
    parser = argparse.ArgumentParser(description="Print the table of model sizes and walk one batch through a network.")
    parser.add_argument("--model", default="JiT-S/16", help="the network to walk through (default: %(default)s)")
    parser.add_argument("--resolution-study", action="store_true",
                        help="only the rows that show: cost hardly grows with resolution when the patch grows along")
    parser.add_argument("--speed", action="store_true", help="also measure images/s of a forward pass, here and now (some minutes on a CPU)")
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)", 2))
    return parser.parse_args(argv)


def fail(message, code=1):
    """Print one line on stderr and return the exit code: 1 failure, 2 wrong usage."""
    print(f"{sys.argv[0].rpartition('/')[2]}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C while torch is imported: no traceback
    ARGS = parse_args()

import torch
import torch.nn as nn
import torch.nn.functional as F

T_EPS = 0.05                       # denominators are clamped here, as in the paper's Algorithms 1 and 2


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: everything a checkpoint needs to rebuild its network and to know what the output means
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class JiTConfig:
    """The network and the meaning of its output.  Defaults: JiT-B/16 at 256 pixels.  Raises ValueError when unusable."""
    image_size: int = 256          # pixels, height = width
    patch_size: int = 16           # pixels; a token holds patch_size^2 * in_channels numbers
    in_channels: int = 3
    hidden_size: int = 768
    depth: int = 12                # number of blocks
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000        # label num_classes is the null class; 0 classes = unconditional
    bottleneck_dim: int = 128      # width between the two linear maps of the patch embedding; 0 = one plain map
    in_context_len: int = 32       # class tokens put in front of the image tokens; 0 = none
    in_context_start: int = 4      # the block before which they are put there
    dropout: float = 0.0           # on attention output and FFN (but not a bottleneck's) of the middle half of the blocks
    patch_embed: str = "linear"    # or "nonlinear": SiLU in the bottleneck (document 000, eq. 1)
    ffn: str = "swiglu"            # or "gelu" (DiT), "bottleneck" (document 000, listing 1)
    norm: str = "rmsnorm"          # or "layernorm": without learned weights, as in DiT
    rope: bool = True              # rotary position embedding on q and k
    qk_norm: bool = True           # RMSNorm on q and k
    aux: str = "none"              # or "time", "rotation": an auxiliary head, used in training only
    pred: str = "x"                # what the output means: "x", "e" or "v"
    path: str = "linear"           # how z is mixed: "linear", "cosine", "ddpm-linear", "ddpm-cosine"
    noise_scale: float = 1.0       # k; the paper uses image_size / 256 from 256 pixels on

    def __post_init__(self):
        choices = {"patch_embed": ("linear", "nonlinear"), "ffn": ("swiglu", "gelu", "bottleneck"),
                   "norm": ("rmsnorm", "layernorm"), "aux": ("none", *AUX_HEADS), "pred": ("x", "e", "v"), "path": PATHS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: one of {', '.join(allowed)}")
        for name in ("image_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is no multiple of patch size {self.patch_size}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden size {self.hidden_size} is no multiple of 4 x {self.num_heads} heads: a head's "
                             "channels turn in pairs, half with the row and half with the column")
        if min(self.num_classes, self.bottleneck_dim, self.in_context_len) < 0 or self.noise_scale <= 0:
            raise ValueError("num_classes, bottleneck_dim and in_context_len cannot be negative, noise_scale must be > 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.patch_embed == "nonlinear" and not self.bottleneck_dim:
            raise ValueError("a nonlinear patch embedding needs a bottleneck (bottleneck_dim > 0) to put the SiLU in")
        if self.in_context_start >= self.depth:
            self.in_context_len = 0                       # they would never be inserted: same network without them


def _size(image, patch, hidden, depth, heads, bottleneck=128, start=4, dropout=0.0, classes=1000, context=32):
    return dict(image_size=image, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads,
                bottleneck_dim=bottleneck, in_context_start=start, dropout=dropout, num_classes=classes,
                in_context_len=context, noise_scale=max(1.0, image / 256))


MODELS = {  # name      image patch hidden depth heads bottleneck start dropout classes context   (JiT Table 9; T and S are ours)
    "JiT-T/8":   _size(32,   8,  192,   6,  3,  48, 2, 0.0, 10, 4),       # small images, a CPU
    "JiT-T/16":  _size(64,   16, 192,   6,  3,  64, 2, 0.0, 10, 4),
    "JiT-S/4":   _size(32,   4,  384,  12,  6,  48, 4, 0.0, 10, 8),       # CIFAR-10 on one GPU
    "JiT-S/16":  _size(256,  16, 384,  12,  6, 128, 4),
    "JiT-B/4":   _size(64,   4,  768,  12, 12, 128, 4),                   # the paper's ImageNet-64 (JiT Table 2b)
    "JiT-B/16":  _size(256,  16, 768,  12, 12, 128, 4),
    "JiT-B/32":  _size(512,  32, 768,  12, 12, 128, 4),
    "JiT-B/64":  _size(1024, 64, 768,  12, 12, 128, 4),
    "JiT-L/16":  _size(256,  16, 1024, 24, 16, 128, 8),
    "JiT-L/32":  _size(512,  32, 1024, 24, 16, 128, 8),
    "JiT-H/16":  _size(256,  16, 1280, 32, 16, 256, 10, 0.2),
    "JiT-H/32":  _size(512,  32, 1280, 32, 16, 256, 10, 0.2),
    "JiT-G/16":  _size(256,  16, 1664, 40, 16, 256, 10, 0.2),
}
PAPER_GMAC = {"JiT-B/16": 25, "JiT-B/32": 26, "JiT-B/64": 30, "JiT-L/16": 88, "JiT-L/32": 89, "JiT-H/16": 182,
              "JiT-H/32": 183, "JiT-G/16": 383}           # the paper's "Gflops" are multiply-adds; B/64's 30 leaves out the bottleneck


# ---------------------------------------------------------------------------------------------------------------------
# Paths from noise to data, and what the output means: z = a x + s e, v = a' x + s' e          (JiT eq. 1, 2, Table 1)
# ---------------------------------------------------------------------------------------------------------------------

PATHS = ("linear", "cosine", "ddpm-linear", "ddpm-cosine")


def path_coefficients(path, t):
    """The mixing weights of a path at times t: (a, s, a', s'), each fp32 and shaped like t; ' is d/dt.

    linear: JiT, rectified flow.  cosine: SiT's "GVP".  ddpm-linear: the continuous form of DDPM's linear betas (Song et
    al. 2021, eq. 33, beta from 0.1 to 20).  ddpm-cosine: Nichol & Dhariwal 2021, eq. 17.  Raises ValueError.
    """
    t = t.double()
    if path == "linear":
        a, s, da, ds = t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    elif path == "cosine":
        a, s = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
        da, ds = math.pi / 2 * s, -math.pi / 2 * a
    elif path in ("ddpm-linear", "ddpm-cosine"):
        n = 1 - t                                         # the papers' time: 0 is data
        if path == "ddpm-linear":
            a = torch.exp(-n**2 * (20 - 0.1) / 4 - n * 0.1 / 2)
            da = a * (n * (20 - 0.1) / 2 + 0.1 / 2)
        else:
            u, u0 = (n + 0.008) / 1.008 * math.pi / 2, 0.008 / 1.008 * math.pi / 2
            a, da = torch.cos(u) / math.cos(u0), torch.sin(u) / math.cos(u0) * math.pi / 2 / 1.008
        s = (1 - a**2).clamp_min(0).sqrt()
        ds = -a * da / s.clamp_min(T_EPS)                 # subtle: infinite at t = 1, so v is defined with the clamp
    else:
        raise ValueError(f"path {path!r} is unknown: one of {', '.join(PATHS)}")
    return tuple(c.float() for c in (a, s, da, ds))


def mix(path, x, e, t):
    """The noised image z = a x + s e (B,...) from image x, noise e (B,...) and times t (B,).                  (JiT eq. 1)"""
    a, s, _, _ = (expand(c, x) for c in path_coefficients(path, t))
    return (a * x).addcmul_(s, e)


def velocity_target(path, x, e, t):
    """v = a' x + s' e, the derivative of mix with respect to t: x - e on the linear path.                     (JiT eq. 2)"""
    _, _, da, ds = (expand(c, x) for c in path_coefficients(path, t))
    return da * x + ds * e


def conversion(kind, to, t, path="linear", t_eps=T_EPS):
    """A prediction of one kind ("x", "e", "v") is an affine map of another:  to = u * value + w * z.   (JiT Table 1)

    Returns (u, w), each fp32 and shaped like t.  Denominators that vanish at an end of the path are clamped at t_eps.
    Since z is known, a squared error in the space `to` is u^2 times the one in the space `kind`: choosing the space of
    the loss is choosing a weight over t.  For x to v on the linear path that weight is 1 / (1-t)^2.
    """
    a, s, da, ds = path_coefficients(path, t)
    det = a * ds - s * da                                 # of the map (x, e) -> (z, v); -1 on the linear path
    if kind == to:
        return torch.ones_like(a), torch.zeros_like(a)
    if kind == "v":                                       # the two that never divide by zero
        return (-s / det, ds / det) if to == "x" else (a / det, -da / det)
    if kind == "x":                                       # linear path:  v = (x - z) / max(1-t, t_eps)
        s = s.clamp_min(t_eps)
        return (-a / s, 1 / s) if to == "e" else (-det / s, ds / s)
    a = a.clamp_min(t_eps)                                # linear path:  v = (z - e) / max(t, t_eps)
    return (-s / a, 1 / a) if to == "x" else (det / a, da / a)


def expand(c, like):
    """One number per image (B,) -> (B,1,...,1), to multiply a batch with."""
    return c.reshape(-1, *[1] * (like.dim() - 1))


def convert(value, kind, to, z, t, path="linear", t_eps=T_EPS):
    """Turn a prediction of one kind into another, in fp32.  value, z: (B,...).  t: (B,).                  (JiT Table 1)"""
    u, w = conversion(kind, to, t, path, t_eps)
    return expand(u, z) * value.float() + expand(w, z) * z.float()


def shift_time(t, shift):
    """Spend more of [0,1] near the noise: t / (t + A (1-t)).  For big images and wide tokens (SD3 eq. 23, RAE)."""
    return t / (t + shift * (1 - t))


def to_uint8(x):
    """Pixels in [-1,1], float -> uint8 0..255, rounded and not cut off; the inverse of u / 127.5 - 1."""
    return (((x.float() + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Patches, positions, conditions
# ---------------------------------------------------------------------------------------------------------------------

def patchify(x, p):
    """Images (B,C,H,W) -> tokens (B, N, p*p*C), rows of patches first, channels last inside a patch."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p)                                                      # B C  H/p p  W/p p
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)                  # B N p*p*C


def unpatchify(tokens, p):
    """Tokens (B, N, p*p*C) -> square images (B,C,H,W).  The inverse of patchify."""
    B, N, width = tokens.shape
    side, C = math.isqrt(N), width // (p * p)
    x = tokens.reshape(B, side, side, p, p, C).permute(0, 5, 1, 3, 2, 4)                           # B C  H/p p  W/p p
    return x.reshape(B, C, side * p, side * p)


class PatchEmbed(nn.Module):
    """Patch -> bottleneck -> hidden: two linear maps (JiT section 4.2, figure 4); nonlinear puts a SiLU between them.

    A convolution whose stride equals its kernel is a linear map on patches; it is kept for the official weights' names.
    """

    def __init__(self, config):
        super().__init__()
        C, p, D, width = config.in_channels, config.patch_size, config.hidden_size, config.bottleneck_dim
        self.proj1 = nn.Conv2d(C, width or D, p, p, bias=not width)
        self.act = nn.SiLU() if config.patch_embed == "nonlinear" else nn.Identity()
        self.proj2 = nn.Conv2d(width, D, 1) if width else nn.Identity()

    def forward(self, x):                                                                          # B C H W
        return self.proj2(self.act(self.proj1(x))).flatten(2).transpose(1, 2)                      # B N D


def position_table(hidden, side):
    """Fixed 2-D sine-cosine positions (1,N,D): half the channels from the column, half from the row (as in MAE, DiT)."""
    omega = 10000 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (cols, rows)]                                # N D/4, twice
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]  # 1 N D


def rotary_table(head_dim, side, context):
    """Angles of the 2-D rotary embedding as (cos, sin), each (context + N, d/2).   (RoFormer eq. 34, one axis per half)

    The first half of a head's channels turns with the row, the second with the column; context tokens do not turn.
    """
    freq = 10000 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))                 # d/4
    rows, cols = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * freq, cols.reshape(-1, 1) * freq], dim=1)            # N d/2
    angles = torch.cat([torch.zeros(context, head_dim // 2), angles])                              # L d/2
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn adjacent channel pairs of x (B,h,L,d) by their angles: (x0 cos - x1 sin, x1 cos + x0 sin)."""
    if not (x.is_cuda or torch.compiler.is_compiling()):  # the same in one complex product: a sixth of a CPU's step time
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                            # B h L d/2
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)                     # B h L d
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)                                                   # B h L d/2
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], dim=-1).flatten(-2)             # B h L d


class TimeEmbed(nn.Module):
    """Time (B,) in [0,1] -> (B,D): 256 cosine and sine features, then a small MLP.

    departure: DiT scales t to 0..1000 first; JiT does not, and neither do we.
    """

    def __init__(self, hidden):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t):
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angles = t.float()[:, None] * freq                                                         # B 128
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))                           # B D


class LabelEmbed(nn.Module):
    """Class id (B,) -> (B,D).  The last row is the null class, learned when labels are dropped in training (CFG)."""

    def __init__(self, num_classes, hidden):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden)

    def forward(self, y):
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer block: attention and FFN, each behind a norm that the condition shifts, scales and gates
# ---------------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 also under autocast."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


def make_norm(config):
    """The block's norm: RMSNorm with a learned weight (JiT), or LayerNorm without one (DiT)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size)
    return nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)


def attend(q, k, v):
    """Softmax attention written out, (B,h,L,d) each; the softmax itself is always in fp32."""
    weights = (q * q.shape[-1]**-0.5 @ k.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)   # B h L L
    return weights.to(v.dtype) @ v                                                                 # B h L d


class Attention(nn.Module):
    """Softmax attention with normalised and rotated q and k, scale d^-1/2."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm = RMSNorm(D // self.heads) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // self.heads) if config.qk_norm else nn.Identity()
        self.plain = False                                # True: attention written out in fp32, as the official code has it

    def forward(self, x, rope=None):                                                               # B L D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)            # B h L d, each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.plain:
            with torch.autocast(x.device.type, enabled=False):
                out = attend(q.float(), k.float(), v.float()).to(v.dtype)                          # B h L d
        elif x.is_cuda or not torch.is_grad_enabled():
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)                  # B h L d
        else:                                             # on a CPU the fused kernel's backward is the slower one
            out = attend(q.to(v.dtype), k.to(v.dtype), v)                                          # B h L d
        return self.proj(out.transpose(1, 2).flatten(2))                                           # B L D


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), inner width 2/3 of mlp_ratio * D so that it costs what a plain MLP does (Shazeer 2020)."""

    def __init__(self, hidden, inner, dropout):
        super().__init__()
        inner = int(inner * 2 / 3)
        self.w12, self.w3 = nn.Linear(hidden, 2 * inner), nn.Linear(inner, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(x1) * x2))


def make_ffn(config, dropout):
    """The block's FFN.  "bottleneck" is document 000's: squeezed to D/2 before it widens."""
    D, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
    if config.ffn == "swiglu":
        return SwiGLU(D, inner, dropout)
    if config.ffn == "gelu":
        return nn.Sequential(nn.Linear(D, inner), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(inner, D))
    return nn.Sequential(nn.Linear(D, D // 2), nn.GELU(), nn.Linear(D // 2, inner), nn.SiLU(), nn.Linear(inner, D))


def modulate(x, shift, scale):
    """adaLN: the condition's affine map after a norm (DiT section 3.2)."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """One Transformer block with adaLN-Zero: x + gate * f(norm(x) * (1 + scale) + shift), for attention, then FFN.

    The "Zero" is about the gate: its layer starts at zero, so every block starts as the identity.  The condition c may
    be (B,1,D), the same for all tokens, or (B,L,D), one per token.
    """

    def __init__(self, config, dropout):
        super().__init__()
        D = config.hidden_size
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attn, self.mlp = Attention(config), make_ffn(config, dropout)
        self.dropout = nn.Dropout(dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, rope=None):                                                            # B L D, B 1|L D
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))                       # B L D


class FinalLayer(nn.Module):
    """Norm, shift and scale, then one linear map from a token to its patch of pixels."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm_final = make_norm(config)
        self.linear = nn.Linear(D, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):                                                                       # B N D, B 1 D
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                             # B N p*p*C


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary heads (document 000, section 3.3): a second question put to the tokens in training, never in sampling
# ---------------------------------------------------------------------------------------------------------------------

class AuxHead(nn.Module):
    """Mean of the image tokens after block `after` (-1: the last) -> Linear, SiLU, Linear.  loss() sees all of the batch.

    A further head is a subclass: set `outputs` and `after`, or override forward, and define loss.
    """
    outputs, after = 1, -1

    def __init__(self, hidden):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, self.outputs))

    def forward(self, tokens):                                                                     # B N D
        return self.mlp(tokens.mean(dim=1))                                                        # B outputs


class TimeHead(AuxHead):
    """How noisy is this image?  Squared error against t."""

    @staticmethod
    def loss(answer, batch):
        return F.mse_loss(answer.float().squeeze(1), batch["t"])


class RotationHead(AuxHead):
    """By how many quarter turns was this image rotated?  Cross-entropy over four classes (RotNet)."""
    outputs = 4

    @staticmethod
    def loss(answer, batch):
        return F.cross_entropy(answer.float(), batch["turns"])


AUX_HEADS = {"time": TimeHead, "rotation": RotationHead}


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------

class JiT(nn.Module):
    """net(z, t, y) -> prediction (B,C,H,W): the clean image, if config.pred is "x".

    z: (B,C,H,W) float noised images.  t: (B,) float in [0,1].  y: (B,) int64 in [0, num_classes], num_classes = null.
    At initialisation the output is exactly zero.  Parameter names are the official ones, so official weights load.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, depth, side = config.hidden_size, config.depth, config.image_size // config.patch_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimeEmbed(D)
        self.y_embedder = LabelEmbed(config.num_classes, D)
        self.pos_embed = nn.Parameter(position_table(D, side), requires_grad=False)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, D))
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(Block(config, config.dropout if i in middle else 0.0) for i in range(depth))
        self.final_layer = FinalLayer(config)
        self.aux_head = AUX_HEADS[config.aux](D) if config.aux != "none" else None
        self.checkpointing = False                        # recompute blocks in the backward pass: memory for time
        for context in {0, config.in_context_len} if config.rope else ():
            for name, table in zip(("cos", "sin"), rotary_table(D // config.num_heads, side, context)):
                self.register_buffer(f"rope_{name}_{context}", table, persistent=False)
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, N(0, 0.02) for tables and the time MLP, zero for every gate and for the output."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))   # subtle: flatten is a view; patches, not pixels, fan in
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight,
                       *([self.in_context_posemb] if self.config.in_context_len else [])):
            nn.init.normal_(weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
                      self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def plain_attention(self, plain):
        """Choose attention written out in fp32 (True) or whatever is fastest on the device (False)."""
        for block in self.blocks:
            block.attn.plain = plain

    def rope(self, context):
        """(cos, sin) for `context` class tokens followed by the image tokens, or None."""
        if not self.config.rope:
            return None
        return getattr(self, f"rope_cos_{context}"), getattr(self, f"rope_sin_{context}")

    def forward(self, z, t, y, with_aux=False):
        """See the class.  with_aux=True returns (prediction, the auxiliary head's answer)."""
        config, context, answer = self.config, 0, None
        x = self.x_embedder(z) + self.pos_embed                                                    # B N D
        y_emb = self.y_embedder(y)                                                                 # B D
        c = (self.t_embedder(t) + y_emb)[:, None]                                                  # B 1 D
        for i, block in enumerate(self.blocks):
            if config.in_context_len and i == config.in_context_start:
                context = config.in_context_len
                x = torch.cat([y_emb[:, None] + self.in_context_posemb, x.to(y_emb.dtype)], dim=1)  # B L D
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, c, self.rope(context), use_reentrant=False)
            else:
                x = block(x, c, self.rope(context))                                                # B L D
            if with_aux and i == self.aux_head.after % config.depth:
                answer = self.aux_head(x[:, context:])
        out = unpatchify(self.final_layer(x[:, context:], c), config.patch_size)                   # B C H W
        return (out, answer) if with_aux else out


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

def picture(rows, titles=(), cell=64):
    """Rows of images (C,H,W) in [-1,1] -> one PIL picture, a title above each column; small images are enlarged."""
    from PIL import Image, ImageDraw
    side = max(rows[0][0].shape[-1], cell // rows[0][0].shape[-1] * rows[0][0].shape[-1])
    top = 14 if titles else 0
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows) + top), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((x * side + 3, 1), str(title)[:side // 6], fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x * side, y * side + top))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours, and the official release's (a dict with model, model_ema1, model_ema2 and args)
# ---------------------------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """Open a checkpoint file without running anything in it.  Raises ValueError with one line that names the file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # the official files' only foreign class
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}: train one first (python 03_train.py), or is the name another?") from None
    except Exception as error:                            # a pickle of foreign code, a truncated or a foreign file
        raise ValueError(f"{path} is no readable checkpoint ({str(error).strip().splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or not ({"config", "ema"} <= state.keys() or {"model_ema1", "args"} <= state.keys()):
        raise ValueError(f"{path} is no JiT checkpoint: it holds neither config and ema nor model_ema1 and args")
    return state


def load_network(path, ema=0):
    """A checkpoint file -> (JiT in eval mode without auxiliary head, info).

    ema picks one set of averaged weights by its place (0 is the first), -1 the raw weights.  Official files are known by
    their keys: model, image size, classes and noise scale come from their args.  Raises ValueError.
    """
    state = read_checkpoint(path)
    official = "args" in state
    if official:
        args = vars(state["args"])
        if args.get("model") not in MODELS:
            raise ValueError(f"{path} holds a model {args.get('model')!r} that is not in the table of 02_model.py")
        config = dict(MODELS[args["model"]], image_size=args["img_size"], num_classes=args["class_num"],
                      noise_scale=float(args.get("noise_scale", 1.0)))
        names, info = ["model_ema1", "model_ema2"], {"step": None, "epoch": state.get("epoch"), "decays": [0.9999, 0.9996]}
        weights = [{k.removeprefix("net."): v for k, v in state[n].items()} for n in names + ["model"] if n in state]
    else:
        known = {field.name for field in fields(JiTConfig)}
        config = {k: v for k, v in state["config"].items() if k in known}
        weights, info = state["ema"] + ([state["model"]] if "model" in state else []), dict(state.get("info", {}))
    if not -1 <= ema < len(weights):
        raise ValueError(f"{path} holds {len(weights)} sets of weights: --ema goes from 0 to {len(weights) - 1}, -1 for the raw ones")
    if ema == -1 and "model" not in state:
        raise ValueError(f"{path} holds averaged weights only: --ema goes from 0 to {len(weights) - 1}")
    net = JiT(JiTConfig(**{**config, "aux": "none"}))
    load_weights(net, weights[ema], path)
    return net.eval(), {**info, "ema": ema, "official": official}


def load_weights(net, weights, path):
    """Copy weights into net, all of them and no others (auxiliary heads aside).  Raises ValueError naming the first misfit."""
    own = net.state_dict()
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith("aux_head.")}
    for name, value in own.items():
        if name not in weights and name != "pos_embed":   # the fixed table may be left out of a file
            raise ValueError(f"{path} lacks the weight {name}")
        if name in weights and weights[name].shape != value.shape:
            raise ValueError(f"{path}: weight {name} is {tuple(weights[name].shape)}, the network wants {tuple(value.shape)}")
    extra = [name for name in weights if name not in own and "rope" not in name]            # official files store the rotary tables
    if extra:
        raise ValueError(f"{path} holds a weight {extra[0]} that the network does not have")
    net.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Hardware
# ---------------------------------------------------------------------------------------------------------------------

def bf16_is_fast(device):
    """Is there hardware for bf16?  Ampere and later GPUs; CPUs with avx512_bf16 or amx."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


def keep_freed_memory():
    """Let the C library keep what is freed instead of handing it back to the system (glibc; elsewhere nothing happens).

    subtle: by default every array of some megabytes is mapped afresh and filled with zeros page by page, which on a CPU
    takes up to fifty times as long as multiplying it by two.  A third of a training step went there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):      # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX
        mallopt(option, value)


def pick_device(name=None):
    """torch.device of "cuda" or "cpu", the best there is for None; under torchrun every process gets its own GPU.  Raises ValueError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no CUDA GPU")
    try:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: give cuda or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: GPU {device.index} is asked for, this machine has {torch.cuda.device_count()}: give another, or start fewer processes")
    return device


def matmul_rate(device, dtype, quick=False):
    """FLOP/s of one big matrix product here and now, on random numbers: the ceiling that utilisation is measured against."""
    size = 8192 if device.type == "cuda" else 1024 if quick else 2048
    dtype = torch.float32 if (device.type, dtype) == ("cpu", torch.float16) else dtype          # no CPU multiplies fp16 fast
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return 2 * size**3 / sorted(times[2:])[2]


# ---------------------------------------------------------------------------------------------------------------------
# As a script: the table of sizes, and one batch with the shape after each step
# ---------------------------------------------------------------------------------------------------------------------

def count_macs(config, net=None):
    """Multiply-adds of one forward pass of one image, counted by torch on tensors without storage (net: built on "meta")."""
    from torch.utils.flop_counter import FlopCounterMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with torch.device("meta"):
        net = net or JiT(JiTConfig(**{**asdict(config), "aux": "none"})).eval()
        z, t, y = torch.empty(1, config.in_channels, config.image_size, config.image_size), torch.empty(1), torch.zeros(1).long()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(z, t, y)
    return counter.get_total_flops() // 2


def count_parameters(net):
    """Trainable numbers; the fixed table of positions is not one of them."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def forward_rate(config, batch=4):
    """Images/s of one forward pass in bf16 where it is fast, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        net, z = JiT(config).eval(), torch.randn(batch, config.in_channels, config.image_size, config.image_size)
        t, y = torch.rand(batch), torch.zeros(batch).long()
    times = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
        for _ in range(3):
            start = perf_counter()
            net(z, t, y).sum().item()
            times.append(perf_counter() - start)
    return batch / min(times)


def print_table(names, speed=False):
    """One line per model: what it costs, beside the paper's figure."""
    print(f"{'model':10s} {'image':>6s} {'patch':>6s} {'tokens':>7s} {'hidden':>7s} {'depth':>6s} {'parameters':>14s} "
          f"{'GMAC':>7s} {'paper':>6s}{'  images/s, forward' if speed else ''}")
    for name in names:
        config = JiTConfig(**MODELS[name])
        with torch.device("meta"):
            net = JiT(config).eval()
        print(f"{name:10s} {config.image_size:6d} {config.patch_size:6d} {(config.image_size // config.patch_size)**2:7d} "
              f"{config.hidden_size:7d} {config.depth:6d} {count_parameters(net):14,d} {count_macs(config, net) / 1e9:7.2f} "
              f"{PAPER_GMAC.get(name, '-'):>6}{f'{forward_rate(config):19.1f}' if speed else ''}")


def walk(config, batch=2):
    """Send one batch through a fresh network and print the shape after each step."""
    net = JiT(config).eval()
    z, t, y = torch.randn(batch, config.in_channels, *[config.image_size] * 2), torch.rand(batch), torch.zeros(batch).long()
    steps = [("z: the noised images", z.shape)]

    def note(text):
        return lambda module, inputs, output: steps.append((text, output.shape))
    net.x_embedder.proj1.register_forward_hook(note("x_embedder.proj1: every patch squeezed to the bottleneck"))
    net.x_embedder.register_forward_hook(note("x_embedder.proj2: ... widened to a token"))
    net.t_embedder.register_forward_hook(note("t_embedder: the time"))
    net.y_embedder.register_forward_hook(note("y_embedder: the class"))
    for i, block in enumerate(net.blocks):
        front = config.in_context_len if i >= config.in_context_start else 0
        block.register_forward_hook(note(f"block {i}" + (f": {front} context tokens in front" if front else "")))
    net.final_layer.register_forward_hook(note("final_layer: context tokens gone, pixels of each patch"))
    with torch.no_grad():
        out = net(z, t, y)
    steps.append(("unpatchify: the predicted clean images", out.shape))
    for text, shape in steps:
        print(f"  {text:62s} {' x '.join(map(str, shape))}")


def main(args):
    if args.model not in MODELS:
        return fail(f"--model {args.model} is unknown: one of {', '.join(MODELS)}", 2)
    print_table(["JiT-B/16", "JiT-B/32", "JiT-B/64"] if args.resolution_study else MODELS, args.speed)
    if not args.resolution_study:
        print(f"\nOne batch through {args.model}:")
        walk(JiTConfig(**MODELS[args.model]))
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
