"""Group norm, SiLU and the shift before them in one, in channels_last, forward and backward: ours against torch's.

Cases: layers of the U-Nets for 8, 28 and 32 px and of DDGAN's generator, whose scale and bias are a sample's own.
Floor: copies of as many bytes, measured in the same run: forward x is read and out written, backward x and grad are
read and the gradient of x written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.nets.norm import EPS, groups_of
from diffgan_fast.ops import norm

# samples, channels, size, whether scale and bias are a sample's own
CASES = {
    "unet-8": [(128, 32, 8, False), (128, 64, 4, False)],
    "unet-28": [(64, 32, 28, False), (64, 64, 14, False)],
    "unet-32": [(8, 128, 32, False), (8, 256, 16, False), (8, 256, 8, False)],
    "ddgan": [(64, 64, 8, True), (16, 64, 28, True), (2, 128, 32, True)],
}
QUICK = {"quick": [(2, 8, 8, False), (2, 8, 8, True)]}
ROUNDS = 40


def run(options: Options) -> list[dict]:
    """The rows of this benchmark: none where the kernel does not exist."""
    if not norm._EXISTS or options.device != "cpu":
        print("there is no kernel of ours for this device")
        return []
    rows = []
    for case, sizes in (QUICK if options.quick else CASES).items():
        for size in sizes:
            rows += measure(case, *size, options)
    return rows


def measure(case: str, n: int, channels: int, size: int, adaptive: bool, options: Options) -> list[dict]:
    """The rows of one size."""
    torch.manual_seed(0)
    groups = groups_of(channels)
    x, grad = (
        torch.randn(n, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_(needed)
        for needed in (True, False)
    )
    affine = (n, channels) if adaptive else (channels,)
    inputs = (x, *(torch.randn(s, requires_grad=True) for s in (affine, affine, (n, channels))))
    functions = {"eager": norm._plain, "dgf": lambda *given: norm.group_norm_silu(*given[:4], groups=groups, eps=EPS)}
    if options.compile:
        functions["compile"] = torch.compile(norm._plain, dynamic=False)

    def call(name: str, given: tuple[Tensor, ...] = inputs, up: Tensor = grad) -> tuple[Tensor, ...]:
        out = functions[name](*given, groups, EPS)
        return out.detach(), *torch.autograd.grad(out, given, up)

    want = call("eager", tuple(v.detach().double().requires_grad_() for v in inputs), grad.double())
    status = {}
    for name in functions:
        error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(call(name), want, strict=True))
        status[name] = "ok" if error < 1e-5 else f"RED: off by {error:.2g}"
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    copies = []
    target = torch.empty_like(grad)
    for round_ in range(2 if options.quick else ROUNDS):
        copied = timed(lambda: target.copy_(grad), x.device)
        for name in functions:
            took = timed(lambda name=name: call(name), x.device)
            if round_:
                seconds[name].append(took)
                copies.append(copied)
    torch._dynamo.reset()
    floor = 2.5 * quantiles(copies)["ms"]  # a copy moves 2 tensors; 5 are to be moved
    shape = f"{n}x{channels}x{size}x{size}" + ", adaptive" * adaptive
    return [
        {"benchmark": "norm", "case": case, "shape": shape, "dtype": "float32", "device": options.device,
         "threads": options.threads, "provider": name, "status": status[name], "floor_ms": floor}
        | quantiles(seconds[name])
        for name in functions
    ]  # fmt: skip
