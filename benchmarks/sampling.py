"""Sampling 64 images of 28 px, T = 300, student U-Net: the reference's loop and diffusers' against ours.

Providers, all with the same network and weights, in eval mode:
    reference   the notebook's loop: eager, coefficients indexed step by step, torch.randn_like, contiguous images
    diffusers   DDPMScheduler in the loop of its DDPMPipeline (`fixed_large`, no clipping)
    denoising-diffusion-pytorch    the loop of its GaussianDiffusion over its `p_sample`, where installed
    dgf         `dgf.sample` as a run calls it: channels_last, batch norm folded, one fused step op, noise from keys

All steps cost the same, so `STEPS` of them are timed, and `ms` is that of one step; `images_per_s` is for 300.
`floor_ms` is the fastest of these networks alone. Before timing ours is checked against the formula of
Ho et al. 2020, Algorithm 2, in float64 with the noise of its keys; the others draw their own.
"""

from __future__ import annotations

import copy
import importlib.util

import torch
from torch import Tensor, nn

import diffgan_fast as dgf
from benchmarks import oracle, peers
from benchmarks.cases import Options
from benchmarks.check import in_float32
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.nets import StudentUNet
from diffgan_fast.nets.folding import folded
from diffgan_fast.sampling import first_noise

T, BATCH, STEPS, ROUNDS = 300, 64, 10, 9  # on CUDA all T steps are timed, for the first ones record a graph


class Reference:
    """Ancestral sampling as the notebook has it, with variance beta."""

    def __init__(self, net: nn.Module, schedule: dgf.Schedule, device: torch.device):
        self.net, abar = net, schedule.alphas_cumprod.to(device)
        self.abar = abar.float()
        self.betas = (1 - abar[1:] / abar[:-1]).float()  # of t = 1..T

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int) -> Tensor:
        for t in range(T, T - steps, -1):
            eps = self.net(x, torch.full((len(x),), t, device=x.device))
            beta = self.betas[t - 1]
            x = (x - beta / (1 - self.abar[t]).sqrt() * eps) / (1 - beta).sqrt()
            if t > 1:
                x = x + beta.sqrt() * torch.randn_like(x)
        return x


class Diffusers:
    """The loop of DDPMPipeline."""

    def __init__(self, net: nn.Module, x: Tensor, steps: int):
        from diffusers import DDPMScheduler

        self.net, self.x, self.steps = net, x, steps
        self.scheduler = DDPMScheduler(T, 1e-4, 0.02, variance_type="fixed_large", clip_sample=False)
        self.scheduler.set_timesteps(T)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        x = self.x
        for t in self.scheduler.timesteps[: self.steps]:
            out = self.net(x, (t + 1).expand(len(x)).to(x.device))
            x = self.scheduler.step(out, t, x).prev_sample
        return x


class Lucidrains:
    """The loop of denoising-diffusion-pytorch."""

    def __init__(self, net: nn.Module, x: Tensor, steps: int):
        self.x, self.steps = x, steps
        self.diffusion = peers.gaussian_diffusion(net, x.shape[1], x.shape[2], T, x.device).eval()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        x = self.x
        for t in range(T - 1, T - 1 - self.steps, -1):
            x, _ = self.diffusion.p_sample(x, t)
        return x


class Ours:
    """The first steps of `dgf.sample`: the same loop over the same `Reverse`, cut short by `on_step`."""

    class Enough(Exception):
        pass

    def __init__(self, net: nn.Module, schedule: dgf.Schedule):
        self.net, self.schedule = net, schedule

    def __call__(self, x: Tensor, steps: int, key: int = 0) -> Tensor:
        def stop(t: int, x: Tensor) -> None:
            if t == T - steps:
                raise self.Enough(x)

        try:
            dgf.sample(self.net, tuple(x.shape), self.schedule, key, channels_last=True, device=x.device, on_step=stop)
        except self.Enough as done:
            return done.args[0]
        raise AssertionError("sampling had fewer steps than were asked for")


@in_float32()
def verify(ours: Ours, net: nn.Module, shape: tuple[int, ...], device: torch.device) -> str:
    """ "ok", or how far two steps are from the formula in float64."""
    x, key = first_noise(shape, 5, device=device).double(), 5
    net, abar = copy.deepcopy(net).double(), ours.schedule.alphas_cumprod.to(device)
    for t in (T, T - 1):
        with torch.no_grad():
            eps = net(x, torch.full((shape[0],), t, device=device))
        beta = 1 - abar[t] / abar[t - 1]
        z = oracle.normals(x.numel(), dgf.random.fold_in(key, t), 0, device).view(shape)
        x = (x - beta / (1 - abar[t]).sqrt() * eps) / (1 - beta).sqrt() + beta.sqrt() * z
    error = (ours(x, 2, key) - x).abs().max().item()
    return "ok" if error < 1e-3 else f"RED: off by {error:.3g}"


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    device, schedule = torch.device(options.device), dgf.Schedule.linear(T)
    batch, steps, rounds = (2, 2, 1) if options.quick else (BATCH, T if device.type == "cuda" else STEPS, ROUNDS)
    net = StudentUNet(T=T).to(device).eval()
    fast = folded(copy.deepcopy(net).to(memory_format=torch.channels_last))
    x = torch.randn(batch, 1, 28, 28, device=device)
    t = torch.full((batch,), T, device=device)
    ours = Ours(fast, schedule)
    status = verify(ours, net, (2, 1, 28, 28), device)
    calls = {"reference": lambda: Reference(net, schedule, device)(x, steps), "dgf": lambda: ours(x, steps)}
    if importlib.util.find_spec("diffusers"):
        calls["diffusers"] = Diffusers(net, x, steps)
    if peers.installed():
        calls["denoising-diffusion-pytorch"] = Lucidrains(net, x, steps)
    floors = {
        "as it is": lambda: [net(x, t) for _ in range(steps)],
        "folded, channels_last": lambda: [fast(x.to(memory_format=torch.channels_last), t) for _ in range(steps)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*calls, *floors)}
    with torch.no_grad():
        for round_ in range(1 + rounds):
            for name, call in (calls | floors).items():
                took = timed(call, device) / steps
                if round_ or options.quick:
                    seconds[name].append(took)
    floor = min(quantiles(seconds[name])["ms"] for name in floors)
    rows = []
    for name in calls:
        row = {"benchmark": "sampling", "case": f"student, T = {T}", "shape": f"{batch}x1x28x28", "dtype": "float32",
               "device": options.device, "threads": options.threads, "provider": name,
               "status": status if name == "dgf" else "ok"}  # fmt: skip
        if row["status"] == "ok":
            row |= quantiles(seconds[name]) | {"floor_ms": floor}
            row["images_per_s"] = batch / (row["ms"] * T) * 1e3
        rows.append(row)
    return rows
