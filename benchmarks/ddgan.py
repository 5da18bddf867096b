"""Denoising Diffusion GAN: a training iteration against the reference procedure, and sampling against DDPM's.

Reference, from the facts of the published code: a randn for every noise and a table look-up for every coefficient; the
real path is walked twice (its graph is kept on every step, for the R1 penalty of every 15th); the critic's loss goes
back through the generator, whose gradients are then thrown away; plain Adam; the average stacks all parameters of equal
shape on every step. Ours is `dgf.methods`' own step, as `dgf.train` runs it with `cuda_graphs=False`. All arms are
eager: what graphs save is measured by `steps`, which runs ours in them on CUDA. Same networks, initial weights and
batch; before timing, the losses of an iteration with R1 are checked against the same draws in float64.

`predicted` is the ratio of the operations of convolutions and products of matrices, counted in each arm's passes: of an
iteration, the 15th with R1; of sampling, of all calls. `macs` are multiply-accumulates on one sample: of an iteration,
or of a call. The U-Net of the DDPM has the width at which a call takes as many as the generator's, within 10 %.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import diffgan_fast as dgf
from benchmarks.cases import Options
from benchmarks.check import in_float32
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.engine import Batch, State, Steps
from diffgan_fast.nets import UNet
from diffgan_fast.nets.macs import MacCounter
from diffgan_fast.reproduce.ddgan import matched

T, LAZY, GAMMA, LR, CRITIC_LR, DECAY, Z = 4, 15, 0.02, 1.6e-4, 1.25e-4, 0.9999, 100
DDPM_T = 300
CASES = {  # device -> (size, channels, batch, rounds of LAZY iterations)
    "cpu": [(8, 1, 64, 5), (28, 1, 16, 2)],
    "cuda": [(28, 1, 128, 5), (32, 3, 64, 5)],
}
Draws = Callable[[str, str, tuple[int, ...]], Tensor]  # part ("critic", "generator"), what, shape -> numbers


class Reference:
    """The published procedure. t counts from 0 and names the cleaner of a pair; networks are told ours, one more."""

    def __init__(self, generator: nn.Module, critic: nn.Module):
        self.G, self.D = copy.deepcopy(generator).train(), copy.deepcopy(critic).train()
        self.adam_G = torch.optim.Adam(self.G.parameters(), lr=LR, betas=(0.5, 0.9))
        self.adam_D = torch.optim.Adam(self.D.parameters(), lr=CRITIC_LR, betas=(0.5, 0.9))
        self.average = [p.detach().clone() for p in self.G.parameters()]
        S, like = dgf.Schedule.vp(T), next(generator.parameters())
        abar = S.alphas_cumprod
        tables = dict(a_cum=abar.sqrt(), s_cum=(1 - abar).sqrt(), a=S.alphas.sqrt(), s=S.betas.sqrt(),
                      c1=S.posterior_mean_coef1[1:], c2=S.posterior_mean_coef2[1:],
                      log_var=S.posterior_variance[1:].clamp(min=1e-20).log())  # fmt: skip
        self.tables = {name: table.to(like) for name, table in tables.items()}
        self.count = 0

    def at(self, name: str, t: Tensor) -> Tensor:
        return torch.gather(self.tables[name], 0, t).reshape(-1, 1, 1, 1)

    def draw(self, part: str, what: str, shape: tuple[int, ...]) -> Tensor:
        device = self.tables["a"].device
        return torch.randint(0, T, shape, device=device) if what == "t" else torch.randn(shape, device=device)

    def pair(self, x0: Tensor, t: Tensor, part: str, draw: Draws) -> tuple[Tensor, Tensor]:
        increment = draw(part, "increment", x0.shape)
        x_t = self.at("a_cum", t) * x0 + self.at("s_cum", t) * draw(part, "pair", x0.shape)
        return x_t, self.at("a", t + 1) * x_t + self.at("s", t + 1) * increment

    def posterior(self, x0: Tensor, x_tp1: Tensor, t: Tensor, part: str, draw: Draws) -> Tensor:
        mean = self.at("c1", t) * x0 + self.at("c2", t) * x_tp1
        moving = (1 - (t == 0).to(x0.dtype)).reshape(-1, 1, 1, 1)
        return mean + moving * torch.exp(0.5 * self.at("log_var", t)) * draw(part, "posterior", x0.shape)

    def fake(self, x_tp1: Tensor, t: Tensor, part: str, draw: Draws) -> Tensor:
        x0 = self.G(x_tp1.detach(), t + 1, draw(part, "z", (len(t), Z)))
        return self.D(self.posterior(x0, x_tp1, t, part, draw), t=t + 1, x_t=x_tp1.detach())

    def step(self, x0: Tensor, draw: Draws | None = None) -> tuple[Tensor, Tensor]:
        """One iteration; its losses, the critic's with R1."""
        draw = draw or self.draw
        self.D.requires_grad_(True)
        self.D.zero_grad()
        t = draw("critic", "t", x0.shape[:1])
        x_t, x_tp1 = self.pair(x0, t, "critic", draw)
        x_t.requires_grad = True
        real = self.D(x_t, t=t + 1, x_t=x_tp1.detach())
        loss = softplus(-real).mean()
        loss.backward(retain_graph=True)
        critic_loss = loss.detach()
        if self.count % LAZY == 0:
            (g,) = torch.autograd.grad(real.sum(), x_t, create_graph=True)
            penalty = GAMMA / 2 * (g.reshape(len(g), -1).norm(2, dim=1) ** 2).mean()
            penalty.backward()
            critic_loss = critic_loss + penalty.detach()
        loss = softplus(self.fake(x_tp1, t, "critic", draw)).mean()
        loss.backward()
        self.adam_D.step()
        critic_loss = critic_loss + loss.detach()

        self.D.requires_grad_(False)
        self.G.zero_grad()
        t = draw("generator", "t", x0.shape[:1])
        _, x_tp1 = self.pair(x0, t, "generator", draw)
        loss = softplus(-self.fake(x_tp1, t, "generator", draw)).mean()
        loss.backward()
        self.adam_G.step()
        self.track()
        self.count += 1
        return critic_loss, loss.detach()

    @torch.no_grad()
    def track(self) -> None:
        """The moving average, all parameters of a shape stacked into one tensor."""
        shapes: dict[torch.Size, list[int]] = defaultdict(list)
        parameters = list(self.G.parameters())
        for i, p in enumerate(parameters):
            shapes[p.shape].append(i)
        for places in shapes.values():
            mean = torch.stack([self.average[i] for i in places])
            mean.mul_(DECAY).add_(torch.stack([parameters[i] for i in places]), alpha=1 - DECAY)
            for place, value in zip(places, mean, strict=True):
                self.average[place] = value.clone()


