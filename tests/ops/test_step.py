import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import diffgan_fast as dgf
from diffgan_fast.ops import step as module
from tests.ops import oracle
from tests.ops.cases import T, check_compiles, images, layouts, tolerance

S = dgf.Schedule.linear(T)
BETA, ALPHA, ABAR = oracle.linear_schedule(T)
PREDICTIONS = ("eps", "x0", "v")


def ddpm(x, e, t, key, first=0, variance="posterior", prediction="eps", clip=False):
    """One ancestral step in float64 NumPy, step by step as Ho et al. write it. t [N, 1, ...]."""
    beta, alpha, abar, before = BETA[t], ALPHA[t], ABAR[t], ABAR[t - 1]
    if prediction == "eps":
        x0 = (x - np.sqrt(1 - abar) * e) / np.sqrt(abar)
    elif prediction == "x0":
        x0 = e
    else:
        x0 = np.sqrt(abar) * x - np.sqrt(1 - abar) * e
    if clip:
        x0 = x0.clip(-1, 1)
    mean = np.sqrt(before) * beta / (1 - abar) * x0 + np.sqrt(alpha) * (1 - before) / (1 - abar) * x
    var = beta * (1 - before) / (1 - abar) if variance == "posterior" else beta
    z = oracle.normal(x.size, key, first).reshape(x.shape)
    return mean + np.where(t > 1, np.sqrt(var), 0) * z


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("clip", [False, True])
def test_follows_the_formula(backend, prediction, variance, clip):
    t = torch.tensor([1, 2, 40, T - 1, T], device=backend.device)
    i = t.cpu().numpy().reshape(-1, 1, 1, 1)
    for dtype in backend.dtypes:
        for x in layouts(images((5, 3, 5, 7), dtype, backend.device)):
            e = torch.randn_like(x)
            got = dgf.ops.ddpm_step(
                x, e, t, S, 7, variance=variance, prediction=prediction, clip_x0=clip, first_sample=3
            )
            want = ddpm(*(v.double().cpu().numpy() for v in (x, e)), i, 7, 315, variance, prediction, clip)
            assert got.dtype == dtype and got.stride() == x.stride()
            assert np.abs(got.double().cpu().numpy() - want).max() <= tolerance(dtype, 16)


def test_points_and_ints(backend):
    x, e = images((50, 2), torch.float32, backend.device), images((50, 2), torch.float32, backend.device)
    for t in (1, 2, 77, T):
        got = dgf.ops.ddpm_step(x, e, t, S, 5)
        want = ddpm(x.double().cpu().numpy(), e.double().cpu().numpy(), np.full((50, 1), t), 5)
        assert np.abs(got.cpu().numpy() - want).max() < 1e-5
        assert torch.equal(got, dgf.ops.ddpm_step(x, e, torch.full((50,), t, device=backend.device), S, 5))


def test_guidance_comes_in_the_stated_order(backend):
    x, e, u, g = (images((4, 3, 5, 5), torch.float32, backend.device) for _ in range(4))
    t = torch.tensor([1, 30, 200, T], device=backend.device)
    rest = torch.tensor(np.sqrt(1 - ABAR[t.cpu()]), dtype=torch.float32, device=backend.device).view(-1, 1, 1, 1)
    for clip in (False, True):
        got = dgf.ops.ddpm_step(
            x, e, t, S, 5, clip_x0=clip, eps_uncond=u, guidance_scale=2.5, logit_grad=g, logit_scale=1.5
        )
        guided = u + 2.5 * (e - u) - 1.5 * rest * g
        assert torch.allclose(got, dgf.ops.ddpm_step(x, guided, t, S, 5, clip_x0=clip), atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_critic_guidance_is_the_same_shift_for_every_prediction(prediction):
    """The same network, told to predict x0 or v instead of eps, must be guided to the same place."""
    x, eps, g = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1, 2, 50, 150, 299, T])
    a = torch.tensor(ABAR)[t][:, None]
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    out = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[prediction]
    got = dgf.ops.ddpm_step(x, out, t, S, 3, prediction=prediction, logit_grad=g, logit_scale=0.7)
    want = dgf.ops.ddpm_step(x, eps - 0.7 * (1 - a).sqrt() * g, t, S, 3)
    assert torch.allclose(got, want, atol=1e-12)


def test_no_guidance_is_exact():
    x, e, u = (torch.randn(3, 8) for _ in range(3))
    plain = dgf.ops.ddpm_step(x, e, 40, S, 3)
    assert torch.allclose(dgf.ops.ddpm_step(x, e, 40, S, 3, eps_uncond=u, guidance_scale=1.0), plain, atol=1e-6)
    zero = dgf.ops.ddpm_step(x, e, 40, S, 3, logit_grad=u, logit_scale=0.0)
    assert torch.equal(zero, plain)


