"""02_model.py -- the network: a plain Transformer on large pixel patches (JiT), and the line from noise to data

What this stage teaches: how an image and noise are mixed, and what a network may predict of the mixture; how an image
becomes a few long tokens and comes back; and how time and class steer every block (adaLN-Zero, context tokens).
Reads nothing, writes nothing.   Run it:   python 02_model.py   (7 s: the table of sizes, then the shapes of one batch)

TIME RUNS FROM NOISE TO DATA: t = 0 is pure noise, t = 1 is the clean image.  (Stable Diffusion 3, SiT and REPA write it
the other way round.)  With x the image in [-1, 1] and e ~ N(0, k^2 I) noise, k = noise_scale:

    z = t x + (1-t) e        the noised image the network sees                                      (JiT eq. 1)
    v = dz/dt = x - e        the velocity a sampler follows from noise to data                      (JiT eq. 2)
    z and t are known, so x, e and v say the same thing:  x = z + (1-t) v,  e = z - t v,  v = (x - z)/(1-t)
    (the code divides by max(1-t, 0.05): at t = 1 the last of the three divides by zero)

JiT predicts x and is trained with the loss on v: patches of real images fill a small part of the patch space, noise and
velocity fill all of it, and a token too narrow for the noise can still hold the image (JiT sections 3.3 and 4.2).

Letters of the shape column:  B images, C channels, H W pixels, p patch size, N = (H/p)(W/p) tokens, L = N + context
tokens, D hidden size, h heads, d = D/h.  In attention q, k, v are queries, keys, values.
JiT: Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720.  Improved JiT: the
course paper whose variants are offered too (Siu 2025).
Marks: "departure" what differs from its source on purpose, "subtle" a trap, "experiment" where a file of
tests/experiments/ may put something else (NORMS, MIXERS, FFNS, PATHS ...: dicts of names, after the first reading).
"""
import argparse
import ctypes
import importlib.util
import json
import math
import os
import signal
import sys
import traceback
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "10000")          # read by torch: threads that wait do not block a busy CPU
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn                               # subtle: if DDP imports it, threads outlive the process group
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

data = importlib.import_module("01_data")                 # a name that begins with a digit cannot follow `import`
option, refuse = data.option, data.refuse

# ---- The line from noise to data ------------------------------------------------------------- (JiT eq. 1 and 2) ----
T_EPS = 0.05                                              # denominators are clamped here            (JiT section 4.3)

def mix(x, e, t):
    """The noised image z = t x + (1-t) e, from image x (B,...), noise e (B,...) and times t (B,).       (JiT eq. 1)"""
    t = expand(t, x)
    return t * x + (1 - t) * e

def expand(c, like):
    """One number per image (B,) -> (B,1,...,1), to multiply a batch with."""
    return c.reshape(-1, *[1] * (like.dim() - 1))

