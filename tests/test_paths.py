"""Paths, predictions, losses and solvers against closed forms: Gaussian data has an exact denoiser."""
import math

import pytest
import torch

from conftest import TINY, model, randomised, sample, train

paths = model.load_experiment("paths")
PATHS, KINDS = model.PATHS, ("x", "e", "v")
MADE = {"linear": lambda t: (t, 1 - t, torch.ones_like(t), -torch.ones_like(t)), "cosine": paths.cosine, "ddpm-linear": paths.ddpm_linear, "ddpm-cosine": paths.ddpm_cosine}

def coefficients(path, t):
    """alpha, sigma and their derivatives, fp64."""
    return MADE[path](t.double())

def example(n=64, path="linear", low=0.0, high=1.0):
    torch.manual_seed(0)
    x, e, t = torch.randn(n, 3, 4, 4), torch.randn(n, 3, 4, 4), torch.linspace(low, high, n)
    z, v = PATHS[path].mix(x, e, t), PATHS[path].velocity_target(x, e, t)
    return x, e, t, z, v, {"x": x, "e": e, "v": v}

def test_linear_path_is_the_papers():
    x, e, t, z, v, _ = example()
    t4 = t.view(-1, 1, 1, 1)
    assert torch.allclose(z, t4 * x + (1 - t4) * e, atol=1e-6) and torch.allclose(v, x - e, atol=1e-6)
    assert torch.allclose(model.convert(x, "x", "v", z, t), (x - z) / (1 - t4).clamp_min(0.05), atol=1e-5)

@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    t, h = torch.linspace(0.05, 0.9, 50, dtype=torch.float64), 1e-4
    a, s, da, ds = coefficients(path, t)
    (a1, s1, *_), (a0, s0, *_) = coefficients(path, t + h), coefficients(path, t - h)
    assert torch.allclose((a1 - a0) / (2 * h), da, atol=1e-5) and torch.allclose((s1 - s0) / (2 * h), ds, atol=1e-5)
    if path != "linear":
        assert torch.allclose(a**2 + s**2, torch.ones_like(a), atol=1e-6)             # variance preserving
    ends = coefficients(path, torch.tensor([0.0, 1.0]))
    assert abs(float(ends[0][0])) < 0.01 and abs(float(ends[0][1]) - 1) < 1e-3 and float(ends[1][1]) < 0.02
    for time in (0.0, 0.3, 1.0):
        assert PATHS[path].scales(time) == pytest.approx([c.item() for c in coefficients(path, torch.tensor(time, dtype=torch.float64))[:2]], abs=1e-9)

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_conversions_are_right_and_inverse(path, kind, to):
    x, e, t, z, v, truth = example(path=path, low=0.3, high=0.9)
    there = model.convert(truth[kind], kind, to, z, t, path)
    assert (there - truth[to]).abs().max() < 2e-5 * truth[to].abs().max()
    assert (model.convert(there, to, kind, z, t, path) - truth[kind]).abs().max() < 2e-5 * max(1, truth[to].abs().max())

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pred", KINDS)
@pytest.mark.parametrize("space", KINDS)
def test_nine_cells_loss(path, pred, space):
    """A perfect prediction has loss 0 at every t, ends included; an error is weighed as if both sides were converted."""
    x, e, t, z, v, truth = example(path=path)
    config = model.JiTConfig(**{**TINY, "pred": pred, "path": path})
    batch = {"x": x, "e": e, "t": t}
    assert train.grid_loss(truth[pred], batch, config, space).abs().max() == 0
    wrong = truth[pred] + 0.1 * torch.randn_like(x)
    slow = (model.convert(wrong, pred, space, z, t, path) - model.convert(truth[pred], pred, space, z, t, path)).square().mean((1, 2, 3))
    assert torch.allclose(train.grid_loss(wrong, batch, config, space), slow, rtol=2e-2, atol=1e-6)

def test_v_loss_of_x_prediction_is_the_papers():
    """The loss of the lesson, that of the table, and JiT's Algorithm 1 written out here."""
    x, e, t, z, v, _ = example()
    out = x + torch.randn_like(x)
    t4 = t.view(-1, 1, 1, 1)
    expected = (((out - z) - (x - z)) / (1 - t4).clamp_min(0.05)).square().mean((1, 2, 3))
    assert torch.allclose(train.diffusion_loss(out, x, z, t), expected, rtol=1e-4)
    assert torch.allclose(train.grid_loss(out, {"x": x, "e": e, "t": t}, model.JiTConfig(**TINY), "v"), expected, rtol=1e-4)
    assert train.diffusion_loss(x, x, z, t).abs().max() == 0

