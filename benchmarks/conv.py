"""The gradient of a convolution's weights and biases, in channels_last: ours against torch's, which is oneDNN's.

Cases: the convolutions of the student's U-Net (28 px), of the 8 px U-Net, and of the CIFAR-10 U-Net. Floor: as many
multiplications at the rate of torch's product of matrices, measured in the same run.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.points import rate
from benchmarks.training import timed
from diffgan_fast.ops import conv

# samples, size, channels in and out, stride; 3x3
CASES = {
    "student": [(32, 28, 64, 64, 1), (32, 28, 64, 64, 2), (32, 14, 64, 64, 1), (32, 28, 128, 64, 1)],
    "unet-8": [(128, 8, 32, 32, 1), (128, 4, 64, 64, 1), (128, 4, 128, 64, 1), (128, 8, 96, 32, 1)],
    "unet-32": [(8, 32, 128, 128, 1), (8, 16, 256, 256, 1), (8, 4, 256, 256, 1)],
}  # fmt: skip
QUICK = {"quick": [(2, 8, 16, 12, 1)]}


def providers(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, stride: int) -> dict:
    def eager(*wide: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g, v, w = wide or (grad, x, weight)
        return torch.ops.aten.convolution_backward(
            g, v, w, [len(w)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, (False, True, True)
        )[1:]

    return {"eager": eager, "dgf": lambda: torch.ops.diffgan_fast.conv2d_weight_gradient(x, grad, 3, stride, 1)}


def run(options: Options) -> list[dict]:
    """The rows of this benchmark: none where the kernel does not exist."""
    if not conv._EXISTS or options.device != "cpu":
        print("there is no kernel of ours for this device")
        return []
    rows, best = [], 0.0
    for case, sizes in (QUICK if options.quick else CASES).items():
        for n, size, inputs, outputs, stride in sizes:
            out = (size - 1) // stride + 1
            x, grad, weight = (
                torch.randn(shape).contiguous(memory_format=torch.channels_last)
                for shape in ((n, inputs, size, size), (n, outputs, out, out), (outputs, inputs, 3, 3))
            )
            calls = providers(x, grad, weight, stride)
            want = calls["eager"](grad.double(), x.double(), weight.double())
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for round_ in range(2 if options.quick else 30):
                best = max(best, rate(x.device))
                for name, call in calls.items():
                    took = timed(call, x.device)
                    if round_:
                        seconds[name].append(took)
            for name, call in calls.items():
                error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(call(), want, strict=True))
                shape = f"{n}x{inputs}x{size}x{size} to {outputs}, stride {stride}"
                rows.append(
                    {"benchmark": "conv", "case": case, "shape": shape,
                     "dtype": "float32", "device": options.device, "threads": options.threads, "provider": name,
                     "status": "ok" if error < 1e-4 else f"RED: off by {error:.2g}",
                     "floor_ms": 2e3 * grad.numel() * inputs * 9 / best} | quantiles(seconds[name])
                )  # fmt: skip
    return rows
