"""02_model.py -- the network: a plain Transformer on large pixel patches (JiT), and the path from noise to data

What this stage teaches: how the three things a network may predict, x, e or v, turn into each other; how an image
becomes a few long tokens and comes back; and how time and class steer every block (adaLN-Zero, context tokens).
Reads nothing, writes nothing.   Run it:   python 02_model.py   (7 s: the table of sizes, then one batch walked through)

TIME RUNS FROM NOISE TO DATA: t = 0 is pure noise, t = 1 is the clean image.  (Stable Diffusion 3, SiT and REPA write it
the other way round.)  With x the image in [-1, 1] and e ~ N(0, k^2 I) noise, k = noise_scale:

    z = t x + (1-t) e        the noised image the network sees                                      (JiT eq. 1)
    v = dz/dt = x - e        the velocity a sampler follows from noise to data                      (JiT eq. 2)
    z and t are known, so x, e and v say the same thing:  x = z + (1-t) v,  e = z - t v,  v = (x - z)/(1-t)
    (the code divides by max(1-t, 0.05): at t = 1 the last of the three divides by zero)

JiT predicts x and is trained with the loss on v: patches of real images fill a small part of the patch space, noise and
velocity fill all of it, and a network narrower than the patch can hold images only (JiT sections 3.3 and 4.2).

Letters of the shape column:  B images, C channels, H W pixels, p patch size, N = (H/p)(W/p) tokens, L = N + context
tokens, D hidden size, h heads, d = D/h.     Paper: Li & He 2025, "Back to Basics: Let Denoising Generative Models
Denoise", arXiv 2511.13720.  "Improved JiT" is the course paper whose variants are offered too (Siu 2025).
"departure:" marks what differs from its source on purpose, "subtle:" a trap, "variant:" what plain JiT does not need.
"""
import argparse
import ctypes
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

data = import_module("01_data")                           # a name that begins with a digit cannot follow `import`
option = data.option
T_EPS = 0.05                                              # denominators are clamped here (JiT Algorithms 1 and 2)

# ---- The path from noise to data, and what an output means                               (JiT eq. 1, 2, Table 1) ----
def path_coefficients(path, t):
    """The weights of a path (PATHS, below), alpha of the image and sigma of the noise, and their derivatives by t.

    Returns (alpha, sigma, alpha', sigma'), each fp32 and shaped like t.  Raises ValueError.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r} is unknown: one of {', '.join(PATHS)}")
    return tuple(c.float() for c in PATHS[path](t.double()))

def linear_path(t):
    """JiT's, and rectified flow's: z = t x + (1-t) e."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)

def mix(path, x, e, t):
    """The noised image z = alpha x + sigma e (B,...) from image x, noise e (B,...) and times t (B,).    (JiT eq. 1)"""
    alpha, sigma, _, _ = (expand(c, x) for c in path_coefficients(path, t))
    return (alpha * x).addcmul_(sigma, e)

def velocity_target(path, x, e, t):
    """The derivative of mix by t, v = alpha' x + sigma' e: x - e on the linear path.                    (JiT eq. 2)"""
    _, _, d_alpha, d_sigma = (expand(c, x) for c in path_coefficients(path, t))
    return d_alpha * x + d_sigma * e

def conversion(kind, to, t, path="linear", t_eps=T_EPS):
    """A prediction of one kind ("x", "e", "v") is an affine map of another:  to = u * value + w * z.     (JiT Table 1)

    Returns (u, w), each fp32 and shaped like t.  Both are fractions over sigma (from x) or over alpha (from e), which
    vanish at an end of the path and are clamped at t_eps from below; from v nothing vanishes, nothing is clamped.
    Since z is known, a squared error in the space `to` is u^2 times the one in the space `kind`: choosing the space of
    the loss is choosing a weight over t.  For x to v on the linear path that weight is 1 / (1-t)^2.
    """
    alpha, sigma, d_alpha, d_sigma = path_coefficients(path, t)
    # (z, v) are two linear functions of (x, e); the inverse of that 2 x 2 map, det being -1 on the linear path:
    #     z = alpha  x + sigma  e          x = (sigma' z - sigma  v) / det
    #     v = alpha' x + sigma' e          e = (alpha  v - alpha' z) / det       det = alpha sigma' - sigma alpha'
    det = alpha * d_sigma - sigma * d_alpha
    if kind == to:
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    if kind == "v":                                       # the two that never divide by zero
        return (-sigma / det, d_sigma / det) if to == "x" else (alpha / det, -d_alpha / det)
    if kind == "x":                                       # linear path:  v = (x - z) / max(1-t, t_eps)
        sigma = sigma.clamp_min(t_eps)
        return (-alpha / sigma, 1 / sigma) if to == "e" else (-det / sigma, d_sigma / sigma)
    alpha = alpha.clamp_min(t_eps)                        # linear path:  v = (z - e) / max(t, t_eps)
    return (-sigma / alpha, 1 / alpha) if to == "x" else (det / alpha, d_alpha / alpha)

def expand(c, like):
    """One number per image (B,) -> (B,1,...,1), to multiply a batch with."""
    return c.reshape(-1, *[1] * (like.dim() - 1))

def convert(value, kind, to, z, t, path="linear", t_eps=T_EPS):
    """Turn a prediction of one kind into another, in fp32.  value, z: (B,...).  t: (B,)."""
    u, w = conversion(kind, to, t, path, t_eps)
    return expand(u, z) * value.float() + expand(w, z) * z.float()

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

def to_pictures(x, coder=None):
    """(B,C,H,W) in [-1,1], or latents and their coder -> numpy uint8 (B,H,W,3), as files and pictures want it."""
    x = coder.decode(x.float()) if coder else x
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

# ---- Patches and positions ------------------------------------------------------------------------------------------
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
    """Fixed 2-D sine-cosine positions (1,N,D): half the channels from the column, half from the row (as MAE, DiT)."""
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
    """Turn each pair of adjacent channels of x (B,h,L,d) by its angle: (x0 cos - x1 sin, x1 cos + x0 sin).

    cos, sin: (L,d/2).  Lengths stay, and the product of a turned q and a turned k depends on the difference of their
    angles alone, that is, on how far apart the two tokens are.
    """
    if not (x.is_cuda or torch.compiler.is_compiling()):  # the same as one complex product: faster on a CPU
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                            # B h L d/2
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)                     # B h L d
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)                                                   # B h L d/2
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], dim=-1).flatten(-2)             # B h L d

