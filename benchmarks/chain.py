"""The denoising chain in a training step of method 2: student U-Net, 28 px, train mode, DCGAN critic, two Adams.

A step: one run of the chain, the critic's update on its x0, the denoiser's loss by the updated critic, the chain's
backward pass; in channels_last, as in the engine. Providers are values of recompute=: "none" (plain autograd), "step",
and an int near sqrt(T).

Memory: a fresh process for every row, with the allocator as users have it; its peak less the peak after building
networks and optimisers (on a GPU, of the memory allocated). The peak is reached where the backward pass starts, with
all states kept and a first step's graph: rows of large batches, where a training step takes a quarter of an hour, stop
after `EARLY` steps of it. Rows of small batches go on to the end and are red if that needed more. Expected, with
A = 4.7 MiB (a step's graph, a sample) and S = 3 KiB (a state):

    none  T A N             step  A N + T S N + P             k  A N + (ceil(T / k) + k) S N + P

where N is the batch and P the buffers of the gradients, as large as the trainable parameters.

Time: providers in turns, in one process. `over_none` is the median over rounds of plain autograd's time over a row's.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import diffgan_fast as dgf
from benchmarks import machine
from benchmarks.cases import Options
from benchmarks.check import in_float32
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.adversarial import critic_loss, generator_loss
from diffgan_fast.chain import Recompute
from diffgan_fast.engine import frozen
from diffgan_fast.nets import DCGANCritic, StudentUNet
from diffgan_fast.sampling import first_noise

MIB = 2**20
GRAPH, STATE = 4.7 * MIB, 28 * 28 * 4  # bytes a sample: of one step's graph, of a kept state
EARLY = 5  # steps of the backward pass by which the peak is reached
MEMORY: list[tuple[int, int, Recompute, bool]] = [  # T, batch, recompute, the whole backward pass
    (20, 10, "none", True),
    (60, 10, "none", True),
    (300, 10, "step", True),
    (300, 10, 17, True),
    (100, 128, "step", False),
    (300, 128, "step", False),
]
TIME: list[tuple[int, int, Recompute, int]] = [  # T, batch, recompute, rounds
    (60, 10, "none", 4),
    (60, 10, "step", 4),
    (60, 64, "step", 1),
]


class Trainer:
    """Networks, optimisers and a step."""

    def __init__(self, T: int, batch: int, recompute: Recompute, device: torch.device):
        torch.manual_seed(0)
        self.batch, self.recompute, self.device = batch, recompute, device
        self.schedule = dgf.Schedule.linear(T)
        nets = StudentUNet(T=T), DCGANCritic(1, 28, init="dcgan")
        self.unet, self.critic = (net.to(device, memory_format=torch.channels_last) for net in nets)
        self.unet_adam = torch.optim.Adam(self.unet.parameters(), lr=1e-5, betas=(0.5, 0.999))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=1e-4, betas=(0.5, 0.999))
        self.count = 0

    def samples(self, key: int) -> Tensor:
        x_T = first_noise((self.batch, 1, 28, 28), key, device=self.device)
        return dgf.denoise_chain(self.unet, x_T, self.schedule, key, recompute=self.recompute)

    def step(self) -> None:
        """One training step, each with a key of its own."""
        self.count += 1
        real = torch.rand(self.batch, 1, 28, 28, device=self.device)
        fake = self.samples(self.count)
        self.critic_adam.zero_grad()
        critic_loss(self.critic(real), self.critic(fake.detach())).backward()
        self.critic_adam.step()
        with frozen(self.critic):
            loss = generator_loss(self.critic(fake))
        self.unet_adam.zero_grad()
        loss.backward()
        self.unet_adam.step()


@in_float32()
def verify(providers: list[Recompute], T: int, device: torch.device) -> dict[str, str]:
    """For every provider "ok", or how far its gradients are from plain autograd's."""
    found = {}
    for recompute in ("none", *providers):
        trainer = Trainer(T, 2, recompute, device)
        gradients = torch.autograd.grad((trainer.samples(3) ** 2).mean(), list(trainer.unet.parameters()))
        found[recompute] = torch.cat([g.flatten() for g in gradients]).double()
    plain = found["none"]
    errors = {str(recompute): float((g - plain).norm() / plain.norm()) for recompute, g in found.items()}
    return {name: "ok" if error < 1e-4 else f"RED: gradients off by {error:.3g}" for name, error in errors.items()}


class Stopped(Exception):
    pass


