"""Diffusion-GAN's noiser against the reference's procedure, and its share of a training step.

The reference, by the facts of the published code: t is chosen from the list of levels in NumPy and copied to the
device, both coefficient tables are copied there in every call, gathered, and the noise is added in eager arithmetic.
Both get the same list: the mix of the paper (32 of 64 slots are clean), or levels above 0 alone. Checked before timing:
clean samples come back bit for bit, and the noise of all others has mean 0 and variance 1.

Floor in float32: 8 bytes an element (x read, y written); `copy` is the limit of what memory can do. The last case is a
step of method `diffusion-gan` (DCGAN, batch 64, 32 px) beside the noiser's part of it: three calls, as many levels, and
an update.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import diffgan_fast as dgf
from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast import random
from diffgan_fast.engine import Batch, State

T, SIGMA = 250, 0.05


class Reference:
    """The published procedure."""

    def __init__(self, slots: np.ndarray, device: torch.device):
        self.slots, self.device = slots, device
        abar = np.concatenate(([1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))))
        self.signal, self.noise = np.sqrt(abar), np.sqrt(1 - abar)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.from_numpy(np.random.choice(self.slots, size=len(x), replace=True)).to(self.device)
        signal, noise = (torch.from_numpy(table).float().to(self.device) for table in (self.signal, self.noise))
        shape = (-1, *[1] * (x.dim() - 1))
        return signal[t].view(shape) * x + noise[t].view(shape) * SIGMA * torch.randn_like(x), t


def noiser(slots: np.ndarray, device: torch.device) -> dgf.AdaptiveDiffusion:
    """Ours at T steps, with a list of levels."""
    diffusion = dgf.AdaptiveDiffusion(T_min=T, T_max=T, sigma=SIGMA)
    diffusion.slots.copy_(torch.from_numpy(slots))
    return diffusion.to(device)


def verify(run: Callable, x: Tensor) -> str:
    """ "ok", or what is wrong with the result."""
    y, t = run(x)
    abar = np.concatenate(([1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))))
    a = torch.from_numpy(abar).to(x.device)[t].view(-1, *[1] * (x.dim() - 1))
    clean = t == 0
    if not torch.equal(y[clean], x[clean]):
        return "RED: clean samples changed"
    z = ((y.double() - a.sqrt() * x) / ((1 - a).sqrt() * SIGMA))[~clean]
    mean, variance = float(z.mean()), float(z.var())
    limit = 6 * (2 / z.numel()) ** 0.5
    return "ok" if abs(mean) < limit and abs(variance - 1) < limit else f"RED: mean {mean:.3g}, variance {variance:.3g}"


def timings(arms: dict[str, Callable[[Tensor], object]], inputs: list[Tensor], options: Options) -> dict[str, list]:
    """Seconds of a call of each, in turns; on a GPU of many calls at once."""
    calls = 100 if options.device == "cuda" else 1
    found: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(4 if options.quick else 110):
        for name, run in arms.items():
            x = inputs[round_ % len(inputs)]
            took = timed(lambda run=run, x=x: [run(x) for _ in range(calls)], x.device) / calls
            if round_ >= 2:
                found[name].append(took)
    return found


class Step:
    """A step of the method, and the part of the noiser in one."""

    def __init__(self, device: torch.device, quick: bool):
        kind = dgf.methods.find("diffusion-gan")
        options = dict(width=4, critic_width=4) if quick else {}
        self.shape = (4, 3, 8, 8) if quick else (64, 3, 32, 32)
        self.method = kind(kind.Config(batch_size=self.shape[0], **options), self.shape[1:])
        nets = {
            name: net.to(device=device, memory_format=torch.channels_last)
            for name, net in self.method.networks({}).items()
        }
        self.state = State(nets, self.method.optimizers(nets), self.method.averaged, self.method.config)

    def whole(self, x: Tensor) -> None:
        self.method.step(self.state, Batch(x), random.fold_in(0, self.state.step))
        self.state.step += 1

    def noise(self, x: Tensor) -> None:
        diffusion, key = self.state["diffusion"], random.fold_in(1, self.state.step)
        t = None
        for name in ("real", "fake", "generator"):
            _, t = diffusion(x, None if name == "generator" else t, random.fold_in(key, name))
            diffusion.level(t)
        diffusion.update(x[:, 0, 0, 0], random.fold_in(key, "levels"))


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    np.random.seed(0)
    device = torch.device(options.device)
    levels = 1 + np.random.randint(T, size=64)
    lists = {"the paper's mix": np.where(np.arange(64) < 32, levels, 0), "all t above 0": levels}
    shapes = [(8, 3, 4, 4)] if options.quick else [(64, 3, 32, 32)]
    if device.type == "cuda" and not options.quick:
        shapes += [(mebibytes * 2**20 // 4 // 2**14, 4, 64, 64) for mebibytes in (64, 256)]
    rows = []
    for shape in shapes:
        inputs = [torch.randn(shape, device=device) for _ in range(4)]
        place = torch.empty_like(inputs[0])
        for case, slots in lists.items():
            arms = {"reference": Reference(slots, device), "ours": noiser(slots, device)}
            status = {name: verify(arm, inputs[0]) for name, arm in arms.items()}
            rows += _rows(case, shape, options, timings({**arms, "copy": place.copy_}, inputs, options), status)
    step = Step(device, options.quick)
    images = [torch.rand(step.shape, device=device).to(memory_format=torch.channels_last) for _ in range(4)]
    found = _rows(
        "a training step", step.shape, options, timings({"step": step.whole, "noiser": step.noise}, images, options)
    )
    return rows + [row | {"of_step": row["ms"] / found[0]["ms"]} for row in found]


def _rows(case: str, shape: tuple[int, ...], options: Options, seconds: dict[str, list], status: dict | None = None):
    """A row for each arm."""
    n, rows = torch.Size(shape).numel(), []
    for name, times in seconds.items():
        row = {"benchmark": "instance_noise", "case": case, "shape": "x".join(map(str, shape)), "dtype": "float32",
               "device": options.device, "threads": options.threads, "provider": name,
               "status": (status or {}).get(name, "ok")} | quantiles(times)  # fmt: skip
        if status is not None:
            row |= {"bytes_per_element": 8, "ns_per_element": row["ms"] * 1e6 / n, "gb_per_s": 8 * n / row["ms"] / 1e6}
        rows.append(row)
    return rows