def test_elbo_weight_of_the_variational_diffusion_model():
    """KL( q(z_s | z_t, x) || q(z_s | z_t, x_hat) ) = half the difference of the SNRs times |x - x_hat|^2, SNR = a^2/s^2.

    The posterior's mean is what ddpm_step returns without noise, its variance follows from the same formula.
    """
    for path in PATHS:
        for t, s in ((0.3, 0.4), (0.6, 0.61)):
            (a_t, s_t, *_), (a_s, s_s, *_) = (coefficients(path, torch.tensor(time)) for time in (t, s))
            z, x, x_hat = (torch.randn(1, 5, dtype=torch.float64) for _ in range(3))
            means = [sample.ddpm_step(z, t, s, lambda z, t: guess, lambda: 0.0, PATHS[path].scales) for guess in (x, x_hat)]
            var = (s_t**2 - (a_t / a_s)**2 * s_s**2) * s_s**2 / s_t**2
            kl = (means[0] - means[1]).square().sum() / (2 * var)
            assert torch.allclose(kl, 0.5 * (a_s**2 / s_s**2 - a_t**2 / s_t**2) * (x - x_hat).square().sum(), rtol=2e-3)

# ---- Samplers on Gaussian data x ~ N(mu, sd^2): E[x | z] is known, and the marginal of z is N(a mu, a^2 sd^2 + s^2 k^2) ---
class Gaussian:
    """The exact network for Gaussian data, for any prediction and path.

    sd near 1, as for standardised data: ancestral sampling takes the posterior's variance for a known x, which is too
    small by O(1/steps) for narrow data (measured: 4 % at sd 0.4, 200 steps, ddpm-linear; 2 % at sd 1).
    """

    def __init__(self, pred, path, mu=0.7, sd=1.0, k=1.0):
        self.config = model.JiTConfig(**{**TINY, "pred": pred, "path": path, "noise_scale": k})
        self.mu, self.sd, self.k = mu, sd, k

    def __call__(self, z, t, y):
        a, s, da, ds = (model.expand(c.float(), z) for c in coefficients(self.config.path, t))
        var = (a * self.sd)**2 + (s * self.k)**2
        x = self.mu + a * self.sd**2 / var * (z - a * self.mu)
        e = s * self.k**2 / var * (z - a * self.mu)
        return {"x": x, "e": e, "v": da * x + ds * e}[self.config.pred]

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pred", KINDS)
@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_gaussian_data_is_reproduced(path, pred, solver):
    torch.manual_seed(0)
    net = Gaussian(pred, path)
    z = sample.generate(net, torch.randn(1, 3, 256, 256), torch.zeros(1).long(), solver=solver, steps=200, t_eps=0.005)
    assert abs(z.mean() - net.mu) < 0.03 * net.mu and abs(z.std() - net.sd) < 0.03 * net.sd

@pytest.mark.parametrize("solver", sample.SOLVERS)
def test_noise_scale_is_respected(solver):
    torch.manual_seed(0)
    net = Gaussian("x", "linear", k=2.0)
    z = sample.generate(net, 2.0 * torch.randn(1, 3, 256, 256), torch.zeros(1).long(), solver=solver, steps=200, t_eps=0.005)
    assert abs(z.mean() - net.mu) < 0.03 * net.mu and abs(z.std() - net.sd) < 0.03 * net.sd

@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_no_clamp_between_x_and_the_next_state(solver):
    """250 steps on the linear path, t_eps 0.05: dividing by the clamped 1-t and multiplying by the other lost 4 % of the mean."""
    torch.manual_seed(0)
    net = Gaussian("x", "linear")
    z = sample.generate(net, torch.randn(1, 3, 128, 128), torch.zeros(1).long(), solver=solver, steps=250)
    assert abs(z.mean() - net.mu) < 0.02 * net.mu

@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ddpm_paths_end_where_they_should(solver):
    """Narrow data: a constant clamp of sigma' moved the end by 0.009 at std 0.05."""
    net = Gaussian("x", "ddpm-linear", mu=0.0, sd=0.05)
    noise = torch.randn(1, 3, 16, 16)
    z = sample.generate(net, noise, torch.zeros(1).long(), solver=solver, steps=2000, t_eps=1e-4)
    assert (z - 0.05 * noise).abs().max() < 0.003

@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """The flow of Gaussian data is affine: z_1 = mu + sd (z_0 - 0)/k exactly.  Halving the step divides the error by 2^order.

    On the cosine path, where heun's last Euler step does not hide its order: the flow is smooth up to t = 1 in x and e.
    """
    net, noise = Gaussian("v", "cosine"), torch.randn(1, 3, 16, 16)
    exact = net.mu + net.sd * noise
    errors = []
    for steps in (20, 40, 80):
        z = sample.generate(net, noise, torch.zeros(1).long(), solver=solver, steps=steps, t_eps=1e-3)
        errors.append((z - exact).abs().mean().item())
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(rate - order) < 0.25 for rate in rates), rates

