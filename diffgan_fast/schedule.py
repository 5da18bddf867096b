"""Noise schedules: every coefficient table, computed in float64 and served as rows on a device.

Tables have length T + 1 and are indexed by t: t = 0 is clean data (alphas_cumprod[0] is exactly 1), t = T the noisiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Literal, get_args

import torch

Prediction = Literal["eps", "x0", "v"]


def check_prediction(prediction: str) -> None:
    """ValueError unless `prediction` names what a network predicts."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}; got {prediction!r}")


class RowCache:
    """Coefficient rows in the type and on the device that an op wants them, each built once."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, torch.Tensor] = {}

    def rows(self, kind: Hashable, like: torch.Tensor, build: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """`build(self, *args)` -> float64, on like's device: in float64 for float64 data, else in float32."""
        double = like.dtype == torch.float64
        key = (kind, like.device, double)
        value = self._rows.get(key)
        if value is None:
            with torch.inference_mode(False):  # the rows will also serve calls that need gradients
                value = build(self, *args).to(torch.float64 if double else torch.float32).contiguous().to(like.device)
            self._rows[key] = value
        return value


class Schedule(RowCache):
    """A variance-preserving noise schedule of T steps. Not to be changed; make one with a class method below.

    Float64 CPU tensors [T + 1], indexed by t (Ho et al. 2020, §2 and Eqs. 6-7):
        betas, alphas, alphas_cumprod: beta_t (beta_0 = 0), alpha_t = 1 - beta_t, abar_t.
        posterior_mean_coef1, posterior_mean_coef2: coefficients of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0).
        posterior_variance: its variance beta_t (1 - abar_{t-1}) / (1 - abar_t); 0 at t = 1.
        snr: abar_t / (1 - abar_t); infinite at t = 0.
    timesteps: int64 [T + 1], the step of the original schedule that t stands for (t itself unless respaced): what the
        network, the critic and guidance are told.
    """

    def __init__(self, betas: torch.Tensor, timesteps: torch.Tensor | None = None):
        super().__init__()
        self._respaced: dict[int, Schedule] = {}
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or betas.numel() == 0:
            raise ValueError(f"betas must be [T] with T >= 1, got shape {list(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must lie in (0, 1), got {betas.min().item():.6g}..{betas.max().item():.6g}")
        self.T = betas.numel()
        self.betas = torch.cat((betas.new_zeros(1), betas))
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        rest = 1 - self.alphas_cumprod
        before, rest_before = self.alphas_cumprod.roll(1), rest.roll(1)
        self.posterior_mean_coef1 = before.sqrt() * self.betas / rest
        self.posterior_mean_coef2 = self.alphas.sqrt() * rest_before / rest
        self.posterior_variance = self.betas * rest_before / rest
        for table, at_zero in (
            (self.posterior_mean_coef1, 1.0),
            (self.posterior_mean_coef2, 0.0),
            (self.posterior_variance, 0.0),
        ):
            table[0] = at_zero  # 0/0 above; clean data stay as they are
        # abar_0 = 1: the last step returns x_0 itself
        self.posterior_mean_coef1[1], self.posterior_mean_coef2[1], self.posterior_variance[1] = 1.0, 0.0, 0.0
        self.snr = self.alphas_cumprod / rest
        self.timesteps = torch.arange(self.T + 1) if timesteps is None else timesteps

    @classmethod
    def from_betas(cls, betas) -> Schedule:
        """From beta_1 … beta_T, each in (0, 1): a tensor, an array or a list."""
        return cls(torch.as_tensor(betas, dtype=torch.float64))

    @classmethod
    def linear(cls, T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
        """beta_t evenly spaced from beta_1 to beta_T (Ho et al. 2020, §4)."""
        return cls(torch.linspace(beta_1, beta_T, _steps(T), dtype=torch.float64))

    @classmethod
    def linear_scaled(cls, T: int) -> Schedule:
        """The linear schedule of 1000 steps with its betas times 1000/T, so that few steps reach the prior too."""
        return cls.linear(_steps(T), 0.1 / T, min(20.0 / T, 0.999))

    @classmethod
    def quadratic(cls, T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
        """sqrt(beta_t) evenly spaced from sqrt(beta_1) to sqrt(beta_T)."""
        return cls(torch.linspace(math.sqrt(beta_1), math.sqrt(beta_T), _steps(T), dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, T: int, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """abar_t proportional to cos^2((t/T + s)/(1 + s) · pi/2), betas at most max_beta.

        Source: Nichol and Dhariwal 2021, Eq. 17.
        """
        u = torch.arange(_steps(T) + 1, dtype=torch.float64, device="cpu") / T
        abar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp_max(max_beta))

    @classmethod
    def vp(cls, T: int, beta_min: float = 0.1, beta_max: float = 20.0, eps: float = 1e-3) -> Schedule:
        """The variance-preserving SDE sampled at T + 1 times from eps to 1.

        Source: Denoising Diffusion GAN, Xiao et al. 2022.
        """
        s = eps + (1 - eps) * torch.arange(_steps(T) + 1, dtype=torch.float64, device="cpu") / T
        log_abar = -0.5 * (beta_max - beta_min) * s**2 - beta_min * s
        betas = -torch.expm1(log_abar[1:] - log_abar[:-1])
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"beta_min and beta_max must lead to betas in (0, 1); got {beta_min:g} and {beta_max:g}, which lead to "
                f"{betas.min():.6g}..{betas.max():.6g} with T = {T}"
            )
        return cls(betas)

    def respace(self, steps: int) -> Schedule:
        """A schedule of fewer steps through the same noise levels: beta' = 1 - abar_{t_i} / abar_{t_{i-1}}.

        The kept t_i are round(i T / steps), i = 0..steps; `timesteps` holds what they were called originally.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.T:
            raise ValueError(f"steps must be an int in 1..{self.T}, got {steps!r}")
        if steps not in self._respaced:  # made once, as its rows then are
            kept = torch.tensor([(2 * i * self.T + steps) // (2 * steps) for i in range(steps + 1)])
            abar = self.alphas_cumprod[kept]
            self._respaced[steps] = Schedule(1 - abar[1:] / abar[:-1], self.timesteps[kept])
        return self._respaced[steps]

    @property
    def prior_mismatch(self) -> float:
        """sqrt(abar_T): how much of the data's amplitude is left where sampling starts from pure noise. 0 is exact."""
        return math.sqrt(float(self.alphas_cumprod[-1]))

    def on(self, device: torch.device) -> torch.Tensor:
        """alphas_cumprod in float64 on a device."""
        return self.rows("abar", torch.empty(0, dtype=torch.float64, device=device), lambda s: s.alphas_cumprod)

    def __repr__(self) -> str:
        betas = f"{self.betas[1]:.3g}..{self.betas[-1]:.3g}"
        return f"Schedule(T={self.T}, betas={betas}, abar_T={self.alphas_cumprod[-1]:.3g})"


def _steps(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T must be an int >= 1, got {T!r}")
    return T
