"""The U-Net of DDPM (Ho et al. 2020, App. B), with optional class labels."""

from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_at_least, check_images, check_labels
from .conv import Conv2d
from .embedding import sinusoidal
from .norm import GroupNormSiLU, group_norm

Layer = TypeVar("Layer", bound=nn.Module)

PRESETS = {
    8: dict(width=32, multipliers=(1, 2), blocks=1, attention=(4,)),
    28: dict(width=64, multipliers=(1, 2, 2), blocks=2, attention=(14,)),
    32: dict(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1),
}


def zeroed(layer: Layer) -> Layer:
    """`layer` with its weight and bias set to zero, so that the branch it ends starts as no change."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """x + f(x, emb), f: norm, SiLU, conv, + emb, norm, SiLU, dropout, conv. A 1x1 conv fits x if needed."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels)
        self.norm2 = GroupNormSiLU(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x)), self.emb(emb))
        return self.skip(x) + self.conv2(self.dropout(h))


class SelfAttention(nn.Module):
    """x + single-head attention among the pixels of group-normed x, [N, C, H, W] -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [N, H·W, C]
        q, k, v = self.qkv(pixels)[:, None].chunk(3, dim=-1)  # each [N, 1 head, H·W, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(attended).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """A residual block, followed by self-attention if `attend`."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, dropout: float, attend: bool):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, emb_dim, dropout)
        self.attention = SelfAttention(out_channels) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.residual(x, emb))


class DownLevel(nn.Module):
    """The blocks of one resolution, then a strided conv that halves it. Every output joins `skips`."""

    def __init__(self, blocks: list[Block], channels: int, shrink: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shrink = Conv2d(channels, channels, 3, stride=2, padding=1) if shrink else None

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
            skips.append(x)
        if self.shrink is not None:
            x = self.shrink(x)
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """The blocks of one resolution, each taking the last of `skips` as further channels, then a doubling."""

    def __init__(self, blocks: list[Block], channels: int, grow: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grow: nn.Module = nn.Identity()
        if grow:
            conv = Conv2d(channels, channels, 3, padding=1)
            self.grow = nn.Sequential(nn.Upsample(scale_factor=2), conv)

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.grow(x)


class UNet(nn.Module):
    """The DDPM U-Net, a denoiser `model(x, t, y=None) -> ε̂`. At initialisation ε̂ is exactly zero.

    Level i works at resolution size / 2^i with width · multipliers[i] channels. On the way down it has
    `blocks` residual blocks and a strided conv, on the way up `blocks + 1` and a nearest-neighbour doubling
    with a conv. The middle (block, attention, block) always attends, as in DDPM. The sinusoidal embedding
    of t goes through a two-layer MLP, a learned embedding of the label is added, and every block receives
    the sum.

    Args:
        channels: of the images.
        size: height and width in pixels, a multiple of 2^(len(multipliers) - 1).
        width: channels at full resolution, at least 4 and even.
        multipliers: of `width`, one per level.
        blocks: residual blocks per level.
        attention: the resolutions at which every block is followed by self-attention.
        num_classes: 0 for a network without labels.
        dropout: before the last conv of each residual block.

    Raises:
        ValueError: an argument is out of its range.

    Source: Ho, Jain and Abbeel 2020, §4 and App. B; classifier-free labels: Ho and Salimans 2022, §3.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        num_classes: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        resolutions = level_resolutions(size, width, multipliers, blocks, attention)
        check_at_least(1, channels=channels)
        check_at_least(0, num_classes=num_classes)
        self.channels, self.size, self.num_classes, self.width = channels, size, num_classes, width
        emb_dim = 4 * width
        block = partial(Block, emb_dim=emb_dim, dropout=dropout)
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None
        self.stem = Conv2d(channels, width, 3, padding=1)

        here, skips, last = width, [width], len(multipliers) - 1
        self.down = nn.ModuleList()
        for level, (multiplier, resolution) in enumerate(zip(multipliers, resolutions, strict=True)):
            stack = []
            for _ in range(blocks):
                stack.append(block(here, width * multiplier, attend=resolution in attention))
                here = width * multiplier
                skips.append(here)
            self.down.append(DownLevel(stack, here, shrink=level < last))
            if level < last:
                skips.append(here)

        self.middle = nn.ModuleList([block(here, here, attend=True), block(here, here, attend=False)])

        self.up = nn.ModuleList()
        for multiplier, resolution in zip(reversed(multipliers), reversed(resolutions), strict=True):
            stack = []
            for _ in range(blocks + 1):
                stack.append(block(here + skips.pop(), width * multiplier, attend=resolution in attention))
                here = width * multiplier
            self.up.append(UpLevel(stack, here, grow=resolution < size))

        out = zeroed(Conv2d(here, channels, 3, padding=1))
        self.head = nn.Sequential(GroupNormSiLU(here), out)

    @classmethod
    def preset(cls, size: int, channels: int, **changes) -> "UNet":
        """A U-Net of a known good shape for images of `size` pixels.

        8 is small and quick on a CPU, 28 suits MNIST, 32 is DDPM's CIFAR-10 network. `changes` overrides any
        keyword of the constructor: `UNet.preset(28, 1, num_classes=10)`.

        Raises:
            ValueError: there is no preset for `size`.
        """
        if size not in PRESETS:
            raise ValueError(f"size is {size}; there are presets for {', '.join(map(str, PRESETS))} pixels")
        return cls(channels, size, **{**PRESETS[size], **changes})

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """ε̂ for noisy images.

        Args:
            x: [N, channels, size, size].
            t: [N] int64, 1 … T.
            y: [N] int64, 0 … num_classes; num_classes, or no `y` at all, means "no label".

        Returns:
            [N, channels, size, size].

        Raises:
            ValueError: `x` has another shape, or `y` is given to a network without labels.
        """
        check_images(x, self.channels, self.size)
        check_labels(y, self.num_classes)
        emb = F.silu(self._embed(t, y, x.dtype))
        x = self.stem(x)
        skips = [x]
        for level in self.down:
            x = level(x, emb, skips)
        for block in self.middle:
            x = block(x, emb)
        for level in self.up:
            x = level(x, emb, skips)
        return self.head(x)

    def _embed(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        emb = self.time(sinusoidal(t, self.width, dtype))
        if self.label is None:
            return emb
        return emb + self.label(torch.full_like(t, self.num_classes) if y is None else y)


def level_resolutions(size: int, width: int, multipliers: tuple, blocks: int, attention: tuple) -> list[int]:
    """The resolution of each level of a U-Net, once these arguments are known to fit together."""
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers is {multipliers}; it must hold one positive integer per level")
    step = 2 ** (len(multipliers) - 1)
    if size < step or size % step:
        raise ValueError(f"size is {size}; {len(multipliers)} levels need a positive multiple of {step}")
    if width < 4 or width % 2:
        raise ValueError(f"width is {width}; it must be even and at least 4")
    check_at_least(1, blocks=blocks)
    resolutions = [size >> level for level in range(len(multipliers))]
    if not set(attention) <= set(resolutions):
        raise ValueError(f"attention is {attention}; the levels work at {resolutions} pixels")
    return resolutions