def test_noise_left_by_the_clamp():
    """A perfect network for a point mass, 50 steps: t_eps 0.05 leaves std 0.017 (2 grey levels), t_eps = 1/steps leaves none."""
    net = Gaussian("x", "linear", sd=1e-6)
    torch.manual_seed(0)
    noise, y = torch.randn(1, 3, 64, 64), torch.zeros(1).long()
    left = [sample.generate(net, noise, y, solver=solver, steps=50, t_eps=t_eps).std().item() for solver in ("euler", "heun") for t_eps in (0.05, 0.02)]
    assert all(0.01 < left[i] < 0.025 for i in (0, 2)) and left[1] < 1e-5 and left[3] < 1e-5

def test_times_of_training():
    n, s = 200_000, train.Options(shift=1.0)
    torch.manual_seed(0)
    t = train.sample_times(n, s, "cpu")
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() + 0.8) < 0.01 and abs(logit.std() - 0.8) < 0.01
    shifted = train.sample_times(n, train.Options(shift=3.0), "cpu")                         # p_mean - ln A
    assert abs(torch.log(shifted / (1 - shifted)).mean() + 0.8 + math.log(3)) < 0.01
    uniform = train.sample_times(n, train.Options(times="uniform", shift=1.0), "cpu")
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.std() - 12**-0.5) < 0.01
    assert abs(train.sample_times(n, train.Options(times="uniform", shift=3.0), "cpu").median() - 0.25) < 0.01

# ---- The official sampler, rewritten: always two passes, guidance by mask, Heun with a last Euler step ---------------
def official_sampler(net, z, y, null, steps, method, w, low, high, t_eps=0.05):
    ts = torch.linspace(0, 1, steps + 1)

    def v_of(z, t):
        tt = torch.full((len(z),), float(t))
        cond, unc = ((net(z, tt, lab) - z) / max(1 - float(t), t_eps) for lab in (y, torch.full_like(y, null)))
        on = t < high and (low == 0 or t > low)
        return unc + (w if on else 1.0) * (cond - unc)
    for i in range(steps - 1):
        t, u = ts[i], ts[i + 1]
        v = v_of(z, t)
        if method == "heun":
            v = 0.5 * (v + v_of(z + (u - t) * v, u))
        z = z + (u - t) * v
    return z + (ts[-1] - ts[-2]) * v_of(z, ts[-2])

@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("w", [1.0, 2.9])
@pytest.mark.parametrize("interval", [(0.1, 1.0), (0.3, 0.7), (0.0, 1.0)])
def test_trajectories_of_the_official_sampler(method, w, interval):
    net = randomised(model.JiTConfig(**TINY), scale=0.15)
    torch.manual_seed(1)
    z, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected = official_sampler(net, z, y, 3, 20, method, w, *interval)
    got = sample.generate(net, z, y, solver=method, steps=20, cfg=w, interval=interval)
    assert (got - expected).abs().max() < 1e-4

def test_small_t_eps_ends_on_the_prediction():
    net = randomised(model.JiTConfig(**TINY))
    z, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for solver in ("euler", "heun"):
        *_, (t, state), (end, out) = sample.walk(net, z, y, solver=solver, steps=10, t_eps=0.1)
        with torch.no_grad():
            assert torch.allclose(out, net(state, torch.full((2,), t), y), atol=1e-5) and end == 1.0

def test_guidance_one_is_conditional_and_zero_unconditional():
    net, calls = randomised(model.JiTConfig(**TINY)), []
    net.register_forward_hook(lambda module, args, out: calls.append((len(args[0]), args[2].tolist())))
    z, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    with torch.no_grad():
        v1, v0, v3 = (sample.guided(net, z, 0.5, y, cfg=w) for w in (1.0, 0.0, 3.0))
        conditional, unconditional = (sample.predict(net, z, 0.5, labels) for labels in (y, torch.full_like(y, 3)))
        x3 = sample.guided(net, z, 0.5, y, cfg=3.0, to="x")
    assert torch.equal(v1, conditional) and torch.equal(v0, unconditional)
    assert torch.allclose(v3, unconditional + 3 * (conditional - unconditional), atol=1e-5)
    assert torch.allclose(x3, z + 0.5 * v3, atol=1e-5)                                  # guided images are guided velocities
    assert calls[:3] == [(2, [0, 1]), (2, [3, 3]), (4, [0, 1, 3, 3])]                   # one pass each, both halves in one batch

def test_heun_50_costs_99_evaluations():
    net, calls = Gaussian("x", "linear"), []
    counted = lambda z, t, y: calls.append(1) or net(z, t, y)
    sample.generate(counted, torch.randn(1, 3, 4, 4), torch.zeros(1).long(), steps=50)
    assert len(calls) == 99

def test_wrong_requests_to_generate():
    for options in ({"solver": "rk4"}, {"steps": 0}):
        with pytest.raises(ValueError):
            sample.generate(Gaussian("x", "linear"), torch.randn(1, 3, 4, 4), torch.zeros(1).long(), **options)