class Ours:
    """The same networks in the engine's own step."""

    def __init__(self, generator: nn.Module, critic: nn.Module, shape: tuple[int, ...], *, cuda_graphs: bool = False):
        kind = dgf.methods.find("ddgan")
        config = kind.Config(T=T, steps=10**6, lr=LR, critic_lr=CRITIC_LR, r1_gamma=GAMMA, lazy_reg=LAZY, ema=DECAY,
                             z_dim=Z, cuda_graphs=cuda_graphs)  # fmt: skip
        self.method = kind(config, shape)
        nets = {"generator": copy.deepcopy(generator).train(), "critic": copy.deepcopy(critic).train()}
        nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
        self.state = State(nets, self.method.optimizers(nets), self.method.averaged, config)
        self.run = Steps.on(next(generator.parameters()).device, self.method, self.state)

    def step(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        x0 = x0.contiguous(memory_format=torch.channels_last)
        losses = self.run(Batch(x0), self.key(self.state.step))
        self.state.step += 1
        return losses["critic_loss"].detach(), losses["generator_loss"].detach()

    @staticmethod
    def key(step: int) -> int:
        return dgf.random.fold_in(dgf.random.key(0), "step", step)

    @staticmethod
    def draws(key: int, like: Tensor) -> Draws:
        """What a step of ours draws from its key, as the reference asks for it."""

        def draw(part: str, what: str, shape: tuple[int, ...]) -> Tensor:
            found = dgf.random.fold_in(key, part, "pair" if what == "increment" else what)
            if what == "t":
                return dgf.random.randint(T, shape, found, device=like.device)
            stream = int(what == "increment")
            return dgf.random.normal(shape, found, stream=stream, dtype=torch.float64).to(like)

        return draw


@in_float32()
def verify(generator: nn.Module, critic: nn.Module, x0: Tensor) -> dict[str, str]:
    """For both arms "ok", or how the losses of an iteration with R1 differ from the same in float64."""
    # A fresh critic answers about 1e-8: its gradients are rounding, which the first step of Adam makes a whole lr.
    critic, drawn = copy.deepcopy(critic), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in critic.parameters():
            if p.dim() > 1 and p.abs().max() < 1e-3:
                p.add_(torch.randn(p.shape, generator=drawn).to(p) / p[0].numel() ** 0.5)
    right = Reference(generator.double(), critic.double())
    wanted = right.step(x0.double(), Ours.draws(Ours.key(0), x0.double()))
    generator.float(), critic.float()
    found = {
        "reference": Reference(generator, critic).step(x0, Ours.draws(Ours.key(0), x0)),
        "ours": Ours(generator, critic, x0.shape[1:]).step(x0),
    }
    status = {}
    for name, losses in found.items():
        # In units of 1 + the loss, for an untrained critic may be so sure that the generator's loss underflows.
        error = max(abs(float(loss - want)) / (1 + float(want)) for loss, want in zip(losses, wanted, strict=True))
        status[name] = "ok" if error < 1e-3 else f"RED: losses off by {error:.3g}"
    return status


def macs_of(arm: Reference | Ours, images: Tensor, calls: int) -> float:
    """Multiply-accumulates of an iteration on one image, the mean of so many iterations from the first on."""
    with MacCounter() as counter:
        for _ in range(calls):
            arm.step(images)
    return counter.total / calls / len(images)


def row_of(options: Options, case: str, shape: tuple[int, ...], provider: str, status: str) -> dict:
    return {"benchmark": "ddgan", "case": case, "shape": "x".join(map(str, shape)), "dtype": "float32",
            "device": options.device, "threads": options.threads, "provider": provider, "status": status}  # fmt: skip


def training_rows(options: Options, size: int, channels: int, batch: int, rounds: int) -> list[dict]:
    """The reference and ours, in turns; a round is LAZY iterations, so that each holds one R1."""
    device, shape = torch.device(options.device), (channels, size, size)
    generator = dgf.nets.DDGANGenerator(channels, size, T=T, z_dim=Z).to(device)
    critic = dgf.nets.DDGANCritic(channels, size, T=T).to(device)
    images = [torch.rand(batch, *shape, device=device) * 2 - 1 for _ in range(4)]
    status = verify(generator, critic, images[0][:8])
    made = {"reference": lambda: Reference(generator, critic), "ours": lambda: Ours(generator, critic, shape)}
    arms = {name: make() for name, make in made.items() if status[name] == "ok"}
    lazy = 2 if options.quick else LAZY
    counted = {name: macs_of(make(), images[0][:4], lazy) for name, make in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            took = timed(lambda arm=arm: [arm.step(images[i % len(images)]) for i in range(lazy)], device) / lazy
            if round_:
                seconds[name].append(took)
    rows = []
    for name in made:
        row = row_of(options, "training iteration", (batch, *shape), name, status[name])
        row |= {"macs": counted[name], "predicted": counted["reference"] / counted[name]}
        if name in arms:
            row |= quantiles(seconds[name])
            row["images_per_s"] = batch / row["ms"] * 1e3
        rows.append(row)
    return rows


@torch.no_grad()
def walk(unet: nn.Module, shape: tuple[int, ...], schedule: dgf.Schedule, key: int, device: torch.device) -> Tensor:
    """What `dgf.sample` gives, by eager steps: so many steps it would run as CUDA graphs, and the DDGAN's few not."""
    reverse = dgf.sampling.Reverse(schedule=schedule)
    x = dgf.sampling.first_noise(shape, key, device=device).contiguous(memory_format=torch.channels_last)
    for t in range(schedule.T, 0, -1):
        x = reverse.step(unet, x, t, dgf.random.fold_in(key, t))
    return x


def sampling_rows(options: Options, size: int, channels: int, batch: int) -> list[dict]:
    """A batch of samples of DDGAN and of DDPM, untrained, whose calls take as many operations, within 10 %."""
    device, shape = torch.device(options.device), (channels, size, size)
    width, generator_macs, unet_macs = matched(shape, None)
    steps = 6 if options.quick else DDPM_T
    unet = UNet.preset(size, channels, width=width)
    generator = dgf.nets.DDGANGenerator(channels, size, T=T, z_dim=Z)
    unet, generator = (net.to(device, memory_format=torch.channels_last).eval() for net in (unet, generator))
    dense, sparse, count = dgf.Schedule.linear_scaled(steps), dgf.Schedule.vp(T), 0
    few = dict(z_dim=Z, channels_last=True, device=device)
    calls = {
        "ddpm": lambda key: walk(unet, (batch, *shape), dense, key, device),
        "ddgan": lambda key: dgf.sampling.sample_posterior(generator, (batch, *shape), sparse, key, **few),
    }
    cost = dict(zip(calls, ((unet_macs, steps), (generator_macs, T)), strict=True))
    alike = abs(unet_macs / generator_macs - 1) <= 0.1
    status = "ok" if alike else f"RED: {unet_macs} and {generator_macs} MACs a call are not within 10 %"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(4 if size == 8 and not options.quick else 2):  # larger ones take minutes a round
        for name, call in calls.items():
            count += 1
            took = timed(lambda call=call, key=count: call(key), device)
            if round_:
                seconds[name].append(took)
    most = unet_macs * steps
    return [
        row_of(options, f"sampling, DDPM T = {steps}, DDGAN T = {T}", (batch, *shape), name, status)
        | {"macs": macs, "predicted": most / (macs * n)}
        | quantiles(seconds[name])
        | {"images_per_s": batch / quantiles(seconds[name])["ms"] * 1e3}
        for name, (macs, n) in cost.items()
    ]


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    rows = []
    for size, channels, batch, rounds in [(8, 1, 4, 1)] if options.quick else CASES[options.device]:
        rows += training_rows(options, size, channels, batch, rounds)
        rows += sampling_rows(options, size, channels, 4 if options.quick else 100)
    return rows
