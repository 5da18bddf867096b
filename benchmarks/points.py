"""GAN-enhanced diffusion on moons, batch 256: the reference procedure against ours, and sampling 10,000 points.

The reference arms follow the facts of the published code: a DataLoader over 100,000 rows, frequencies of the embeddings
made anew in every call, per-tensor AdamW loops, two losses read every step, and in the GAN runs a first run of the
denoiser whose result is not used, a critic that judges x_t, and a double backward for the penalty. `intended` arms are
ours with the adversarial term that reaches the denoiser, which is more useful work than the reference does; `as-coded`
is ours with the reference's own losses.

Floor: the products of matrices alone, in MFLOP a step, at the rate of a 256 x 256 x 256 product in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss

import diffgan_fast as dgf
from benchmarks.cases import Options
from benchmarks.harness import quantiles
from benchmarks.training import timed
from diffgan_fast.engine import Feed, State, Steps

T, BATCH, SAMPLES = 100, 256, 10_000
DENOISER = 2 * BATCH * (384 * 256 + 3 * 256 * 256 + 256 * 2)  # operations of a forward pass
FIRST = 2 * BATCH * 384 * 256
CRITIC = 2 * BATCH * (2 * 256 + 2 * 256 * 256 + 256)
FLOPS = {
    "plain": 3 * DENOISER - FIRST,
    # the critic twice as many rows forward, back and to its weights; once more forward and back to what it judges
    "adversarial": 3 * DENOISER - FIRST + 6 * CRITIC + 2 * CRITIC,
    "penalty": 3 * DENOISER - FIRST + 6 * CRITIC + 2 * CRITIC + 4 * CRITIC,
    "sampling": T
    * SAMPLES
    / BATCH
    * (DENOISER - 2 * BATCH * 128 * 256),  # the time's part of the first layer is shared
}


class Embedding(nn.Module):
    """The reference's: 64 frequencies, made in every call."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        frequencies = torch.exp(-math.log(10000) / 63 * torch.arange(64))
        phase = x.unsqueeze(-1) * frequencies.to(x.device).unsqueeze(0)
        return torch.cat((torch.sin(phase), torch.cos(phase)), dim=-1)


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff, self.act = nn.Linear(256, 256), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.act(x))


class ReferenceDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.x, self.y = Embedding(), Embedding(25.0), Embedding(25.0)
        blocks = [ResidualBlock() for _ in range(3)]
        self.network = nn.Sequential(nn.Linear(384, 256), *blocks, nn.ReLU(), nn.Linear(256, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        parts = self.x(x[:, 0]), self.y(x[:, 1]), self.time(t)
        return self.network(torch.cat(parts, dim=-1))


class Reference:
    """The published procedure. `critic`: with adversarial term, `penalty`: with gradient penalty."""

    def __init__(self, points: Tensor, device: torch.device, critic: bool, penalty: bool):
        self.penalty, self.device = penalty, device
        self.denoiser = ReferenceDenoiser().to(device)
        layers = [nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.critic = nn.Sequential(*layers, nn.Linear(256, 1)).to(device) if critic else None
        self.adam = torch.optim.AdamW(self.denoiser.parameters(), lr=3e-4)
        if self.critic is not None:
            self.critic_adam = torch.optim.AdamW(self.critic.parameters(), lr=3e-4)
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, T_max=10_000)
        betas = torch.linspace(1e-4, 0.02, T).to(device)
        self.abar = torch.cumprod(1 - betas, 0)
        self.betas, self.before = betas, torch.cat((torch.ones_like(betas[:1]), self.abar[:-1]))
        self.signal, self.noise = self.abar**0.5, (1 - self.abar) ** 0.5
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points), batch_size=BATCH, shuffle=True)
        self.batches = self._forever(loader)
        self.average = [p.detach().clone() for p in self.denoiser.parameters()]
        self.steps = 0

    @staticmethod
    def _forever(loader) -> Iterator[Tensor]:
        while True:
            for (x,) in loader:
                yield x

    def step(self) -> None:
        x0 = next(self.batches).to(self.device)
        noise, t = torch.randn(x0.shape).to(self.device), torch.randint(0, T, (len(x0),)).long().to(self.device)
        x_t = self.signal[t].reshape(-1, 1) * x0 + self.noise[t].reshape(-1, 1) * noise
        adversarial = 0.0
        if self.critic is not None:
            self.denoiser(x_t, t)
            self.critic_adam.zero_grad()
            real, fake = self.critic(x0), self.critic(x_t.detach())
            loss = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
            if self.penalty:
                u = torch.rand(len(x0), 1).to(self.device)
                between = (u * x0 + (1 - u) * x_t).requires_grad_(True)
                out = self.critic(between)
                (g,) = torch.autograd.grad(out, between, torch.ones_like(out), create_graph=True, retain_graph=True)
                loss = loss + 10 * ((g.norm(2, dim=1) - 1) ** 2).mean()
            loss.backward()
            self.critic_adam.step()
            loss.item()
            judged = self.critic(x_t)
            adversarial = bce(judged, torch.ones_like(judged))
        loss = mse_loss(self.denoiser(x_t, t), noise) + adversarial
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 0.5)
        self.adam.step()
        self.cosine.step()
        loss.item()
        self.steps += 1
        if self.steps % 10 == 0:
            with torch.no_grad():
                for mine, theirs in zip(self.average, self.denoiser.parameters(), strict=True):
                    mine.lerp_(theirs, 0.005)

    @torch.no_grad()
    def sample(self) -> Tensor:
        x = torch.randn(SAMPLES, 2, device=self.device)
        for i in range(T - 1, -1, -1):
            t = torch.full((SAMPLES,), i).long().to(self.device)
            out = self.denoiser(x, t)
            x0 = self.abar[i] ** -0.5 * x - (1 / self.abar[i] - 1) ** 0.5 * out
            rest = 1 - self.abar[i]
            first = self.betas[i] * self.before[i] ** 0.5 / rest
            x = first * x0 + (1 - self.before[i]) * (1 - self.betas[i]) ** 0.5 / rest * x
            if i > 0:
                variance = (self.betas[i] * (1 - self.before[i]) / rest).clamp(1e-20)
                x = x + variance**0.5 * torch.randn_like(x)
        return x


