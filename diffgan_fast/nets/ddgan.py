"""The generator of Denoising Diffusion GANs (Xiao et al. 2022): an NCSN++ U-Net whose norms a latent drives."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffgan_fast.ops.norm import group_norm_silu

from .checks import check_at_least, check_images, check_latents, preset_for
from .conv import Conv2d
from .embedding import sinusoidal
from .fir import fir_blur, fir_down, fir_up
from .norm import EPS, GroupNormSiLU, groups_of
from .scaled import SQRT_HALF, variance_scaled
from .unet import SelfAttention, level_resolutions


@dataclass(frozen=True)
class Shape:
    """Level i of the U-Net works at size / 2^i pixels with width · multipliers[i] channels.

    Attributes:
        width: channels at full resolution, at least 4 and even.
        multipliers: of `width`, one per level.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: the resolutions with self-attention.
        latent: length of the mapped latent.
        mapping: further layers of the mapping network after the first.
        dropout: before the last conv of each residual block.
    """

    width: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    blocks: int = 2
    latent: int = 256
    mapping: int = 3
    dropout: float = 0.0


PRESETS = {
    "8": Shape(width=32, multipliers=(1, 2), attention=(4,), blocks=1, latent=64, mapping=2),
    "28": Shape(width=32, multipliers=(1, 2, 2), attention=(7,), blocks=1, latent=128),
    "cifar10": Shape(width=128, multipliers=(1, 2, 2, 2), attention=(16,), mapping=4),
    "256": Shape(width=64, multipliers=(1, 1, 2, 2, 4, 4), attention=(16,)),
}
BY_SIZE = {8: "8", 28: "28", 32: "cifar10", 256: "256"}


def fitting(size: int) -> list[str]:
    """The presets whose levels fit images of `size` pixels."""
    found = []
    for name, shape in PRESETS.items():
        with suppress(ValueError):
            level_resolutions(size, shape.width, shape.multipliers, shape.blocks, shape.attention)
            found.append(name)
    return found


class AdaptiveGroupNormSiLU(nn.Module):
    """SiLU(γ(w) · GroupNorm(x + shift) + β(w)): the mapped latent w scales and shifts each channel.

    At first γ(0) = 1, β(0) = 0.
    """

    def __init__(self, channels: int, latent: int):
        super().__init__()
        self.groups = groups_of(channels)
        self.style = variance_scaled(nn.Linear(latent, 2 * channels), fan="out")
        nn.init.ones_(self.style.bias[:channels])

    def forward(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        gamma, beta = self.style(w).chunk(2, dim=1)
        return group_norm_silu(x, gamma, beta, shift, groups=self.groups, eps=EPS)


class Block(nn.Module):
    """(x + f(x, emb, w)) / √2, f: norm, SiLU, conv, + emb, norm, SiLU, dropout, conv; the norms adaptive.

    `resample` changes the resolution of x, and within f before the first conv. A 1x1 conv fits x if needed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        latent: int,
        dropout: float,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm1 = AdaptiveGroupNormSiLU(in_channels, latent)
        self.conv1 = variance_scaled(Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb = variance_scaled(nn.Linear(emb_dim, out_channels))
        self.norm2 = AdaptiveGroupNormSiLU(out_channels, latent)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = variance_scaled(Conv2d(out_channels, out_channels, 3, padding=1), 0.0)
        same = in_channels == out_channels and resample is None
        self.skip = nn.Identity() if same else variance_scaled(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor, w: Tensor) -> Tensor:
        h = self.norm1(x, w)
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv2(self.dropout(self.norm2(self.conv1(h), w, self.emb(emb))))
        return (self.skip(x) + h) * SQRT_HALF


class Attention(SelfAttention):
    """(x + single-head attention among the pixels of group-normed x) / √2."""

    def __init__(self, channels: int):
        super().__init__(channels)
        variance_scaled(self.qkv, 0.2)  # 0.1 for each of q, k and v: the three as one layer have twice the mean fan
        variance_scaled(self.out, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SQRT_HALF


class DownLevel(nn.Module):
    """The blocks of one resolution, then a block that halves it, joined by the halved pyramid."""

    def __init__(
        self, blocks: list[Block], attentions: list[Attention], shrink: Block | None, reduce: nn.Conv2d | None
    ):
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.shrink, self.reduce = shrink, reduce

    def forward(self, x: Tensor, pyramid: Tensor, emb: Tensor, w: Tensor, skips: list[Tensor]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, emb, w)
            if self.attentions:
                x = self.attentions[i](x)
            skips.append(x)
        if self.shrink is not None:
            assert self.reduce is not None  # the two come together
            x = (self.reduce(fir_blur(pyramid)) + self.shrink(x, emb, w)) * SQRT_HALF
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """The blocks of one resolution, each taking the last of `skips` as further channels, attention, then a doubling."""

    def __init__(self, blocks: list[Block], attention: Attention | None, grow: Block | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention, self.grow = attention, grow

    def forward(self, x: Tensor, emb: Tensor, w: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, w)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.grow is None else self.grow(x, emb, w)


class DDGANGenerator(nn.Module):
    """The generator of a denoising diffusion GAN: `generator(x_t, t, z) -> x̂0` in [-1, 1].

    A U-Net in the manner of NCSN++: BigGAN blocks, resolutions changed with the filter [1, 3, 3, 1], sums of branches
    divided by √2, and an input pyramid: at each halving the input of the level, halved by a conv of its own, is added
    (the image itself at the first). The latent goes through pixel norm and a mapping network; the result scales and
    shifts the channels in every group norm of the blocks. t enters through sines and cosines of t - 1, since its
    authors count from 0. z = 0 for all samples gives the paper's ablation without a latent.

    Parameters: 48,432,515 with "cifar10" (3 channels, 32 px), 39,726,979 with "256"; "8" and "28" are small and train
    on a CPU. At initialisation |x̂0| is below 1e-3: the last conv starts nearly at zero.

    Args:
        channels: of the images.
        size: height and width in pixels, a multiple of 2^(levels - 1).
        preset: "8", "28", "cifar10" or "256"; None takes the one made for `size`. Any works at other sizes that fit.
        T: the number of time steps; an attribute to read, the layers do not depend on it.
        z_dim: length of z.
        bounded: whether a tanh keeps the output in [-1, 1]. False is for x_{t-1}, which is noisy, in place of x̂0.
        changes: replace attributes of the preset's `Shape`: `DDGANGenerator(3, 64, preset="256", T=4, width=32)`.

    Raises:
        ValueError: an argument is out of its range, or there is no preset of this name or for this size.
        TypeError: `changes` names what `Shape` does not have.

    Source: Xiao, Kreis and Vahdat 2022, §4 and App. C, and their code; Song et al. 2021, App. H (NCSN++).
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        T: int,
        preset: str | None = None,
        z_dim: int = 100,
        bounded: bool = True,
        **changes,
    ):
        super().__init__()
        shape = replace(PRESETS[preset_for(size, preset, PRESETS, BY_SIZE)], **changes)
        width, multipliers, attention = shape.width, shape.multipliers, shape.attention
        resolutions = level_resolutions(size, width, multipliers, shape.blocks, attention)
        check_at_least(1, channels=channels, T=T, z_dim=z_dim, latent=shape.latent)
        check_at_least(0, mapping=shape.mapping)
        self.channels, self.size, self.T, self.z_dim, self.width = channels, size, T, z_dim, width
        emb_dim = 4 * width
        block = partial(Block, emb_dim=emb_dim, latent=shape.latent, dropout=shape.dropout)
        self.time = nn.Sequential(
            variance_scaled(nn.Linear(width, emb_dim)), nn.SiLU(), variance_scaled(nn.Linear(emb_dim, emb_dim))
        )
        self.mapping = _mapping(z_dim, shape.latent, shape.mapping)
        self.stem = variance_scaled(Conv2d(channels, width, 3, padding=1))

        here, pyramid, skips = width, channels, [width]
        self.down = nn.ModuleList()
        for multiplier, resolution in zip(multipliers, resolutions, strict=True):
            stack = [block(a, width * multiplier) for a in (here, *[width * multiplier] * (shape.blocks - 1))]
            here = width * multiplier
            attentions = [Attention(here) for _ in stack if resolution in attention]
            skips += [here] * len(stack)
            if resolution == resolutions[-1]:
                self.down.append(DownLevel(stack, attentions, None, None))
            else:
                reduce = variance_scaled(Conv2d(pyramid, here, 3, stride=2))
                self.down.append(DownLevel(stack, attentions, block(here, here, resample=fir_down), reduce))
                skips.append(here)
            pyramid = here

        self.middle = nn.ModuleList([block(here, here), Attention(here), block(here, here)])

        self.up = nn.ModuleList()
        for multiplier, resolution in zip(reversed(multipliers), reversed(resolutions), strict=True):
            stack = []
            for _ in range(shape.blocks + 1):
                stack.append(block(here + skips.pop(), width * multiplier))
                here = width * multiplier
            attend = Attention(here) if resolution in attention else None
            self.up.append(UpLevel(stack, attend, block(here, here, resample=fir_up) if resolution < size else None))

        out = variance_scaled(Conv2d(here, channels, 3, padding=1), 0.0)
        self.head = nn.Sequential(GroupNormSiLU(here), out, nn.Tanh() if bounded else nn.Identity())

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x̂0, a guess at the clean images.

        Args:
            x: [N, channels, size, size], noisy images x_t.
            t: [N] int64, 1 … T. Values out of range are not noticed.
            z: [N, z_dim], standard normal.

        Returns:
            [N, channels, size, size], in [-1, 1] if bounded.

        Raises:
            ValueError: `x` or `z` has another shape.
        """
        check_images(x, self.channels, self.size)
        check_latents(z, self.z_dim)
        emb = F.silu(self.time(sinusoidal(t - 1, self.width, x.dtype)))
        w = self.mapping(z)
        pyramid, x = x, self.stem(x)
        skips = [x]
        for level in self.down:
            x = pyramid = level(x, pyramid, emb, w, skips)
        before, attention, after = self.middle
        x = after(attention(before(x, emb, w)), emb, w)
        for level in self.up:
            x = level(x, emb, w, skips)
        return self.head(x)


def _mapping(z_dim: int, latent: int, further: int) -> nn.Sequential:
    """The mapping network: z divided by its root mean square, then 1 + `further` linear layers, each with SiLU."""
    layers: list[nn.Module] = [nn.RMSNorm(z_dim, eps=1e-8, elementwise_affine=False)]
    for inputs in (z_dim, *[latent] * further):
        layers += [variance_scaled(nn.Linear(inputs, latent), fan="out"), nn.SiLU()]
    return nn.Sequential(*layers)
