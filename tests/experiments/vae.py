"""A variational autoencoder (Kingma & Welling 2014), and diffusion on its latents (Rombach et al. 2022).

The encoder gives each image a Gaussian over a small latent, mean and log variance; a draw from it, mean + std * noise,
must give the image back.  The pull of the KL divergence towards N(0,1) keeps latents smooth:

    loss = |decode(draw) - x|  +  beta KL,    KL = 1/2 sum (mean^2 + var - 1 - log var)

beta = 1 is the ELBO.  Latent diffusion uses about 1e-6: the pull is faint, the latents are not N(0,1), and what is decoded
from plain noise (the last row of preview.png) is texture without a shape.  The prior has to be learned, and that is the
diffusion model's work.

departure: beta is 1e-4 (both terms are divided by the number of pixel values, so it compares with LDM's 1e-6): the coder
is trained for a minute only.  The latent set holds means, not draws.

python tests/experiments/vae.py           makes data/shapes-vae: 4 x 16 x 16 numbers an image, 90 s on two cores
03_train.py --experiment vae && 04_sample.py --run shapes-vae && 05_eval.py --run shapes-vae
"""
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
latents = model.load_experiment("latents")

def gaussian_kl(mean, log_var):
    """KL(N(mean, var) || N(0,1)), number by number: (mean^2 + var - 1 - log var) / 2.     (Kingma & Welling, app. B)"""
    return (mean.square() + log_var.exp() - 1 - log_var) / 2

def reparameterise(mean, log_var):
    """A draw from N(mean, var) through which gradients reach both: mean + std * noise.      (Kingma & Welling, 2.4)"""
    return mean + (log_var / 2).exp() * torch.randn_like(mean)

class VAE(latents.Coder):
    kl_weight = 1e-4

    def __init__(self, size, classes):
        super().__init__(size, size // (4 if size <= 128 else 8), channels=4)
        self.encoder = latents.shrink(size // self.side, 2 * self.channels)

    def moments(self, x):
        """Mean and log variance (B,4,side,side); clamped, as LDM does, so that no exponential overflows."""
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def features(self, x):
        return self.moments(x)[0]

    def encoder_loss(self, x, y):
        """Encoder and decoder are trained as one."""
        mean, log_var = self.moments(x)
        error = (self.decoder(reparameterise(mean, log_var)).float() - x).abs().mean()
        return error + self.kl_weight * gaussian_kl(mean, log_var).sum() / x.numel()

load_coder = partial(latents.load_coder, {"vae": VAE})
# latents of 64 px shapes: fewer numbers a token, so fewer and narrower blocks
SETTINGS = {"data": "shapes-vae", "depth": 4, "in_context_start": 1, "patch_size": 2, "hidden_size": 96, "steps": 2400,
            "lr": 4e-3, "noise_scale": 1.0}

def main(argv=None):
    options = latents.Options(**data.parse(argv, "Make the latents of a VAE.", latents.Options))
    latents.pack(options, "vae", "vae", lambda arguments: (VAE(**arguments), arguments), {})

if __name__ == "__main__":
    sys.exit(data.run(main))