def test_the_true_noise_gives_the_posterior_mean():
    x0, t = torch.randn(5, 6, dtype=torch.float64), torch.tensor([2, 3, 50, 299, T])
    x, eps = dgf.ops.add_noise(x0, t, S, 1, return_noise=True)
    z = dgf.random.normal(x0.shape, 9, dtype=torch.float64)
    i = t.numpy()[:, None]
    mean = (
        np.sqrt(ABAR[i - 1]) * BETA[i] / (1 - ABAR[i]) * x0.numpy()
        + np.sqrt(ALPHA[i]) * (1 - ABAR[i - 1]) / (1 - ABAR[i]) * x.numpy()
    )
    std = np.sqrt(BETA[i] * (1 - ABAR[i - 1]) / (1 - ABAR[i]))
    assert np.abs(dgf.ops.ddpm_step(x, eps, t, S, 9).numpy() - mean - std * z.numpy()).max() < 1e-12
    assert np.abs(dgf.ops.posterior_step(x0, x, t, S, 9).numpy() - mean - std * z.numpy()).max() < 1e-12


@pytest.mark.parametrize("schedule", [S, dgf.Schedule.linear(1000).respace(50), dgf.Schedule.cosine(30)])
def test_ddim_with_eta_one_is_ddpm(schedule):
    x, e = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for t in (1, 2, schedule.T // 2, schedule.T):
        ddpm_out = dgf.ops.ddpm_step(x, e, t, schedule, 3)
        a = schedule.alphas_cumprod[t]
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        assert torch.allclose(dgf.ops.ddim_step(x, e, t, t - 1, schedule, 3, eta=1.0), ddpm_out, atol=1e-9)
        assert torch.allclose(dgf.ops.posterior_step(x0, x, t, schedule, 3), ddpm_out, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_follows_the_formula(backend, eta, clip):
    x, e = images((5, 3, 3, 3), torch.float32, backend.device), images((5, 3, 3, 3), torch.float32, backend.device)
    t, before = torch.tensor([1, 20, 20, 299, T]), torch.tensor([0, 19, 0, 150, 100])
    got = dgf.ops.ddim_step(x, e, t.to(x.device), before.to(x.device), S, 3, eta=eta, clip_x0=clip)
    a, p = (ABAR[v.numpy()].reshape(-1, 1, 1, 1) for v in (t, before))
    wide, eps = x.double().cpu().numpy(), e.double().cpu().numpy()
    x0 = (wide - np.sqrt(1 - a) * eps) / np.sqrt(a)
    if clip:
        x0 = x0.clip(-1, 1)
        eps = (wide - np.sqrt(a) * x0) / np.sqrt(1 - a)
    sigma = eta * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    want = np.sqrt(p) * x0 + np.sqrt(1 - p - sigma**2) * eps + sigma * oracle.normal(x.numel(), 3).reshape(x.shape)
    assert np.abs(got.cpu().numpy() - want).max() < 2e-5
    for n in range(5):
        one = dgf.ops.ddim_step(
            x[n : n + 1], e[n : n + 1], int(t[n]), int(before[n]), S, 3, eta=eta, clip_x0=clip, first_sample=n
        )
        assert torch.allclose(one[0], got[n], atol=2e-6)


def test_exact_gaussian_data_keep_their_law():
    """Data N(0, 1) and eps* = sqrt(1 - abar) x: the variance recursion catches every slip of index or variance."""
    for variance, end in (("beta", 0.9999), ("posterior", 0.98409976)):
        var = 1.0
        for t in range(T, 0, -1):
            x = torch.tensor([[1.0]], dtype=torch.float64)
            e = math.sqrt(1 - ABAR[t]) * x
            keys = torch.tensor([0])
            with_noise = dgf.ops.ddpm_step(x, e, t, S, keys, variance=variance)
            gain = dgf.ops.ddpm_step(2 * x, 2 * e, t, S, keys, variance=variance) - with_noise
            scale = (with_noise - gain) / dgf.random.normal((1, 1), 0, dtype=torch.float64)
            var = float(gain) ** 2 * var + float(scale) ** 2
            if variance == "beta" and t > 1:
                assert abs(var - 1) < 1e-9
        assert abs(var - end) < 1e-8


def test_a_point_mass_is_reproduced_at_every_step():
    n, c = 200_000, 0.6
    x = dgf.ops.add_noise(torch.full((n, 1), c, dtype=torch.float64), T, S, 1)
    for t in range(T, 0, -1):
        e = (x - math.sqrt(ABAR[t]) * c) / math.sqrt(1 - ABAR[t])
        x = dgf.ops.ddpm_step(x, e, t, S, dgf.random.fold_in(2, t))
        if t in (T, 200, 50, 2):
            assert abs(float(x.mean()) - math.sqrt(ABAR[t - 1]) * c) < 5 / n**0.5
            assert abs(float(x.var()) - (1 - ABAR[t - 1])) < 8 / n**0.5
    assert torch.allclose(x, torch.full_like(x, c), atol=1e-12)


def test_gradients(backend):
    t = torch.tensor([1, 2, 100, T], device=backend.device)
    double = torch.float64 in backend.dtypes
    tensors = [images((4, 2, 2, 2), torch.float64 if double else torch.float32, backend.device) for _ in range(4)]
    x, e, u, g = (v.requires_grad_() for v in tensors)
    for clip in (False, True):

        def f(x, e, u, g, clip=clip):
            return dgf.ops.ddpm_step(
                x, e, t, S, 5, clip_x0=clip, eps_uncond=u, guidance_scale=2.0, logit_grad=g, logit_scale=1.5
            )

        if double:
            assert gradcheck(f, (x, e, u, g), check_forward_ad=True) and gradgradcheck(f, (x, e, u, g))
        else:
            got = torch.autograd.grad(f(x, e, u, g).square().sum(), (x, e, u, g))
            with dgf.backend("reference"):
                wide = [v.detach().double().requires_grad_() for v in (x, e, u, g)]
                want = torch.autograd.grad(f(*wide).square().sum(), wide)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_asked_for():
    x, e = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dgf.ops.ddpm_step(x, e, 9, S, 1).sum(), e)
    b = -BETA[9] / math.sqrt(ALPHA[9] * (1 - ABAR[9]))
    assert torch.allclose(grad, torch.full((3, 4), b, dtype=torch.float32), rtol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_opcheck(backend, guided):
    if backend.name == "reference":
        pytest.skip("the reference is plain torch, not a registered op")
    op = getattr(torch.ops.diffgan_fast, "step_triton" if backend.name == "triton" else "step").default
    x, e, u, g = (images((3, 2, 4, 4), torch.float32, backend.device) for _ in range(4))
    rows = S.rows(("ddpm", "beta", "eps"), x, module._ddpm_rows, "beta", "eps")
    t = torch.tensor([1, 5, T], device=backend.device)
    rest = (u, g) if guided else (None, None)
    torch.library.opcheck(op, (x, e, *rest, rows, t, 0, 2.0, 1.0, guided, 3, None, 0))


def test_compiles_without_breaks_or_recompiles():
    def f(x, e, t, key):
        return (
            dgf.ops.ddpm_step(x, e, t, S, key)
            + dgf.ops.ddim_step(x, e, 9, 3, S, key)
            + dgf.ops.posterior_step(e, x, t, S, key)
        )

    check_compiles(f, torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 2, T]))


