"""Networks of other libraries as our denoisers."""

from typing import Any

from torch import Tensor, nn


class DiffusersDenoiser(nn.Module):
    """A diffusers `UNet2DModel` as a denoiser `model(x, t, y=None) -> ε̂`; built by `from_diffusers`."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """ε̂ for noisy images.

        Args:
            x: [N, C, H, W].
            t: [N] int64, 1 … T; diffusers counts from 0 and receives t - 1.
            y: [N] int64 class labels, where the network has them.

        Returns:
            [N, C, H, W].

        Raises:
            ValueError: `y` is given to a network without labels, or missing for one with them.
        """
        return self.unet(x, t - 1, class_labels=y).sample


def from_diffusers(unet: nn.Module) -> DiffusersDenoiser:
    """Makes a diffusers `UNet2DModel` a denoiser. It shares the network's parameters, which stay trainable.

    Args:
        unet: what `UNet2DModel(...)` or `UNet2DModel.from_pretrained(...)` returns.

    Returns:
        A module called as `model(x, t, y=None)` with our t in 1 … T.

    Raises:
        ValueError: `unet` is not such a network, or has more outputs than inputs (a learned variance).
    """
    config: Any = getattr(unet, "config", None)
    if not isinstance(unet, nn.Module) or not hasattr(config, "in_channels"):
        raise ValueError(f"unet is a {type(unet).__name__}; it must be a diffusers UNet2DModel")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"unet has {config.in_channels} input and {config.out_channels} output channels; "
            "they must be equal (a denoiser predicts the noise alone)"
        )
    return DiffusersDenoiser(unet)
