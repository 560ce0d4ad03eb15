"""One-step generation in pixels: pMF, pixel MeanFlow (Lu et al. 2026, arXiv 2601.22158, with JiT's authors among them).

Sampling takes steps because a network predicts the mean velocity of all lines through z, and the path bends.  Here it
predicts where the path will lead: u(z, t, r), the average of the velocity between t and r along the path.  Then
(r - t) u is the integral of v from t to r; its derivative by t along the path gives                 (MeanFlow eq. 6)

    u = v + (r - t) du/dt          du/dt along (dz, dt, dr) = (v, 1, 0), by one forward-mode product (torch.func.jvp)

The right side, with its gradient stopped, is the target; at r = t it is v, and the loss JiT's.  The network predicts an
image, x(z, t, r) = z + (1-t) u; one step from pure noise is x(noise, 0, 1).  A trained JiT is fine-tuned (--init): the
length of the step enters through a map that begins at zero, so it starts as itself.  Guidance is learned, too: v is
replaced by v_null + w (v - v_null), v_null being the network's own.

departure: time runs from noise to data.  The guidance is MeanFlow's form, not pMF's; micro-batches are averaged where
the papers sum; the rms of the second term is capped at 1.5 (at the solution it is u - v, about the data's std).

python tests/experiments/one_step.py      from runs/shapes; then one, two and four steps: five minutes on two cores
03_train.py --experiment one_step --init shapes --run shapes-onestep           (registers NETWORKS and OBJECTIVES one_step)
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
data, model, train = (import_module(name) for name in ("01_data", "02_model", "03_train"))

# ---- The network knows where a step begins and where it ends ---------------------------------------------------------
class SpanEmbed(model.TimeEmbed):
    """Times t and r at which a step begins and ends, (B,2) -> (B,D).  A single t, (B,), means r = t."""

    def __init__(self, hidden):
        super().__init__(hidden)
        self.span = model.TimeEmbed(hidden)
        self.span_out = nn.Parameter(torch.zeros(hidden, hidden))

    def forward(self, t):
        t, r = (t, t) if t.dim() == 1 else t.unbind(1)
        return super().forward(t) + self.span(r - t) @ self.span_out

@dataclass
class OneStepConfig(model.JiTConfig):
    guidance: float = data.option(1.5, "w of the guidance that the network learns", "[1, inf)", group="one step")

    def __post_init__(self):
        super().__post_init__()
        data.refuse(self.path != "linear", "one_step follows the linear path")
        data.refuse(self.aux != "none", "one_step takes no auxiliary head")

class OneStepJiT(model.JiT):
    solvers = ("euler",)                                  # what it knows are mean velocities

    def __init__(self, config):
        super().__init__(config)
        self.t_embedder = SpanEmbed(config.hidden_size)
        self.t_next = None

    def begin_step(self, i, t, t_next):
        self.t_next = t_next

    def forward(self, z, t, y, tap=None):
        if t.dim() == 1 and self.t_next is not None:      # sampling
            t = torch.stack([t, torch.full_like(t, self.t_next)], dim=1)                           # B 2
        return super().forward(z, t, y, tap)

# ---- The objective ---------------------------------------------------------------------------------------------------
def average_velocity(net, z, t, r, y):
    """u (B,C,H,W) in fp32: the mean of v from t to r >= t, each (B,), along the path through z; at r = t it is v."""
    return model.convert(net(z, torch.stack([t, r], dim=1), y), net.config.pred, "v", z, t)

def mean_flow_target(u, z, t, r, v, tangent, cap=1.5):
    """v + (r-t) du/dt, the derivative taken along the path, dz/dt = tangent; the second term's rms is capped.

    subtle: fused attention has no forward derivative, hence sdpa_kernel(MATH).
    """
    with sdpa_kernel(SDPBackend.MATH):
        _, du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (tangent, torch.ones_like(t)))
    correction = model.expand(r - t, z) * du
    rms = correction.square().flatten(1).mean(dim=1).sqrt()                                        # B
    return v + correction * model.expand((cap / rms).clamp_max(1.0), z)

@contextmanager
def nothing_recomputed(net):
    """Inside, --checkpointing is off: without gradients it saves nothing, and in torch 2.6 it has no forward derivative."""
    kept = [vars(block).pop("forward", None) for block in net.blocks]
    yield
    for block, forward in zip(net.blocks, kept):
        if forward:
            block.forward = forward

def draw_spans(t):
    """Times t (B,) -> (t, r): half have r = t, as JiT; of the rest half end at 1.

    15 % of the rest begin at 0, the others at t moved towards the noise.
    """
    n = (len(t) + 1) // 2
    chance = torch.rand(3, n, device=t.device)
    begin = torch.where(chance[0] < 0.15, 0.0, model.shift_time(t[:n], 2.0))
    end = begin + (1 - begin) * torch.where(chance[1] < 0.5, 1.0, chance[2])
    return torch.cat([begin, t[n:]]), torch.cat([end, t[n:]])

def one_step_objective(trainer, batch):
    """|u - target|^2, divided by about itself (MeanFlow's adaptive weight); the log has it undivided.     (pMF eq. 9)"""
    net, config = trainer.net, trainer.config             # the bare network asks for targets, without DDP, in fp32
    data.refuse(config.num_classes and config.guidance > 1 and not trainer.options.label_drop,
                "--guidance above 1 needs --label-drop above 0: it is the null class that is guided away from")
    x, e, y = (batch[name] for name in "xey")
    t, r = draw_spans(batch["t"])
    batch["t"] = t                                        # for the log
    n = (len(t) + 1) // 2                                 # of these r may be another time than t
    z = model.mix(x, e, t)

    def own(z, t, r):
        return average_velocity(net, z, t, r, y[:n])
    with torch.no_grad(), nothing_recomputed(net):
        v = model.convert(x, "x", "v", z, t)
        v_null = average_velocity(net, z, t, t, torch.full_like(y, config.num_classes))
        w = torch.where(y != config.num_classes, config.guidance, 1.0)
        v = v_null + model.expand(w, x) * (v - v_null)
        tangent = own(z[:n], t[:n], t[:n])
        v[:n] = mean_flow_target(own, z[:n], t[:n], r[:n], v[:n], tangent)
    with trainer.autocast:
        out = trainer.forward(z, torch.stack([t, r], dim=1), y)
    u = model.convert(out, config.pred, "v", z, t)
    error = (u - v).square().flatten(1).mean(dim=1)                                                # B
    return (error / (error.detach() + 0.01)).mean(), error.detach()

model.NETWORKS["one_step"] = (OneStepConfig, OneStepJiT)
train.OBJECTIVES["one_step"] = one_step_objective
SETTINGS = {"network": "one_step", "objective": "one_step", "steps": 1000, "lr": 1.2e-3, "schedule": "cosine",
            "ema": (0.995,), "sampling": {"solver": "euler", "cfg": 1.0, "steps": 1, "shift": 1.0}}

def main(*flags):
    """Fine-tunes runs/shapes, and as a control trains it on as the JiT it is; then 1, 2 and 4 steps of both."""
    sample, evaluate = import_module("04_sample"), import_module("05_eval")
    call = model.load_experiment("_compare").call
    call(train, "--experiment", "one_step", "--init", "shapes", "--run", "shapes-onestep", *flags)
    call(train, "--init", "shapes", "--steps", 1000, "--lr", 1.2e-3, "--run", "shapes-control", *flags)
    for run in ("shapes-control", "shapes-onestep"):
        for steps in (1, 2, 4):
            print(f"\n{run}, {steps} steps:", flush=True)
            out = f"trials/{run}-{steps}"
            call(sample, "--run", run, "--solver", "euler", "--steps", steps, "--out", out)
            call(evaluate, "--samples", out, "--metrics", "fd")

if __name__ == "__main__":
    main(*sys.argv[1:])
