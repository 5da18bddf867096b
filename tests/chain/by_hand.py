"""What the tests of denoise_chain share: small networks, and the chain written out in plain torch, step by step."""

import math

import torch
from torch import nn

import diffgan_fast as dgf
from tests.ops import oracle

T, BETAS, KEY = 8, (0.02, 0.3), 21
S = dgf.Schedule.linear(T, *BETAS)
ABAR = oracle.linear_schedule(T, *BETAS)[2].tolist()
RECOMPUTED = ("step", 3, 4, 50)  # 3 does not divide T, 4 does, 50 is above it
RECOMPUTE = ("none", *RECOMPUTED)


class Net(nn.Module):
    """Small, smooth, and with whatever a step may depend on: t, a shift, a scale, labels."""

    def __init__(self, *middle):
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 6), nn.Linear(6, 2)
        self.label, self.middle = nn.Embedding(4, 6), nn.Sequential(*middle)

    def forward(self, x, t, shift=0.0, scale=1.0, y=None):
        h = self.enter(x) + shift + t[:, None] / 10
        h = h if y is None else h + self.label(y)
        return scale * self.leave(self.middle(torch.tanh(h)))


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x, *, t):
        return self.layers(x) * t[:, None] / 10


def start(n=5, shape=(2,), dtype=torch.float64):
    """x_T, a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def by_hand(model, x, *, key=KEY, sampler="ddpm", steps=None, eta=0.0, variance="beta", prediction="eps",
            clip_x0=False, guidance_scale=1.0, critic=None, logit_scale=1.0, logit_from=1, cond=None, uncond=None,
            last=T):  # fmt: skip
    """x_0 by the formulas, one after the other in plain torch: noise from the test's own Philox, states before `last`
    constant, and torch's generator seeded as the chain says that it does."""
    kept = range(T + 1) if steps is None else [math.floor(i * T / steps + 0.5) for i in range(steps + 1)]
    with torch.random.fork_rng():
        for i in range(len(kept) - 1, 0, -1):
            if i == last < T:
                x = x.detach()
            t, a, b = kept[i], ABAR[kept[i]], ABAR[kept[i - 1]]
            torch.manual_seed(dgf.random.fold_in(key, i, "torch"))
            told = torch.full((len(x),), t)
            out = model(x, told, **(cond or {})).to(x.dtype)
            if guidance_scale != 1.0:
                without = model(x, told, **(uncond or {})).to(x.dtype)
                out = without + guidance_scale * (out - without)
            root, rest = a**0.5, (1 - a) ** 0.5
            other = (x - root * out) / rest if prediction == "x0" else root * out + rest * x
            eps = out if prediction == "eps" else other
            if critic is not None and t >= logit_from:
                at = x if x.requires_grad else x.detach().requires_grad_()
                (g,) = torch.autograd.grad(critic(at, t=told).sum(), at, create_graph=True)
                eps = eps - logit_scale * rest * g
            z = torch.as_tensor(oracle.normal(x.numel(), dgf.random.fold_in(key, i))).reshape(x.shape).to(x.dtype)
            x = oracle.reverse_step(x, eps, a, b, z, sampler=sampler, eta=eta, variance=variance, clip_x0=clip_x0)
    return x


def chain(model, x, **options):
    return dgf.denoise_chain(model, x, S, options.pop("key", KEY), **options)


def reward(x0):
    """A scalar in which no two elements stand alike."""
    return (x0 * torch.linspace(-1, 1, x0.numel()).to(x0).reshape(x0.shape)).sum() + (x0**2).mean()


def gradients(x0, inputs, **options):
    return torch.autograd.grad(reward(x0), inputs, allow_unused=True, **options)


def agree(got, want, tolerance=1e-10):
    for g, w in zip(got, want, strict=True):
        if w is None:
            assert g is None
        else:
            assert (g.double() - w.double()).abs().max() <= tolerance * w.double().abs().max()


def same(got, want):
    assert all((g is w is None) or torch.equal(g, w) for g, w in zip(got, want, strict=True))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]
