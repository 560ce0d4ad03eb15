"""Latent sets: images as the features of an autoencoder, here called the coder.  Shared by vae.py, rae.py, reg.py.

A latent set is a data set: its arrays hold latents (N,h,w,C) float16 of mean 0 and variance 1 in every channel, and
coder.pt beside them turns them back into pixels.  03_train.py trains on it as on any other (patch 1, no mirroring),
04_sample.py decodes what it draws, 05_eval.py scores the pictures against the pixels that the latents were made of.
Two numbers describe a coder: the PSNR of what it gives back, and how often a linear map reads the class off its
latents.

departure: statistics are per channel (RAE normalises each place by itself), and the decoder is convolutional, with an
L1 loss alone (LDM's and RAE's have perceptual and adversarial losses, RAE's is a ViT).
"""
import math
import sys
import uuid
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
option = data.option

# ---- Networks --------------------------------------------------------------------------------------------------------
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
    """Images in [-1,1] (B,3,size,size) <-> latents (B,channels,side,side).

    A coder has features(x), its latents before normalisation, a decoder, and two losses, trained one after the other:
    encoder_loss(x, y), then decoder_loss(x, y) on latents that no longer change.  None: nothing to train.
    """
    encoder_loss = decoder_loss = None
    shift = 1.0                                           # of time, recommended for training on these latents
    saw_labels = False                                    # the encoder, in its training: then a probe flatters it

    def __init__(self, size, side, channels):
        super().__init__()
        factor = size // side
        data.refuse(size % side or factor < 2 or factor & (factor - 1),
                    f"images of {size} pixels do not become {side} x {side} latents by halving: pack them at another "
                    f"--size, such as {side * 4}")
        self.side, self.channels, self.decoder = side, channels, grow(factor, channels)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def encode(self, x):
        return (self.features(x).float() - self.mean) / self.std

    def decode(self, z):
        return self.decoder(z * self.std + self.mean).float()

