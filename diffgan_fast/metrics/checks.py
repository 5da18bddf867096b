"""What every metric asks of its features: float64, two axes, finite."""

import numpy as np
import torch
from torch import Tensor


class NotFinite(ValueError):
    """Samples that hold NaN or infinity."""


def float64(values) -> Tensor:
    """A tensor on its own device, or an array, as float64 without gradients."""
    if isinstance(values, Tensor):
        return values.detach().double()
    return torch.from_numpy(np.ascontiguousarray(values, np.float64))


def checked(values, name: str, least: int = 2) -> Tensor:
    """A tensor or array as float64 ``[n, d]`` with n at least `least`. ValueError if it is not, or not finite."""
    values = float64(values)
    if values.ndim != 2 or len(values) < least or values.shape[1] == 0:
        raise ValueError(f"{name} must be [n, d] with n >= {least} and d >= 1, not {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite; it holds NaN or infinity")
    return values


def checked_pair(real, fake) -> tuple[Tensor, Tensor]:
    """Two sets of rows as float64 ``[n, d]`` and ``[m, d]`` on real's device, n and m at least 2. Else ValueError."""
    real, fake = checked(real, "real"), checked(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake must have {real.shape[1]} features as real has, not {fake.shape[1]}")
    return real, fake.to(real.device)
