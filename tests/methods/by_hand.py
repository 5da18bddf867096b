"""What the methods are made of, in plain torch: schedule, noise, reverse steps and losses, and small networks.

An oracle: of the library it uses the names of keys, and `make`, which builds what is tested.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import diffgan_fast as dgf
from diffgan_fast.engine import State
from tests.ops import oracle

T, BETAS = 6, (0.02, 0.4)
LINEAR = dict(T=T, schedule="linear", beta_1=BETAS[0], beta_T=BETAS[1])
BETA, ALPHA, ABAR = (table.tolist() for table in oracle.linear_schedule(T, *BETAS))


class Denoiser(nn.Module):
    """Small, with batch norm, and told t and, if it has classes, y."""

    def __init__(self, channels=1, classes=0):
        super().__init__()
        self.enter, self.time = nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.Linear(1, 6)
        self.norm, self.leave = nn.BatchNorm2d(6), nn.Conv2d(6, channels, 3, padding=1)
        self.label = nn.Embedding(classes + 1, 6) if classes else None

    def forward(self, x, t, y=None):
        told = self.time(t[:, None].to(x.dtype) / 10)
        if self.label is not None:
            told = told + self.label(y)
        return self.leave(F.silu(self.norm(self.enter(x)) + told[:, :, None, None]))


def make(method, shape=(1, 8, 8), given=None, classes=0, **options):
    """A method on the schedule above, and its state."""
    kind = dgf.methods.find(method)
    made = kind(kind.Config(**{**LINEAR, **options}), shape, classes)
    networks = made.networks(given or {})
    return made, State(networks, made.optimizers(networks), made.averaged, made.config)


# what the source document's notebooks have
NOTEBOOK = dict(T=300, schedule="linear", beta_1=1e-4, beta_T=0.02, variance="beta", sampler="ddpm", sample_steps=None,
                network="student", data_range="unit", clip_x0=False, prediction="eps", conditional=False, ema=0.0,
                lr_schedule="constant", clip_grad=0.0, warmup=0, gan_loss="nonsaturating", critic_width=64)  # fmt: skip


def check_options(config, **want):
    assert {name: getattr(config, name) for name in want} == want


def images(n, shape=(1, 8, 8), seed=3):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(shape, key, first=0):
    """Normals for samples first, first + 1, …, float32."""
    per = torch.Size(shape[1:]).numel()
    return torch.tensor(oracle.normal(shape[0] * per, key, first * per), dtype=torch.float32).view(shape)


def levels(t):
    """sqrt(abar_t) and sqrt(1 - abar_t), [N, 1, 1, 1] for t [N]."""
    a = torch.tensor(ABAR)[t].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def sample(model, shape, key, *, sampler="ddpm", kept=range(T + 1), eta=0.0, variance="beta", prediction="eps",
           clip_x0=False, s=1.0, cond=None, uncond=None, critic=None, w=0.0, logit_from=1, last=T,
           first=0):  # fmt: skip
    """x_0 from noise, one step after the other; states before the `last` steps are constants."""
    x, kept = noise(shape, dgf.random.fold_in(key, "x_T"), first), list(kept)
    for i in range(len(kept) - 1, 0, -1):
        if i == last:
            x = x.detach()
        t, a, b = kept[i], ABAR[kept[i]], ABAR[kept[i - 1]]
        told, root, rest = torch.full((len(x),), t), a**0.5, (1 - a) ** 0.5
        out = model(x, told, **(cond or {}))
        if s != 1.0:
            without = model(x, told, **(uncond or {}))
            out = (1 - s) * without + s * out
        eps = {"eps": out, "x0": (x - root * out) / rest, "v": root * out + rest * x}[prediction]
        if critic is not None and t >= logit_from:
            at = x.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(critic(at, t=told).sum(), at)
            eps = eps - w * rest * gradient
        z = noise(shape, dgf.random.fold_in(key, i), first)
        x = oracle.reverse_step(x, eps, a, b, z, sampler=sampler, eta=eta, variance=variance, clip_x0=clip_x0)
    return x


def bce(logits, label):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


LOSSES = {  # of the critic, by its logits of real and fake; of what it judges, by those of fake
    "nonsaturating": (lambda real, fake: bce(real, 1.0) + bce(fake, 0.0), lambda fake: bce(fake, 1.0)),
    "lsgan": (
        lambda real, fake: 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean(),
        lambda fake: 0.5 * ((fake - 1) ** 2).mean(),
    ),
}


class Recording:
    """A state that keeps the gradient of every loss on which it updates a network."""

    def __init__(self, state):
        self.gradients, update = {}, state.update

        def noted(name, loss):
            self.gradients[name] = gradient(loss, state[name])
            update(name, loss)

        state.update = noted


def gradient(loss, net):
    """Of a loss in all parameters that it depends on, as one vector; zeros in the others."""
    wanted = list(net.parameters())
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in wanted)
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(found, zeros, strict=True)])


def near(got, want, tolerance=1e-4):
    """Equal up to a share of the largest."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


def same_weights(net, other):
    a, b = net.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def adam(net, lr, beta1=0.5):
    return torch.optim.Adam(net.parameters(), lr, betas=(beta1, 0.999))


def follow(net, optimizer, loss, found, tolerance=1e-3):
    """One step of plain torch along `found`, which is the gradient of `loss`, up to rounding: Adam makes much of it."""
    near(found, gradient(loss, net), tolerance)
    at = 0
    for p in net.parameters():
        p.grad = found[at : at + p.numel()].view_as(p).clone()
        at += p.numel()
    optimizer.step()


def copies(state):
    return {name: copy.deepcopy(net) for name, net in state.nets.items()}
