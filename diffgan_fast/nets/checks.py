"""What every network checks of its arguments."""

from collections.abc import Collection, Mapping

from torch import Tensor


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raises ValueError for the first of `arguments` that is below `minimum`."""
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def check_images(x: Tensor, channels: int, size: int, name: str = "x") -> None:
    """Raises ValueError unless `x` is [N, channels, size, size]."""
    if x.shape[1:] != (channels, size, size):
        raise ValueError(f"{name} is {list(x.shape)}; it must be [N, {channels}, {size}, {size}]")


def check_latents(z: Tensor, z_dim: int) -> None:
    """Raises ValueError unless `z` is [N, z_dim]."""
    if z.shape[1:] != (z_dim,):
        raise ValueError(f"z is {list(z.shape)}; it must be [N, {z_dim}]")


def check_labels(y: Tensor | None, num_classes: int) -> None:
    """Raises ValueError if labels are given to a network without classes."""
    if y is not None and not num_classes:
        raise ValueError("y is given, but num_classes is 0; y must be None for a network without labels")


def preset_for(size: int, preset: str | None, presets: Collection[str], by_size: Mapping[int, str]) -> str:
    """`preset` if there is one of this name, the one made for `size` if it is None; else raises ValueError."""
    if preset is None:
        if size not in by_size:
            raise ValueError(f"size is {size}; give a preset ({', '.join(presets)}) for any but {[*by_size]} pixels")
        return by_size[size]
    if preset not in presets:
        raise ValueError(f"preset is {preset!r}; it may be {', '.join(presets)}, or None for the one made for the size")
    return preset


def resolutions(size: int) -> list[int]:
    """From the smallest image that doubling leads to `size` from, of 4 pixels or an odd number, up to `size`.

    Raises ValueError if there is no such image of less than 16 pixels, or size is below 8.
    """
    found = [size]
    while found[0] > 4 and found[0] % 2 == 0:
        found.insert(0, found[0] // 2)
    if size < 8 or len(found) == 1 or found[0] > 15:
        raise ValueError(f"size is {size}; it must be 4 or an odd number below 16, times a power of 2, at least 8")
    return found
