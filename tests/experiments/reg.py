"""REG (Wu et al. 2025): the image and what a frozen encoder says of it are noised and denoised together.

REPA compares tokens with a frozen encoder's, in training only.  REG makes the encoder's class token part of what is
generated: noised like the image, predicted like the image, and dropped at the end.  So sampling, too, has something to
follow, which it makes itself.

Here the token is K more channels of a VAE's latents, the same at every place, with a standard deviation of 1 / side.
That is one token: of a number c / side at side^2 places, under noise of std k at each of them, the mean over the places
says all there is to know, and times side it is

    side * mean(t c / side + (1-t) k n) = t c + (1-t) k n',    n' ~ N(0, 1)

In the sum of squared errors, too, side^2 such places count as one c.  Mixing, loss, averages and samplers stay as they
are, and decode() drops the channels.

departure: channels at every place, not a token in attention.  The encoder is the RAE's (REG: DINOv2), which was trained
with labels and has no class token: the mean of its features stands for it, of which K = 32 channels are taken.  So the
token weighs 32 / 1024 = 0.03 of the image, as with REG's beta.  REPA's loss, which REG keeps, is left out.

python tests/experiments/rae.py && python tests/experiments/reg.py      makes data/shapes-reg: 36 x 16 x 16 numbers, 90 s
03_train.py --experiment reg && 04_sample.py --run shapes-reg && 05_eval.py --run shapes-reg
"""
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model = import_module("01_data"), import_module("02_model")
latents, vae, rae = (model.load_experiment(name) for name in ("latents", "vae", "rae"))

TOKEN = 32                                                # channels, of the encoder's 192

class REG(vae.VAE):
    saw_labels = True

    def __init__(self, size, classes):
        super().__init__(size, classes)
        self.frozen = rae.RAE(size, classes).encoder      # its weights come from a latent set
        self.image_channels = self.channels               # the decoder's
        self.channels += TOKEN
        self.mean = torch.zeros(1, self.channels, 1, 1)
        self.std = torch.ones(1, self.channels, 1, 1)

    def features(self, x):
        z = super().features(x)                                                                    # B 4 h w
        token = self.frozen(x)[1][:, :TOKEN].mean(dim=(2, 3), keepdim=True)                        # B K 1 1
        return torch.cat([z, token.expand(-1, -1, *z.shape[2:])], dim=1)                           # B 4+K h w

    def encode(self, x):
        image, token = super().encode(x).tensor_split([self.image_channels], dim=1)
        return torch.cat([image, token / self.side], dim=1)

    def decode(self, z):
        image = slice(self.image_channels)
        return self.decoder(z[:, image] * self.std[:, image] + self.mean[:, image]).float()

load_coder = partial(latents.load_coder, {"reg": REG})
SETTINGS = vae.SETTINGS | {"data": "shapes-reg"}

@dataclass
class Options(latents.Options):
    encoder: str = data.option("shapes-rae", "the latent set, data/NAME, whose RAE has the encoder")

def main(argv=None):
    options = Options(**data.parse(argv, "Make the latents of a VAE, with a class token.", Options))
    folder = model.folder_of(options.encoder, "data")
    meta, _ = data.open_data(folder)
    made_by = meta.get("coder", {})
    data.refuse(made_by.get("kind") != "rae", f"--encoder {folder}: it has no encoder made by tests/experiments/rae.py")

    def make(arguments):
        data.refuse(made_by["size"] != arguments["size"], f"--encoder: it is for images of {made_by['size']} pixels")
        coder = REG(**arguments)
        coder.frozen.load_state_dict(rae.load_coder(folder, made_by).encoder.state_dict())
        return coder, arguments
    latents.pack(options, "reg", "reg", make, {"encoder": meta["id"]})

if __name__ == "__main__":
    sys.exit(data.run(main))
