"""Whole training steps of four methods at named sizes: the reference procedure, the same compiled, peers, and ours.

Families, each with the same networks, initial weights and batch in all arms:
    ddpm        predict the noise of x_t; the student's U-Net at 28 px, the DDPM U-Net of the size elsewhere
    method3.5   `benchmarks.training`'s as-coded procedure and the engine's step, at every size
    method2     a chain of T steps for each update, by plain autograd, against the engine's one chain that recomputes
    ddgan       `benchmarks.ddgan`'s reference and engine; LAZY steps are a call, so that each holds one R1

Arms:
    reference   what the published code does, eager: randn and table look-ups, plain Adam, losses read by `.item()`
    compile     the same with its networks compiled; on a CPU at 8 px alone, for larger ones take minutes to compile
    diffusers, denoising-diffusion-pytorch    where installed, ddpm: their noising and loss around the same network
    ours, ours-compile                        the engine's step, without and with compile=True; on CUDA in its graphs
    ours-kept                                 method2 with recompute="none": one chain, but the graph of all its steps

`floor_ms` is the time of the networks alone: as many forward and backward passes as a step of ours cannot do without,
with no noise, loss, update or average. `peak_mib` is what tensors take at most in a step beside networks, optimisers
and the batch (on the CPU not known of compiled code). `of_kernels` is the share of a step of ours that its own kernels
take, seen by torch's profiler; the JSON file has them one by one. Before timing, the engine's first losses are checked
in float64.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, mse_loss, softplus

import diffgan_fast as dgf
from benchmarks import ddgan, oracle, peers, training
from benchmarks.cases import Options
from benchmarks.check import in_float32
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.engine import Batch, State, Steps, frozen
from diffgan_fast.engine.compiling import compiled
from diffgan_fast.nets import DCGANCritic, DDGANCritic, DDGANGenerator, StudentUNet, UNet
from diffgan_fast.planning import peak_memory
from diffgan_fast.sampling import first_noise

T = 300
SECONDS = 45.0  # of a case, once every arm has run twice
# family -> (size, channels, batch, steps of the chain)
SIZES = {
    "cpu": {
        "ddpm": [(8, 1, 128, T), (28, 1, 64, T), (32, 3, 8, T)],
        "method3.5": [(8, 1, 128, T), (28, 1, 64, T), (32, 3, 8, T)],
        "method2": [(8, 1, 16, 20), (28, 1, 10, 20), (32, 3, 2, 10)],
        "ddgan": [(8, 1, 64, T), (28, 1, 16, T), (32, 3, 2, T)],
    },
    "cuda": {
        "ddpm": [(8, 1, 128, T), (28, 1, 128, T), (32, 3, 128, T)],
        "method3.5": [(8, 1, 128, T), (28, 1, 128, T), (32, 3, 128, T)],
        "method2": [(8, 1, 128, 50), (28, 1, 64, 50), (32, 3, 16, 20)],
        "ddgan": [(8, 1, 128, T), (28, 1, 128, T), (32, 3, 64, T)],
    },
}
QUICK = {"ddpm": [(8, 1, 4, T)], "method3.5": [(8, 1, 4, T)], "method2": [(8, 1, 4, 3)], "ddgan": [(8, 1, 4, T)]}
Step = Callable[[Tensor], object]  # of images [N, C, H, W] in [-1, 1]
Nets = dict[str, nn.Module]


@dataclass(frozen=True)
class Case:
    """A family at a size: its networks, which every arm copies."""

    family: str
    shape: tuple[int, int, int]
    batch: int
    steps: int
    device: torch.device

    def networks(self) -> Nets:
        channels, size, _ = self.shape
        torch.manual_seed(0)
        if self.family == "ddgan":
            nets: Nets = {
                "generator": DDGANGenerator(channels, size, T=ddgan.T, z_dim=ddgan.Z),
                "critic": DDGANCritic(channels, size, T=ddgan.T),
            }
        else:
            nets = {
                "denoiser": StudentUNet(T=T) if size == 28 else UNet.preset(size, channels, dropout=0.0)
            }  # masks are keyed in no way
            if self.family == "method3.5":
                nets["critic"] = DCGANCritic(channels, size, inputs=("x", "t"), T=T, init="dcgan")
            if self.family == "method2":
                nets["critic"] = DCGANCritic(channels, size, init="dcgan")
        for p in (p for net in nets.values() for p in net.parameters()):
            if p.dim() > 1 and not p.any():  # a last layer of zeros would hide what the network is shown
                nn.init.normal_(p, std=0.02)
        return {name: net.to(self.device).train() for name, net in nets.items()}

    def tables(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """abar_t of t = 0..T, and beta_t, of the chain's schedule."""
        abar = dgf.Schedule.linear(self.steps).alphas_cumprod.to(self.device)
        return abar.to(dtype), (1 - abar / abar.roll(1)).to(dtype)


