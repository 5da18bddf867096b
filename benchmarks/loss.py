"""The noise-prediction loss, alone and as a training step uses it.

`noise_mse`: the forward alone. Plain torch is given the stored noise that ours makes again from the key. Floor in
float32: 4 bytes an element read (eps_hat), 47 operations for the normal, 3 for the sum of squares.

`noise+loss step`: add_noise, then noise_mse of a leaf eps_hat, and its backward. Floor: 20 bytes an element (x0 read
and x_t written; eps_hat read, its gradient written and scaled), the normals made twice (a GPU makes them a third time
instead of keeping what the gradient needs). In plain torch the noise is
stored between noising and loss, since the network stands there; so under torch.compile the two are compiled apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import mse_loss

import diffgan_fast as dgf
from benchmarks.cases import NORMAL_OPS, Case, Options, Size, copy, ours, peers, sizes
from benchmarks.harness import measure
from benchmarks.oracle import T, Tables


def _take_gradient(eps_hat: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    gradient, eps_hat.grad = eps_hat.grad, None
    return gradient


def cases(size: Size, options: Options) -> Iterator[Case]:
    """`noise_mse` forward, and the whole of what a training step does around its network."""
    schedule, tables = dgf.Schedule.linear(T), Tables(size.device)
    a, s = size.column(tables.abar.sqrt()), size.column((1 - tables.abar).sqrt())
    item = size.dtype.itemsize

    def noised_and_noise(x0, t):
        noise = torch.randn_like(x0)
        return a[t] * x0 + s[t] * noise, noise

    def two():
        return size.randn(), size.randn()

    def with_leaf():
        return size.randn(), size.randn().requires_grad_()

    def build_step(wrap: Callable) -> Callable:
        noising, loss_of = wrap(noised_and_noise), wrap(mse_loss)

        def step(x0, eps_hat, t):
            x_t, noise = noising(x0, t)
            loss = loss_of(eps_hat, noise)
            return x_t, loss.detach(), _take_gradient(eps_hat, loss), noise

        return step

    def build_loss(wrap: Callable) -> Callable:
        loss_of = wrap(mse_loss)
        return lambda eps_hat, noise, t: loss_of(eps_hat, noise)

    def step(x0, eps_hat, t, key):
        x_t = dgf.ops.add_noise(x0, t, schedule, key)
        loss = dgf.ops.noise_mse(eps_hat, key)
        return x_t, loss.detach(), _take_gradient(eps_hat, loss)

    def expected_loss(data, t, z):
        return ((data[0] - z[0]).square().mean(),)

    def expected_step(data, t, z):
        residual = data[1] - z[0]
        return tables.noise(data[0], t, z[0]), residual.square().mean(), residual * (2 / residual.numel())

    providers = [
        *ours(lambda eps_hat, noise, t, key: dgf.ops.noise_mse(eps_hat, key), size),
        *peers(build_loss, size, options, "given"),
        copy(size),
    ]
    yield Case("noise_mse", size, two, expected_loss, providers, item, NORMAL_OPS + 3)
    providers = [*ours(step, size), *peers(build_step, size, options, "returned"), copy(size)]
    yield Case("noise+loss step", size, with_leaf, expected_step, providers, 5 * item, 3 * NORMAL_OPS + 7)


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    return [row for size in sizes(options) for case in cases(size, options) for row in measure("loss", case, options)]
