"""denoise_chain against steps written out in plain torch, float64, and against closed forms."""

import math

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast.sampling import first_noise
from tests.chain.by_hand import KEY, RECOMPUTE, RECOMPUTED, Critic, Net, S, agree, by_hand, chain, gradients, start
from tests.ops import oracle

OPTIONS = [
    dict(),
    dict(variance="posterior"),
    dict(clip_x0=True),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=1.0, clip_x0=True),
    dict(steps=5),
    dict(sampler="ddim", steps=5, eta=0.5),
    dict(prediction="x0"),
    dict(prediction="v", clip_x0=True),
    dict(guidance_scale=2.5),
    dict(critic=Critic, logit_scale=1.5, logit_from=4),
    dict(critic=Critic, guidance_scale=0.5, prediction="v", variance="posterior"),
]


def case(options, dtype):
    """(model, x_T, options with their networks and conditions, all that wants a gradient)."""
    torch.manual_seed(1)
    model, x, options = Net().to(dtype), start(dtype=dtype), dict(options)
    shift, other = (torch.randn(n, 6, dtype=torch.float64).to(dtype).requires_grad_() for n in (5, 1))
    options["cond"] = dict(shift=shift, scale=0.8, y=torch.tensor([0, 3, 1, 1, 2]))
    options["uncond"] = dict(shift=other)
    inputs = [x, shift, *model.parameters()]
    if options.get("guidance_scale"):
        inputs.append(other)
    if "critic" in options:
        options["critic"] = options["critic"]().to(dtype)
        inputs += options["critic"].parameters()
    return model, x, options, inputs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_to_make_a_step(options):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model, x, given, inputs = case(options, torch.float64)
        want = by_hand(model, x, **given)
        expected = gradients(want, inputs)
        assert all(g is not None and g.any() for g in expected if g is not expected[-1])
        model, x, given, inputs = case(options, dtype)
        for recompute in RECOMPUTE:
            got = chain(model, x, recompute=recompute, **given)
            assert got.dtype == dtype
            agree([got], [want], tolerance)
            agree(gradients(got, inputs), expected, tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_value_is_that_of_sample(options, recompute):
    model, _, options, _ = case(options, torch.float32)
    want = dgf.sample(model, (5, 2), S, KEY, **options)
    assert torch.equal(chain(model, first_noise((5, 2), KEY), recompute=recompute, **options), want)


@pytest.mark.parametrize("recompute", ("none", "step", 15, 17, 301))
def test_golden_of_a_linear_network(recompute):
    """eps_hat = k x makes every step linear: dx_0/dx_T = prod_t (1 - k beta_t / sqrt(1 - abar_t)) / sqrt(alpha_t)."""
    k, (beta, alpha, abar) = 0.5, oracle.linear_schedule(300)
    product = math.prod((1 - k * beta[t] / (1 - abar[t]) ** 0.5) / alpha[t] ** 0.5 for t in range(1, 301))
    assert abs(product - 0.51750970) < 1e-8
    x = start(3)
    x0 = dgf.denoise_chain(lambda x, t: k * x, x, dgf.Schedule.linear(300), KEY, recompute=recompute)
    (g,) = torch.autograd.grad(x0.sum(), x)
    torch.testing.assert_close(g, torch.full_like(g, product), rtol=1e-12, atol=0)


def test_x_T_needs_no_gradient():
    """Neither with a critic, whose gradient is then taken at a copy of x_T."""
    model, x, given, _ = case(OPTIONS[-1], torch.float64)
    inputs = [*model.parameters(), *given["critic"].parameters()]
    want = gradients(by_hand(model, x.detach(), **given), inputs)
    for recompute in RECOMPUTED:
        agree(gradients(chain(model, x.detach(), recompute=recompute, **given), inputs), want)
