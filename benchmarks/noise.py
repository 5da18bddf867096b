"""Forward noising against plain torch and diffusers' DDPMScheduler.

Floor in float32, bytes an element: `add_noise` 8 (x0 read, x_t written), with the noise returned 12, `noise_pair` 12
(two written). Arithmetic: 47 operations for a normal, 2 for the affine combination; twice for the pair. Plain torch
gets its coefficient tables ready-made, in the dtype of the data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

import diffgan_fast as dgf
from benchmarks.cases import NORMAL_OPS, Case, Options, Provider, Size, copy, ours, peers, sizes
from benchmarks.harness import measure
from benchmarks.oracle import T, Tables


def diffusers_scheduler(name: str, **config):
    """A scheduler of diffusers on the benchmarks' schedule, None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02, **config)
    scheduler.set_timesteps(T)
    return scheduler


def _diffusers(size: Size, return_noise: bool) -> list[Provider]:
    scheduler = diffusers_scheduler("DDPMScheduler")
    if scheduler is None or size.dtype != torch.float32:  # in bfloat16 it rounds abar, and 1 - abar is lost
        return []

    def noised(x0, t):
        noise = torch.randn_like(x0)
        x_t = scheduler.add_noise(x0, noise, t)
        return (x_t, noise) if return_noise else x_t

    return [Provider("diffusers", noised, "returned" if return_noise else "hidden", time="each0")]


def cases(size: Size, options: Options) -> Iterator[Case]:
    """`add_noise` without and with the noise returned, and `noise_pair`."""
    schedule, tables = dgf.Schedule.linear(T), Tables(size.device)
    a, s = size.column(tables.abar.sqrt()), size.column((1 - tables.abar).sqrt())
    step_a, step_s = size.column(tables.alpha.sqrt()), size.column(tables.beta.sqrt())

    def noised(x0, t):
        return a[t] * x0 + s[t] * torch.randn_like(x0)

    def noised_and_noise(x0, t):
        noise = torch.randn_like(x0)
        return a[t] * x0 + s[t] * noise, noise

    def pair(x0, t):
        previous = a[t - 1] * x0 + s[t - 1] * torch.randn_like(x0)
        return previous, step_a[t] * previous + step_s[t] * torch.randn_like(x0)

    def expected_pair(data, t, z):
        previous = tables.noise(data[0], t - 1, z[0])
        alpha, beta = (tables.at(table, t, previous) for table in (tables.alpha, tables.beta))
        return previous, alpha.sqrt() * previous + beta.sqrt() * z[1]

    def data():
        return (size.randn(),)

    item = size.dtype.itemsize

    def expected(data, t, z):
        return (tables.noise(data[0], t, z[0]),)

    def expected_noise(data, t, z):
        return tables.noise(data[0], t, z[0]), z[0]

    providers = [
        *ours(lambda x0, t, key: dgf.ops.add_noise(x0, t, schedule, key), size),
        *peers(lambda wrap: wrap(noised), size, options),
        *_diffusers(size, return_noise=False),
        copy(size),
    ]
    yield Case("add_noise", size, data, expected, providers, 2 * item, NORMAL_OPS + 2)
    providers = [
        *ours(lambda x0, t, key: dgf.ops.add_noise(x0, t, schedule, key, return_noise=True), size),
        *peers(lambda wrap: wrap(noised_and_noise), size, options, "returned"),
        *_diffusers(size, return_noise=True),
        copy(size),
    ]
    yield Case("add_noise+noise", size, data, expected_noise, providers, 3 * item, NORMAL_OPS + 2)
    providers = [
        *ours(lambda x0, t, key: dgf.ops.noise_pair(x0, t, schedule, key), size),
        *peers(lambda wrap: wrap(pair), size, options),
        copy(size),
    ]
    yield Case("noise_pair", size, data, expected_pair, providers, 3 * item, 2 * (NORMAL_OPS + 2), streams=2)


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    return [row for size in sizes(options) for case in cases(size, options) for row in measure("noise", case, options)]