BAD = [
    (dict(t=0), "t must be in 1..300, got 0"),
    (dict(t=torch.tensor([1, 0, 3])), "t must be in 1..300, got values in 0..3"),
    (dict(eps_hat=torch.ones(3, 3)), "prediction must match x"),
    (dict(eps_hat=torch.ones(3, 2, dtype=torch.bfloat16)), "prediction must match x"),
    (dict(variance="learned"), "variance must be"),
    (dict(prediction="score"), "prediction must be one of"),
    (dict(guidance_scale=2.0), "guidance_scale=2.0 needs eps_uncond"),
    (dict(logit_scale=2.0), "logit_scale=2.0 needs logit_grad"),
    (dict(eps_uncond=torch.ones(2, 2)), "eps_uncond must match x"),
]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_are_named(name, change, message):
    if reason := dgf.backends.unavailable(name):
        pytest.skip(reason)
    args = dict(x=torch.ones(3, 2), eps_hat=torch.ones(3, 2), t=5, schedule=S, key=1) | change
    with dgf.backend(name), pytest.raises(ValueError, match=message):
        dgf.ops.ddpm_step(**args)


def test_bad_pairs_of_steps_are_named():
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="t_prev must be below t"):
        dgf.ops.ddim_step(x, x, 5, 5, S, 1)
    with pytest.raises(ValueError, match="t - t_prev must be in 1"):
        dgf.ops.ddim_step(x, x, torch.tensor([5, 6]), torch.tensor([1, 6]), S, 1)
    with pytest.raises(ValueError, match="both be ints"):
        dgf.ops.ddim_step(x, x, 5, torch.tensor([1, 6]), S, 1)
    with pytest.raises(ValueError, match="eta"):
        dgf.ops.ddim_step(x, x, 5, 4, S, 1, eta=2)


def test_ddim_with_tensor_steps_compiles():
    def f(x, e, t, before, key):
        return dgf.ops.ddim_step(x, e, t, before, S, key, eta=0.5)

    check_compiles(f, torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 20, T]), torch.tensor([0, 10, 299]))


@pytest.mark.gpu
def test_ddim_rows_out_of_range_are_nan_on_a_gpu():
    x = torch.ones(4, 9, device="cuda")
    t, before = (torch.tensor(v, device="cuda") for v in ([T + 1, 5, 5, 5], [0, -1, 5, 4]))
    assert dgf.ops.ddim_step(x, x, t, before, S, 1).isnan().any(1).tolist() == [True, True, True, False]
