"""Method 3.5, `student` preset, 28 px, batch 128: the reference procedure against ours, item by item.

As coded (facts of the source report's notebooks): every step noises a batch with torch.randn, runs the denoiser in eval
mode for the critic's update and again in train mode for its own, takes binary cross-entropy of sigmoid outputs, steps
two plain Adam optimisers, and reads both losses with `.item()`. The first forward is under `no_grad`.

Ours, each arm with all that stands before it:
    shared          one forward, in train mode, serves both updates
    channels-last   networks and images in that memory format
    fused-adam      Adam(fused=True)
    op-noise        x_t and the noise from one `dgf.ops.add_noise`
    lean            the critic's weights get no gradient in the denoiser's update, and losses stay on the device
    engine          `dgf.methods`' own step, as `dgf.train` runs it: t drawn from its key, logits instead of sigmoids

All arms have the same networks, initial weights, dtype and critic batch norm (train mode, real and fake apart). Only
the critic's fakes differ: the shared forward normalises by the batch, the as-coded one by running statistics. Before
timing, each arm's first step is checked against the same in float64: two forwards, the first in the arm's mode.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffgan_fast as dgf
from benchmarks import oracle
from benchmarks.cases import Options
from benchmarks.check import in_float32
from benchmarks.harness import quantiles
from diffgan_fast.engine import Batch, State, Steps
from diffgan_fast.nets import DCGANCritic, StudentUNet

T = 300
BCE = nn.functional.binary_cross_entropy


@dataclass(frozen=True)
class Arm:
    """What one way of training does."""

    name: str
    shared: bool = True
    channels_last: bool = False
    fused: bool = False
    op_noise: bool = False
    lean: bool = False
    engine: bool = False


ARMS = (
    Arm("as-coded", shared=False),
    Arm("shared"),
    Arm("channels-last", channels_last=True),
    Arm("fused-adam", channels_last=True, fused=True),
    Arm("op-noise", channels_last=True, fused=True, op_noise=True),
    Arm("lean", channels_last=True, fused=True, op_noise=True, lean=True),
    Arm("engine", channels_last=True, fused=True, op_noise=True, lean=True, engine=True),
)


class Trainer:
    """The networks and optimisers of one arm, and its step."""

    def __init__(self, arm: Arm, unet: nn.Module, critic: nn.Module):
        self.arm = arm
        self.format = torch.channels_last if arm.channels_last else torch.contiguous_format
        self.unet = copy.deepcopy(unet).to(memory_format=self.format).train()
        self.critic = copy.deepcopy(critic).to(memory_format=self.format).train()
        settings = {"betas": (0.5, 0.999)} | ({"fused": True} if arm.fused else {})
        self.unet_adam = torch.optim.Adam(self.unet.parameters(), lr=1e-5, **settings)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=1e-4, **settings)
        self.schedule = dgf.Schedule.linear(T)
        abar = self.schedule.alphas_cumprod.to(next(unet.parameters()).device)
        self.signal, self.noise = (table.float().view(-1, 1, 1, 1) for table in (abar.sqrt(), (1 - abar).sqrt()))

    def noise_key(self, key: int) -> int:
        """The key of a step's noise."""
        return key

    def noised(self, x0: Tensor, t: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """x_t and its noise."""
        if self.arm.op_noise:
            return dgf.ops.add_noise(x0, t, self.schedule, self.noise_key(key), return_noise=True)
        eps = torch.randn_like(x0)
        return self.signal[t] * x0 + self.noise[t] * eps, eps

    def update(self, x_t: Tensor, eps: Tensor, t: Tensor, first_train: bool | None = None) -> tuple:
        """One update of the critic, then of the denoiser. `first_train` runs two forwards, the first in that mode."""
        if first_train is None and self.arm.shared:
            eps_hat = fake = self.unet(x_t, t)
        else:
            with torch.no_grad():
                fake = self.unet.train(bool(first_train))(x_t, t)
            self.unet.train()
            eps_hat = None
        self.critic_adam.zero_grad()
        real_score, fake_score = (torch.sigmoid(self.critic(x, t)) for x in (eps, fake.detach()))
        one = torch.ones_like(real_score)
        critic_loss = BCE(real_score, one) + BCE(fake_score, 1 - one)
        critic_loss.backward()
        self.critic_adam.step()

        if eps_hat is None:
            eps_hat = self.unet(x_t, t)
        self.unet_adam.zero_grad()
        self.critic.requires_grad_(not self.arm.lean)
        unet_loss = BCE(torch.sigmoid(self.critic(eps_hat, t)), one)
        unet_loss.backward()
        self.critic.requires_grad_(True)
        self.unet_adam.step()
        losses = critic_loss.detach(), unet_loss.detach()
        return losses if self.arm.lean else tuple(loss.item() for loss in losses)

    def step(self, x0: Tensor, t: Tensor, key: int) -> tuple:
        """A whole training step."""
        x_t, eps = self.noised(x0, t, key)
        return self.update(x_t, eps, t)

    def first_losses(self, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, key: int) -> tuple:
        """The losses of a step at a given t, whose noise `noised` has made."""
        return self.update(x_t, eps, t)


class EngineTrainer(Trainer):
    """The same networks in the engine's own step."""

    def __init__(self, arm: Arm, unet: nn.Module, critic: nn.Module):
        super().__init__(arm, unet, critic)
        kind = dgf.methods.find("method3.5")
        config = kind.Config.make("student", critic_steps=0)
        self.method = kind(config, (1, 28, 28))
        nets = {"denoiser": self.unet, "critic": self.critic}
        self.state = State(nets, self.method.optimizers(nets), self.method.averaged, config)
        self.run = Steps.on(next(unet.parameters()).device, self.method, self.state)

    def noise_key(self, key: int) -> int:
        return dgf.random.fold_in(key, "noise")

    def step(self, x0: Tensor, t: Tensor | None, key: int) -> tuple:
        losses = self.run(Batch(x0 * 2 - 1), key)  # the engine holds images in [-1, 1]
        return losses["critic_loss"], losses["denoiser_loss"]

    def first_losses(self, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, key: int) -> tuple:
        draw, self.method.draw_t = self.method.draw_t, lambda *_: t
        try:
            return self.step(x0, None, key)
        finally:
            self.method.draw_t = draw


def make_trainer(arm: Arm, unet: nn.Module, critic: nn.Module) -> Trainer:
    return (EngineTrainer if arm.engine else Trainer)(arm, unet, critic)


@in_float32()
def verify(arm: Arm, unet: nn.Module, critic: nn.Module, images: Tensor) -> str:
    """ "ok", or how an arm's first step differs from the float64 one."""
    trainer = make_trainer(arm, unet, critic)
    images = images.to(memory_format=trainer.format)
    t = torch.randint(1, T + 1, images.shape[:1], device=images.device)
    x_t, eps = trainer.noised(images, t, key=7)
    abar = trainer.schedule.alphas_cumprod.to(images.device)[t].view(-1, 1, 1, 1)
    wide = eps.double()
    if arm.op_noise:
        wide = oracle.normals(eps.numel(), trainer.noise_key(7), 0, eps.device).view(eps.shape)
        if not (eps - wide).abs().max() < 2e-5:
            return "RED: the noise is not that of the key"
    if not (x_t - (abar.sqrt() * images + (1 - abar).sqrt() * wide)).abs().max() < 2e-5:
        return "RED: x_t is not the noised image"
    right = Trainer(Arm("float64"), unet.double(), critic.double())
    expected = right.update(x_t.double(), eps.double(), t, first_train=arm.shared)
    unet.float(), critic.float()
    losses = [torch.as_tensor(loss).detach().item() for loss in trainer.first_losses(images, x_t, eps, t, key=7)]
    errors = [abs(loss / want - 1) for loss, want in zip(losses, expected, strict=True)]
    return "ok" if max(errors) < 1e-3 else f"RED: losses off by {max(errors):.3g}"


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(options: Options) -> list[dict]:
    """The rows of this benchmark: one for each arm, timed in turns."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    batch, warm_up, rounds, calls = (2, 0, 1, 1) if options.quick else (128, 1, 9, 1)
    if device.type == "cuda":
        warm_up, calls = 3, 10
    unet = StudentUNet(T=T).to(device)
    critic = DCGANCritic(1, 28, inputs=("x", "t"), T=T, init="dcgan").to(device)
    images = [torch.rand(batch, 1, 28, 28, device=device) for _ in range(8)]
    status = {arm.name: verify(arm, unet, critic, images[0][:8]) for arm in ARMS}
    trainers = {arm.name: make_trainer(arm, unet, critic) for arm in ARMS if status[arm.name] == "ok"}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    count = 0
    for round_ in range(warm_up + rounds):
        for name, trainer in trainers.items():
            arguments = []
            for _ in range(calls):
                count += 1
                x0 = images[count % len(images)].to(memory_format=trainer.format)
                t = torch.randint(1, T + 1, (batch,), device=device)
                arguments.append((x0, t, dgf.random.fold_in(0, count)))
            took = timed(lambda a=arguments, trainer=trainer: [trainer.step(*x) for x in a], device) / calls
            if round_ >= warm_up:
                seconds[name].append(took)
    rows = []
    for arm in ARMS:
        row = {"benchmark": "training", "case": "method 3.5", "shape": f"{batch}x1x28x28", "dtype": "float32",
               "device": options.device, "threads": options.threads, "provider": arm.name,
               "status": status[arm.name]}  # fmt: skip
        if arm.name in trainers:
            row |= quantiles(seconds[arm.name])
            row["images_per_s"] = batch / row["ms"] * 1e3
        rows.append(row)
    return rows
