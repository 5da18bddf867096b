"""GAN-enhanced diffusion of points: noise prediction beside a critic with a gradient penalty.

Source: "GAN-Enhanced Diffusion", Eqs. 1-4. The denoiser minimises |eps - eps_hat|^2 + adv_weight · (-log D(x0_hat)),
the critic -log D(x0) - log(1 - D(x0_hat)) + gp_weight · (|grad D| - 1)^2 between the two, all on logits.

The paper and its code differ. Eq. 2 gives the denoiser the saturating loss log(1 - D), ours is -log D by default. Eq. 4
puts the penalty into the denoiser's loss, where it has no gradient; it belongs to the critic's. And in the published
code D judges x_t, which does not depend on the denoiser at all: its adversarial term has no gradient, and every
published run is plain diffusion (`variant="as-coded"`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffgan_fast import nets, random
from diffgan_fast.adversarial import GanLoss, critic_objective, generator_loss
from diffgan_fast.engine import Batch, FlatAdamW, State, frozen, option
from diffgan_fast.methods.diffusion import DiffusionConfig, DiffusionMethod, noise_levels, reconstruction
from diffgan_fast.ops import add_noise, denoising_loss, posterior_step
from diffgan_fast.ops.step import Variance
from diffgan_fast.schedule import Prediction, Schedule

Judged = Literal["x0", "x_prev"]
LINEAR = dict(schedule="linear", beta_1=1e-4, beta_T=0.02)  # the published betas, which leave 60 % of the data at T
WEIGHT_DECAY = 0.01  # of both optimisers: AdamW's default, as the source's code has it


Variant = Literal["paper", "as-coded"]


def losses(
    denoiser: Callable[..., torch.Tensor],
    critic: Callable[..., torch.Tensor] | None,
    x0: torch.Tensor,
    t: torch.Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    cond: Mapping[str, Any] | None = None,
    variant: Variant = "paper",
    judged: Judged = "x0",
    prediction: Prediction = "eps",
    gan_loss: GanLoss = "nonsaturating",
    adv_weight: float = 1.0,
    gp_weight: float = 10.0,
    snr_weight: bool = True,
    first_sample: int = 0,
) -> tuple[torch.Tensor | None, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """The two losses of a step from one run of the denoiser.

    Args:
        denoiser: its output at (x_t, t) is what `prediction` says.
        critic: logits [N] = critic(x, t=t, x_t=x_t); it takes of t and x_t what it wants. None: plain diffusion.
        x0, t, schedule, first_sample: as for `ops.add_noise`; t in 1..T.
        key: of the step; x_t has the noise of `fold_in(key, "noise")`.
        cond: what else the denoiser takes, by name.
        variant, judged, gan_loss, adv_weight, gp_weight, snr_weight: as the options of the method.

    Returns:
        (critic's loss or None, a function that gives the denoiser's loss and the noise-prediction part of it). Call the
        function after the critic's update: it judges the same reconstruction, with its graph, by the updated critic.
    """
    noise_key = random.fold_in(key, "noise")
    x_t = add_noise(x0, t, schedule, noise_key, first_sample=first_sample)
    out = denoiser(x_t, t, **(cond or {})).to(x0.dtype)

    mse = denoising_loss(out, x0, t, schedule, noise_key, prediction=prediction, first_sample=first_sample)
    if critic is None:
        return None, lambda: (mse, mse)
    real, fake = x0, x_t
    if variant == "paper":
        fake = reconstruction(out, x_t, t, schedule, prediction)
        if judged == "x_prev":
            real, fake = (
                posterior_step(x, x_t, t, schedule, random.fold_in(key, name), first_sample=first_sample)
                for name, x in (("real", real), ("fake", fake))
            )
    loss, _, _ = critic_objective(
        critic,
        real,
        fake,
        gan_loss,
        gp_weight=gp_weight,
        key=random.fold_in(key, "between"),
        first_sample=first_sample,
        cond={"t": t, "x_t": x_t},
    )

    def denoiser_loss() -> tuple[torch.Tensor, torch.Tensor]:
        if variant == "as-coded":  # x_t does not depend on the denoiser: the adversarial term has no gradient
            return mse, mse
        weight = None
        if snr_weight:
            rows = schedule.rows("root of snr", x0, lambda s: s.snr.sqrt().clamp_max(1)[:, None])
            weight = rows.index_select(0, t)[:, 0]
        with frozen(critic):
            fooled = generator_loss(critic(fake, t=t, x_t=x_t), gan_loss, weight=weight)
        return mse + adv_weight * fooled, mse

    return loss, denoiser_loss


@dataclass(kw_only=True)
class GANEnhancedConfig(DiffusionConfig):
    PRESETS: ClassVar = {
        # the paper's Table 1 is plain diffusion
        "baseline": dict(LINEAR, adv_weight=0.0),
        # run 1 of the code, which the paper leaves out: a critic without a penalty
        "adversarial": dict(LINEAR, gp_weight=0.0),
        "gradient-penalty": LINEAR,  # Table 2
        "fine-tuned": dict(LINEAR, critic_layers=4, critic_lr=1.5e-4),  # Table 3
        "quadratic": dict(LINEAR | {"schedule": "quadratic"}, critic_layers=4, critic_lr=1.5e-4),  # Table 4
        # run 5, which the paper leaves out
        "deep-critic": dict(LINEAR | {"schedule": "quadratic"}, critic_layers=6, critic_lr=1.5e-4),
        # ours: the defaults, without and with a critic
        "reaches-prior": dict(adv_weight=0.0),
        "reaches-prior-critic": {},
    }
    steps: int = option(10000, "training steps", low=0)
    batch_size: int = option(256, "samples a step", low=1)
    lr: float = option(3e-4, "learning rate of the denoiser", low=0)
    lr_schedule: Literal["constant", "cosine", "exponential"] = option(
        "cosine", "learning rate of the denoiser over the run: cosine to 0, or exponential to a tenth"
    )
    clip_grad: float = option(0.5, "largest norm of the denoiser's gradient (0: no limit)", low=0)
    ema: float = option(0.995, "decay of the averaged weights that sampling uses (0: none)", low=0, high=1)
    ema_every: int = option(10, "updates between averagings", unit="updates", low=1)
    ema_start: int = option(100, "updates during which the average is a copy", unit="updates", low=0)
    log_every: int = option(100, "steps between rows of metrics.jsonl", unit="steps", low=1)
    sample_every: int = option(0, "steps between sample pictures (0: only at the end)", unit="steps", low=0)
    T: int = option(100, "diffusion steps", unit="steps", low=1)
    schedule: Literal["linear-scaled", "linear", "quadratic", "cosine"] = option(
        "quadratic", "betas; those of the paper (beta_T 0.02) leave much of the data at t = T"
    )
    beta_T: float = option(0.2, "last beta of linear and quadratic", low=0, high=1)
    variance: Variance = option("posterior", "variance of the ddpm sampler")
    variant: Variant = option(
        "paper", "what the critic judges: what the denoiser made, as in the paper, or x_t, as in its code"
    )
    judged: Judged = option("x0", "what the denoiser makes for the critic: the reconstruction of x0, or x_{t-1}")
    gan_loss: GanLoss = option("nonsaturating", "loss of the critic and the denoiser")
    adv_weight: float = option(1.0, "weight of the adversarial loss in the denoiser's (0: no critic)", low=0)
    snr_weight: bool = option(True, "weigh the adversarial loss of a sample by min(1, sqrt(SNR_t))")
    gp_weight: float = option(10.0, "weight of the gradient penalty in the critic's loss (0: none)", low=0)
    critic_lr: float = option(3e-4, "learning rate of the critic, constant", low=0)
    critic_layers: int = option(3, "hidden layers of the critic", low=1)
    critic_width: int = option(256, "width of the critic's layers", low=1)
    inputs: Literal["x", "x,t", "x,x_t", "x,x_t,t"] = option("x", "what the critic sees")


class GANEnhanced(DiffusionMethod):
    name, help, Config = "gan-enhanced", "diffusion of points with a critic and a gradient penalty", GANEnhancedConfig
    config: GANEnhancedConfig

    def networks(self, given):
        c = self.config
        if "critic" in given and c.adv_weight == 0:
            raise ValueError("critic must not be given with adv_weight=0: nothing would use it")
        found = {"denoiser": given["denoiser"] if "denoiser" in given else self.make_denoiser()}
        if c.adv_weight > 0:
            found["critic"] = given["critic"] if "critic" in given else self._make_critic()
        return found

    def _make_critic(self):
        c = self.config
        inputs = ("x", *(i for i in ("x_t", "t") if i in c.inputs.split(",")))
        if not self.points:
            channels, size, _ = self.shape
            return nets.DCGANCritic(channels, size, norm=None, inputs=inputs, T=self.schedule.T)
        return nets.MLPCritic(self.shape[0], c.critic_width, c.critic_layers, inputs=inputs, T=self.schedule.T)

    def optimizers(self, nets):
        rates = {"denoiser": self.config.lr, "critic": self.config.critic_lr}
        return {name: FlatAdamW(net, rates[name], weight_decay=WEIGHT_DECAY) for name, net in nets.items()}

    def step(self, state: State, batch: Batch, key: random.Key):
        c, x0, first = self.config, self.to_model(batch.x), batch.first_sample
        loss, denoiser_loss = losses(
            state["denoiser"],
            state.nets.get("critic"),
            x0,
            self.draw_t(len(x0), key, first, x0.device),
            self.schedule,
            key,
            cond=self.condition(batch.labels, key, first),
            variant=c.variant,
            judged=c.judged,
            prediction=c.prediction,
            gan_loss=c.gan_loss,
            adv_weight=c.adv_weight,
            gp_weight=c.gp_weight,
            snr_weight=c.snr_weight,
            first_sample=first,
        )
        logged = {}
        if loss is not None:
            state.update("critic", loss)
            logged["critic_loss"] = loss
        logged["denoiser_loss"], logged["mse"] = denoiser_loss()
        state.update("denoiser", logged["denoiser_loss"])
        return logged

    def diagnose(self, state, batch, key):
        return noise_levels(self, state.sampling_net("denoiser"), batch, key)