class Ours:
    """The engine's step, its feed included."""

    def __init__(self, points: Tensor, device: torch.device, **options):
        kind = dgf.methods.find("gan-enhanced")
        config = kind.Config.make("gradient-penalty", **options)
        self.method = kind(config, (2,))
        nets = {name: net.to(device) for name, net in self.method.networks({}).items()}
        self.state = State(nets, self.method.optimizers(nets), self.method.averaged, config)
        self.run = Steps.on(device, self.method, self.state)
        self.feed = Feed(dgf.data.load(points), BATCH, dgf.random.key(0), device)
        self.key = dgf.random.key(0)

    def step(self) -> None:
        s = self.state.step
        self.run(self.feed.batch(s), dgf.random.fold_in(self.key, "step", s))
        self.state.step = s + 1

    def sample(self) -> Tensor:
        return self.method.sample(self.state, SAMPLES, self.key)


def rate(device: torch.device) -> float:
    """Operations a second of a 256 x 256 x 256 product: the best of many."""
    a, b, c = (torch.randn(256, 256, device=device) for _ in range(3))
    return 2 * 256**3 / min(timed(lambda: torch.mm(a, b, out=c), device) for _ in range(200))


def run(options: Options) -> list[dict]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    points = dgf.data.load("moons").batch(slice(0, None))
    trained: dict[tuple[str, str], Reference | Ours] = {
        ("plain", "reference"): Reference(points, device, False, False),
        ("plain", "ours"): Ours(points, device, adv_weight=0.0),
        ("adversarial", "reference"): Reference(points, device, True, False),
        ("adversarial", "ours"): Ours(points, device, gp_weight=0.0),
        ("penalty", "reference"): Reference(points, device, True, True),
        ("penalty", "ours"): Ours(points, device),
        ("penalty", "ours, as coded"): Ours(points, device, variant="as-coded"),
    }
    rounds, steps = (2, 2) if options.quick else (20, 20)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in trained}
    rates = []
    for round_ in range(rounds + 1):
        rates.append(rate(device))
        for key, arm in trained.items():
            for _ in range(steps):
                seconds = timed(arm.step, device)
                if round_:
                    found[key].append(seconds)
    for _ in range(1 if options.quick else 3):
        for name in ("reference", "ours"):
            found.setdefault(("sampling", name), []).append(timed(trained["plain", name].sample, device))
    rows = []
    best = max(rates)
    for (case, name), times in found.items():
        row = {"benchmark": "points", "case": case, "shape": f"{SAMPLES if case == 'sampling' else BATCH}x2",
               "dtype": "float32", "device": options.device, "threads": options.threads, "provider": name,
               "status": "ok", "floor_ms": FLOPS[case] / best * 1e3} | quantiles(times)  # fmt: skip
        rows.append(row)
    added = {row["provider"]: row["ms"] for row in rows if row["case"] == "penalty"}
    without = {row["provider"]: row["ms"] for row in rows if row["case"] == "adversarial"}
    for name, ms in without.items():
        row = {"benchmark": "points", "case": "what the penalty adds", "shape": f"{BATCH}x2", "dtype": "float32",
               "device": options.device, "threads": options.threads, "provider": name, "status": "ok",
               "floor_ms": 4 * CRITIC / best * 1e3, "ms": added[name] - ms}  # fmt: skip
        rows.append(row)
    return rows