def load_coder(kinds, folder, made_by):
    """The coder beside a latent set, in eval mode.  Raises ValueError if it is not the one wanted.

    made_by: what the data set's meta.json says of it, {"kind", "id", ...}.
    """
    path = Path(folder) / "coder.pt"
    try:
        data.expect(made_by, id=str, pixels=str, pixels_id=str, size=int)
        if bad := zipfile.ZipFile(path).testzip():        # torch does not look at the checksums
            raise ValueError(f"{bad} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        coder = kinds[state["kind"]](**state["arguments"])
        coder.load_state_dict(state["weights"])
        if not all(torch.isfinite(value).all() for value in coder.state_dict().values()):
            raise ValueError("it holds NaN or infinity")
    except Exception as error:                            # torch raises many kinds
        raise ValueError(f"cannot read {path}, the coder of these latents ({str(error).splitlines()[0][:100]}): put "
                         "the file back, or make the data set and what was trained on it again") from None
    if state["id"] != made_by["id"]:
        raise ValueError(f"{path} is not the coder that made these latents: the data set was made again since; put the "
                         "old one back, or train anew")
    return coder.eval().requires_grad_(False)

# ---- Training a coder ------------------------------------------------------------------------------------------------
def train_coder(coder, images, labels, seed, steps, device):
    """Its encoder, then, with mean and std of the latents measured, its decoder."""
    random, autocast = np.random.default_rng(seed), model.autocast(model.choose_precision(None, device), device)
    torch.manual_seed(seed)
    for part, batch in (("encoder", 64), ("decoder", 32)):
        if part == "decoder":
            measure(coder, images, np.sort(random.permutation(len(images))[:10_000]), device)
        loss_of = getattr(coder, f"{part}_loss")
        if not loss_of:                                   # DINOv2's encoder is ready, a VAE's parts are trained as one
            continue
        optimizer = torch.optim.AdamW(coder.parameters(), lr=2e-3)
        with data.Progress(steps, f"training the {part}", " steps") as bar:
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
                chosen = np.sort(random.integers(0, len(images), batch))
                x, y = model.to_float(images[chosen], device), torch.from_numpy(labels[chosen]).to(device)
                with autocast:
                    loss = loss_of(x.flip(3) if step % 2 else x, y)
                optimizer.zero_grad()                     # None where a part is frozen: AdamW leaves it alone
                loss.backward()
                optimizer.step()
                bar.update()

@torch.no_grad()
def measure(coder, images, rows, device):
    """Set the mean and std of the coder's latents, per channel, to those over some images."""
    n, total, squares = 0, 0, 0
    for part in data.in_parts(rows, 100):
        f = coder.features(model.to_float(images[part], device)).double()
        n += len(f)
        total = total + f.sum(dim=0)
        squares = squares + f.square().sum(dim=0)
    mean, square = ((s / n).mean(dim=(1, 2))[None, :, None, None] for s in (total, squares))
    coder.mean.copy_(mean)
    coder.std.copy_((square - mean**2 + 1e-5).sqrt())

# ---- Packing a latent set --------------------------------------------------------------------------------------------
@dataclass
class Options:
    data: str = option("shapes", "the packed pixels, data/NAME, or a folder")
    name: str = option(None, "the latent set's name (default: that of the pixels and of the coder, as shapes-vae)")
    steps: int = option(800, "training of each part of the coder", "[1, inf)")
    seed: int = option(0, "of the coder's weights and batches", "[0, 1e18]")
    out: Path = option(Path("data"), "folder of data sets")
    overwrite: bool = option(False, "replace a data set of this name")

def pack(options, experiment, kind, make, recipe):
    """Train a coder, encode a data set, and show what it can do.

    experiment: the file that decodes, by its name.  kind, make(**arguments): the coder.  recipe: what decides it, too.
    """
    root = model.folder_of(options.data, "data")
    pixels, arrays = data.open_data(root)
    if "coder" in pixels:
        raise ValueError(f"{root} holds latents: give the data set that they were made from")
    options.name = options.name or f"{root.resolve().name}-{kind}"
    folder = options.out / options.name
    folder = folder.resolve() if folder.is_symlink() else folder               # a set on another disk
    data.refuse(folder.resolve() == root.resolve(), f"--name {options.name} is the data set of the pixels")
    recipe |= {"source": kind, "pixels": pixels["id"], "steps": options.steps, "seed": options.seed}
    with data.locked(folder), model.device_and_processes() as (device, _, _):
        if data.already_packed(folder, recipe, options.overwrite):
            return print(f"{folder} is there, made with these settings; nothing to do (--overwrite makes it again)")
        with data.new_set(folder) as part:
            key = uuid.uuid4().hex
            arguments = {"size": pixels["size"], "classes": len(pixels["classes"])}
            torch.manual_seed(options.seed + 1)           # the network of the scores has seed 0
            coder, arguments = make(arguments)
            train_coder(coder.to(device), *arrays["train"], options.seed + 1, options.steps, device)
            model.save({"id": key, "kind": kind, "arguments": arguments, "weights": coder.state_dict()},
                       part / "coder.pt")
            coder.eval().requires_grad_(False)
            shape = (coder.side, coder.side, coder.channels)
            for split, (images, labels) in arrays.items():
                data.save_rows(part / f"{split}_images.npy", encoded(coder, images, split, device), shape, np.float16)
                np.save(part / f"{split}_labels.npy", labels)
            psnr = show(coder, arrays, part, device)
            classes, stored = len(pixels["classes"]), {}
            for split, (_, labels) in arrays.items():
                stored[split] = np.load(part / f"{split}_images.npy", mmap_mode="r"), labels
            probe = linear_probe(stored, classes) if classes > 1 else None
            data.save_json(part / "meta.json", {
                "id": key, "size": coder.side, "channels": coder.channels,
                "classes": pixels["classes"], "counts": pixels["counts"], "preprocessing": kind, "recipe": recipe,
                "psnr": psnr, "linear_probe": probe, "shift": coder.shift, "mean": coder.mean.flatten().tolist(),
                "std": coder.std.flatten().tolist(),
                "coder": {"experiment": experiment, "kind": kind, "id": key, "pixels": str(root),
                          "pixels_id": pixels["id"], "size": pixels["size"]}})
    print(f"{folder}: {coder.channels} x {coder.side} x {coder.side} numbers an image, PSNR {psnr:.1f} dB; look at "
          f"{folder / 'preview.png'}")
    if probe is not None:
        print(f"a linear map of these latents names the class of {probe:.1%} of the held-out images"
              f"{' (the encoder was trained with labels)' * coder.saw_labels}")

def encoded(coder, images, split, device):
    """The latents (h,w,C) of images, one by one."""
    with data.Progress(len(images), split, " images") as bar:
        for rows in data.in_parts(range(len(images)), 100):
            x = model.to_float(images[np.array(rows)], device)
            yield from coder.encode(x).permute(0, 2, 3, 1).half().cpu().numpy()
            bar.update(len(x))

def show(coder, arrays, part, device):
    """preview.png: images, what is decoded from their latents, and from noise; reconstructions.npz, for 05_eval.py.

    Returns the PSNR in dB, for pixels of 0..255, over at most 2,000 held-out images.
    """
    images, labels = arrays["val" if len(arrays["val"][1]) else "train"]
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:2000])
    real, made = images[chosen], []
    for rows in data.in_parts(chosen, 100):
        made.append(model.to_pictures(coder.encode(model.to_float(images[rows], device)), coder))
    made = np.concatenate(made)
    with data.whole(part / "reconstructions.npz") as file, open(file, "wb") as stream:
        np.savez(stream, arr_0=made, arr_1=labels[chosen])
    noise = np.random.default_rng(0).standard_normal((10, coder.side, coder.side, coder.channels)).astype(np.float16)
    few = np.random.default_rng(1).permutation(len(real))[:40]
    rows = []
    for i in range(4):
        rows += [real[few[i::4]], made[few[i::4]]]
    rows.append(model.to_pictures(model.to_float(noise, device), coder))
    model.save_picture(part / "preview.png", data.picture(rows, names=["image", "decoded"] * 4 + ["noise"]))
    return 10 * math.log10(255**2 / ((real.astype(np.float32) - made)**2).mean())