# ---- Conditions: time and class -------------------------------------------------------------------------------------
class TimeEmbed(nn.Module):
    """Time (B,) in [0,1], not scaled to 0..1000 as in DiT -> (B,D): 256 cosine and sine features, then a small MLP."""

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

# ---- The Transformer block: attention and FFN, each behind a norm that the condition shifts, scales and gates -------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 also under autocast."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight

def attend(q, k, v):
    """Softmax attention, (B,h,L,d) each, scale d^-1/2: torch's fused kernel, or written out where that is faster."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1]**-0.5 @ k.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)   # B h L L
    return weights.to(v.dtype) @ v                        # on a CPU the fused kernel's backward is the slower one

class Attention(nn.Module):
    """Softmax attention with normalised and rotated q and k."""

    def __init__(self, config, layer=0):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm = RMSNorm(D // self.heads) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // self.heads) if config.qk_norm else nn.Identity()

    def forward(self, x, rope=None):                                                               # B L D
        out = attend(*self.split(x, rope))                                                         # B h L d
        return self.proj(out.transpose(1, 2).flatten(2))                                           # B L D

    def split(self, x, rope):
        """q, k and v of every head, q and k normalised and rotated."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)            # B h L d, each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.to(v.dtype), k.to(v.dtype), v

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

def modulate(x, shift, scale):
    """adaLN: the condition's affine map after a norm (DiT section 3.2)."""
    return x * (1 + scale) + shift

class Block(nn.Module):
    """One Transformer block with adaLN-Zero: x + gate * f(norm(x) * (1 + scale) + shift), for attention, then FFN.

    The "Zero" that matters is the gate's: all six start at zero, so every block starts as the identity.  The condition
    c may be (B,1,D), the same for all tokens, or (B,L,D), one per token.  adaLN_modulation(c) ends with 6 D signals.
    """

    def __init__(self, config, dropout, layer=0):
        super().__init__()
        D = config.hidden_size
        self.norm1, self.norm2 = NORMS[config.norm](D), NORMS[config.norm](D)
        self.attn = MIXERS[config.mixer](config, layer)
        self.mlp = FFNS[config.ffn](D, int(config.mlp_ratio * D), dropout)
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
        self.norm_final = NORMS[config.norm](D)
        self.linear = nn.Linear(D, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):                                                                       # B N D, B 1 D
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                             # B N p*p*C

