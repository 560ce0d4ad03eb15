"""Stable Diffusion 3's objective (Esser et al. 2024) on DiT's blocks: rectified flow with logit-normal times.

The linear path, a network that predicts v, the loss on v, and t = sigmoid(N(0, 1)): more weight on the middle of the
path by drawing it more often, and no further weight.  Against JiT: the prediction, and where the times lie (JiT: mean
-0.8, std 0.8, nearer to the noise).

departure: only the objective.  SD3 is a text-to-image model with two streams of tokens, in latents.

python tests/experiments/dit.py         shows it beside DiT and JiT
03_train.py --experiment sd3            (brings dit.py along)
"""
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
model = import_module("02_model")

SETTINGS = model.load_experiment("dit").BLOCKS | {"pred": "v", "loss": "v", "path": "linear", "p_mean": 0.0, "p_std": 1.0}

main = model.load_experiment("dit").main

if __name__ == "__main__":
    main(*sys.argv[1:])
