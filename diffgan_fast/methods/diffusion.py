"""What all methods with a denoiser share: its network, its schedule, and sampling from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from diffgan_fast import nets, random
from diffgan_fast.engine import Batch, Method, State, TrainConfig, evaluating, option
from diffgan_fast.nets.folding import folded
from diffgan_fast.ops import add_noise, denoising_loss
from diffgan_fast.ops.step import Variance
from diffgan_fast.sampling import Sampler, sample
from diffgan_fast.schedule import Prediction, Schedule

# The reference's MNIST set-up (facts of the source document): its small U-Net, pixels in [0, 1], 300 linear steps that
# do not reach the prior, ancestral sampling with variance beta.
STUDENT: dict[str, Any] = dict(
    network="student",
    data_range="unit",
    T=300,
    schedule="linear",
    beta_1=1e-4,
    beta_T=0.02,
    variance="beta",
    clip_x0=False,
)


@dataclass(kw_only=True)
class DiffusionConfig(TrainConfig):
    """A denoiser, its schedule and its sampler."""

    network: Literal["auto", "unet", "student", "mlp"] = option(
        "auto",
        "denoiser: the DDPM U-Net of the image's size, the source document's small U-Net (28 px), or an MLP for points "
        "(auto: U-Net or MLP)",
    )
    width: int | None = option(
        None, "channels of the U-Net's first level, or width of the MLP (none: as the network has them)", low=1
    )
    dropout: float = option(0.0, "dropout in the U-Net", low=0, high=1)
    conditional: bool = option(False, "the denoiser is told each image's class")
    label_dropout: float = option(
        0.1, "share of the images that a conditional denoiser is trained on without their class", low=0, high=1
    )
    T: int = option(300, "diffusion steps", unit="steps", low=1)
    schedule: Literal["linear-scaled", "linear", "quadratic", "cosine"] = option(
        "linear-scaled",
        "betas; linear-scaled is the linear schedule of 1000 steps, scaled to T so that it reaches the prior",
    )
    beta_1: float = option(1e-4, "first beta of linear and quadratic", low=0, high=1)
    beta_T: float = option(0.02, "last beta of linear and quadratic", low=0, high=1)
    prediction: Prediction = option("eps", "what the denoiser predicts")
    data_range: Literal["signed", "unit"] = option(
        "signed", "pixels in [-1, 1], or in [0, 1] as the source document has them"
    )
    sampler: Sampler = option("ddpm", "how samples are drawn")
    sample_steps: int | None = option(None, "sampling steps (none: all T)", unit="steps", low=1)
    eta: float = option(0.0, "noise of the ddim sampler", low=0, high=1)
    variance: Variance = option("beta", "variance of the ddpm sampler")
    clip_x0: bool = option(True, "clamp the reconstruction to [-1, 1] while sampling (images)")
    guidance_scale: float = option(
        1.0, "classifier-free guidance of a conditional denoiser while sampling (1: none, 0: no class)", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_steps is not None and self.sample_steps > self.T:
            raise ValueError(f"sample_steps must be in 1..{self.T}, got {self.sample_steps}")
        if self.clip_x0 and self.data_range == "unit":
            raise ValueError("clip_x0 clamps to [-1, 1]: with data_range='unit' it must be False")
        if self.guidance_scale != 1.0 and not self.conditional:
            raise ValueError(f"guidance_scale must be 1 unless conditional is True, got {self.guidance_scale}")


# All that says what the denoiser is and how it is sampled: what a fine-tuned run takes over from its base.
DENOISER_OPTIONS = tuple(f.name for f in fields(DiffusionConfig) if f.name not in {g.name for g in fields(TrainConfig)})


class DiffusionMethod(Method):
    """Base of the methods whose generating network is a denoiser."""

    Config: ClassVar[type[TrainConfig]] = DiffusionConfig
    has_denoiser = True
    sampling_options: ClassVar[tuple[str, ...]] = ("sampler", "steps", "eta", "variance", "clip_x0", "guidance_scale")
    config: DiffusionConfig

    def __init__(self, config: TrainConfig, shape: tuple[int, ...], num_classes: int = 0):
        super().__init__(config, shape, num_classes)
        if self.config.conditional and not num_classes:
            raise ValueError("conditional must be False: the data have no labels")
        self.schedule = make_schedule(self.config)

    @property
    def points(self) -> bool:
        """Whether the data are points, in their own units, and not images."""
        return len(self.shape) == 1

    def make_denoiser(self) -> nn.Module:
        """A new denoiser for this data."""
        kind, width = self.config.network, self.config.width
        if kind == "auto":
            kind = "mlp" if self.points else "unet"
        if (kind == "mlp") != self.points or (not self.points and self.shape[1] != self.shape[2]):
            needed = "points [N, D]" if kind == "mlp" else "square images [N, C, S, S]"
            raise ValueError(
                f"data must be {needed} for method {self.name!r} with network={kind!r}, got shape {list(self.shape)}"
            )
        if kind == "mlp":
            if self.config.conditional:
                raise ValueError("conditional must be False for points: their denoiser takes no class")
            return nets.MLPDenoiser(self.shape[0], width or 256)
        channels, size, _ = self.shape
        classes = self.num_classes if self.config.conditional else 0
        if kind == "student":
            return nets.StudentUNet(channels, classes, T=self.config.T)
        chosen = {"num_classes": classes} | ({} if width is None else {"width": width})
        return nets.UNet.preset(size, channels, dropout=self.config.dropout, **chosen)

    def image_size(self) -> tuple[int, int]:
        """Channels and size of the images, for a critic of images. ValueError for other data."""
        if self.points or self.shape[1] != self.shape[2]:
            raise ValueError(f"data must be images [N, C, S, S] for method {self.name!r}, got {list(self.shape)}")
        return self.shape[0], self.shape[1]

    def to_model(self, x: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] in the range that the denoiser works in; points as they are."""
        return x if self.points or self.config.data_range == "signed" else (x + 1) / 2

    def to_data(self, x: torch.Tensor) -> torch.Tensor:
        """The denoiser's range as images, clamped to [-1, 1]; points as they are."""
        if self.points:
            return x
        return (x if self.config.data_range == "signed" else x * 2 - 1).clamp(-1, 1)

    def draw_t(self, n: int, key: random.Key, first_sample: int, device: torch.device) -> torch.Tensor:
        """t ~ U{1..T} for each sample."""
        return 1 + random.randint(self.schedule.T, n, random.fold_in(key, "t"), first=first_sample, device=device)

    def condition(
        self, labels: torch.Tensor | None, key: random.Key | None = None, first_sample: int = 0
    ) -> dict[str, Any]:
        """What a conditional denoiser is told beside x_t and t, {"y": labels [N]}; other denoisers nothing.

        With a key, as in training, a share `label_dropout` of the labels becomes "no label" (Ho and Salimans 2022,
        Algorithm 1).
        """
        if not self.config.conditional:
            return {}
        if labels is None:
            raise ValueError("conditional must be False: the batch has no labels")
        if key is not None:
            u = random.uniform(labels.shape, random.fold_in(key, "label"), first=first_sample, device=labels.device)
            labels = torch.where(u < self.config.label_dropout, self.num_classes, labels)
        return {"y": labels}

    def guidance(self, labels: torch.Tensor | None) -> dict[str, Any]:
        """`cond` and `uncond` of a sampler or a chain for these labels [N]."""
        cond = self.condition(labels)
        return {"cond": cond, "uncond": {k: torch.full_like(v, self.num_classes) for k, v in cond.items()}}

    def reverse(self, state: State) -> dict[str, Any]:
        """How samples are drawn: keywords of `sampling.Reverse`."""
        c = self.config
        return dict(
            sampler=c.sampler,
            steps=c.sample_steps,
            eta=c.eta,
            variance=c.variance,
            prediction=c.prediction,
            clip_x0=c.clip_x0 and not self.points,
            guidance_scale=c.guidance_scale,
        )

    def sample(self, state, n, key, *, first=0, ema=True, labels=None, on_step=None, **how):
        if how.get("guidance_scale", 1.0) != 1.0 and not self.config.conditional:
            scale = how["guidance_scale"]
            raise ValueError(f"guidance_scale must be 1 of a denoiser that is told no class, got {scale}")
        if how.get("clip_x0") and (self.points or self.config.data_range == "unit"):
            raise ValueError("clip_x0 must be False: it clamps to [-1, 1], and this run's data do not lie there")
        reverse = self.reverse(state) | how
        return self.draw(state, n, key, reverse, first=first, ema=ema, labels=labels, on_step=on_step)

    def draw(self, state, n, key, reverse, *, first=0, ema=True, labels=None, on_step=None):
        """As `sample`, by the steps that `reverse` says."""
        net = state.sampling_net("denoiser", ema)
        device = next(net.parameters()).device
        if self.config.conditional:
            labels = (torch.arange(first, first + n) % self.num_classes if labels is None else labels).to(device)
        elif labels is not None:
            raise ValueError("labels must be None: this run's denoiser is told no class")
        with evaluating(*state.nets.values(), net):
            x = sample(
                folded(net),
                (n, *self.shape),
                self.schedule,
                key,
                **self.guidance(labels),
                **reverse,
                first_sample=first,
                channels_last=self.config.channels_last,
                device=device,
                on_step=on_step,
            )
        return self.to_data(x).contiguous()

    def strips(self, state: State, x: torch.Tensor, key: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """x on its way to noise, and samples on their way from it."""
        T, noised = self.schedule.T, []
        for t in (0, T // 8, T // 4, T // 2, 3 * T // 4, T):
            noised.append((t, self.to_data(add_noise(self.to_model(x), t, self.schedule, key)).cpu()))
        seen: list[tuple[int, torch.Tensor]] = []
        self.sample(state, len(x), key, on_step=lambda t, x: seen.append((t, self.to_data(x).cpu())))
        told = self.schedule.respace(len(seen) - 1).timesteps.tolist()
        picked = sorted({round(i * (len(seen) - 1) / 6) for i in range(7)})
        return {"noising": noised, "denoising": [(told[seen[i][0]], seen[i][1]) for i in picked]}

    @torch.no_grad()
    def evaluation_loss(self, state: State, x: torch.Tensor, key: int) -> float:
        """The noise-prediction loss of the weights as trained, not averaged, over ten draws of t and noise a sample."""
        net, losses = state["denoiser"], []
        x = self.to_model(x.to(next(net.parameters()).device))
        with evaluating(net):
            for draw in range(10):
                t = self.draw_t(len(x), random.fold_in(key, draw), 0, x.device)
                noise_key = random.fold_in(key, draw, "noise")
                out = net(add_noise(x, t, self.schedule, noise_key), t).to(x.dtype)
                losses.append(denoising_loss(out, x, t, self.schedule, noise_key, prediction=self.config.prediction))
        return float(torch.stack(losses).mean())


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that a config names."""
    if config.schedule == "linear-scaled":
        return Schedule.linear_scaled(config.T)
    if config.schedule == "cosine":
        return Schedule.cosine(config.T)
    make = Schedule.linear if config.schedule == "linear" else Schedule.quadratic
    return make(config.T, config.beta_1, config.beta_T)


def _level_rows(schedule: Schedule) -> torch.Tensor:
    abar = schedule.alphas_cumprod
    return torch.stack((abar.sqrt(), (1 - abar).sqrt()), 1)


def _levels(x_t: torch.Tensor, t: torch.Tensor, schedule: Schedule) -> list[torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) for t [N] in 0..T, shaped to broadcast against x_t."""
    rows = schedule.rows("levels", x_t, _level_rows).index_select(0, t).to(x_t.dtype)
    return [c.reshape(-1, *[1] * (x_t.dim() - 1)) for c in rows.unbind(1)]


def predicted_noise(
    out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, schedule: Schedule, prediction: Prediction
) -> torch.Tensor:
    """eps_hat, the noise that a network's output stands for: the output itself, or what follows from its x0 or v."""
    out = out.to(x_t.dtype)
    if prediction == "eps":
        return out
    signal, noise = _levels(x_t, t, schedule)
    return (x_t - signal * out) / noise if prediction == "x0" else noise * x_t + signal * out


def reconstruction(
    out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, schedule: Schedule, prediction: Prediction
) -> torch.Tensor:
    """x0_hat, the clean data that an output stands for: the output itself, or what follows from its eps or v."""
    out = out.to(x_t.dtype)
    if prediction == "x0":
        return out
    signal, noise = _levels(x_t, t, schedule)
    return (x_t - noise * out) / signal if prediction == "eps" else signal * x_t - noise * out


@torch.no_grad()
def noise_levels(method: DiffusionMethod, net: nn.Module, batch: Batch, key: int, levels: int = 10) -> dict[str, list]:
    """How well a denoiser predicts the noise at evenly spaced t: {"t", "mse", "log_var_eps"}, a list each.

    log_var_eps is the log variance of eps_hat; for one that is constant, log 1e-6. The Bayes-optimal one lies below 0
    (for N(0, 1) data it is log(1 - abar_t)), so a critic that sees the output alone can tell even a perfect denoiser
    from noise.
    """
    T, x, cond = method.schedule.T, method.to_model(batch.x), method.condition(batch.labels)
    steps = sorted({max(1, round(T * (i + 1) / levels)) for i in range(levels)})
    rows: dict[str, list] = {"t": steps, "mse": [], "log_var_eps": []}
    with evaluating(net):
        for t in steps:
            x_t, eps = add_noise(x, t, method.schedule, random.fold_in(key, t), return_noise=True)
            told = torch.full((len(x),), t, device=x.device)
            eps_hat = predicted_noise(net(x_t, told, **cond), x_t, told, method.schedule, method.config.prediction)
            rows["mse"].append(float((eps_hat - eps).square().mean()))
            rows["log_var_eps"].append(float(eps_hat.var().clamp_min(1e-6).log()))
    return rows