# ---- The network ----------------------------------------------------------------------------------------------------
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
        self.t_embedder = TIME_EMBEDS[config.two_times](D)
        self.y_embedder = LabelEmbed(config.num_classes, D)
        self.pos_embed = nn.Parameter(position_table(D, side), requires_grad=False)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, D))
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(Block(config, config.dropout if i in middle else 0.0, i) for i in range(depth))
        self.final_layer = FinalLayer(config)
        self.aux_head = AUX_HEADS[config.aux](config)
        self.checkpointing = False                        # recompute blocks in the backward pass: memory for time
        for name, table in zip(("cos", "sin"), rotary_table(D // config.num_heads, side, config.in_context_len)):
            self.register_buffer(f"rope_{name}", table, persistent=False)
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, N(0, 0.02) for tables and the time MLP, zero for every adaLN map and the output."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))   # subtle: a view; patches, not pixels, fan in
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        context = [self.in_context_posemb] if self.config.in_context_len else []
        time_mlp = self.t_embedder.mlp
        for weight in (self.y_embedder.embedding_table.weight, time_mlp[0].weight, time_mlp[2].weight, *context):
            nn.init.normal_(weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
                      self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def rope(self, context):
        """(cos, sin) for the image tokens, with the context tokens in front or without, or None."""
        first = 0 if context else self.config.in_context_len
        return (self.rope_cos[first:], self.rope_sin[first:]) if self.config.rope else None

    def forward(self, z, t, y, with_aux=False):
        """See the class.  with_aux=True returns (prediction, the auxiliary head's answer)."""
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)                                      # B D
        c = (t_emb + y_emb)[:, None]                                                               # B 1 D
        tokens = self.x_embedder(z) + self.pos_embed                                               # B N D
        tokens, answer = self.transform(tokens, c, y_emb, with_aux)                                # B N D
        out = unpatchify(self.final_layer(tokens, c), self.config.patch_size)                      # B C H W
        return (out, answer) if with_aux else out

    def transform(self, x, c, y_emb, with_aux=False):
        """Image tokens (B,N,D) through all blocks -> (image tokens, the auxiliary head's answer or None)."""
        config, context, answer = self.config, 0, None
        for i, block in enumerate(self.blocks):
            if config.in_context_len and i == config.in_context_start:
                context = config.in_context_len
                x = torch.cat([y_emb[:, None] + self.in_context_posemb, x.to(y_emb.dtype)], dim=1)  # B L D
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, c, self.rope(context), use_reentrant=False)
            else:
                x = block(x, c, self.rope(context))                                                # B L D
            if with_aux and i == self.aux_head.after % config.depth:           # variant: -1 is the last block
                answer = self.aux_head(x[:, context:])
        return x[:, context:], answer

# ---- Variants, looked up by name: other paths, norms, FFNs, mixers and times ----------------------------------------
def cosine_path(t):
    """SiT's "GVP"."""
    alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    return alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha

def ddpm_path(alpha, d_alpha):
    """A path that keeps the variance: sigma = sqrt(1 - alpha^2)."""
    sigma = (1 - alpha**2).clamp_min(0).sqrt()
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp_min(T_EPS)    # subtle: infinite at t = 1

def ddpm_linear_path(t):
    """The continuous form of DDPM's linear betas, from 0.1 to 20 (Song et al. 2021, eq. 33)."""
    n = 1 - t                                             # the papers' time: 0 is data
    alpha = torch.exp(-n**2 * (20 - 0.1) / 4 - n * 0.1 / 2)
    return ddpm_path(alpha, alpha * (n * (20 - 0.1) / 2 + 0.1 / 2))

def ddpm_cosine_path(t):
    """Nichol & Dhariwal 2021, eq. 17."""
    u, u0 = (1 - t + 0.008) / 1.008 * math.pi / 2, 0.008 / 1.008 * math.pi / 2
    return ddpm_path(torch.cos(u) / math.cos(u0), torch.sin(u) / math.cos(u0) * math.pi / 2 / 1.008)

def gelu_ffn(hidden, inner, dropout, approximate="tanh"):
    """DiT's; ViT and DINOv2 have the exact function instead of the approximation."""
    act = nn.GELU(approximate)
    return nn.Sequential(nn.Linear(hidden, inner), act, nn.Dropout(dropout), nn.Linear(inner, hidden))

def bottleneck_ffn(hidden, inner, dropout):
    """Improved JiT's (listing 1): squeezed to D/2 before it widens.  It has no dropout."""
    return nn.Sequential(nn.Linear(hidden, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, inner), nn.SiLU(),
                         nn.Linear(inner, hidden))

def plain_layernorm(dim):
    """DiT's norm: LayerNorm without learned weights."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

class TimeNorm(RMSNorm):
    """TD-norm: an RMSNorm whose weight moves with time, s p0 + (1-s) p1, s = sigmoid(a t + b).      (DiMR, section 3.3)

    departure: DiMR's is a LayerNorm that moves its shift too, in place of adaLN; here adaLN stays beside it.  Networks
    made by build() set t before each pass.
    """

    def __init__(self, dim):
        super().__init__(dim)
        self.weight1, self.time_map = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.tensor([1.0, 0.0]))
        self.t = None

    def forward(self, x):
        s = torch.sigmoid(self.time_map[0] * expand(self.t.float(), x) + self.time_map[1])         # B 1 1
        x = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return x * (s * self.weight + (1 - s) * self.weight1)

class DifferentialAttention(Attention):
    """(softmax(q1 k1) - lambda softmax(q2 k2)) v: what both maps of a pair attend to cancels.

    A pair of heads shares values twice as wide; a layer has one lambda.     (Differential Transformer 2024, eq. 1-3)
    """

    def __init__(self, config, layer):
        super().__init__(config)
        d, self.start = config.hidden_size // self.heads, 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas, self.out_norm = nn.Parameter(torch.randn(4, d) * 0.1), RMSNorm(2 * d)

    def forward(self, x, rope=None):                                                               # B L D
        q, k, v = self.split(x, rope)                                                              # B h L d, each
        v = torch.cat([v[:, ::2], v[:, 1::2]], dim=-1).repeat_interleave(2, dim=1)                 # B h L 2d
        first, second = attend(q, k, v).unflatten(1, (-1, 2)).unbind(2)                            # B h/2 L 2d
        a1, b1, a2, b2 = self.lambdas
        weight = (a1 @ b1).exp() - (a2 @ b2).exp() + self.start
        out = self.out_norm(first - weight * second) * (1 - self.start)
        return self.proj(out.transpose(1, 2).flatten(2))                                           # B L D

class ConvMixer(nn.Module):
    """ConvNeXt's: a depthwise 7 x 7 convolution of the token grid in place of attention."""
    branches = 1

    def __init__(self, config, layer):
        super().__init__()
        D, self.side = config.hidden_size, config.image_size // config.patch_size
        self.conv, self.proj = nn.Conv2d(D, self.branches * D, 7, padding=3, groups=D), nn.Linear(D, D)

    def forward(self, x, rope=None):                                                               # B N D
        y = self.conv(x.transpose(1, 2).unflatten(2, (self.side, -1)))                             # B branches*D h w
        return self.proj(self.combine(y).flatten(2).transpose(1, 2))

    def combine(self, y):
        return y

class DiceMixer(ConvMixer):
    """Two convolutions l and r; what they disagree on is faded out: (l + r) sigmoid(-softplus(a) (l-r)^2).       (DICE)

    departure: DICE's (l + r) / (1 + exp(a (l-r)^2)) is the same for a > 0, but where its exponential overflows (in half
    precision above exp(11.09)) its gradient is NaN.
    """
    branches = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.strictness = nn.Parameter(torch.zeros(1))

    def combine(self, y):
        left, right = y.float().unflatten(1, (-1, 2)).unbind(2)
        return (left + right) * torch.sigmoid(-F.softplus(self.strictness) * (left - right).square())

class SpanEmbed(TimeEmbed):
    """Times t and r at which a step begins and ends, (B,2) -> (B,D), for pMF.  A single t, (B,), means r = t.

    The map of the length starts at zero: with a trained JiT's weights the output is that JiT's, whatever the length.
    """

    def __init__(self, hidden):
        super().__init__(hidden)
        self.span = TimeEmbed(hidden)
        self.span_out = nn.Parameter(torch.zeros(hidden, hidden))              # not a Linear: initialize() fills those

    def forward(self, t):
        t, r = (t, t) if t.dim() == 1 else t.unbind(1)
        return super().forward(t) + self.span(r - t) @ self.span_out

PATHS = {"linear": linear_path, "cosine": cosine_path, "ddpm-linear": ddpm_linear_path, "ddpm-cosine": ddpm_cosine_path}
NORMS = {"rmsnorm": RMSNorm, "layernorm": plain_layernorm, "td": TimeNorm}
MIXERS = {"attention": Attention, "differential": DifferentialAttention, "convnext": ConvMixer, "dice": DiceMixer}
TIME_EMBEDS = {False: TimeEmbed, True: SpanEmbed}
FFNS = {"swiglu": SwiGLU, "gelu": gelu_ffn, "exact-gelu": partial(gelu_ffn, approximate="none"),
        "bottleneck": bottleneck_ffn}

# ---- Auxiliary heads: a second question put to the tokens, in training only          (Improved JiT, section 3.3) ----
class AuxHead(nn.Module):
    """Gets the image tokens after block `after` (-1: the last).  A head is a subclass with forward and loss.

    loss(answer, batch): what is added to the diffusion loss, times `weight` (--aux-weight).
    """
    after, weight = -1, 0.1

    def __init__(self, config):
        super().__init__()

class PooledHead(AuxHead):
    """Mean of the tokens -> Linear, SiLU, Linear."""
    outputs = 1

    def __init__(self, config):
        super().__init__(config)
        hidden = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, self.outputs))

    def forward(self, tokens):                                                                     # B N D
        return self.mlp(tokens.mean(dim=1))                                                        # B outputs

