"""Reverse steps against plain torch and diffusers' DDPMScheduler and DDIMScheduler.

Floor in float32, bytes an element: 12 (x_t and the prediction read, x_{t-1} written), 20 with guidance (two more
tensors read). Arithmetic: 47 operations for a normal, 3 for the affine combination, 3 more for the clamp or guidance.
`ddim_step` with eta = 0 draws no noise. Plain torch gets tables with everything multiplied out. diffusers' `step` takes
one t for the whole batch, so there t is an int; in `ddim_step` it is for all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import diffgan_fast as dgf
from benchmarks.cases import NORMAL_OPS, Case, Options, Provider, Size, copy, ours, peers, sizes
from benchmarks.harness import measure
from benchmarks.noise import diffusers_scheduler
from benchmarks.oracle import T, Tables

GUIDANCE, LOGIT_SCALE = 3.0, 2.0


def _diffusers(name: str, size: Size, **config) -> list[Provider]:
    scheduler = diffusers_scheduler(name, **config)
    if scheduler is None or size.dtype != torch.float32:
        return []
    return [Provider("diffusers", lambda x, e, t: scheduler.step(e, t, x, return_dict=False)[0], time="one0")]


class Formulas:
    """The steps in plain torch, from tables in the dtype of the data."""

    def __init__(self, size: Size, tables: Tables):
        abar, before = tables.abar, tables.abar.roll(1)
        c0 = before.sqrt() * tables.beta / (1 - abar)
        cx = tables.alpha.sqrt() * (1 - before) / (1 - abar)
        px, pe = 1 / abar.sqrt(), -((1 - abar) / abar).sqrt()
        sigma = (tables.beta * (1 - before) / (1 - abar)).clamp_min(0).sqrt()
        sigma[1] = 0.0
        direction = ((1 - before) / (1 - abar)).sqrt()
        ddim_x0 = before.sqrt() - direction * abar.sqrt()
        column = size.column
        self.c0, self.cx, self.px, self.pe, self.s = (column(table) for table in (c0, cx, px, pe, sigma))
        self.a, self.b, self.guide = column(c0 * px + cx), column(c0 * pe), column((1 - abar).sqrt())
        self.ddim_a, self.ddim_b = column(ddim_x0 * px + direction), column(ddim_x0 * pe)

    def plain(self, x, e, t):
        return self.a[t] * x + self.b[t] * e + self.s[t] * torch.randn_like(x)

    def clipped(self, x, e, t):
        x0 = (self.px[t] * x + self.pe[t] * e).clamp(-1, 1)
        return self.c0[t] * x0 + self.cx[t] * x + self.s[t] * torch.randn_like(x)

    def guided(self, x, e, e_uncond, logit_grad, t):
        e = e_uncond + GUIDANCE * (e - e_uncond) - LOGIT_SCALE * self.guide[t] * logit_grad
        return self.a[t] * x + self.b[t] * e + self.s[t] * torch.randn_like(x)

    def ddim(self, x, e, t):
        return self.ddim_a[t] * x + self.ddim_b[t] * e


def cases(size: Size, options: Options) -> Iterator[Case]:
    """`ddpm_step` plain, with the clamp and with both guidances, and `ddim_step` with eta = 0."""
    schedule, tables = dgf.Schedule.linear(T), Tables(size.device)
    formulas, item = Formulas(size, tables), size.dtype.itemsize

    def step(x, e, t, key):
        return dgf.ops.ddpm_step(x, e, t, schedule, key)

    def step_clipped(x, e, t, key):
        return dgf.ops.ddpm_step(x, e, t, schedule, key, clip_x0=True)

    def step_guided(x, e, e_uncond, logit_grad, t, key):
        return dgf.ops.ddpm_step(
            x, e, t, schedule, key,
            eps_uncond=e_uncond, guidance_scale=GUIDANCE, logit_grad=logit_grad, logit_scale=LOGIT_SCALE,
        )  # fmt: skip

    def step_ddim(x, e, t, key):
        return dgf.ops.ddim_step(x, e, t, t - 1, schedule, key)

    def expected(data, t, z):
        return (tables.posterior(data[0], tables.x0(*data, t), t, z[0]),)

    def expected_clipped(data, t, z):
        return (tables.posterior(data[0], tables.x0(*data, t).clamp(-1, 1), t, z[0]),)

    def expected_guided(data, t, z):
        x, e, e_uncond, logit_grad = data
        root = (1 - tables.at(tables.abar, t, x)).sqrt()
        return expected((x, e_uncond + GUIDANCE * (e - e_uncond) - LOGIT_SCALE * root * logit_grad), t, z)

    def expected_ddim(data, t, z):
        return (tables.noise(tables.x0(*data, t), t - 1, data[1]),)

    ddim = {"name": "DDIMScheduler", "clip_sample": False}
    ddpm = {"name": "DDPMScheduler", "variance_type": "fixed_small"}
    rows = [
        ("ddpm_step", 2, step, formulas.plain, expected, NORMAL_OPS + 3, ddpm | {"clip_sample": False}),
        ("ddpm_step clip", 2, step_clipped, formulas.clipped, expected_clipped, NORMAL_OPS + 6, ddpm),
        ("ddpm_step guided", 4, step_guided, formulas.guided, expected_guided, NORMAL_OPS + 6, None),
        ("ddim_step eta=0", 2, step_ddim, formulas.ddim, expected_ddim, 3, ddim),
    ]
    for name, inputs, run_ours, formula, right, ops, config in rows:
        time = "one" if "ddim" in name else "each"
        providers = [
            *ours(run_ours, size, time),
            *peers(lambda wrap, formula=formula: wrap(formula), size, options, time=time),
            *(_diffusers(size=size, **config) if config else []),
            copy(size),
        ]
        data = lambda inputs=inputs: tuple(size.randn() for _ in range(inputs))  # noqa: E731
        yield Case(name, size, data, right, providers, (inputs + 1) * item, ops)


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    return [row for size in sizes(options) for case in cases(size, options) for row in measure("step", case, options)]
