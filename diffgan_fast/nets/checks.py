"""What every network checks of its arguments."""

from torch import Tensor


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raises ValueError for the first of `arguments` that is below `minimum`."""
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def check_images(x: Tensor, channels: int, size: int) -> None:
    """Raises ValueError unless `x` is [N, channels, size, size]."""
    if x.shape[1:] != (channels, size, size):
        raise ValueError(f"x is {list(x.shape)}; it must be [N, {channels}, {size}, {size}]")


def check_latents(z: Tensor, z_dim: int) -> None:
    """Raises ValueError unless `z` is [N, z_dim]."""
    if z.shape[1:] != (z_dim,):
        raise ValueError(f"z is {list(z.shape)}; it must be [N, {z_dim}]")


def check_labels(y: Tensor | None, num_classes: int) -> None:
    """Raises ValueError if labels are given to a network without classes."""
    if y is not None and not num_classes:
        raise ValueError("y is given, but num_classes is 0; y must be None for a network without labels")
