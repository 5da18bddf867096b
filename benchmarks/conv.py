"""Convolutions of 3x3 in channels_last on a CPU: ours against torch's, which is oneDNN's.

Cases: an output, the gradient of the input, and that of weights and biases, of the convolutions in the student's U-Net
(28 px), the 8 px U-Net and the CIFAR-10 U-Net. Where the stride is 2, ours has the last alone, on processors with AVX2
and without AVX-512. Floor: as many multiplications as the definition takes, at the rate of torch's product of matrices,
measured in the same run. Winograd's algorithm takes a quarter of them, so that it may be below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.points import rate
from benchmarks.training import timed
from diffgan_fast.ops import conv

# samples, size, channels in and out, stride
CASES = {
    "student": [(32, 28, 64, 64, 1), (32, 28, 64, 64, 2), (32, 14, 64, 64, 1), (32, 28, 128, 64, 1)],
    "unet-8": [(128, 8, 32, 32, 1), (128, 4, 64, 64, 1), (128, 4, 128, 64, 1), (128, 8, 96, 32, 1)],
    "unet-32": [(8, 32, 128, 128, 1), (8, 16, 256, 256, 1), (8, 8, 512, 256, 1), (8, 4, 256, 256, 1)],
}  # fmt: skip
QUICK = {"quick": [(2, 8, 32, 24, 1)]}
RAW = torch.ops.diffgan_fast
Call = Callable[..., tuple[Tensor, ...]]


def passes(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, stride: int) -> dict[str, tuple[Call, Call | None]]:
    """Each pass as torch makes it, of given tensors or of these, and as ours does, if it does."""

    def forward(v: Tensor = x, g: Tensor = grad, w: Tensor = weight, b: Tensor = bias) -> tuple[Tensor, ...]:
        return (torch.nn.functional.conv2d(v, w, b, stride, 1),)

    def back(*wanted: bool) -> Call:
        def run(v: Tensor = x, g: Tensor = grad, w: Tensor = weight, b: Tensor = bias) -> tuple[Tensor, ...]:
            geometry = [len(w)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
            made = torch.ops.aten.convolution_backward(g, v, w, *geometry, wanted)
            return tuple(m for m, wants in zip(made, wanted, strict=True) if wants)

        return run

    ours: list[Call | None] = [None, None, None]
    if conv._by_winograd(x, weight, stride, 1):
        ours = [
            lambda: (RAW.conv2d_winograd(x, weight, bias, False),),
            lambda: (RAW.conv2d_winograd(grad, weight, None, True),),
            lambda: RAW.conv2d_winograd_weight_gradient(x, grad),
        ]
    elif conv._DIRECT:
        ours[2] = lambda: RAW.conv2d_weight_gradient(x, grad, 3, stride, 1)
    torchs = forward, back(True, False, False), back(False, True, True)
    return dict(zip(("output", "input gradient", "weight gradient"), zip(torchs, ours, strict=True), strict=True))


def run(options: Options) -> list[dict]:
    """The rows of this benchmark: none where ours does not exist."""
    if not (conv._WINOGRAD or conv._DIRECT) or options.device != "cpu":
        print("there is no kernel of ours for this device")
        return []
    rows, device = [], torch.device("cpu")
    best = max(rate(device) for _ in range(3))
    for case, sizes in (QUICK if options.quick else CASES).items():
        for n, size, inputs, outputs, stride in sizes:
            out = (size - 1) // stride + 1
            x, grad, weight = (
                torch.randn(shape).contiguous(memory_format=torch.channels_last)
                for shape in ((n, inputs, size, size), (n, outputs, out, out), (outputs, inputs, 3, 3))
            )
            bias = torch.randn(outputs)
            for name, (eager, dgf) in passes(x, grad, weight, bias, stride).items():
                if dgf is None:
                    continue
                calls = {"eager": eager, "dgf": dgf}
                want = eager(*(v.double() for v in (x, grad, weight, bias)))
                seconds: dict[str, list[float]] = {provider: [] for provider in calls}
                for round_ in range(2 if options.quick else 25):
                    for provider, call in calls.items():
                        took = timed(call, device)
                        if round_:
                            seconds[provider].append(took)
                for provider, call in calls.items():
                    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(call(), want, strict=True))
                    rows.append(
                        {"benchmark": "conv", "case": f"{case}, {name}",
                         "shape": f"{n}x{inputs}x{size}x{size} to {outputs}, stride {stride}",
                         "dtype": "float32", "device": options.device, "threads": options.threads, "provider": provider,
                         "status": "ok" if error < 2e-5 else f"RED: off by {error:.2g}", "error": error,
                         "floor_ms": 2e3 * grad.numel() * inputs * 9 / best} | quantiles(seconds[provider])
                    )  # fmt: skip
    return rows
