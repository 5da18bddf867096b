"""Networks of other libraries as our denoisers."""

import json
from os import PathLike
from pathlib import Path
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


def from_diffusers(unet: nn.Module | str | PathLike[str]) -> DiffusersDenoiser:
    """Makes a diffusers `UNet2DModel` a denoiser. It shares the network's parameters, which stay trainable.

    Args:
        unet: what `UNet2DModel(...)` or `UNet2DModel.from_pretrained(...)` returns, or the local folder that its
            `save_pretrained` wrote (of a pipeline's folder, the subfolder `unet`). Nothing is downloaded.

    Returns:
        A module called as `model(x, t, y=None)` with our t in 1 … T.

    Raises:
        ValueError: `unet` is not such a network or such a folder, its folder lacks a weight, or it has more outputs
            than inputs (a learned variance).
        ImportError: `unet` is a folder, and diffusers is not installed.
    """
    if isinstance(unet, str | PathLike):
        unet = _read_folder(Path(unet))
    config: Any = getattr(unet, "config", None)
    if not isinstance(unet, nn.Module) or not hasattr(config, "in_channels"):
        raise ValueError(f"unet is a {type(unet).__name__}; it must be a diffusers UNet2DModel")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"unet has {config.in_channels} input and {config.out_channels} output channels; "
            "they must be equal (a denoiser predicts the noise alone)"
        )
    return DiffusersDenoiser(unet)


def _read_folder(folder: Path) -> nn.Module:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "reading a diffusers folder needs diffusers: pip install 'diffgan-fast[diffusers]'"
        ) from error
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"unet {folder} is no folder of a diffusers model (there is no config.json)")
    kind = json.loads(config.read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"unet {folder} holds a {kind}; it must be a diffusers UNet2DModel")
    try:
        unet, loaded = UNet2DModel.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"unet {folder} cannot be read: {error}") from error
    if loaded["missing_keys"] or loaded["unexpected_keys"]:  # diffusers would go on with random weights
        raise ValueError(
            f"unet {folder} has weights that do not fit its config.json: "
            f"{len(loaded['missing_keys'])} are missing, {len(loaded['unexpected_keys'])} unexpected"
        )
    return unet