class TimeHead(PooledHead):
    """How noisy is this image?  Squared error against t."""

    @staticmethod
    def loss(answer, batch):
        return F.mse_loss(answer.float().squeeze(1), batch["t"])

class RotationHead(PooledHead):
    """By how many quarter turns was this image rotated?  Cross-entropy over four classes (RotNet)."""
    outputs = 4

    @staticmethod
    def loss(answer, batch):
        return F.cross_entropy(answer.float(), batch["turns"])

class RepaHead(AuxHead):
    """Do the tokens know what a frozen encoder sees in the clean image?  Minus the mean cosine.    (REPA, section 3.2)

    batch["features"]: the encoder's (B,F,h,w), averaged or repeated to the token grid where that is another.
    """
    weight = 0.5

    def __init__(self, config):
        super().__init__(config)
        self.after, D = config.depth // 3 - 1, config.hidden_size              # block 4 of 12, 8 of 24
        inner = min(2048, 4 * D)
        self.mlp = nn.Sequential(nn.Linear(D, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(),
                                 nn.Linear(inner, config.aux_dim))

    def forward(self, tokens):
        return self.mlp(tokens)                                                                    # B N F

    @staticmethod
    def loss(answer, batch):
        wanted = F.adaptive_avg_pool2d(batch["features"].float(), math.isqrt(answer.shape[1]))
        return -F.cosine_similarity(answer.float(), wanted.flatten(2).transpose(1, 2), dim=-1).mean()

class DispersiveHead(AuxHead):
    """No target: the images of a batch are pushed apart, log mean exp(-|h_i - h_j|^2 / 0.5).     (Wang & He 2025)

    h: all tokens of an image after the middle block.  departure: divided by their number; undivided, the exponentials
    are zero from the start, and nothing is left to push.
    """
    weight = 0.5

    def __init__(self, config):
        super().__init__(config)
        self.after = config.depth // 2 - 1

    def forward(self, tokens):
        return tokens.float().flatten(1) / tokens.shape[1]                                         # B N*D

    @staticmethod
    def loss(answer, batch):
        squares = answer.square().sum(dim=1)                                                       # B
        distances = (squares[:, None] + squares - 2 * answer @ answer.T).clamp_min(0)              # B B
        return torch.logsumexp(-distances.flatten() / 0.5, dim=0) - math.log(distances.numel())

class MultiScale(AuxHead):
    """The coarse stages of a cascade are graded too, against the averaged image, by their share of the pixels.   (DiMR)

    answer: images (B,C,H/4,W/4) and (B,C,H/2,W/2).  Error in v-space, as the default main loss.
    """
    weight = 1.0

    @staticmethod
    def loss(answer, batch):
        x, u, total = batch["x"], conversion("x", "v", batch["t"])[0], 0.0
        for out in answer:
            error = (out.float() - F.adaptive_avg_pool2d(x, out.shape[-1])).square().flatten(1).mean(dim=1)
            total = total + out[0].numel() / x[0].numel() * (u**2 * error).mean()
        return total

AUX_HEADS = {"none": lambda config: None, "time": TimeHead, "rotation": RotationHead, "repa": RepaHead,
             "dispersive": DispersiveHead, "multiscale": MultiScale}

# ---- A wide, shallow head: narrow blocks decide what to do, wide ones do it ------------------- (DDT; RAE's DiT-DH) --
class WideHeadJiT(JiT):
    """A JiT whose last blocks, the head, have their own width and see z embedded again.

    The backbone's tokens become the head's condition, one per token; the class acts through them alone.  Head as wide
    as the backbone: DDT (Wang et al. 2025, section 3).  Wider: DiT-DH (RAE, section 5), for v in wide feature spaces.
    """

    def __init__(self, config):
        super().__init__(config)
        width, heads = config.head_sizes()
        self.head = JiT(replace(config, hidden_size=width, num_heads=heads, depth=config.head_depth, head_depth=0,
                                in_context_len=0, dropout=0.0, aux="none"))
        self.head_condition = nn.Linear(config.hidden_size, width)
        nn.init.xavier_uniform_(self.head_condition.weight)
        nn.init.zeros_(self.head_condition.bias)
        del self.final_layer, self.head.t_embedder, self.head.y_embedder       # the other part has them
        self.reuse, self.kept = False, (None, None)       # 04_sample.py --reuse: take the last call's condition again

    def forward(self, z, t, y, with_aux=False):
        (labels, s), answer = self.kept, None                                                      # B, B N head_width
        if not self.reuse or s is None or not torch.equal(labels, y):          # another batch: where guidance begins
            t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)
            tokens = self.x_embedder(z) + self.pos_embed
            tokens, answer = self.transform(tokens, (t_emb + y_emb)[:, None], y_emb, with_aux)
            s = self.head_condition(F.silu(t_emb[:, None] + tokens))
            self.kept = (None, None) if torch.is_grad_enabled() else (y, s)
        tokens, _ = self.head.transform(self.head.x_embedder(z) + self.head.pos_embed, s, None)
        out = unpatchify(self.head.final_layer(tokens, s), self.config.patch_size)
        return (out, answer) if with_aux else out

