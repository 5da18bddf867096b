"""Reverse steps as a whole: what runs the networks and puts their outputs into one step op. And sampling with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from diffgan_fast import ops, random
from diffgan_fast.graphs import NotCapturable, Recorder
from diffgan_fast.ops.step import Variance
from diffgan_fast.schedule import Prediction, Schedule

Sampler = Literal["ddpm", "ddim"]
Predicts = Literal["x0", "x_prev"]  # what a generator of Denoising Diffusion GAN makes of x_t
Denoiser = Callable[..., torch.Tensor]


def check_predicts(predicts: str) -> None:
    """ValueError unless `predicts` names what a generator makes of x_t."""
    if predicts not in get_args(Predicts):
        raise ValueError(f"predicts must be one of {', '.join(get_args(Predicts))}; got {predicts!r}")


@dataclass(kw_only=True)
class Reverse:
    """How x_{t-1} is made from x_t: what `sample` and `denoise_chain` take as keywords.

    Args:
        sampler: "ddpm", ancestral (Ho et al. 2020, Algorithm 2), or "ddim" (Song et al. 2021).
        steps: number of steps, 1..T; the schedule is respaced. None: all T.
        eta: noise of "ddim", 0..1.
        variance, prediction, clip_x0: as for `ops.ddpm_step`.
        guidance_scale: s of classifier-free guidance, e_u + s (e - e_u) (Ho and Salimans 2022); 1 is none. The network
            then predicts a second time, with `uncond` in place of `cond`.
        critic: logits [N] or [N, K] = critic(x_t, t=t), of real over generated: critic guidance (Kim et al. 2023),
            eps - w sqrt(1 - abar_t) grad_x logit, K logits averaged. None: none. The critic is told the t that the
            network is told, and is best in eval mode.
        logit_scale: w.
        logit_from: the critic guides at t >= logit_from, counted in the schedule's own steps, not respaced.
    """

    schedule: Schedule
    sampler: Sampler = "ddpm"
    steps: int | None = None
    eta: float = 0.0
    variance: Variance = "beta"
    prediction: Prediction = "eps"
    clip_x0: bool = False
    guidance_scale: float = 1.0
    critic: Denoiser | None = None
    logit_scale: float = 1.0
    logit_from: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler must be 'ddpm' or 'ddim', got {self.sampler!r}")
        if self.variance not in get_args(Variance):
            raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}; got {self.variance!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta!r}")
        for name in ("guidance_scale", "logit_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        if self.critic is None and self.logit_scale != 1.0:
            raise ValueError(f"logit_scale={self.logit_scale} needs a critic")
        if self.steps is not None:
            self.schedule = self.schedule.respace(self.steps)
        self._told: list[int] = self.schedule.timesteps.tolist()
        self._told_on: dict[torch.device, torch.Tensor] = {}

    @property
    def T(self) -> int:
        """The number of steps."""
        return self.schedule.T

    def guides(self, t: int) -> bool:
        """Whether the critic, if there is one, guides at step t."""
        return self._told[t] >= self.logit_from

    def step(
        self,
        model: Denoiser,
        x: torch.Tensor,
        t: int | torch.Tensor,
        key: random.Key,
        *,
        guided: bool | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        first_sample: int = 0,
        doubled: bool = False,
    ) -> torch.Tensor:
        """x_{t-1} from x_t = x [N, …]; t in 1..T counts the steps that are made, and `key` is that of this step.

        doubled: both predictions of classifier-free guidance may come from one call with 2 N samples; see `_doubles`.

        Differentiable where gradients are enabled, through the critic's gradient too. In a CUDA graph t is an int64
        tensor with one number on x's device, and `guided` says what `guides(t)` does.
        """
        if isinstance(t, int):
            told, guided = torch.full((1,), self._told[t], device=x.device), self.guides(t)
        else:
            if x.device not in self._told_on:
                self._told_on[x.device] = torch.tensor(self._told, device=x.device)
            told, t = self._told_on[x.device][t.view(1)], t.expand(len(x))
        told = told.expand(len(x))  # one number, as a network may notice
        options: dict[str, Any] = dict(prediction=self.prediction, clip_x0=self.clip_x0, first_sample=first_sample)
        cond, uncond = cond or {}, uncond or {}
        if self.guidance_scale == 1.0:
            out = model(x, told, **cond)
        else:
            if doubled and _doubles(x, cond, uncond):
                both = {name: torch.cat((v, uncond[name])) for name, v in cond.items()}
                out, without = model(torch.cat((x, x)), told[:1].expand(2 * len(x)), **both).chunk(2)
            else:
                out, without = model(x, told, **cond), model(x, told, **uncond)
            options |= dict(eps_uncond=without.to(x.dtype), guidance_scale=self.guidance_scale)
        out = out.to(x.dtype)
        if self.critic is not None and guided:
            options |= dict(logit_grad=self._logit_grad(self.critic, x, told), logit_scale=self.logit_scale)
        if self.sampler == "ddpm":
            return ops.ddpm_step(x, out, t, self.schedule, key, variance=self.variance, **options)
        return ops.ddim_step(x, out, t, t - 1, self.schedule, key, eta=self.eta, **options)

    @staticmethod
    def _logit_grad(critic: Denoiser, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():
                x, told = x.clone(), told.clone()
            at = x if differentiable and x.requires_grad else x.detach().requires_grad_()
            logits = critic(at, t=told)
            if logits.dim() == 0 or len(logits) != len(x) or not logits.requires_grad:
                what = f"{list(logits.shape)}, {'with' if logits.requires_grad else 'without'} a gradient"
                raise ValueError(f"critic must give logits [N] or [N, K] that depend on x_t, N = {len(x)}; got {what}")
            (grad,) = torch.autograd.grad(logits.reshape(len(x), -1).mean(1).sum(), at, create_graph=differentiable)
        return grad.to(x.dtype)


# Numbers in x_t up to which a CPU takes less time for one call with 2 N samples than for two with N (64 images of 8 px,
# 4 of 28 px). Of more the activations do not fit in its caches, and two calls are faster.
DOUBLED = 4096


def _doubles(x: torch.Tensor, cond: Mapping[str, Any], uncond: Mapping[str, Any]) -> bool:
    """Whether one call with 2 N samples is as good as two, and faster: always on a GPU, which N seldom fill.

    Only for labels, int64 [N]: other tensors may belong to the whole call.
    """
    values = (*cond.values(), *uncond.values())
    labels = all(isinstance(v, torch.Tensor) and v.dtype == torch.int64 and v.shape == x.shape[:1] for v in values)
    return labels and cond.keys() == uncond.keys() and (x.is_cuda or x.numel() <= DOUBLED)


@torch.no_grad()
def sample(
    model: Denoiser,
    shape: tuple[int, ...],
    schedule: Schedule,
    key: random.Key,
    *,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    first_sample: int = 0,
    channels_last: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    **reverse: Any,
) -> torch.Tensor:
    """Samples from a denoiser.

    Args:
        model: denoiser `model(x, t, **cond)`, t int64 [N]; in eval mode, and able to take any number of samples.
        shape: [N, …] of the samples.
        key: names an endless sequence of samples; x_T is drawn from `fold_in(key, "x_T")` and step t from
            `fold_in(key, t)`, so sample i is the same in any batch (up to the network's own rounding).
        cond: what else the network takes, by name.
        uncond: what it takes instead of `cond` for its unconditional prediction (with guidance_scale). Where both are
            labels, int64 [N], of the same names, one call may make both predictions.
        first_sample: number of the first sample in the sequence.
        on_step: called with (t, x_t) before every step and with (0, x_0) at the end.
        reverse: how the steps are made: sampler=, steps=, guidance_scale=, critic=, …; see `Reverse`.

    Returns: x_0, float32 of `shape`.
    """
    step = Reverse(schedule=schedule, **reverse)

    def reverse_step(x: torch.Tensor, t: int | torch.Tensor, key: random.Key, guided: bool) -> torch.Tensor:
        options: dict[str, Any] = dict(cond=cond, uncond=uncond, first_sample=first_sample)
        return step.step(model, x, t, key, guided=guided, doubled=True, **options)

    x = _begin(shape, key, first_sample, channels_last, device)
    steps = _Captured(x, reverse_step, step.guides) if _worthwhile(x, step.T) else None
    for t in range(step.T, 0, -1):
        if on_step:
            on_step(t, x if steps is None else x.clone())  # which the next step overwrites
        step_key = random.fold_in(key, t)
        if steps is None or not steps.step(t, step_key):
            steps, x = None, reverse_step(x, t, step_key, step.guides(t))
    if on_step:
        on_step(0, x)
    return x


@torch.no_grad()
def sample_posterior(
    generator: Denoiser,
    shape: tuple[int, ...],
    schedule: Schedule,
    key: random.Key,
    *,
    z_dim: int,
    predicts: Predicts = "x0",
    first_sample: int = 0,
    channels_last: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Samples in T calls of a generator with a latent: x_{t-1} ~ q(x_{t-1} | x_t, x_0 = G(x_t, t, z)), a new z a step.

    Source: Denoising Diffusion GAN, Xiao et al. 2022, Eq. 5.

    Args:
        generator: `generator(x_t, t, z)` -> what `predicts` says, like x_t; t int64 [N] in 1..T, z [N, z_dim] standard
            normal; in eval mode.
        schedule: its T is the number of calls; `Schedule.vp` is the paper's.
        key: names an endless sequence of samples; x_T is drawn from `fold_in(key, "x_T")`, and `fold_in(key, t)` is the
            key of step t.
        shape, first_sample, on_step: as for `sample`.
        z_dim, predicts: as for `generated_step`.

    Returns: x_0, float32 of `shape`.
    """

    options: dict[str, Any] = dict(z_dim=z_dim, predicts=predicts, first_sample=first_sample)
    x = _begin(shape, key, first_sample, channels_last, device)
    for t in range(schedule.T, 0, -1):
        if on_step:
            on_step(t, x)
        x = generated_step(generator, x, t, schedule, random.fold_in(key, t), **options)
    if on_step:
        on_step(0, x)
    return x


def generated_step(
    generator: Denoiser,
    x: torch.Tensor,
    t: int,
    schedule: Schedule,
    key: random.Key,
    *,
    z_dim: int,
    predicts: Predicts = "x0",
    first_sample: int = 0,
) -> torch.Tensor:
    """x_{t-1} from x_t = x [N, …] by a generator, t in 1..T: one step of `sample_posterior`.

    Args:
        key: of the step; z is drawn from `fold_in(key, "z")`, the posterior's noise from `key` itself.
        z_dim: length of z.
        predicts: "x0", from which x_{t-1} is drawn, or "x_prev", x_{t-1} itself.
    """
    check_predicts(predicts)
    told = torch.full((1,), t, device=x.device).expand(len(x))  # one number, as a network may notice
    z_key, first = random.fold_in(key, "z"), first_sample * z_dim
    z = random.normal((len(x), z_dim), z_key, first=first, dtype=x.dtype, device=x.device)
    out = generator(x, told, z).to(x.dtype)
    return out if predicts == "x_prev" else ops.posterior_step(out, x, t, schedule, key, first_sample=first_sample)


def _worthwhile(x: torch.Tensor, T: int) -> bool:
    """Whether steps are to be captured in CUDA graphs: there are many of them, and this is not inside of a graph."""
    return x.is_cuda and T >= 16 and not torch.cuda.is_current_stream_capturing()


class _Captured:
    """Reverse steps as replays of a CUDA graph, which changes x_t = x in place; one graph with the critic, one without.

    A graph of one step, not of all: it is recorded as fast as a step runs, and serves any number of them.
    """

    def __init__(self, x: torch.Tensor, run: Callable[..., torch.Tensor], guides: Callable[[int], bool]):
        self.x, self.run, self.guides = x, run, guides
        self.recorder = Recorder(x.device)
        self.t = torch.zeros((), dtype=torch.int64, device=x.device)
        self.key = torch.zeros((), dtype=torch.int64, device=x.device)
        self.rehearsals = {False: 2, True: 2}
        self.replays: dict[bool, Callable[[], None]] = {}

    def step(self, t: int, key: random.Key) -> bool:
        """Makes x_{t-1}. False, and nothing has happened, if steps of this model cannot be captured."""
        guided = self.guides(t)
        self.t.fill_(t)
        if not isinstance(key, torch.Tensor):
            self.key.fill_(key)
        elif self.key.shape == key.shape:
            self.key.copy_(key)
        else:  # one a sample, as the first step tells
            self.key = key.clone()

        def run() -> None:
            self.x.copy_(self.run(self.x, self.t, self.key, guided))

        if self.rehearsals[guided]:
            self.rehearsals[guided] -= 1
            with self.recorder.rehearsal():
                run()
            return True
        if guided not in self.replays:
            try:
                self.replays[guided], _ = self.recorder.record(run)
            except (RuntimeError, NotCapturable) as error:
                warnings.warn(f"sampling runs without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=4)
                return False
        self.replays[guided]()
        return True


def _begin(
    shape: tuple[int, ...], key: random.Key, first_sample: int, channels_last: bool, device: torch.device | str
) -> torch.Tensor:
    """x_T in the memory format of the walk."""
    x = first_noise(shape, key, first_sample=first_sample, device=device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def first_noise(
    shape: tuple[int, ...], key: random.Key, *, first_sample: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The x_T, float32 [N, …], from which `sample` starts: sample i is the same in any batch."""
    per = torch.Size(shape[1:]).numel()
    return random.normal(shape, random.fold_in(key, "x_T"), first=first_sample * per, device=device)
