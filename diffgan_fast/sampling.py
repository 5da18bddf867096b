"""Samplers: from noise to data, step by step, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from diffgan_fast import ops, random
from diffgan_fast.ops.step import Variance
from diffgan_fast.schedule import Prediction, Schedule

Sampler = Literal["ddpm", "ddim"]


@torch.no_grad()
def sample(
    model: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    schedule: Schedule,
    key: int,
    *,
    sampler: Sampler = "ddpm",
    steps: int | None = None,
    eta: float = 0.0,
    variance: Variance = "beta",
    prediction: Prediction = "eps",
    clip_x0: bool = False,
    cond: Mapping[str, Any] | None = None,
    first_sample: int = 0,
    channels_last: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Samples from a denoiser.

    Args:
        model: denoiser `model(x, t, **cond)`, t int64 [N]; in eval mode.
        shape: [N, …] of the samples.
        key: names an endless sequence of samples; x_T is drawn from `fold_in(key, "x_T")` and step t from
            `fold_in(key, t)`, so sample i is the same in any batch (up to the network's own rounding).
        sampler: "ddpm", ancestral (Ho et al. 2020, Algorithm 2), or "ddim" (Song et al. 2021).
        steps: number of steps, 1..T; the schedule is respaced. None: all T.
        eta: noise of "ddim", 0..1.
        variance, prediction, clip_x0: as for `ops.ddpm_step`.
        cond: what else the network takes, by name.
        first_sample: number of the first sample in the sequence.
        on_step: called with (t, x_t) before every step and with (0, x_0) at the end.

    Returns: x_0, float32 of `shape`.
    """
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f"sampler must be 'ddpm' or 'ddim', got {sampler!r}")
    if steps is not None:
        schedule = schedule.respace(steps)
    n, per = shape[0], torch.Size(shape[1:]).numel()
    x = random.normal(shape, random.fold_in(key, "x_T"), first=first_sample * per, device=device)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    told = schedule.timesteps.tolist()
    for t in range(schedule.T, 0, -1):
        if on_step:
            on_step(t, x)
        now = torch.full((1,), told[t], device=device).expand(n)  # one number, as a network may notice
        out = model(x, now, **(cond or {})).to(x.dtype)
        common: dict[str, Any] = dict(prediction=prediction, clip_x0=clip_x0, first_sample=first_sample)
        step_key = random.fold_in(key, t)
        if sampler == "ddpm":
            x = ops.ddpm_step(x, out, t, schedule, step_key, variance=variance, **common)
        else:
            x = ops.ddim_step(x, out, t, t - 1, schedule, step_key, eta=eta, **common)
    if on_step:
        on_step(0, x)
    return x