# ---- The configuration: sizes of the network, and what its output means ----------------------------------------------
@dataclass
class JiTConfig:
    """What a checkpoint needs to rebuild its network.

    option(default, text, what it may be) is a flag of 03, too; refuse(bad, why) raises an error if the first is true.
    """
    image_size: int = 256                                 # pixels, height = width
    patch_size: int = option(16, "pixels (default: as many tokens as --model has)", "[1, inf)", group="network")
    in_channels: int = 3                                  # colours
    hidden_size: int = option(768, "width of a token", "[1, 100000]")
    depth: int = option(12, "number of blocks", "[1, 10000]")
    num_heads: int = option(12, "heads of the attention", "[1, inf)")
    mlp_ratio: float = option(4.0, "inner width of a plain FFN, in hidden sizes (SwiGLU: 2/3 of it)", "(0, 1000]")
    num_classes: int = option(1000, "id num_classes is the null class; 0: no classes (default: the data's)", "[0, inf)")
    bottleneck_dim: int = option(128, "width between the two maps of the patch embedding; 0: one map", "[0, 100000]")
    in_context_len: int = option(32, "class tokens put in front of the image tokens; 0: none", "[0, 100000]")
    in_context_start: int = option(4, "the block before which they are put there", "[0, inf)")
    dropout: float = option(0.0, "on attention output and FFN of the middle half of the blocks", "[0, 1)")
    noise_scale: float = option(1.0, "k, the noise's std (default: image size / 256, at least 1)", "(0, 1000]")
    # variants: names of the registries below, the first is JiT's
    pred: str = option("x", "what the output means", choices=lambda: ("x", "e", "v"))
    path: str = option("linear", "how z is mixed; others: --experiment paths", choices=lambda: PATHS)
    patch_embed: str = option("linear", "nonlinear: SiLU in the bottleneck", choices=lambda: ("linear", "nonlinear"))
    ffn: str = option("swiglu", "feed-forward network", choices=lambda: FFNS)
    norm: str = option("rmsnorm", "the norm of the blocks; experiments have others", choices=lambda: NORMS)
    mixer: str = option("attention", "what lets tokens see each other; experiments have others", choices=lambda: MIXERS)
    network: str = option("jit", "the network as a whole; experiments have others", choices=lambda: NETWORKS)
    rope: bool = option(True, "rotary position embedding on q and k")
    qk_norm: bool = option(True, "RMSNorm on q and k")
    aux: str = option("none", "auxiliary head, used in training only", choices=lambda: AUX_HEADS)

    def __post_init__(self):
        check_fields(self)
        refuse(self.image_size % self.patch_size,
               f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        refuse(self.hidden_size % (4 * self.num_heads),
               f"hidden size {self.hidden_size} is not a multiple of 4 x {self.num_heads} heads: channels turn in "
               "pairs, half of a head's with the row and half with the column")
        refuse(self.patch_embed == "nonlinear" and not self.bottleneck_dim,
               "a nonlinear patch embedding needs a bottleneck (--bottleneck-dim) to put the SiLU in")
        if self.in_context_start >= self.depth:
            self.in_context_len = 0                       # they would never be put there: leave them out

# ---- Layers, with the initialisation of JiT: Xavier for linear maps, N(0, 0.02^2) or zero where said -----------------
class Linear(nn.Linear):
    """A linear map that begins with Xavier-uniform weights and zero bias."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight.flatten(1))   # subtle: of PatchLinear (out,in,p,p), a map of whole patches
        if self.bias is not None:
            nn.init.zeros_(self.bias)

def normal(layer):
    nn.init.normal_(layer.weight, std=0.02)
    return layer

def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer

# ---- Patches and positions ------------------------------------------------------------------------------------------
def patchify(x, p):
    """Images (B,C,H,W) -> tokens (B, N, p*p*C), patch after patch, row by row; inside a patch channels come last.

    What unpatchify undoes.  The network itself cuts by F.unfold, channels first, in PatchEmbed.
    """
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p)                                                      # B C  H/p p  W/p p
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)                  # B N p*p*C

def unpatchify(tokens, p):
    """Tokens (B, N, p*p*C) -> square images (B,C,H,W), the inverse of patchify: the output's order of numbers."""
    B = len(tokens)
    side = math.isqrt(tokens.shape[1])
    x = tokens.reshape(B, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)                          # B C  H/p p  W/p p
    return x.reshape(B, -1, side * p, side * p)

class PatchLinear(nn.Conv2d):
    """A linear map of patches (B,N,C*p*p), channels first.  It is a Conv2d so that official weights fit."""

    reset_parameters = Linear.reset_parameters

    def forward(self, patches):
        return F.linear(patches, self.weight.flatten(1), self.bias)

class PatchEmbed(nn.Module):
    """Patch -> bottleneck -> hidden: two linear maps (JiT section 4.2, figure 4); nonlinear puts SiLU between them."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        width = config.bottleneck_dim
        self.proj1 = PatchLinear(config.in_channels, width or D, config.patch_size, bias=not width)
        self.act = nn.SiLU() if config.patch_embed == "nonlinear" else nn.Identity()
        self.proj2 = PatchLinear(width, D, 1) if width else nn.Identity()

    def forward(self, x):                                                                          # B C H W
        p = self.proj1.kernel_size
        patches = F.unfold(x, p, stride=p).transpose(1, 2)                                         # B N C*p*p
        return self.proj2(self.act(self.proj1(patches)))                                           # B N D

def position_table(hidden, side):
    """Fixed 2-D sine-cosine positions (1,N,D): half the channels from the column, half from the row (as MAE, DiT)."""
    omega = 10000 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))              # D/4
    place = torch.arange(side * side)[:, None]            # row by row                             # N 1
    across = place % side * omega                                                                  # N D/4
    down = place // side * omega                                                                   # N D/4
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1).float()[None]    # 1 N D

def rotary_table(head_dim, side, context):
    """The 2-D rotary embedding: two tables, (2,L,1,d), the 1 for the heads.                        (RoFormer eq. 34)

    [0] has the cosine of each channel's angle, (c0, c0, c1, c1, ...), [1] its sine with signs, (-s0, s0, -s1, s1, ...).
    The first half of a head's channels turns with the row, the second with the column; context tokens do not turn.
    """
    freq = 10000 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))                         # d/4
    place = torch.arange(side * side)[:, None]                                                     # N 1
    angles = torch.cat([place // side * freq, place % side * freq], dim=1)                         # N d/2
    angles = torch.cat([torch.zeros(context, head_dim // 2), angles])                              # L d/2
    angles = angles.repeat_interleave(2, dim=1)           # a0 a0 a1 a1 ...                        # L d
    sign = torch.tensor([-1, 1]).repeat(head_dim // 2)    # - + - + ...                            # d
    return torch.stack([angles.cos(), sign * angles.sin()])[:, :, None]                            # 2 L 1 d

def rotate(x, cos, sin):
    """Turn each pair of adjacent channels of x (B,L,h,d) by its angle: (x0 cos - x1 sin, x1 cos + x0 sin).

    cos, sin: (L,1,d), sin with signs -+.  A turned q times a turned k depends only on how far apart their tokens are.
    """
    if x.is_cpu and not torch.compiler.is_compiling():    # the same as one complex product, faster there
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                            # B L h d/2
        return torch.view_as_real(pairs * torch.complex(cos[..., ::2], sin[..., 1::2])).flatten(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                                        # B L h d
    return x * cos + swapped * sin

# ---- Conditions: time and class -------------------------------------------------------------------------------------
class TimeEmbed(nn.Module):
    """Time (B,) in [0,1], not scaled to 0..1000 as in DiT -> (B,D): 256 cosine and sine features, then a small MLP."""

    def __init__(self, hidden):
        super().__init__()
        self.mlp = nn.Sequential(normal(Linear(256, hidden)), nn.SiLU(), normal(Linear(hidden, hidden)))

    def forward(self, t):
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * freq                                                         # B 128
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))                           # B D

class LabelEmbed(nn.Module):
    """Class (B,) -> (B,D).  The last row is the null class, learned when labels are dropped in training, for CFG."""

    def __init__(self, num_classes, hidden):
        super().__init__()
        self.embedding_table = normal(nn.Embedding(num_classes + 1, hidden))

    def forward(self, y):
        return self.embedding_table(y)

# ---- The Transformer block: attention and FFN, each behind a norm that the condition shifts, scales and gates -------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 also under autocast."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v: for each token a weighted mean of all v, its values.  q, k, v: (B,h,L,d)."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)    # the same in one kernel; its backward pass is slow on a CPU
    scores = q * q.shape[-1]**-0.5 @ k.transpose(-1, -2)                                           # B h L L
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return weights @ v                                                                             # B h L d

class Attention(nn.Module):
    """Every token looks at every other: softmax attention with normalised and rotated q and k."""

    def __init__(self, config, layer=0):
        super().__init__()
        D = config.hidden_size
        d = D // config.num_heads
        self.qkv = Linear(D, 3 * D)
        self.q_norm = RMSNorm(d) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d) if config.qk_norm else nn.Identity()
        self.proj = Linear(D, D)
        self.head_dim = d

    def forward(self, x, rope=None):                                                               # B L D
        q, k, v = self.split(x, rope)                                                              # B h L d, each
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))                               # B L D

    def split(self, x, rope):
        """q, k, v of every head, q and k normalised and rotated.  The heads' axis moves last: memory lies in order."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)                      # B L h d, each
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        return [part.to(v.dtype).transpose(1, 2) for part in (q, k, v)]                            # B h L d, each

class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), inner width 2/3 of mlp_ratio * D so that it costs what a plain MLP does (Shazeer 2020)."""

    def __init__(self, hidden, inner, dropout):
        super().__init__()
        width = int(inner * 2 / 3)
        self.w12 = Linear(hidden, 2 * width)
        self.w3 = Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(x1) * x2))

def modulate(x, shift, scale):
    """adaLN: the condition's affine map after a norm (DiT section 3.2)."""
    return x * (1 + scale) + shift

