"""Every method with tiny networks, stepped as the loop steps it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import diffgan_fast as dgf
from diffgan_fast import random
from diffgan_fast.engine import Batch, precision
from diffgan_fast.run import build

CHAIN = dict(critic_width=4, T=3, width=8, critic_start="scratch")
GAN = dict(width=8, critic_width=8, z_dim=8)
STYLES = dict(GAN, network="stylegan2", r1_gamma=1.0, r1_every=2, path_length=2.0, style_mixing=0.5, critic_lr=1e-5)
# at the usual rate Adam's first steps, of gradients that are mostly rounding, lead far apart
AS_CODED = dict(GAN, variant="as-coded", critic_lr=1e-5)
# name -> (method, shape of a sample, options)
CASES = {
    "ddpm": ("ddpm", (1, 8, 8), dict(T=6, width=8, dropout=0.1)),
    "method1": ("method1", (1, 8, 8), CHAIN),
    "method2": ("method2", (1, 8, 8), CHAIN),
    "method2, every second state": ("method2", (1, 8, 8), dict(CHAIN, recompute=2, chain_mode="train", dropout=0.1)),
    "method2, plain autograd": ("method2", (1, 8, 8), dict(CHAIN, recompute="none")),
    "method2, fewer steps": ("method2", (1, 8, 8), dict(CHAIN, T=6, sample_steps=3, sampler="ddim")),
    "method3": ("method3", (1, 8, 8), dict(critic_width=4, critic_steps=1, T=6, width=8)),
    "method3.5": ("method3.5", (1, 8, 8), dict(critic_width=4, critic_steps=0, T=6, width=8)),
    "method3, as coded": ("method3", (1, 8, 8), dict(critic_width=4, critic_steps=1, T=6, width=8, forwards="two")),
    "method4": ("method4", (1, 8, 8), dict(critic_width=4, T=6, width=8, critic_off=1)),
    "discriminator-guidance": ("discriminator-guidance", (1, 8, 8), dict(critic_width=4, fakes=5, T=3, width=8)),
    "gan-enhanced": ("gan-enhanced", (2,), dict(T=6, width=16, critic_width=16)),
    "gan": ("gan", (1, 8, 8), GAN),
    "gan, R1": ("gan", (1, 8, 8), dict(GAN, r1_gamma=1.0, r1_every=2, critic_norm="layer")),
    "gan, residual": ("gan", (1, 8, 8), dict(GAN, network="sngan", gan_loss="hinge")),
    "gan, StyleGAN2, R1": ("gan", (1, 8, 8), STYLES),
    "ddgan": ("ddgan", (1, 8, 8), dict(T=2, lazy_reg=2, width=8, z_dim=8, lr=1e-5, critic_lr=1e-5)),
    "ddgan, two updates": ("ddgan", (2,), dict(T=2, lazy_reg=2, width=16, z_dim=4, critic_updates=2, lr=1e-4)),
    "ddgan of points": ("ddgan", (2,), dict(T=2, lazy_reg=2, width=16, z_dim=4)),
    "diffusion-gan": ("diffusion-gan", (1, 8, 8), GAN),
    "diffusion-gan, StyleGAN2, R1": ("diffusion-gan", (1, 8, 8), STYLES),
    "diffusion-gan, as coded": ("diffusion-gan", (2,), dict(AS_CODED, r1_gamma=1.0, r1_every=2)),
}
KEY = random.key(3)


def start(case, given=None, device="cpu", **options):
    """(method, state, batch): the same weights and data in every call. `given`: networks of one's own, by name."""
    name, shape, usual = CASES[case]
    kind, x = dgf.methods.find(name), random.normal((8, *shape), KEY, device=device).clamp(-1, 1)
    method = kind(kind.Config(**{"batch_size": 8, "steps": 8, "lr": 2e-4, **usual, **options}), shape)
    state = build(method, given or {}, 0, torch.device(device))
    for net in state.nets.values():
        net.train()
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        method.prepare(state, KEY, Path(folder))
    return method, state, Batch(x.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else x)


def step(method, state, batch):
    """One step. Its losses."""
    key = random.fold_in(KEY, "step", state.step)
    torch.manual_seed(random.fold_in(key, "torch", 0))
    with precision.reduced(method.config.precision, batch.x.device):
        losses = method.step(state, batch, key)
    state.step += 1
    return {name: float(v.detach()) for name, v in losses.items()}


def weights(state):
    """All weights of the networks that are trained, as one vector."""
    return torch.cat([p.detach().flatten() for name in state.optimizers for p in state[name].parameters()])
