"""The gradient penalty: its value and the critic's parameter gradients, by mode, against autograd's double backward.

`mlp`: the 3-layer critic of points at batch 256; floor: four passes, the products of matrices alone, at the rate that
the same run measures. `dcgan`: a critic of 32 px images without norm, batch 64.

Peers: `eager`, `autograd.grad(create_graph=True)` as every WGAN-GP code has it; `compile`, the same inside
`torch.compile` by way of `torch.func.grad`, and `compile-autograd`, with Dynamo tracing `autograd.grad` itself, where
this torch can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.points import rate
from benchmarks.training import timed
from diffgan_fast import nets
from diffgan_fast.ops import gradient_penalty

CENTER = 1.0


def plain(critic: nn.Module, x: Tensor) -> Tensor:
    """As every WGAN-GP code has it."""
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((g.flatten(1).norm(2, dim=1) - CENTER) ** 2).mean()


def functional(critic: nn.Module, x: Tensor) -> Tensor:
    g = torch.func.grad(lambda x: critic(x).sum())(x)
    return ((g.flatten(1).norm(2, dim=1) - CENTER) ** 2).mean()


def ours(mode: str) -> Callable[[nn.Module, Tensor], Tensor]:
    # between x and itself: the peers are given their points, ours draws u and interpolates too
    return lambda critic, x: gradient_penalty(critic, x, x, 1, mode=mode)


def providers(options: Options) -> dict[str, Callable[[nn.Module, Tensor], Tensor]]:
    found = {"eager": plain} | {f"dgf-{mode}": ours(mode) for mode in ("closed", "double", "forward")}
    if options.compile:
        found["compile"] = torch.compile(functional)
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            found["compile-autograd"] = torch.compile(plain)
    return found


def case(name: str, critic: nn.Module, x: Tensor, flops: int, options: Options) -> list[dict]:
    """The rows of one critic: every provider checked against float64, then timed in turns."""
    wide = copy.deepcopy(critic).double()
    want = plain(wide, x.double().requires_grad_())
    wide_parameters = list(wide.parameters())
    expected = torch.autograd.grad(want, wide_parameters, allow_unused=True)
    parameters = list(critic.parameters())

    def call(function) -> tuple[Tensor, list]:
        loss = function(critic, x.detach().requires_grad_())
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    status, seconds, found = {}, {}, providers(options)
    for provider, function in found.items():
        try:
            loss, gradients = call(function)
        except Exception as error:  # a peer that cannot do it says so in its row
            if provider.startswith("dgf"):
                raise
            status[provider] = f"fails: {type(error).__name__}"
            continue
        pairs = zip(gradients, expected, strict=True)
        both = [(torch.zeros_like(e) if g is None else g, e) for g, e in pairs if e is not None and e.any()]
        error = max(float((g.double() - e).abs().max() / e.abs().max()) for g, e in both)
        good = error < 1e-3 and abs(float(loss) - float(want.detach())) < 1e-4 * float(want.detach())
        status[provider] = "ok" if good else f"RED: off by {error:.2g}"
        seconds[provider] = []
    best = rate(x.device)
    for round_ in range(3 if options.quick else 40):
        best = max(best, rate(x.device))
        for provider in seconds:
            for _ in range(5 if x.dim() == 2 else 1):
                took = timed(lambda f=found[provider]: call(f), x.device)
                if round_:
                    seconds[provider].append(took)
    torch._dynamo.reset()
    rows = []
    for provider, said in status.items():
        row = {"benchmark": "penalty", "case": name, "shape": "x".join(map(str, x.shape)), "dtype": "float32",
               "device": options.device, "threads": options.threads, "provider": provider, "status": said}  # fmt: skip
        row |= {"floor_ms": flops / best * 1e3} if flops else {}
        rows.append(row | (quantiles(seconds[provider]) if seconds.get(provider) else {}))
    return rows


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    if options.compile and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.config.trace_autograd_ops = True
    device = torch.device(options.device)
    mlp = nets.MLPCritic().to(device)
    flops = 4 * 2 * 256 * (2 * 256 + 2 * 256 * 256 + 256)
    rows = case("mlp", mlp, torch.randn(256, 2, device=device), flops, options)
    dcgan = nets.DCGANCritic(3, 32, norm=None).to(device, memory_format=torch.channels_last)
    x = torch.randn(4 if options.quick else 64, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return rows + case("dcgan", dcgan, x, 0, options)