class ReferenceDDPM:
    """Ho et al. 2020, Algorithm 1, as it is commonly written. `noise`: x0, t -> (x_t, eps)."""

    def __init__(self, case: Case, nets: Nets, noise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None):
        self.net, self.abar = nets["denoiser"], case.tables()[0]
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.noise = noise or self.noised

    def noised(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps, abar = torch.randn_like(x0), self.abar[t].view(-1, 1, 1, 1)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps, eps

    def step(self, x0: Tensor) -> float:
        t = torch.randint(1, T + 1, x0.shape[:1], device=x0.device)
        x_t, eps = self.noise(x0, t)
        loss = mse_loss(self.net(x_t, t), eps)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.item()


def diffusers_step(case: Case, nets: Nets) -> Step:
    """The training loop of diffusers' examples, around the same network."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(T, 1e-4, 0.02)

    def noise(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0)
        return scheduler.add_noise(x0, eps, t - 1), eps

    return ReferenceDDPM(case, nets, noise).step


def lucidrains_step(case: Case, nets: Nets) -> Step:
    """The loss of denoising-diffusion-pytorch, around the same network."""
    diffusion = peers.gaussian_diffusion(nets["denoiser"], *case.shape[:2], T, case.device)
    adam = torch.optim.Adam(diffusion.model.parameters(), lr=1e-3)

    def step(x0: Tensor) -> float:
        loss = diffusion((x0 + 1) / 2)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.item()

    return step


PEERS = {
    "diffusers": ("diffusers", diffusers_step),
    "denoising-diffusion-pytorch": (peers.PACKAGE, lucidrains_step),
}


class ReferenceMethod2:
    """The notebook's step: its fakes are drawn twice, the critic's in eval mode; plain autograd through the chain."""

    def __init__(self, case: Case, nets: Nets):
        self.net, self.critic, self.case = nets["denoiser"], nets["critic"], case
        self.abar, self.beta = case.tables()
        adam = partial(torch.optim.Adam, lr=1e-5, betas=(0.5, 0.999))
        self.adams = adam(self.net.parameters()), adam(self.critic.parameters())

    def chain(self, like: Tensor) -> Tensor:
        x = torch.randn_like(like)
        for t in range(self.case.steps, 0, -1):
            eps, beta = self.net(x, torch.full((len(x),), t, device=x.device)), self.beta[t]
            x = (x - beta / (1 - self.abar[t]).sqrt() * eps) / (1 - beta).sqrt()
            x = x + beta.sqrt() * torch.randn_like(x) if t > 1 else x
        return x

    def step(self, x0: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            self.net.eval()
            fake = self.chain(x0)
            self.net.train()
        real, false = (torch.sigmoid(self.critic(x)) for x in (x0, fake))
        one = torch.ones_like(real)
        critic_loss = binary_cross_entropy(real, one) + binary_cross_entropy(false, 1 - one)
        self.adams[1].zero_grad()
        critic_loss.backward()
        self.adams[1].step()
        loss = binary_cross_entropy(torch.sigmoid(self.critic(self.chain(x0))), one)
        self.adams[0].zero_grad()
        loss.backward()
        self.adams[0].step()
        return critic_loss.item(), loss.item()


class Ours:
    """The engine's step of ddpm or method 2."""

    def __init__(self, case: Case, nets: Nets, **options: object):
        kind = dgf.methods.find(case.family)
        settings = dict(T=case.steps, schedule="linear", steps=10**6)
        if case.family == "method2":
            settings |= dict(critic_start="scratch", chain_mode="train")
        self.method, self.count = kind(kind.Config(**settings, **options), case.shape), 0
        nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
        self.state = State(nets, self.method.optimizers(nets), self.method.averaged, self.method.config)
        self.run = Steps.on(case.device, self.method, self.state)

    def step(self, x0: Tensor) -> dict[str, Tensor]:
        key = self.key(self.count)
        self.count += 1
        return self.run(Batch(x0.contiguous(memory_format=torch.channels_last)), key)

    @staticmethod
    def key(count: int) -> int:
        return dgf.random.fold_in(dgf.random.key(0), "step", count)


class Coded:
    """An arm of `benchmarks.training`, which takes images in [0, 1], t and a key."""

    def __init__(self, arm: str, case: Case, nets: Nets):
        chosen = next(each for each in training.ARMS if each.name == arm)
        self.trainer, self.count = training.make_trainer(chosen, nets["denoiser"], nets["critic"]), 0

    def step(self, x0: Tensor) -> object:
        self.count += 1
        t = torch.randint(1, T + 1, x0.shape[:1], device=x0.device)
        images = (x0.to(memory_format=self.trainer.format) + 1) / 2
        return self.trainer.step(images, t, dgf.random.fold_in(0, self.count))


class Lazy:
    """LAZY steps of an arm of `benchmarks.ddgan` as one."""

    def __init__(self, arm: str, case: Case, nets: Nets):
        both = nets["generator"], nets["critic"]
        self.arm = ddgan.Reference(*both) if arm == "reference" else ddgan.Ours(*both, case.shape, cuda_graphs=True)

    def step(self, x0: Tensor) -> object:
        return [self.arm.step(x0) for _ in range(ddgan.LAZY)][-1]


MAKE: dict[str, tuple[Callable, Callable]] = {  # family -> the reference and ours, of (case, networks)
    "ddpm": (ReferenceDDPM, Ours),
    "method3.5": (partial(Coded, "as-coded"), partial(Coded, "engine")),
    "method2": (ReferenceMethod2, Ours),
    "ddgan": (partial(Lazy, "reference"), partial(Lazy, "ours")),
}


def modules(arm: object) -> Nets:
    """The networks that an arm calls: its own attributes, or those of what it holds."""
    held = [*vars(arm).values(), *(v for part in vars(arm).values() for v in getattr(part, "__dict__", {}).values())]
    state = next((v for v in held if isinstance(v, State)), None)
    found = [*state.nets.values()] if state else [v for v in held if isinstance(v, nn.Module)]
    return {str(i): net for i, net in enumerate(dict.fromkeys(found))}


@in_float32()
def verify(case: Case, x0: Tensor) -> str:
    """ "ok", or how the first losses of ours differ from the same in float64."""
    nets = case.networks()
    if case.family == "method3.5":
        arm = next(each for each in training.ARMS if each.engine)
        return training.verify(arm, nets["denoiser"], nets["critic"], (x0 + 1) / 2)
    if case.family == "ddgan":
        return ddgan.verify(nets["generator"], nets["critic"], x0)["ours"]
    ours, key, wide = Ours(case, nets), Ours.key(0), {name: net.double() for name, net in case.networks().items()}
    abar, beta = case.tables(torch.float64)
    normals = partial(oracle.normals, device=x0.device)
    if case.family == "ddpm":
        t = ours.method.draw_t(len(x0), key, 0, x0.device)
        eps = normals(x0.numel(), dgf.random.fold_in(key, "noise"), 0).view(x0.shape)
        level = abar[t].view(-1, 1, 1, 1)
        out = wide["denoiser"](level.sqrt() * x0.double() + (1 - level).sqrt() * eps, t)
        want, name = mse_loss(out, eps), "loss"
    else:
        x = first_noise(tuple(x0.shape), key, device=x0.device).double()
        with torch.no_grad():
            for t in range(case.steps, 0, -1):
                eps = wide["denoiser"](x, torch.full((len(x),), t, device=x.device))
                x = (x - beta[t] / (1 - abar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
                if t > 1:
                    z = normals(x.numel(), dgf.random.fold_in(key, t), 0).view(x.shape)
                    x = x + beta[t].sqrt() * z
            want = softplus(-wide["critic"](x0.double())).mean() + softplus(wide["critic"](x)).mean()
        name = "critic_loss"
    error = abs(float(ours.step(x0)[name].detach()) / float(want.detach()) - 1)
    return "ok" if error < 1e-3 else f"RED: {name} off by {error:.3g}"


def floor(case: Case, x0: Tensor) -> Callable[[], None]:
    """A call of the networks alone, forward and backward, as often as a step of ours (of ddgan: without R1) needs."""
    nets = {name: net.to(memory_format=torch.channels_last) for name, net in case.networks().items()}
    x, n = x0.contiguous(memory_format=torch.channels_last), len(x0)
    t, z = torch.ones(n, dtype=torch.int64, device=x.device), torch.zeros(n, ddgan.Z, device=x.device)
    told = {"method3.5": dict(t=t), "ddgan": dict(t=t, x_t=x)}.get(case.family, {})
    make = (lambda: nets["generator"](x, t, z)) if case.family == "ddgan" else (lambda: nets["denoiser"](x, t))
    chain = case.steps if case.family == "method2" else 1

    def once() -> None:
        if case.family in ("ddgan", "method2"):  # the critic's fakes, or the chain that keeps states
            with torch.no_grad():
                for _ in range(chain):
                    make()
        for _ in range(2 if "critic" in nets else 0):
            nets["critic"](x, **told).sum().backward()
        for i in range(chain):
            out = make()
            if "critic" in nets and i == 0:
                with frozen(nets["critic"]):
                    nets["critic"](out, **told).sum().backward()
            else:
                out.sum().backward()

    return lambda: [once() for _ in range(ddgan.LAZY if case.family == "ddgan" else 1)] and None


def arms_of(case: Case, options: Options) -> dict[str, tuple[Callable, bool]]:
    """Arm -> (how it is made of (case, networks), whether its networks are compiled)."""
    reference, ours = MAKE[case.family]
    found = {"reference": (reference, False), "ours": (ours, False)}
    if case.family == "method2":
        found["ours-kept"] = (partial(ours, recompute="none"), False)
    if options.compile and (case.device.type == "cuda" or case.shape[1] == 8):
        found |= {"compile": (reference, True), "ours-compile": (ours, True)}
    for name, (package, make) in PEERS.items() if case.family == "ddpm" else ():
        if importlib.util.find_spec(package):
            found[name] = (make, False)
        else:
            print(f"{case.family}: {name} is skipped, for it is not installed")
    return found


class Timed:
    """An arm, and the seconds and the memory that its steps take."""

    def __init__(self, name: str, case: Case, make: Callable, wanted: bool):
        made = make(case, case.networks())
        self.name, self.case, self.wanted = name, case, wanted
        self.step = made if callable(made) else made.step
        self.nets, self.seconds, self.peak = {} if callable(made) else modules(made), [], None

    def run(self, x0: Tensor) -> float:
        with compiled(self.nets, self.wanted, self.case.device):
            return timed(lambda: self.step(x0), self.case.device)


def kernel_shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of a step's time that each of our kernels takes, by its name; on CUDA of the device's time."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA] if cuda else [activity.CPU]) as profile:
        step()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profile.key_averages()}
    mark, total = "dgf::" if cuda else "diffgan_fast::", max(sum(times.values()), 1e-9)
    named = {key.replace("(anonymous namespace)::", ""): time for key, time in times.items()}
    ours = {key.split(mark)[1].split("(")[0]: time / total for key, time in named.items() if mark in key}
    return dict(sorted(ours.items(), key=lambda item: -item[1]))


def measure(case: Case, options: Options) -> list[dict]:
    """The rows of a case: its arms in turns."""
    images = [torch.rand(case.batch, *case.shape, device=case.device) * 2 - 1 for _ in range(4)]
    status, bare = verify(case, images[0][:8]), floor(case, images[0])
    arms = [Timed(name, case, *how) for name, how in arms_of(case, options).items()]
    alone: list[float] = []
    for arm in list(arms):
        try:
            arm.run(images[0])  # also compiles
            if not (arm.wanted and case.device.type == "cpu"):
                arm.peak = peak_memory(lambda arm=arm: arm.run(images[0]), case.device) / 2**20
            for x in images if case.device.type == "cuda" else ():  # until all of it is in graphs
                arm.run(x)
        except RuntimeError as error:  # compiled code has no double backward, which the reference of ddgan needs
            arms.remove(arm)
            print(f"{case.family} {case.shape}: {arm.name} is skipped: {str(error).splitlines()[0]}")
    started = time.perf_counter()
    for i in range(1 if options.quick else 9):
        if i > 1 and time.perf_counter() - started > SECONDS:
            break
        for arm in arms:
            arm.seconds.append(arm.run(images[i % 4]))
        alone.append(timed(bare, case.device))
    rows = []
    for arm in arms:
        row = {"benchmark": "steps", "case": case.family, "shape": "x".join(map(str, (case.batch, *case.shape))),
               "dtype": "float32", "device": options.device, "threads": options.threads, "provider": arm.name,
               "status": status if arm.name.startswith("ours") else "ok"}  # fmt: skip
        if row["status"] == "ok":
            each = ddgan.LAZY if case.family == "ddgan" else 1
            row |= quantiles([s / each for s in arm.seconds]) | {"peak_mib": arm.peak}
            row["floor_ms"] = quantiles([s / each for s in alone])["ms"]
            row["images_per_s"] = case.batch / row["ms"] * 1e3
        if arm.name in ("ours", "ours-kept"):
            row["kernels"] = kernel_shares(lambda arm=arm: arm.run(images[0]), case.device)
            row["of_kernels"] = sum(row["kernels"].values())
        rows.append(row)
    return rows


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    device, rows = torch.device(options.device), []
    for family, sizes in (QUICK if options.quick else SIZES[options.device]).items():
        for size, channels, batch, steps in sizes:
            rows += measure(Case(family, (channels, size, size), batch, steps, device), options)
    return rows