# ---- A cascade of networks, coarse to fine ------------------------------------------------------- (DiMR; DICE) ----
class Cascade(nn.Module):
    """JiTs at 1/4, 1/2 and 1 of the resolution, with 1/2, 1/3 and the rest of the blocks; the last gives the output.

    subtractive: a stage's output, upsampled, is subtracted from the next one's input.             (DICE, section 3.1)
    additive: a stage's tokens, through a linear map and a pixel shuffle, are added to the next one's; the coarsest
    stage has attention, whatever the mixer.  Context tokens enter the stages deep enough for them.            (DiMR)
    """

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.hidden_size
        depths = [config.depth // 2, config.depth // 3, config.depth - config.depth // 2 - config.depth // 3]
        sizes = [config.image_size // 4, config.image_size // 2, config.image_size]
        mixers = [config.mixer if config.cascade == "subtractive" else "attention", config.mixer, config.mixer]
        self.stages = nn.ModuleList(
            JiT(replace(config, cascade="none", aux="none", image_size=size, depth=depth, mixer=mixer))
            for size, depth, mixer in zip(sizes, depths, mixers))
        if config.cascade == "additive":
            self.up = nn.ModuleList(nn.Linear(D, 4 * D) for _ in range(2))

    def forward(self, z, t, y, with_aux=False):
        """with_aux=True returns (prediction, those of the coarse stages)."""
        tokens, outs = None, []
        for k, stage in enumerate(self.stages):
            part = F.avg_pool2d(z, 4 // 2**k)                                                      # B C H/4.. W/4..
            if self.config.cascade == "subtractive" and k:
                part = part - F.interpolate(outs[-1].float(), scale_factor=2, mode="bilinear")
            t_emb, y_emb = stage.t_embedder(t), stage.y_embedder(y)
            c, x = (t_emb + y_emb)[:, None], stage.x_embedder(part) + stage.pos_embed
            if self.config.cascade == "additive" and k:
                x = x + unpatchify(self.up[k - 1](tokens), 2).flatten(2).transpose(1, 2)           # twice the side
            tokens, _ = stage.transform(x, c, y_emb)
            outs.append(unpatchify(stage.final_layer(tokens, c), self.config.patch_size))
        return (outs[-1], outs[:-1]) if with_aux else outs[-1]

def build(config):
    """The network that a configuration describes."""
    net = (Cascade if config.cascade != "none" else WideHeadJiT if config.head_depth else JiT)(config)
    time_norms = [module for module in net.modules() if isinstance(module, TimeNorm)]

    def set_time(net, inputs):
        for norm in time_norms:
            norm.t = inputs[1] if inputs[1].dim() == 1 else inputs[1][:, 0]
    if time_norms:
        net.register_forward_pre_hook(set_time)
    return net

# ---- Configuration: everything a checkpoint needs to rebuild its network, and to know what the output means ---------
@dataclass
class JiTConfig:
    """The network and the meaning of its output.  Defaults: JiT-B/16 at 256 pixels.  Raises ValueError if unusable."""
    image_size: int = option(256, "pixels, height = width", "[1, inf)", flag=False)
    patch_size: int = option(16, "pixels (default: as many tokens as --model has)", "[1, inf)", group="network")
    in_channels: int = option(3, "3 for colours", "[1, inf)", flag=False)
    hidden_size: int = option(768, "width of a token", "[1, inf)")
    depth: int = option(12, "number of blocks", "[1, inf)")
    num_heads: int = option(12, "heads of the attention", "[1, inf)")
    mlp_ratio: float = option(4.0, "inner width of the FFN, in hidden sizes", "(0, inf)")
    num_classes: int = option(1000, "the label num_classes is the null class; 0: train without classes", "[0, inf)")
    bottleneck_dim: int = option(128, "width between the two maps of the patch embedding; 0: one map", "[0, inf)")
    in_context_len: int = option(32, "class tokens put in front of the image tokens; 0: none", "[0, inf)")
    in_context_start: int = option(4, "the block before which they are put there", "[0, inf)")
    dropout: float = option(0.0, "on attention output and FFN of the blocks depth//4 to depth//4*3", "[0, 1)")
    patch_embed: str = option("linear", "nonlinear: SiLU in the bottleneck", choices=("linear", "nonlinear"))
    ffn: str = option("swiglu", "feed-forward network", choices=tuple(FFNS))
    norm: str = option("rmsnorm", "layernorm: without learned weights; td: moves with time", choices=tuple(NORMS))
    mixer: str = option("attention", "what lets tokens see each other", choices=tuple(MIXERS))
    cascade: str = option("none", "stages at 1/4, 1/2 and 1 of the size", choices=("none", "subtractive", "additive"))
    rope: bool = option(True, "rotary position embedding on q and k")
    qk_norm: bool = option(True, "RMSNorm on q and k")
    head_depth: int = option(0, "blocks of a wide head, after the backbone (DDT, DiT-DH); 0: none", "[0, inf)")
    head_width: int = option(0, "its width; 0: as hidden_size", "[0, inf)")
    aux: str = option("none", "auxiliary head, used in training only", choices=tuple(AUX_HEADS))
    aux_dim: int = option(0, "channels of the features that repa predicts", "[0, inf)", flag=False)
    two_times: bool = option(False, "it also knows where a step ends (--objective meanflow)", flag=False)
    pred: str = option("x", "what the output means", choices=("x", "e", "v"))
    path: str = option("linear", "how z is mixed", choices=tuple(PATHS))
    noise_scale: float = option(1.0, "k, the noise's std (default: image size / 256, at least 1)", "(0, inf)")

    def __post_init__(self):
        for entry in fields(self):
            data.check(entry.name, getattr(self, entry.name), entry.metadata["within"], entry.metadata["choices"])
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden size {self.hidden_size} is not a multiple of 4 x {self.num_heads} heads: "
                             "channels turn in pairs, half of a head's with the row and half with the column")
        if self.patch_embed == "nonlinear" and not self.bottleneck_dim:
            raise ValueError("a nonlinear patch embedding needs a bottleneck (bottleneck_dim > 0) to put the SiLU in")
        width, heads = self.head_sizes()
        coarse, grid, mixer = self.cascade != "none", self.image_size // self.patch_size, self.mixer
        for bad, message in (
                (self.head_depth and width % (4 * heads), f"head_width {width} is not a multiple of 4 x {heads} heads, "
                 "each as wide as the backbone's"),
                (mixer == "differential" and (self.num_heads % 2 or self.head_depth and heads % 2), f"{self.num_heads} "
                 f"heads (in a wide head {heads}): differential needs pairs"),
                (mixer in ("convnext", "dice") and self.in_context_len, f"mixer {mixer} works on the image's grid, "
                 "in which context tokens have no place: in_context_len must be 0"),
                (coarse and (self.head_depth or self.aux not in ("none", "multiscale")), "a cascade takes no wide head "
                 "and no auxiliary head but multiscale"),
                (coarse and (grid % 4 or self.depth < 4), f"a cascade needs 4 blocks ({self.depth}) and a grid of "
                 f"patches that halves twice ({grid}): see depth, patch_size"),
                (self.aux == "multiscale" and (not coarse or self.pred != "x" or self.path != "linear"), "multiscale "
                 "grades the stages of a cascade that predicts x on the linear path"),
                (self.two_times and self.path != "linear", "objective meanflow follows the linear path")):
            if bad:
                raise ValueError(message)
        if self.in_context_start >= self.depth:
            self.in_context_len = 0                       # they would never be inserted: same network without them

    def head_sizes(self):
        """Width and number of attention heads of the wide head's blocks; attention heads are as wide as elsewhere."""
        width = self.head_width or self.hidden_size
        return width, max(1, width * self.num_heads // self.hidden_size)

def _size(image, patch, hidden, depth, heads, bottleneck=128, start=4, dropout=0.0, classes=1000, context=32):
    return dict(image_size=image, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads,
                bottleneck_dim=bottleneck, in_context_start=start, dropout=dropout, num_classes=classes,
                in_context_len=context, noise_scale=max(1.0, image / 256))

MODELS = {  # name      image patch hidden depth heads bottleneck start dropout classes context        (JiT Table 9)
    # T and S are ours
    "JiT-T/8":   _size(32,   8,  192,   6,  3,  48, 2, 0.0, 10, 4),       # small images, a CPU
    "JiT-T/16":  _size(64,   16, 192,   6,  3,  64, 2, 0.0, 10, 4),
    "DICE-T/8":  _size(64,   8,  192,   6,  3,  64, 2, 0.0, 10, 0) | {"cascade": "subtractive", "mixer": "dice"},
    "DiMR-T/8":  _size(64,   8,  192,   6,  3,  64, 2, 0.0, 10, 0) | {"cascade": "additive", "mixer": "convnext",
                                                                      "norm": "td", "aux": "multiscale"},
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
              "JiT-H/32": 183, "JiT-G/16": 383}           # called "Gflops"; B/64's 30 leaves out the bottleneck

# ---- Latent spaces: networks that turn images into latents and back, for data sets made by 01_data.py --source latents
class ViT(nn.Module):
    """A Vision Transformer of this file's blocks: images (B,3,H,W) -> (extra tokens (B,E,D), features (B,D,h,w)).

    A ViT block is Block under a constant condition: LayerNorm's affine map and LayerScale (DINOv2) are shift, scale and
    gate.  extra: class and register tokens in front.  The last LayerNorm has no affine map   (RAE, section 3)
    """

    def __init__(self, side, patch, hidden, depth, heads, extra=0):
        super().__init__()
        config = JiTConfig(image_size=side, patch_size=1, hidden_size=hidden, depth=depth, num_heads=heads, rope=False,
                           qk_norm=False, norm="layernorm", ffn="exact-gelu", in_context_len=0)
        self.embed = nn.Conv2d(3, hidden, patch, patch)
        self.pos_embed = nn.Parameter(position_table(hidden, side))
        self.extra = nn.Parameter(torch.zeros(1, extra, hidden))
        self.blocks = nn.ModuleList(Block(config, 0.0) for _ in range(depth))
        for block in self.blocks:
            block.adaLN_modulation = Constant(hidden)
        self.norm = plain_layernorm(hidden)

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

def shrink(factor, channels, width=32):
    """Convolutions of stride 2: (B,3,H,W) -> (B,channels,H/factor,W/factor)."""
    layers = [nn.Conv2d(3, width, 4, 2, 1)]
    for _ in range(factor.bit_length() - 2):
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1)]
        width *= 2
    return nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

def grow(factor, channels, width=96):
    """And back: (B,channels,h,w) -> (B,3,factor*h,factor*w); convolution and pixel shuffle double the side."""
    layers = [nn.Conv2d(channels, width, 1)]
    while factor > 2:
        narrower = max(32, width * 2 // 3 // 8 * 8)
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2)]
        factor, width = factor // 2, narrower
    return nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
                         nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

