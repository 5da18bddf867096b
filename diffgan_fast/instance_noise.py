"""Adaptive instance noise (Diffusion-GAN): what a critic sees, real or fake, is noised as much as it needs.

    y = sqrt(abar_t) x + sqrt(1 - abar_t) sigma eps,   t drawn from a list of 64 noise levels, 0 (clean) among them

Source: Wang et al. 2023, "Diffusion-GAN: Training GANs with Diffusion", Eqs. 2, 5 and 6 and Algorithm 1. The largest
level T grows while the critic is too sure of real samples, and shrinks otherwise. The paper and its code differ in
several numbers: `variant="as-coded"` takes the code's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import distributed, nn

from diffgan_fast import random
from diffgan_fast.ops import affine_noise, support
from diffgan_fast.schedule import RowCache

Preset = Literal["pixel-uniform", "pixel-priority", "feature"]
Mixing = Literal["uniform", "priority"]
Variant = Literal["paper", "as-coded"]
Rebuilt = Literal["rebuild", "fixed"]

SLOTS = 64  # entries of the list that t is drawn from
NOISED = 32  # of them above 0
EVERY = 4  # minibatches between changes of T
# Table 5 of the paper
PRESETS: dict[str, dict[str, Any]] = {
    "pixel-uniform": dict(T_min=5, T_max=500, mixing="uniform", beta_T=0.02, sigma=0.05),
    "pixel-priority": dict(T_min=5, T_max=1000, mixing="priority", beta_T=0.02, sigma=0.05),
    "feature": dict(T_min=5, T_max=500, mixing="uniform", beta_T=0.01, sigma=0.5),
}
# What the published code has in their place
AS_CODED: dict[str, dict[str, Any]] = {
    "pixel-uniform": dict(T_min=10, T_max=1000),
    "pixel-priority": dict(T_min=10, T_max=1000),
    "feature": dict(mixing="priority"),
}
SLOT, LEVEL = 1, 2  # streams of a key: which slot a sample takes, and what the slots hold (0 is the noise)


class _Tables(RowCache):
    """Rows (sqrt(abar_t), sqrt(1 - abar_t)) of linear betas: those of every T below each other, or of T_max alone.

    Row T(T + 1)/2 + t is step t of the schedule with T steps. Where the schedule is fixed, it is row t.
    """

    def __init__(self, T_max: int, beta_1: float, beta_T: float, rebuilt: bool):
        super().__init__()
        self.T_max, self.betas, self.rebuilt = T_max, (beta_1, beta_T), rebuilt

    def on(self, like: torch.Tensor) -> torch.Tensor:
        """The rows in the type that an op on `like` wants, on its device."""
        return self.rows("levels", like, _Tables._build)

    def _build(self) -> torch.Tensor:
        T = torch.arange(self.T_max + 1, dtype=torch.float64, device="cpu")[:, None]
        first, last = self.betas
        # a line a T, exact up to its step T; what lies behind is left out below
        betas = first + (last - first) * T[:-1, 0] / (T - 1).clamp_min(1)
        abar = torch.cat((torch.ones_like(T), (1 - betas).cumprod(1)), 1)
        if self.rebuilt:
            abar = abar[tuple(torch.tril_indices(*abar.shape, device="cpu"))]
        else:
            abar = abar[-1]
        return torch.stack((abar.sqrt(), (1 - abar).sqrt()), 1)


class AdaptiveDiffusion(nn.Module):
    """Diffusion-GAN's noise, for anybody's GAN: call it on all that the critic sees, then tell it how the critic does.

        y, t = diffusion(x)                     # real or fake: the critic judges y; gradients flow through to x
        diffusion.update(logits_of_real_y)      # once a minibatch

    Args:
        preset: the paper's settings for images in [-1, 1] ("pixel-uniform", its advice for new data, or
            "pixel-priority") or for feature vectors and maps ("feature").
        variant: "paper", or "as-coded": T from 10 to 1000 for pixels, weights t - 1 for t under priority mixing; for
            features priority mixing, a t for each channel, and a share of noised slots that grows with p up to 3/4.
        T_min, T_max: ints, the bounds of T; T_min is at least 1 (2 as coded). Equal ones keep T fixed.
        mixing: p(t) over 1..T, "uniform" or "priority" (proportional to t); half of the slots are 0 beside.
        sigma: standard deviation of the noise at its largest, in units of x; finite, at least 0.
        beta_1, beta_T: first and last beta, in (0, 1).
        schedule: "rebuild", as in the published results: T steps lead from beta_1 to beta_T whatever T is, so that the
            same t is another noise at another T. "fixed", as the paper's equations say: the first T of T_max steps.
        per_channel: draw a t for each channel (by default as the variant has it).
        d_target: r_d above which T grows, in [-1, 1], r_d being the mean sign of the critic's outputs of real samples.
        threshold: what the outputs are compared with: 0 for logits (hinge too), 0.5 for probabilities and for least
            squares towards 1 and 0.
        ada_kimg: thousands of real samples in which p can go from 0 to 1; finite, above 0.
        seed: of the draws that get no key.

    Attributes:
        p: float64 scalar in [0, 1] on the device (float32 where there is no float64), how far T is between its bounds.
            Casting a model leaves it as it is.
        T: int64 scalar on the device, T_min + round(p (T_max - T_min)).

    All that changes, the seed and the counters included, is in `state_dict`: a loop that stores it goes on bit for bit.
    Loading a state whose T is not in T_min..T_max is a ValueError. Nothing waits for the device. A CUDA graph may hold
    calls, but not `update`.

    Raises: ValueError for an argument that is not what it may be.
    """

    p: torch.Tensor
    T: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    signs: torch.Tensor
    seed_key: torch.Tensor
    calls: torch.Tensor

    def __init__(
        self,
        preset: Preset = "pixel-uniform",
        *,
        variant: Variant = "paper",
        T_min: int | None = None,
        T_max: int | None = None,
        mixing: Mixing | None = None,
        sigma: float | None = None,
        beta_1: float = 1e-4,
        beta_T: float | None = None,
        schedule: Rebuilt = "rebuild",
        per_channel: bool | None = None,
        d_target: float = 0.6,
        threshold: float = 0.0,
        ada_kimg: float = 100.0,
        seed: int = 0,
    ):
        super().__init__()
        _check_word("preset", preset, Preset)
        _check_word("variant", variant, Variant)
        chosen = PRESETS[preset] | (AS_CODED[preset] if variant == "as-coded" else {})
        own = dict(T_min=T_min, T_max=T_max, mixing=mixing, beta_T=beta_T, sigma=sigma)
        chosen = chosen | {name: value for name, value in own.items() if value is not None}
        self.T_min, self.T_max, self.mixing = chosen["T_min"], chosen["T_max"], chosen["mixing"]
        self.sigma, self.d_target, self.threshold, self.ada_kimg = chosen["sigma"], d_target, threshold, ada_kimg
        self.shift = int(variant == "as-coded")  # under priority mixing, the weight of t is t - shift
        coded_features = self.shift == 1 and preset == "feature"
        self.per_channel = coded_features if per_channel is None else per_channel
        self.growing = coded_features  # whether the share of noised slots follows p
        _check_word("mixing", self.mixing, Mixing)
        _check_word("schedule", schedule, Rebuilt)
        self._check_numbers(beta_1, chosen["beta_T"])
        self._tables = _Tables(self.T_max, beta_1, chosen["beta_T"], schedule == "rebuild")
        self._since = [0, 0, 0]  # minibatches, outputs and samples since the last change, on the host
        # Lists drawn without a key. Processes share them, but may differ in their calls: two counters.
        self._lists = 0
        state = {
            "p": torch.zeros((), dtype=torch.float64, device="cpu"),
            "T": torch.zeros((), dtype=torch.int64, device="cpu"),
            "slots": torch.zeros(SLOTS, dtype=torch.int64, device="cpu"),
            "offset": torch.zeros((), dtype=torch.int64, device="cpu"),  # of the rows of T in the tables
            "signs": torch.zeros((), dtype=torch.float64, device="cpu"),  # since the last change
            # without a key, a call has `seed_key + calls` and a list `seed_key + _lists`, far from every folded one
            "seed_key": torch.tensor(random.fold_in(random.key(seed), "instance noise") >> 1, device="cpu"),
            "calls": torch.zeros((), dtype=torch.int64, device="cpu"),
        }
        for name, buffer in state.items():
            self.register_buffer(name, buffer)
        self._spread_levels(None)

    def _check_numbers(self, beta_1: float, beta_T: float) -> None:
        for name in ("T_min", "T_max"):
            T = getattr(self, name)
            if isinstance(T, bool) or not isinstance(T, int):
                raise ValueError(f"{name} must be an int, got {T!r}")
        least = 1 + (self.shift if self.mixing == "priority" else 0)  # else no t has a weight
        if not least <= self.T_min <= self.T_max:
            raise ValueError(f"T_min must be in {least}..T_max = {self.T_max}, got {self.T_min}")
        for name, beta in (("beta_1", beta_1), ("beta_T", beta_T)):
            _check_number(name, beta, "in (0, 1)", lambda beta: 0 < beta < 1)
        _check_number("sigma", self.sigma, "finite and at least 0", lambda sigma: sigma >= 0)
        _check_number("d_target", self.d_target, "in [-1, 1]", lambda target: -1 <= target <= 1)
        _check_number("threshold", self.threshold, "finite")
        _check_number("ada_kimg", self.ada_kimg, "finite and above 0", lambda kimg: kimg > 0)

    def forward(
        self,
        x: torch.Tensor,
        t: int | torch.Tensor | None = None,
        key: int | torch.Tensor | None = None,
        *,
        first_sample: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, t): x with noise of level t.

        Args:
            x: [N, …] of any shape ([N, C, …] where each channel has its t), on the module's device: float32, float64,
                float16 or bfloat16.
            t: an int, or int64 [N] or [N, C], in 0..T; by default drawn. At 0 a sample comes back bit for bit. Pass the
                t of the real samples with the fake ones to pair them, as Algorithm 1 does.
            key: of the draws; by default each call has its own, in each process of `torch.distributed`.
            first_sample: number of the first sample, where several calls share a key: parts of a batch then get what
                the whole batch gets in one call.

        Gradients: with respect to x, every order, forward mode too.
        Raises: ValueError for arguments of the wrong shape, type, device or range. On CUDA a t out of range gives NaN.
        """
        x = support.dense(x, "x")
        support.first_element(first_sample, x)  # for its error, before anything is drawn
        if key is None:
            key = self._next_key()
        if t is None:
            if self.per_channel and x.dim() < 2:
                raise ValueError(f"x must be [N, C, …], since each channel has its own t; got {list(x.shape)}")
            shape = x.shape[:2] if self.per_channel else x.shape[:1]
            first = first_sample * (x.shape[1] if self.per_channel else 1)
            slot = random.randint(SLOTS, shape, key, stream=SLOT, first=first, device=x.device)
            t = self.slots[slot]
            row = t + self.offset
        else:
            if not isinstance(t, torch.Tensor):
                if isinstance(t, bool) or not isinstance(t, int):
                    raise ValueError(f"t must be an int or an int64 tensor, got {t!r}")
                t = torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)
            row = self._row(t)
        if t.dim() == 2 and x.dim() == 2:  # a t for each number
            return self.forward(x.unsqueeze(2), t, key, first_sample=first_sample)[0].squeeze(2), t
        rows = self._tables.on(x)
        return affine_noise(x, rows, row, key, sigma=self.sigma, first_sample=first_sample), t

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """sqrt(1 - abar_t) of the present schedule, in [0, 1): what a critic should be told of t [N] or [N, C].

        Raises: ValueError for a t that is no int64 tensor, or out of range; on CUDA that gives NaN.
        """
        if not isinstance(t, torch.Tensor) or t.dtype != torch.int64:
            got = t.dtype if isinstance(t, torch.Tensor) else repr(t)
            raise ValueError(f"t must be an int64 tensor, got {got}")
        rows = self._tables.on(torch.empty(0, device=t.device))
        row = self._row(t)
        return (rows[row] if row.is_cpu else support.take(rows, row).view(*t.shape, 2))[..., 1]

    @torch.no_grad()
    def update(self, logits_real: torch.Tensor, key: int | torch.Tensor | None = None) -> None:
        """Takes note of the critic's outputs of a minibatch's noised real samples; every fourth call T may change.

        p moves by C towards more noise if r_d > d_target and towards less if it is below, with C the share that the
        real samples since the last change have in ada_kimg thousand; both are taken over all processes of
        `torch.distributed`, if it runs.

        Args:
            logits_real: [N, …], several outputs a sample if it has them.
            key: of the new list of levels; by default each change has its own, the same in all processes.

        Raises: ValueError for other outputs, or in a CUDA graph.
        """
        if not isinstance(logits_real, torch.Tensor) or logits_real.dim() == 0:
            got = "a scalar" if isinstance(logits_real, torch.Tensor) else type(logits_real).__name__
            raise ValueError(f"logits_real must be a tensor [N, …], outputs of N samples; got {got}")
        if logits_real.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("update must stay outside of a CUDA graph: a replay could not count its minibatches")
        self.signs += (logits_real - self.threshold).sign().sum(dtype=self.signs.dtype)
        found = (1, logits_real.numel(), len(logits_real))
        self._since = [a + b for a, b in zip(self._since, found, strict=True)]
        minibatches, outputs, samples = self._since
        if minibatches < EVERY:
            return
        totals = torch.stack((self.signs, *(torch.full_like(self.signs, n) for n in (outputs, samples))))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        step = totals[2] / (1000 * self.ada_kimg)
        self.p.add_((totals[0] / totals[1] - self.d_target).sign() * step).clamp_(0, 1)
        self.signs.zero_()
        self._since = [0, 0, 0]
        self._spread_levels(key)

    def _spread_levels(self, key: int | torch.Tensor | None) -> None:
        """T from p, and a new list of levels."""
        if key is None:
            key = self.seed_key + self._lists
            self._lists += 1
        self.T.copy_(self.T_min + (self.p * (self.T_max - self.T_min)).round())
        self._place_rows()
        words = random.bits(SLOTS, key, stream=LEVEL, device=self.T.device)
        if self.mixing == "uniform":
            t = 1 + (words * self.T >> 32)
        else:
            # weight w has the numbers w(w - 1)/2 … w(w + 1)/2 - 1
            heaviest = self.T - self.shift
            number = words * (heaviest * (heaviest + 1) // 2) >> 32
            t = 1 + ((8 * number.to(self.p.dtype) + 1).sqrt() - 1).div(2).long() + self.shift
        noised = (SLOTS * self.p).round().clamp_max(3 * SLOTS // 4) if self.growing else NOISED
        slot = torch.arange(SLOTS, device=t.device)
        self.slots.copy_(torch.where(slot < noised, t, 0))

    def _place_rows(self) -> None:
        """Where the rows of T begin in the tables."""
        if self._tables.rebuilt:
            self.offset.copy_(self.T * (self.T + 1) // 2)
        else:
            self.offset.zero_()

    def _row(self, t: torch.Tensor) -> torch.Tensor:
        """The rows of steps t in the tables; none where t is out of range."""
        if t.device.type == "cpu":
            support.check_range(t, 0, self.T)
            return t + self.offset
        return torch.where((t < 0) | (t > self.T), -1, t + self.offset)

    def _next_key(self) -> torch.Tensor:
        """The key of a call without one. Processes have the same seed and counter, and draws of their own."""
        key = self.seed_key + self.calls
        self.calls += 1
        if distributed.is_available() and distributed.is_initialized() and (rank := distributed.get_rank()):
            key = random.fold_in(key, "rank", rank)
        return key

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AdaptiveDiffusion:
        """As of every module, but that a cast leaves the state as it is: in bfloat16 p would stick at 1/4."""

        def placed(state: torch.Tensor) -> torch.Tensor:
            found = fn(state)
            return found if found.dtype == state.dtype else state.to(found.device)

        def kept(state: torch.Tensor) -> torch.Tensor:
            try:
                return placed(state)
            except TypeError:  # a device without float64; float32 holds the signs exactly, and p to 6e-8
                return placed(state.float())

        return super()._apply(kept, recurse)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([*self._since, self._lists], device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        *self._since, self._lists = (*state.tolist(), 0)[:4]  # older states did not count lists

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        T = state_dict.get(f"{prefix}T")
        if T is not None and not self.T_min <= int(T) <= self.T_max:
            bounds = f"T_min..T_max = {self.T_min}..{self.T_max}"
            raise ValueError(f"T must be in {bounds}; the state has {int(T)}, of a module with other bounds")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.offset is state_dict.get(f"{prefix}offset"):  # of assign=True: the caller's own
            self.offset = self.offset.clone()
        self._place_rows()  # the state's are those of its own schedule, which may be of the other kind

    def extra_repr(self) -> str:
        first, last = self._tables.betas
        return (
            f"T={self.T_min}..{self.T_max}, {self.mixing}, sigma={self.sigma}, betas={first}..{last}, "
            f"{'rebuilt' if self._tables.rebuilt else 'fixed'}, d_target={self.d_target}, ada_kimg={self.ada_kimg}"
        )


def _check_word(name: str, value: str, known: Any) -> None:
    if value not in get_args(known):
        raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")


def _check_number(name: str, value: Any, what: str, fits: Callable[[float], bool] = lambda value: True) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise ValueError(f"{name} must be {what}, got {value!r}")