def high_water(device: torch.device) -> int:
    """The most bytes that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "/proc/self/status has no VmHWM"
    return int(found[1]) * 1024


def peak(T: int, batch: int, recompute: Recompute, whole: bool, device: str, threads: int) -> dict:
    """The peak of one training step above that of the networks, in MiB. To be called in a process of its own."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    trainer = Trainer(T, batch, recompute, where)
    before, early, runs = high_water(where), None, 0

    def watch(*_) -> None:
        nonlocal early, runs
        runs += torch.is_grad_enabled()  # the chain's forward pass runs without
        if runs > EARLY and early is None and recompute != "none":
            early = high_water(where)
            if not whole:
                raise Stopped

    trainer.unet.register_forward_pre_hook(watch)
    try:
        trainer.step()
    except Stopped:
        pass
    after = high_water(where)
    more = 0.0 if early is None else (after - early) / (after - before)
    status = "ok" if more < 0.1 else f"RED: {more:.0%} more after {EARLY} steps of the backward pass"
    return {"peak_mib": (after - before) / MIB, "status": status}


def expected(T: int, batch: int, recompute: Recompute) -> float:
    """MiB by the formula above."""
    if recompute == "none":
        return T * GRAPH * batch / MIB
    kept = T if recompute == "step" else math.ceil(T / recompute) + recompute
    buffers = sum(p.nbytes for p in StudentUNet(T=T).parameters())
    return (GRAPH * batch + kept * STATE * batch + buffers) / MIB


def row_of(options: Options, case: str, batch: int, recompute: Recompute) -> dict:
    return {"benchmark": "chain", "case": case, "shape": f"{batch}x1x28x28", "dtype": "float32",
            "device": options.device, "threads": options.threads, "provider": str(recompute)}  # fmt: skip


def memory_rows(options: Options, cases: list[tuple[int, int, Recompute, bool]], status: dict[str, str]) -> list[dict]:
    """A row a case, measured in its own process; then what a step adds, where two T's of a batch were measured."""
    environment = {name: value for name, value in os.environ.items() if name not in machine.ALLOCATOR}
    rows, measured = [], {}
    for T, batch, recompute, whole in cases:
        row = row_of(options, f"memory, T = {T}", batch, recompute) | {"expected_mib": expected(T, batch, recompute)}
        if status[str(recompute)] == "ok":
            arguments = json.dumps([T, batch, recompute, whole, options.device, options.threads])
            command = [sys.executable, "-m", "benchmarks.chain", arguments]
            done = subprocess.run(command, cwd=machine.ROOT, env=environment, check=True, stdout=subprocess.PIPE)
            row |= json.loads(done.stdout)
            measured[T, batch, recompute] = row["peak_mib"]
        rows.append({"status": status[str(recompute)]} | row)
    for (T, batch, recompute), most in measured.items():
        for (less, *same), least in measured.items():
            if same == [batch, recompute] and less < T:
                row = row_of(options, f"memory a step, T = {less} to {T}", batch, recompute)
                added = expected(T, batch, recompute) - expected(less, batch, recompute)
                rows.append(row | {"status": "ok", "peak_mib": (most - least) / (T - less),
                                   "expected_mib": added / (T - less)})  # fmt: skip
    return rows


def time_rows(options: Options, cases: list[tuple[int, int, Recompute, int]], status: dict[str, str]) -> list[dict]:
    """A row a case, timed in turns; after a first round that does not count."""
    device = torch.device(options.device)
    right = [case for case in cases if status[str(case[2])] == "ok"]
    trainers = {case: Trainer(*case[:3], device) for case in right}
    seconds: dict[tuple, list[float]] = {case: [] for case in right}
    for round_ in range(max(case[3] for case in cases) + 1):
        for case, trainer in trainers.items():
            if round_ <= case[3]:
                seconds[case].append(timed(trainer.step, device))
    rows = []
    for case in cases:
        T, batch, recompute, _ = case
        row = row_of(options, f"training step, T = {T}", batch, recompute) | {"status": status[str(recompute)]}
        if case in trainers:
            row |= quantiles(seconds[case][1:])
            row["images_per_s"] = batch / row["ms"] * 1e3
            plain = next((s for (t, n, how, _), s in seconds.items() if (t, n, how) == (T, batch, "none")), None)
            if plain:
                row["over_none"] = statistics.median(p / s for p, s in zip(plain[1:], seconds[case][1:], strict=True))
        rows.append(row)
    return rows


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    T, memory, time = 20, MEMORY, TIME
    if options.quick:
        T, memory = 3, [(6, 2, "step", True), (8, 2, "step", False)]
        time = [(2, 2, "none", 1), (2, 2, "step", 1), (2, 4, "step", 1)]
    providers = dict.fromkeys(case[2] for case in memory if case[2] != "none")
    status = verify(list(providers), T, torch.device(options.device))
    return memory_rows(options, memory, status) + time_rows(options, time, status)


if __name__ == "__main__":
    print(json.dumps(peak(*json.loads(sys.argv[1]))))