class Block(nn.Module):
    """One Transformer block with adaLN-Zero: x + gate * f(norm(x) * (1 + scale) + shift), for attention, then FFN.

    "Zero": all six signals start at zero, the gates too, so every block starts as the identity.  The condition c is
    (B,1,D), the same for all tokens, or (B,L,D), one per token.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        D = config.hidden_size
        middle = config.depth // 4 <= layer < config.depth // 4 * 3
        dropout = config.dropout if middle else 0.0
        self.norm1 = NORMS[config.norm](D)                                                         # JiT: RMSNorm
        self.attn = MIXERS[config.mixer](config, layer)                                            # JiT: Attention
        self.norm2 = NORMS[config.norm](D)
        self.mlp = FFNS[config.ffn](D, int(config.mlp_ratio * D), dropout)                         # JiT: SwiGLU
        self.dropout = nn.Dropout(dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zeroed(Linear(D, 6 * D)))

    def forward(self, x, c, rope=None):                                                            # B L D, B 1|L D
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))                       # B L D

class FinalLayer(nn.Module):
    """Norm, shift and scale, then one linear map from a token to its patch of pixels."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm_final = NORMS[config.norm](D)                                                    # JiT: RMSNorm
        self.linear = zeroed(Linear(D, config.patch_size**2 * config.in_channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zeroed(Linear(D, 2 * D)))

    def forward(self, x, c):                                                                       # B N D, B 1 D
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                             # B N p*p*C

# ---- The network ----------------------------------------------------------------------------------------------------
class JiT(nn.Module):
    """net(z, t, y) -> prediction (B,C,H,W): the clean image, if config.pred is "x".

    z: (B,C,H,W) float noised images.  t: (B,) float in [0,1].  y: (B,) int64 in [0, num_classes], num_classes = null.
    At initialisation the output is exactly zero.  Parameter names are the official ones, so official weights load.
    first_layer: the number of the first block, in a network made of several JiTs.
    """

    def __init__(self, config, first_layer=0):
        super().__init__()
        self.config = config
        D = config.hidden_size
        side = config.image_size // config.patch_size
        context = config.in_context_len
        self.x_embedder = PatchEmbed(config)
        self.pos_embed = nn.Parameter(position_table(D, side), requires_grad=False)
        self.t_embedder = TimeEmbed(D)
        self.y_embedder = LabelEmbed(config.num_classes, D)
        if context:
            self.in_context_posemb = nn.Parameter(torch.randn(1, context, D) * 0.02)
        self.blocks = nn.ModuleList(Block(config, first_layer + i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("rope_table", rotary_table(D // config.num_heads, side, context), persistent=False)

    def forward(self, z, t, y, tap=None):
        """See the class.  experiment: with tap=k returns (prediction, the image tokens after block k), for a head."""
        t_emb = self.t_embedder(t)                                                                 # B D
        y_emb = self.y_embedder(y)                                                                 # B D
        c = (t_emb + y_emb)[:, None]                                                               # B 1 D
        tokens = self.x_embedder(z) + self.pos_embed                                               # B N D
        tokens, tapped = self.transform(tokens, c, y_emb, tap)                                     # B N D
        out = unpatchify(self.final_layer(tokens, c), self.config.patch_size)                      # B C H W
        return out if tap is None else (out, tapped)

    def transform(self, x, c, y_emb, tap=None):
        """Image tokens (B,N,D) through all blocks -> (image tokens, those after block `tap`)."""
        config = self.config
        context = 0
        tapped = None
        for i, block in enumerate(self.blocks):
            if config.in_context_len and i == config.in_context_start:
                context = config.in_context_len
                x = torch.cat([y_emb[:, None] + self.in_context_posemb, x], dim=1)                 # B L D
            x = block(x, c, self.rope(context))                                                    # B L D
            if i == tap:
                tapped = x[:, context:]                                                            # B N D
        return x[:, context:], tapped

    def rope(self, context):
        """The rotary table of the image tokens, with the context tokens in front or without, or None."""
        first = 0 if context else self.config.in_context_len
        return self.rope_table[:, first:] if self.config.rope else None

# ======================================================================================================================
# first reading ends here: conversions and the shift of time (03 and 04 use them), variants, sizes, checkpoints, devices
# ======================================================================================================================

# ---- Any prediction as any other; time and pixels ------------------------------------------------ (JiT Table 1) ----
def velocity_target(x, e, t):
    """The derivative of mix by t: v = x - e, at every t.                                                (JiT eq. 2)"""
    return x - e

def conversion(kind, to, t, t_eps=T_EPS):
    """A prediction of one kind ("x", "e", "v") is an affine map of another:  to = u * value + b * z.     (JiT Table 1)

    Returns (u, b), each shaped like t.  Denominators are clamped at t_eps from below; from v nothing is divided.
    Since z is known, a squared error in the space `to` is u^2 times the one in the space `kind`: choosing the space of
    the loss is choosing a weight over t.  For x to v that weight is 1 / (1-t)^2.
    """
    zero = torch.zeros_like(t)
    one = torch.ones_like(t)
    noise = (1 - t).clamp_min(t_eps)                      # the share of noise in z, and
    image = t.clamp_min(t_eps)                            # that of the image, as denominators
    formulas = {
        ("x", "v"): (1 / noise, -1 / noise),              # v = (x - z) / (1-t)
        ("x", "e"): (-t / noise, 1 / noise),              # e = (z - t x) / (1-t)
        ("v", "x"): (1 - t, one),                         # x = z + (1-t) v
        ("v", "e"): (-t, one),                            # e = z - t v
        ("e", "x"): ((t - 1) / image, 1 / image),         # x = (z - (1-t) e) / t
        ("e", "v"): (-1 / image, 1 / image),              # v = (z - e) / t
    }
    return formulas.get((kind, to), (one, zero))

def shift_time(t, shift):
    """More of [0,1] near the noise for shift A > 1: t / (t + A (1-t)).  For big images, latents (SD3 eq. 23, RAE)."""
    return t / (t + shift * (1 - t))

def to_float(images, device="cpu"):
    """uint8 (B,H,W,C) -> float (B,C,H,W) in [-1,1] on the device; latents, float16, keep their values."""
    x = torch.as_tensor(images).to(device).permute(0, 3, 1, 2)
    x = x.contiguous()                                    # subtle: randn_like would keep NHWC's slow strides
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()

def to_uint8(x):
    """Pixels in [-1,1], float -> uint8 0..255, rounded, not truncated; the inverse of u / 127.5 - 1."""
    return (((x.float() + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8)

# ---- Variants of the parts, looked up by name -----------------------------------------------------------------------
def bottleneck_ffn(hidden, inner, dropout):
    """Improved JiT's (listing 1): squeezed to D/2 before it widens.  It has no dropout."""
    return nn.Sequential(Linear(hidden, hidden // 2), nn.GELU(), Linear(hidden // 2, inner), nn.SiLU(),
                         Linear(inner, hidden))

# experiment: a file of tests/experiments/ adds rows to these, as MIXERS["dice"] = DiceMixer
FFNS = {"swiglu": SwiGLU, "bottleneck": bottleneck_ffn}                        # f(hidden, inner, dropout)
NORMS = {"rmsnorm": RMSNorm}                                                   # f(hidden)
MIXERS = {"attention": Attention}                                              # f(config, layer)
NETWORKS = {"jit": (JiTConfig, JiT)}                                           # (configuration, network)
PATHS = {"linear": SimpleNamespace(mix=mix, velocity_target=velocity_target, conversion=conversion,
                                   scales=lambda t: (t, 1 - t))}               # scales: of image and noise in z

def convert(value, kind, to, z, t, path="linear", t_eps=T_EPS):
    """Turn a prediction of one kind into another, in fp32, on any path.  value, z: (B,...).  t: (B,)."""
    u, b = PATHS[path].conversion(kind, to, t, t_eps)
    return expand(u, z) * value + expand(b, z) * z

# ---- Auxiliary heads: a second question put to the tokens, in training only          (Improved JiT, section 3.3) ----
class AuxHead(nn.Module):
    """Gets the image tokens after block `after` (-1: the last).  This one asks nothing; others are subclasses of it.

    prepare(batch): the batch with what the question needs.  forward(tokens), of a subclass: the answer.
    loss(answer, batch): what is added to the diffusion loss, times `weight` (--aux-weight).
    """
    after = -1
    weight = 0.1
    answer = None

    def __init__(self, config):
        super().__init__()

    def prepare(self, batch):
        return batch

    def loss(self, answer, batch):
        return batch["t"].new_zeros(())

class PooledHead(AuxHead):
    """Mean of the tokens -> Linear, SiLU, Linear.  departure: Improved JiT's text has one layer for the time."""
    outputs = 1

    def __init__(self, config):
        super().__init__(config)
        D = config.hidden_size
        self.mlp = nn.Sequential(Linear(D, D), nn.SiLU(), Linear(D, self.outputs))

    def forward(self, tokens):                                                                     # B N D
        return self.mlp(tokens.mean(dim=1)).float()                                                # B outputs

class TimeHead(PooledHead):
    """How noisy is this image?  Squared error against t."""

    def loss(self, answer, batch):
        return F.mse_loss(answer.squeeze(1), batch["t"])

class RotationHead(PooledHead):
    """By how many quarter turns was this image rotated?  Cross-entropy over four classes (RotNet).

    departure: Improved JiT's code rotates only the input of a second pass; we follow its text, in which the diffusion
    loss is taken on the rotated images too.
    """
    outputs = 4

    def prepare(self, batch):
        x = batch["x"]                                                                             # B C H W
        turns = torch.randint(4, (len(x),), device=x.device)                                       # B
        turned = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)])                        # 4 B C H W
        return batch | {"x": turned[turns, torch.arange(len(x), device=x.device)], "turns": turns}

    def loss(self, answer, batch):
        return F.cross_entropy(answer, batch["turns"])

class WithHead(nn.Module):
    """A network and its auxiliary head: called like the network; head.answer keeps what the head says to it."""

    def __init__(self, net, head):
        super().__init__()
        self.net = net
        self.head = head
        self.tap = head.after % net.config.depth

    def forward(self, z, t, y):
        out, tokens = self.net(z, t, y, tap=self.tap)
        self.head.answer = self.head(tokens)
        return out

AUX_HEADS = {"none": AuxHead, "time": TimeHead, "rotation": RotationHead}      # f(config); files add rows here, too

# ---- Tables ----------------------------------------------------------------------------------------------------------
def table(text, **full):
    """An aligned text -> {first word of a line: {heading: value}}.

    Values are read as JSON or, if they are none, as words; a dash leaves one out.  full: headings written out.
    """
    heading, *lines = text.strip().splitlines()
    keys = [full.get(word, word) for word in heading.split()]
    rows = {}
    for line in lines:
        name, *values = line.split()
        rows[name] = {key: json_or_word(value) for key, value in zip(keys[1:], values) if value != "-"}
    return rows

def json_or_word(text):
    try:
        value = json.loads(text)
        return tuple(value) if isinstance(value, list) else value
    except ValueError:
        return text

# ---- Sizes: B to G are the paper's (JiT Table 9; B/4 Table 2b), T is ours, for a CPU, S for one GPU ------------------
MODELS = table("""
model     image  patch hidden  depth  heads bottleneck  start context dropout noise_scale classes  gmac
JiT-T/8      32      8    192      6      3         48      2       4       0           1      10     -
JiT-T/16     64     16    192      6      3         64      2       4       0           1      10     -
JiT-S/4      32      4    384     12      6         48      4       8       0           1      10     -
JiT-S/16    256     16    384     12      6        128      4      32       0           1    1000     -
JiT-B/4      64      4    768     12     12        128      4      32       0           1    1000     -
JiT-B/16    256     16    768     12     12        128      4      32       0           1    1000    25
JiT-B/32    512     32    768     12     12        128      4      32       0           2    1000    26
JiT-B/64   1024     64    768     12     12        128      4      32       0           4    1000    30
JiT-L/16    256     16   1024     24     16        128      8      32       0           1    1000    88
JiT-L/32    512     32   1024     24     16        128      8      32       0           2    1000    89
JiT-H/16    256     16   1280     32     16        256     10      32     0.2           1    1000   182
JiT-H/32    512     32   1280     32     16        256     10      32     0.2           2    1000   183
JiT-G/16    256     16   1664     40     16        256     10      32     0.2           1    1000   383
""", image="image_size", patch="patch_size", hidden="hidden_size", heads="num_heads", bottleneck="bottleneck_dim",
                    start="in_context_start", context="in_context_len", classes="num_classes")
# the paper's cost, called "Gflops" there; B/64's 30 leaves out the bottleneck
PAPER_GMAC = {name: row.pop("gmac", "-") for name, row in MODELS.items()}

def build(config):
    """The network that a configuration describes."""
    return NETWORKS[config.network][1](config)

# ---- Experiments: files that add rows to the registries --------------------------------------------------------------
EXPERIMENTS_FOLDER = Path(__file__).resolve().parent / "tests/experiments"
LOADED = {}                                               # {path: module}

def experiment_name(name):
    """The name of a file of tests/experiments/; of another file its absolute path."""
    path = Path(name).resolve()
    if "/" in name or name.endswith(".py"):
        return path.stem if path.parent == EXPERIMENTS_FOLDER else str(path)
    return name

def load_experiment(name):
    """Import tests/experiments/NAME.py, or a file by its path; returns the module.  Raises UsageError, ValueError."""
    path = EXPERIMENTS_FOLDER / f"{experiment_name(name).removesuffix('.py')}.py"          # an absolute path stays
    refuse(not path.is_file(), f"--experiment {name}: there is no {path}; known are the files of {EXPERIMENTS_FOLDER}, "
           "and to 03_train.py the rows that its --help names")
    if path not in LOADED:
        spec = importlib.util.spec_from_file_location(f"experiment {path}", path)
        sys.modules[spec.name] = LOADED[path] = importlib.util.module_from_spec(spec)        # dataclasses look there
        try:
            spec.loader.exec_module(LOADED[path])
        except (Exception, SystemExit) as error:
            del LOADED[path]
            line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
            raise ValueError(f"--experiment {name}: {type(error).__name__}: {error} ({path}, line {line})")
    return LOADED[path]

def load_recorded(names, place, given=""):
    """Import the experiments that a file names.  Those from elsewhere must be given again: data never chooses code."""
    for name in names:
        plain = "/" not in name and (EXPERIMENTS_FOLDER / f"{name}.py").is_file()
        refuse(not plain and Path(name).stem not in [Path(path).stem for path in filter(None, given.split(","))],
               f"{place} was made with an experiment of your own: pass --experiment {name!r} again (04_sample.py also "
               "takes it from a new place; a file never makes us run code from outside the project)")
        if plain:
            load_experiment(name)

def load_coder(folder, made_by):
    """experiment: what turns the latents of a packed data set into pixels and back; None where it holds pixels.

    made_by: what the data set's meta.json says of its coder, or None.  Raises ValueError.
    """
    if made_by is None:
        return None
    data.expect(made_by, experiment=str)
    load_recorded([made_by["experiment"]], folder)
    return load_experiment(made_by["experiment"]).load_coder(folder, made_by)

def to_pictures(x, coder=None):
    """(B,C,H,W) in [-1,1], or latents and their coder -> numpy uint8 (B,H,W,3), as files and pictures want it."""
    x = coder.decode(x.float()) if coder else x
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

# ---- Checkpoints: ours, and the official release's (a dict with model, model_ema1, model_ema2 and args) -------------
@contextmanager
def reading(path, advice=""):
    """Inside, whatever goes wrong is said to be this file's fault.  Raises ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:                            # other content may raise any kind
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{path} cannot be used: {what}{' '.join(str(error).split())[:300]}{advice}")

def read_checkpoint(path):
    """Open a checkpoint file without running anything in it.  Raises ValueError with one line that names the file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint file at {path}: train one first (python 03_train.py), or is the name another? "
                         "A run's is runs/NAME/checkpoint.pt")
    try:
        if zipfile.ZipFile(path).testzip():               # torch does not look at the checksums
            raise ValueError
        with torch.serialization.safe_globals([argparse.Namespace]):        # the official files' only foreign class
            state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:                                     # torch raises many kinds
        raise ValueError(f"{path} is not a checkpoint: no access, damaged, not written by torch.save (1.6 or newer), "
                         "or holding more than tensors and plain values")
    if not {"ema", "model_ema1"} & state.keys():
        raise ValueError(f"{path} is not a JiT checkpoint: it holds neither ema nor model_ema1")
    found = digest_of(state)
    refuse(found.items() - state.get("digest", found).items(), f"{path}: its settings or its log were edited since it "
           "was written: put the file back as it was, or train anew; flags change settings", ValueError)
    return state

def digest_of(state):
    """{name: a number that tells whether it is what was saved} of a checkpoint's parts that are plain values."""
    # subtle: what repr() makes of a letter depends on Python's version
    return {name: zlib.crc32(ascii(state[name]).encode())
            for name in "config info options rows".split() if name in state}

def load_network(path, ema=0, experiment=""):
    """A checkpoint file -> (network in eval mode, without auxiliary head; info).  Raises ValueError.

    ema picks one set of averaged weights by its place (0 is the first), -1 the raw weights.  Official files are known
    by their keys: model, image size, classes and noise scale come from their args.
    """
    for name in filter(None, experiment.split(",")):
        load_experiment(name)
    state = read_checkpoint(path)
    info = {"sampling": {}, "classes": [], "experiments": []}
    with reading(path):
        if "args" in state:
            args = vars(state["args"])
            config = MODELS[args["model"]] | {"image_size": args["img_size"], "num_classes": args["class_num"],
                                              "noise_scale": float(args.get("noise_scale", 1.0))}
            averages = [state[name] for name in ("model_ema1", "model_ema2") if name in state]
        else:
            config = state["config"]
            averages = list(state["ema"])
            info |= state.get("info", {})
            data.expect(info, sampling=dict, classes=list, experiments=list)
            "".join(info["classes"])                      # TypeError, unless all of them are texts
        if info.get("step") == 0:
            raise ValueError("it has not been trained for a step")
    load_recorded(info["experiments"], path, experiment)
    refuse(not (0 <= ema < len(averages) or ema == -1 and "model" in state),
           f"--ema {ema}: the averaged weights of {path} are numbered 0 to {len(averages) - 1}, and -1 stands for the "
           f"raw weights{'' if 'model' in state else ', which it does not hold'}")
    with reading(path):
        kind = NETWORKS[config.get("network", "jit")][0]
        net = build(kind(**config | {"aux": "none"}))
        weights = state["model"] if ema == -1 else averages[ema]
        load_weights(net, weights)
        if 0 < len(info["classes"]) < net.config.num_classes:
            raise ValueError("it names only a part of its classes")
    return net.eval(), info

def fingerprint(arrays):
    """Eight hex digits of {name: tensor or array}, as of a network's weights: samples of others are other samples."""
    crc = 0
    for value in arrays.values():
        crc = zlib.crc32(torch.as_tensor(value).cpu().numpy(), crc)
    return f"{crc:08x}"

def load_weights(net, weights):
    """Copy weights into net, all of them and no others.  Raises RuntimeError or ValueError that name a misfit."""
    weights = {name.removeprefix("net."): value for name, value in weights.items() if "rope" not in name}
    tables = {name: value for name, value in net.state_dict().items() if name.endswith("pos_embed")}
    net.load_state_dict(tables | weights)
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"weight {name} holds NaN or infinity")

def save(state, path):
    """torch.save, whole, with the digest of plain values.  Raises ValueError when the disk is full."""
    try:
        with data.whole(path) as part:
            torch.save(state | {"digest": digest_of(state)}, part)
    except (OSError, RuntimeError) as error:              # subtle: torch reports a full disk as a RuntimeError
        raise ValueError(f"cannot write {path} ({str(error).splitlines()[0][:100]}); what was there is intact: if a "
                         "disk is full, make room, and give the same command again")

# ---- Plumbing of the later scripts: device and processes ------------------------------------------------------------
def warn(message):
    with suppress(OSError):                               # a full disk under stderr's file is no reason to stop
        print(f"warning: {message}", file=sys.stderr)

def check_fields(self, given=None, where=""):
    """Raise UsageError unless the values of a dataclass, or those given for it, are what its fields' option() says.

    where: what the message begins with.
    """
    for entry in fields(self):
        value = (given or vars(self)).get(entry.name, entry.default)
        if value is not entry.default:                    # a default may be None: open
            good = type(value) is entry.type or (type(value), entry.type) == (int, float)
            if good and entry.type is tuple:
                good = value and {*map(type, value)} <= {int, float}
            refuse(not good, f"{where}{entry.name} {value!r}: it must be of the type {entry.type.__name__} (a tuple: "
                   "of one number or more)")
            data.check(where + entry.name, value, **entry.metadata)

def settings_for(cls, settings):
    """Those of the settings {name: value} that are fields of the dataclass."""
    return {entry.name: settings[entry.name] for entry in fields(cls) if entry.name in settings}

def folder_of(name, parent):
    """A bare name means parent/name; anything with a slash, and the dots, are paths."""
    return Path(name) if "/" in str(name) or name in (".", "..") else Path(parent) / name

@contextmanager
def device_and_processes(name=None):
    """Set up device and processes; yields (device, rank, world).  name: cuda, cpu or mps, None: cuda or else cpu.

    Under torchrun every process gets its own GPU.  Raises UsageError.
    """
    places = [os.environ.get(variable, "") for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    launched = any(places)
    known = all(map(str.isdecimal, places)) and int(places[0]) < int(places[2]) < 10**6
    refuse(launched and not known, "RANK, LOCAL_RANK and WORLD_SIZE are set, but not as by torchrun: unset them")
    rank, index, world = map(int, places) if launched else (0, 0, 1)
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ["cuda", "cpu"] + ["mps"] * torch.backends.mps.is_available()      # the last has not been tried
    refuse(kind not in kinds, f"--device {name}: give {' or '.join(kinds)}")
    device = torch.device(kind)
    if kind == "cuda":
        count = torch.cuda.device_count()
        refuse(index >= count, f"--device {name}: GPU {index} is asked for, this machine has {count}: start fewer "
               "processes, or leave it out")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    keep_freed_memory()
    if launched:                                          # a day: others wait while the first process scores or saves
        signal.signal(signal.SIGTERM, signal.SIG_DFL)     # Python's would not be heard while one waits for the others
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=1))
        dist.barrier()                                    # subtle: one that leaves early would cut others' connections
    with torchs_errors():
        yield device, rank, world
    if launched:                                          # subtle: the last tensors that went round may still be freed
        data.time.sleep(0.1)                              # by Gloo's threads, for which they need Python's lock; ending
        dist.destroy_process_group()                      # the group keeps that, and waits for them: for ever

@contextmanager
def torchs_errors():
    """Memory that is used up, and a compiler that is missing, as a ValueError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise ValueError("out of memory: pass a smaller --micro-batch, --batch-size or --model")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ValueError(f"torch.compile failed ({str(error).strip().splitlines()[0][:100]}): pass --no-compile, "
                             "or to 04_sample.py no --compile")
        raise

def keep_freed_memory():
    """Let the C library keep what is freed instead of handing it back to the system (glibc; elsewhere nothing happens).

    subtle: by default every array of some megabytes is mapped afresh and filled with zeros page by page, which on a CPU
    takes up to fifty times as long as multiplying it by two.  A third of a training step went there.
    """
    with suppress(Exception):                             # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)

def ahead(function, jobs, count):
    """Yield function(job) for every job, in order; threads work on the `count` jobs after the one in use."""
    with ThreadPoolExecutor(count) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

def choose_precision(amp, device):
    """bf16, fp16 or off -> the same; None -> what the hardware is fast at.

    bf16: NVIDIA's GPUs since Ampere, CPUs with AVX512-bf16.  fp16: the GPUs before.
    """
    if amp is None and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return amp or ("bf16" if torch.cpu._is_avx512_bf16_supported() else "off")

def autocast(amp, device, cache=True):
    """The context in which the network runs; parameters, state and losses stay fp32.  cache: keep weights cast once."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off", cache_enabled=cache)

def save_picture(path, image):
    """Write a PNG file with our mark; what it replaces must have it, too.  Raises ValueError."""
    mark = PngInfo()
    mark.add_text("Software", "JiT scripts")
    if path.exists() and not (path.is_file() and b"Software\0JiT scripts" in path.read_bytes()):
        raise ValueError(f"{path} is there, and was not drawn by these scripts: move it away")
    with data.whole(path) as part:
        image.save(part, "png", pnginfo=mark)

def chart(title, label, lines, log=False):
    """Curves {name: [(x, y), ...]} over one axis, called `label`, as a PIL picture.  log: both axes are logarithmic."""
    curves = {name: np.log10(line) if log else np.array(line) for name, line in lines.items()}
    points = np.concatenate(list(curves.values()))
    low = points.min(axis=0)
    span = np.ptp(points, axis=0) + 1e-9
    corner = np.array([50, 285])                          # in pixels
    size = np.array([405, -250])                          # y goes up
    sheet = Image.new("RGB", (480, 320), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle([50, 35, 455, 285], outline="gray")
    for part in np.linspace(0, 1, 5):                     # numbers along both axes
        x, y = corner + part * size
        marks = low + part * span
        marks = 10**marks if log else marks
        data.write(draw, (x, 289), f"{marks[0]:.4g}", 60, "ma")
        data.write(draw, (46, y), f"{marks[1]:.3g}", 45, "rm")
    data.write(draw, (50, 2), title, 400)
    data.write(draw, (240, 304), label, 400, "ma")
    for row, (name, curve) in enumerate(curves.items()):
        colour = "navy firebrick seagreen darkorange purple gray".split()[row % 6]
        draw.line([tuple(point) for point in corner + (curve - low) / span * size], fill=colour, width=2)
        data.write(draw, (50 + row * 100, 18), name, 95, fill=colour)
    return sheet

def interleaved(columns):
    """[(images of one kind, images of another), ...], a pair per column -> rows: both kinds of each image, in turn."""
    return np.concatenate(np.swapaxes(columns, 0, 2))     # columns, 2, images, ... -> images, 2, columns, ... -> rows

# ---- As a script: the table of sizes, and one batch with the shape after each step ----------------------------------
def count_macs(config):
    """Multiply-adds of one forward pass of one image, counted by torch on tensors without storage."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        net = build(config).eval()
        z = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        batch = z, torch.empty(1), torch.zeros(1).long()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(*batch)
    return counter.get_total_flops() // 2

def count_parameters(config):
    """Trainable numbers; the fixed table of positions is not one of them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters() if p.requires_grad)

def print_table():
    """One line per model: what it costs, beside the paper's figure."""
    print("model     image  patch hidden  depth  heads     parameters    GMAC  paper")
    for name, row in MODELS.items():
        config = JiTConfig(**row)
        print(f"{name:9s}{config.image_size:6d} {config.patch_size:6d} {config.hidden_size:6d} {config.depth:6d} "
              f"{config.num_heads:6d} {count_parameters(config):14,d} {count_macs(config) / 1e9:7.2f} "
              f"{PAPER_GMAC[name]:>6}")

def print_shapes(config):
    """Send a batch of two through a fresh network and print the shape after each step."""
    net = build(config).eval()

    def show(name, shape):
        print(f"  {name:40s} {' x '.join(map(str, shape))}")
    for name, module in net.named_modules():
        if name.count(".") == 1 or name in ("x_embedder", "final_layer"):      # the parts, and every block
            module.register_forward_hook(lambda module, inputs, output, name=name: show(name, output.shape))
    z = torch.randn(2, config.in_channels, config.image_size, config.image_size)
    show("z: the noised images", z.shape)
    with torch.no_grad():
        show("unpatchify: the predicted clean images", net(z, torch.rand(2), torch.zeros(2).long()).shape)

def main(argv=None):
    data.parse(argv, "Print the table of sizes, and walk one batch through the network of the first command.")
    print_table()
    print("\nOne batch through JiT-T/16:")
    print_shapes(JiTConfig(**MODELS["JiT-T/16"]))

if __name__ == "__main__":
    sys.exit(data.run(main))