class Coder(nn.Module):
    """Images in [-1,1] (B,3,size,size) <-> latents (B,channels,side,side), of mean 0 and variance 1 in every channel.

    A coder has features(x), its latents before that normalisation, a decoder, and two losses, trained one after the
    other: encoder_loss(x, y), then decoder_loss(x, y) on latents that no longer change.  None: nothing to train.
    departure: RAE normalises each place by itself, and its decoder is a ViT with perceptual and adversarial losses.
    """
    encoder_loss = decoder_loss = None

    def __init__(self, size, side, channels):
        super().__init__()
        factor = size // side
        if size % side or factor < 2 or factor & (factor - 1):
            raise ValueError(f"images of {size} pixels do not become {side} x {side} latents by halving: pack them at "
                             f"another --size, such as {side * 4}")
        self.side, self.channels, self.decoder = side, channels, grow(factor, channels)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def encode(self, x):
        return (self.features(x).float() - self.mean) / self.std

    def decode(self, z):
        return self.decoder(z * self.std + self.mean).float()

def gaussian_kl(mean, log_var):
    """KL(N(mean, var) || N(0,1)), number by number: (mean^2 + var - 1 - log var) / 2.     (Kingma & Welling, app. B)"""
    return (mean.square() + log_var.exp() - 1 - log_var) / 2

def reparameterise(mean, log_var):
    """A draw from N(mean, var) through which gradients reach both: mean + std * noise.      (Kingma & Welling, 2.4)"""
    return mean + (log_var / 2).exp() * torch.randn_like(mean)