# ---- How much of the class is linear in the latents ------------------------------------------------------------------
def ridge(z, y, penalty):
    """The W (D,C) of least mean |z W - y|^2 + penalty |W|^2, in closed form.  z: (N,D).  y: (N,C)."""
    gram = z.T @ z / len(z) + penalty * torch.eye(z.shape[1])
    return torch.linalg.solve(gram, z.T @ y / len(z))

def linear_probe(arrays, classes, most=10_000):
    """Share of held-out images whose class a linear map of the latents names, fitted to one-hot labels by ridge().

    arrays: those of a data set, of latents or pixels; at most `most` images of each split.  Latents are flattened, not
    averaged over places: a shape is an arrangement, of which a VAE's four means would say nothing.  What is wider than
    4,096 numbers is averaged to a coarser grid.
    """
    z, y = flattened(*arrays["train"], most)
    z_new, y_new = flattened(*arrays["val" if len(arrays["val"][1]) else "train"], most)
    mean, one_hot = z.mean(dim=0), F.one_hot(y, classes).float()
    shares = one_hot.mean(dim=0)
    answers = (z_new - mean) @ ridge(z - mean, one_hot - shares, 1e-3) + shares
    return (answers.argmax(dim=1) == y_new).float().mean().item()

def flattened(images, labels, most):
    """Latents (N,D) of some images, D at most 4,096, and their labels."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:most])
    parts = []
    for rows in data.in_parts(chosen, 100):
        x = model.to_float(images[rows])                                                           # B C h w
        side = min(x.shape[-1], max(1, math.isqrt(4096 // x.shape[1])))
        parts.append(F.adaptive_avg_pool2d(x, side).flatten(1))
    return torch.cat(parts), torch.from_numpy(labels[chosen])
