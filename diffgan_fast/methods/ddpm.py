"""Denoising diffusion (Ho et al. 2020, Algorithm 1): predict the noise that was added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffgan_fast import random
from diffgan_fast.engine import Batch, FlatAdamW, State, option
from diffgan_fast.methods.diffusion import STUDENT, DiffusionConfig, DiffusionMethod, noise_levels
from diffgan_fast.ops import add_noise, denoising_loss
from diffgan_fast.schedule import Prediction, Schedule


def losses(
    denoiser: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    t: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    cond: Mapping[str, Any] | None = None,
    prediction: Prediction = "eps",
    first_sample: int = 0,
) -> torch.Tensor:
    """E |eps - eps_hat(x_t, t)|^2, a scalar; no noise tensor is ever stored.

    Args: x0 [N, …] data, t int64 [N] in 1..T, cond what else the denoiser takes, by name; the rest as for
    `ops.add_noise` and `ops.denoising_loss`.
    """
    x_t = add_noise(x0, t, schedule, key, first_sample=first_sample)
    return denoising_loss(
        denoiser(x_t, t, **(cond or {})).to(x0.dtype),
        x0,
        t,
        schedule,
        key,
        prediction=prediction,
        first_sample=first_sample,
    )


@dataclass(kw_only=True)
class Config(DiffusionConfig):
    PRESETS: ClassVar = {
        # 5 epochs of MNIST at batch 128, counted in images seen so that smaller data sets get as many
        "paper": dict(lr=1e-3, batch_size=128, steps=2344, T=300, schedule="linear", data_range="signed", ema=0.0),
        "student": dict(STUDENT, lr=1e-3, batch_size=128, steps=2344, lr_schedule="exponential", ema=0.0),
    }
    lr: float = option(1e-3, "learning rate", low=0)
    adam_beta1: float = option(0.9, "decay of Adam's mean gradient", low=0, high=1)


class DDPM(DiffusionMethod):
    name, help, Config = "ddpm", "denoising diffusion: the base that the fine-tuning methods start from", Config

    def networks(self, given):
        return {"denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser()}

    def optimizers(self, nets):
        return {"denoiser": FlatAdamW(nets["denoiser"], self.config.lr, (self.config.adam_beta1, 0.999))}

    def step(self, state: State, batch: Batch, key: random.Key):
        x0, first = self.to_model(batch.x), batch.first_sample
        t = self.draw_t(len(x0), key, first, x0.device)
        noise_key = random.fold_in(key, "noise")
        loss = losses(
            state["denoiser"],
            x0,
            t,
            self.schedule,
            noise_key,
            cond=self.condition(batch.labels, key, first),
            prediction=self.config.prediction,
            first_sample=first,
        )
        state.update("denoiser", loss)
        return {"loss": loss}

    def diagnose(self, state, batch, key):
        return noise_levels(self, state.sampling_net("denoiser"), batch, key)