class VAE(Coder):
    """A small convolutional autoencoder; a faint pull towards N(0,1) keeps its latents smooth.    (LDM, section 3.1)"""
    kl_weight = 1e-4                                      # of the KL over the number of pixel values, as L1 is a mean

    def __init__(self, size, classes):
        super().__init__(size, size // (4 if size <= 128 else 8), channels=4)
        self.encoder = shrink(size // self.side, 2 * self.channels)

    def features(self, x):
        return self.encoder(x).chunk(2, dim=1)[0]

    def encoder_loss(self, x, y):
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        error = (self.decoder(reparameterise(mean, log_var)).float() - x).abs().mean()
        return error + self.kl_weight * gaussian_kl(mean, log_var).sum() / x.numel()

class RAE(Coder):
    """Latents are the features of a frozen encoder that understands images; only the decoder learns to draw.      (RAE)

    departure: RAE takes DINOv2's, SigLIP's or MAE's features, and the class below the first; this encoder is small and
    made here.  It learns to name the class and to reconstruct masked patches: classes can be told without colours.
    """

    def __init__(self, size, classes, hidden=192):
        patch = 16 if size >= 64 else size // 4
        super().__init__(size, size // patch, hidden)
        self.patch, self.encoder = patch, ViT(self.side, patch, hidden, depth=4, heads=3)
        self.class_head, self.pixel_head = nn.Linear(hidden, max(1, classes)), nn.Linear(hidden, patch**2 * 3)

    def features(self, x):
        return self.encoder(x)[1]

    def encoder_loss(self, x, y):
        masked = torch.rand(len(x), self.side**2, device=x.device) < 0.5                         # B N
        tokens = self.encoder(x, masked)[1].flatten(2).transpose(1, 2)                           # B N D
        error = (self.pixel_head(tokens).float() - patchify(x, self.patch)).abs()                  # B N p*p*3
        return F.cross_entropy(self.class_head(tokens.mean(dim=1)).float(), y) + error[masked].mean()

    def decoder_loss(self, x, y):
        """L1 from noised latents, std up to 0.8, so that imperfect samples decode well too.    (RAE, section 4.3)"""
        with torch.no_grad():
            z = self.encode(x)
        sigma = torch.rand(len(z), 1, 1, 1, device=z.device) * 0.8
        return (self.decode(z + sigma * torch.randn_like(z)) - x).abs().mean()

class DINOv2(Coder):
    """RAE on the official DINOv2 with registers: 224 px, 16 x 16 features.  Only the decoder is trained here."""
    decoder_loss = RAE.decoder_loss

    def __init__(self, size, classes, hidden=768, depth=12, heads=12):
        super().__init__(size, 16, hidden)
        self.encoder = ViT(16, 14, hidden, depth, heads, extra=5)

    def prepare(self, x):
        """Pixels in [-1,1] of any size -> 224 x 224, with ImageNet's mean and std taken out."""
        x = F.interpolate((x.float() + 1) / 2, size=(224, 224), mode="bicubic", align_corners=False)
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)

    def features(self, x):
        return self.encoder(self.prepare(x))[1]

CODERS = {"vae": VAE, "rae": RAE, "dinov2": DINOv2}

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
    for i in range(depth):
        old = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        same = ("attn.qkv", "attn.proj", ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2"))
        for ours, theirs in (name if isinstance(name, tuple) else (name, name) for name in same):
            new |= {f"blocks.{i}.{ours}.{part}": old[f"{theirs}.{part}"] for part in ("weight", "bias")}
        new[f"blocks.{i}.adaLN_modulation.bias"] = torch.cat([
            old["norm1.bias"], old["norm1.weight"] - 1, old["ls1.gamma"],                          # shift, scale, gate
            old["norm2.bias"], old["norm2.weight"] - 1, old["ls2.gamma"]])
    return new

def load_coder(folder, made_by):
    """The coder beside a latent set, in eval mode, or None for pixels.  Raises ValueError if it is not the one wanted.

    made_by: what the data set's meta.json says of it, {"kind", "id", ...}, or None.
    """
    if not made_by:
        return None
    path = Path(folder) / "coder.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        coder, made = CODERS[state["kind"]](**state["arguments"]), state["id"]
        coder.load_state_dict(state["weights"])
        if not all(torch.isfinite(value).all() for value in coder.state_dict().values()):
            raise ValueError("it holds NaN or infinity")
    except Exception as error:                            # torch raises many kinds
        raise ValueError(f"cannot read {path}, the coder of these latents ({str(error).splitlines()[0][:100]}): put "
                         "the file back, or make the data set and what was trained on it again") from None
    if made != made_by["id"]:
        raise ValueError(f"{path} is not the coder that made these latents: the data set was made again since; put the "
                         "old one back, or train anew")
    return coder.eval().requires_grad_(False)

def teacher_of(folder):
    """meta.json of the latent set whose frozen encoder --aux repa imitates.  Raises ValueError."""
    meta, _ = data.open_data(folder)
    if meta.get("coder", {}).get("kind") not in ("rae", "dinov2"):
        raise ValueError(f"{folder} has no encoder to learn from: make it by --source latents --coder rae, or dinov2")
    return meta

def latent_shift(made_by, numbers):
    """Time shift of a feature space with so many numbers a latent: sqrt(numbers / 4096); else 1.  (RAE, section 4.2)"""
    return math.sqrt(numbers / 4096) if made_by and made_by["kind"] in ("rae", "dinov2") else 1.0

# ---- Checkpoints: ours, and the official release's (a dict with model, model_ema1, model_ema2 and args) -------------
def read_checkpoint(path):
    """Open a checkpoint file without running anything in it.  Raises ValueError with one line that names the file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train one first (python 03_train.py), or is the name another?")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # the official files' only foreign class
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                                     # torch raises many kinds
        raise ValueError(f"{path} is not a checkpoint: damaged, not written by torch.save, or holding more than "
                         "tensors and plain values") from None
    if not isinstance(state, dict) or not ({"config", "ema"} <= state.keys() or {"model_ema1", "args"} <= state.keys()):
        raise ValueError(f"{path} is not a JiT checkpoint: it holds neither config and ema nor model_ema1 and args")
    return state

def load_network(path, ema=0):
    """A checkpoint file -> (JiT in eval mode without auxiliary head, info).

    ema picks one set of averaged weights by its place (0 is the first), -1 the raw weights.  Official files are known
    by their keys: model, image size, classes and noise scale come from their args.  Raises ValueError.
    """
    state = read_checkpoint(path)
    try:
        if "args" in state:
            args = vars(state["args"])
            config = MODELS[args["model"]] | dict(image_size=args["img_size"], num_classes=args["class_num"],
                                                  noise_scale=float(args.get("noise_scale", 1.0)))
            averages = [state[k] for k in ("model_ema1", "model_ema2") if k in state]
            info = {"decays": [0.9999, 0.9996]}
        else:
            names = {entry.name for entry in fields(JiTConfig)}
            config = {k: v for k, v in state["config"].items() if k in names}
            averages, info = list(state["ema"]), dict(state.get("info", {}))
        if not (0 <= ema < len(averages) or ema == -1 and "model" in state):
            raise ValueError(f"it holds {len(averages)} sets of averaged weights and {'model' in state:d} of raw ones: "
                             f"--ema goes from 0 to {len(averages) - 1}, -1 is for raw ones")
        net, weights = build(JiTConfig(**{**config, "aux": "none"})), state["model"] if ema == -1 else averages[ema]
        load_weights(net, {k.removeprefix("net."): v for k, v in weights.items()})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{path} cannot be used: {kind}{str(error).strip().splitlines()[-1].strip()[:200]}") from None
    return net.eval(), {**info, "official": "args" in state}

def load_weights(net, weights):
    """Copy weights into net, all of them and no others.  Raises RuntimeError or ValueError that name a misfit."""
    weights = {k: v for k, v in weights.items() if not k.startswith("aux_head.") and "rope" not in k}
    tables = {name: value for name, value in net.state_dict().items() if name.endswith("pos_embed")}
    net.load_state_dict(tables | weights)
    bad = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if bad:
        raise ValueError(f"weight {bad} holds NaN or infinity")

def save(state, path):
    """torch.save, whole.  Raises ValueError when the disk is full."""
    try:
        with data.whole(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:              # subtle: torch reports a full disk as a RuntimeError
        raise ValueError(f"cannot write {path} ({str(error).splitlines()[0][:100]}); what was there is intact: make "
                         "room, and give the same command again") from None

# ---- Plumbing of the later scripts: device and processes ------------------------------------------------------------
@contextmanager
def machine(name=None):
    """Set up device and processes; yields (device, rank, world).  name: "cuda" or "cpu", None: the best there is.

    Under torchrun every process gets its own GPU.  Raises UsageError.
    """
    kind, _, index = (name or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind not in ("cuda", "cpu") or not (index.isdecimal() or index == ""):
        raise data.UsageError(f"--device {name}: give cuda or cpu")
    index, count = int(index or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    device = torch.device(kind, index) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if index >= count:
            raise data.UsageError(f"--device {name}: GPU {index} is asked for, this machine has {count}: give "
                                  "another, or start fewer processes")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    keep_freed_memory()
    if "WORLD_SIZE" in os.environ:                        # a day: others wait while the first process scores or saves
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    yield device, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        dist.destroy_process_group()

def keep_freed_memory():
    """Let the C library keep what is freed instead of handing it back to the system (glibc; elsewhere nothing happens).

    subtle: by default every array of some megabytes is mapped afresh and filled with zeros page by page, which on a CPU
    takes up to fifty times as long as multiplying it by two.  A third of a training step went there.
    """
    try:                                                  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD, ARENA_MAX
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, OSError, TypeError):
        return

def choose_precision(amp, device):
    """bf16, fp16 or off -> the same; None -> bf16 if the hardware is fast at it (Ampere GPUs, AVX512-bf16 or AMX)."""
    if amp is None and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "off"
    flags = Path("/proc/cpuinfo")
    fast = flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16"))
    return amp or ("bf16" if fast else "off")

def autocast(amp, device):
    """The context in which the network runs; parameters, state and losses stay fp32."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")

# ---- As a script: the table of sizes, and one batch with the shape after each step ----------------------------------
def count_macs(config):
    """Multiply-adds of one forward pass of one image, counted by torch on tensors without storage."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    size = config.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        build(config).eval()(torch.empty(1, config.in_channels, size, size), torch.empty(1), torch.zeros(1).long())
    return counter.get_total_flops() // 2

def count_parameters(config):
    """Trainable numbers; the fixed table of positions is not one of them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters() if p.requires_grad)

def images_per_second(config, batch=32):
    """Speed of a forward pass here, on the CPU."""
    net, size = build(config).eval(), config.image_size
    with torch.no_grad():
        for _ in range(2):                                # the first warms up
            start = time.perf_counter()
            net(torch.randn(batch, config.in_channels, size, size), torch.rand(batch), torch.zeros(batch).long())
    return batch / (time.perf_counter() - start)

def print_table():
    """One line per model: what it costs, beside the paper's figure; for small ones the speed on this CPU."""
    columns = ("image_size", "patch_size", "hidden_size", "depth", "num_heads")
    print(f"{'model':10s}  image  patch hidden  depth  heads     parameters    GMAC  paper  images/s")
    for name, row in MODELS.items():
        config, gmac = JiTConfig(**row), count_macs(JiTConfig(**row)) / 1e9
        speed = f"{images_per_second(config):9.0f}" if gmac < 1 else ""
        print(f"{name:10s} {' '.join(f'{row[column]:6d}' for column in columns)} {count_parameters(config):14,d} "
              f"{gmac:7.2f} {PAPER_GMAC.get(name, '-'):>6} {speed}")

def walk(config, batch=2):
    """Send one batch through a fresh network and print the shape after each step."""
    whole, size = build(config).eval(), config.image_size
    net = whole.stages[-1] if config.cascade != "none" else whole              # of a cascade the finest stage

    def show(text, shape):
        print(f"  {text:62s} {' x '.join(map(str, shape))}")
    modules = [("x_embedder.proj1: every patch squeezed to the bottleneck", net.x_embedder.proj1),
               ("x_embedder.proj2: ... widened to a token", net.x_embedder), ("t_embedder: the time", net.t_embedder),
               ("y_embedder: the class", net.y_embedder), *((f"block {i}", b) for i, b in enumerate(net.blocks)),
               ("final_layer: context tokens gone, pixels of each patch", net.final_layer)]
    for text, module in modules:
        module.register_forward_hook(lambda module, inputs, output, text=text: show(text, output.shape))
    z = torch.randn(batch, config.in_channels, size, size)
    show("z: the noised images", z.shape)
    with torch.no_grad():
        show("unpatchify: the predicted clean images", whole(z, torch.rand(batch), torch.zeros(batch).long()).shape)

@dataclass
class Options:
    model: str = option("JiT-T/16", "the network to walk through", choices=tuple(MODELS))

def main(argv=None):
    options = Options(**data.parse(argv, "Print the table of sizes and walk one batch through a network.", Options))
    print_table()
    print(f"\nOne batch through {options.model}:")
    walk(JiTConfig(**MODELS[options.model]))

if __name__ == "__main__":
    sys.exit(data.run(main))
