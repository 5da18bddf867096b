"""`python -m benchmarks.sanitize cuda|triton|cpu`: each op once on odd sizes, for compute-sanitizer to watch.

Results are compared with the plain torch back end on the CPU, so that the run is not one of broken kernels, and only
theirs are watched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

import diffgan_fast as dgf

KEY, T = 0x123456789ABCDEF, 10
REPEATS = 5


def inputs(device: str) -> Iterator[torch.Tensor]:
    """Points, images and a long vector: odd tails, channels_last, a view that is not aligned, half precision."""
    base = torch.randn(5 * 3 * 7 * 9 + 1, device=device)
    yield base[1:8].view(7, 1)
    yield base[1:].view(5, 3, 7, 9)
    yield base[:-1].view(5, 3, 7, 9).to(memory_format=torch.channels_last)
    yield torch.randn(3, 4099, device=device)
    yield base[1:].view(5, 3, 7, 9).bfloat16()
    yield torch.randn(2, 3, 32, 32, device=device).half().to(memory_format=torch.channels_last)
    yield torch.randn(257, 2, device=device)


def results(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What every op makes of x under the current back end."""
    schedule, ops = dgf.Schedule.linear(T), dgf.ops
    n = len(x)
    t = torch.arange(n, device=x.device) % T + 1
    keys = torch.arange(n, device=x.device) + KEY
    e, other, grad = x.flip(0), x * 0.5, x - 1
    where = {"device": x.device, "first": 3}
    yield "normal", dgf.random.normal(x.shape, KEY, dtype=x.dtype, **where)
    yield "uniform", dgf.random.uniform(x.shape, KEY, **where)
    yield "randint", dgf.random.randint(1000, x.shape, KEY, **where).double()
    yield "bits", dgf.random.bits(x.shape, KEY, **where).double()
    for name, key, first in (("", KEY, 1), (" key_t", keys[:1], 1), (" keys", keys, 0)):
        yield "add_noise" + name, ops.add_noise(x, t, schedule, key, first_sample=first)
        both = ops.add_noise(x, t, schedule, key, return_noise=True, first_sample=first)
        yield "add_noise+noise" + name, torch.cat(both)
        yield "noise_pair" + name, torch.cat(ops.noise_pair(x, t, schedule, key, first_sample=first))
        yield "ddpm_step" + name, ops.ddpm_step(x, e, t, schedule, key, first_sample=first)
        yield "noise_mse" + name, ops.noise_mse(x, key, first_sample=first)
        yield "interpolate" + name, ops.interpolate(x, other, key, first_sample=first)
    guided = {"eps_uncond": other, "guidance_scale": 2.0, "logit_grad": grad, "logit_scale": 0.5}
    yield "ddpm_step guided", ops.ddpm_step(x, e, t, schedule, KEY, clip_x0=True, **guided)
    yield "ddim_step", ops.ddim_step(x, e, t, t - 1, schedule, KEY, eta=0.5)
    yield "posterior_step", ops.posterior_step(e, x, 5, schedule, KEY)
    if x.dim() == 4:
        channels = torch.arange(n * x.shape[1], device=x.device).view(n, -1) % (T + 1)
        yield "add_noise by channel", ops.add_noise(x, channels, schedule, KEY)
    leaf = x.detach().clone().requires_grad_()
    loss = ops.denoising_loss(leaf, e, t, schedule, KEY, prediction="v", weight=t.float())
    yield "denoising_loss", loss.detach()
    yield "denoising_loss gradient", torch.autograd.grad(loss, leaf)[0]
    yield "noise_mse gradient", torch.autograd.grad(ops.noise_mse(leaf, KEY), leaf)[0]
    if x.dim() == 2 and x.dtype == torch.float32:
        torch.manual_seed(0)
        critic = dgf.nets.MLPCritic(x.shape[1], 48, 3, slope=0.2).to(x.device)
        for _ in range(REPEATS):  # its parts of a sum wait for each other: what a race spoils, it spoils now and then
            penalty = ops.gradient_penalty(critic, x, other, KEY)
            yield "gradient_penalty", penalty.detach()
            gradients = torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True)
            yield "gradient_penalty gradient", torch.cat([g.flatten() for g in gradients if g is not None])
    for center in (0.0, 1.0):
        penalty = ops.norm_penalty(leaf, center)
        yield f"norm_penalty {center}", penalty.detach()
        yield f"norm_penalty {center} gradient", torch.autograd.grad(penalty, leaf)[0]


def main(name: str) -> int:
    """Runs everything under the named back end. Returns the number of wrong results."""
    wrong = count = 0
    for x in inputs("cpu" if name == "cpu" else "cuda"):
        with dgf.backend(name):
            found = list(results(x))
        with dgf.backend("reference"):
            expected = list(results(x.cpu()))
        tolerance = 1e-4 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
        for (op, out), (_, right) in zip(found, expected, strict=True):
            count += 1
            out = out.cpu()
            if not torch.allclose(out.double(), right.double(), rtol=tolerance, atol=tolerance):
                wrong += 1
                error = (out.double() - right.double()).abs().max().item()
                print(f"{op} {list(x.shape)} {x.dtype}: differs by {error:.3g}", file=sys.stderr)
    print(f"{name}: {count} results, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
