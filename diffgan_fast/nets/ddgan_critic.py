"""The critics of Denoising Diffusion GANs (Xiao et al. 2022)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_at_least, check_images, preset_for
from .conv import Conv2d
from .deviation import MinibatchDeviation
from .embedding import sinusoidal
from .fir import fir_down
from .scaled import SQRT_HALF, variance_scaled


@dataclass(frozen=True)
class Shape:
    """What a critic is built of.

    Attributes:
        stem: channels after the first conv.
        widths: channels after each block.
        halvings: how many blocks halve the resolution; the last ones.
        emb_dim: length of the time embedding, at least 4 and even.
        head_scale: of the variance of the head's first weights; 0 for nearly none.
    """

    stem: int
    widths: tuple[int, ...]
    halvings: int
    emb_dim: int = 256
    head_scale: float = 0.0


PRESETS = {
    "8": Shape(stem=32, widths=(32, 64, 128), halvings=2, emb_dim=64),
    "28": Shape(stem=32, widths=(32, 64, 128, 256), halvings=3, emb_dim=128),
    "small": Shape(stem=128, widths=(128, 256, 512, 512), halvings=3),
    "large": Shape(stem=128, widths=(256, 512, 512, 512, 512, 512), halvings=6, head_scale=1.0),
}
BY_SIZE = {8: "8", 28: "28", 32: "small", 256: "large"}


def fitting(size: int) -> list[str]:
    """The presets whose halvings leave something of images of `size` pixels."""
    return [name for name, shape in PRESETS.items() if size >= 2**shape.halvings]


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Block(nn.Module):
    """(skip(x) + f(x, emb)) / √2, f: LeakyReLU, conv, + emb, LeakyReLU, conv; no norm.

    With `shrink` x, and the input of the second conv, are halved first.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, shrink: bool):
        super().__init__()
        self.shrink = shrink
        self.conv1 = variance_scaled(Conv2d(in_channels, out_channels, 3, padding=1), fan="out")
        self.emb = variance_scaled(nn.Linear(emb_dim, out_channels), fan="out")
        self.conv2 = variance_scaled(Conv2d(out_channels, out_channels, 3, padding=1), 0.0, fan="out")
        self.skip = variance_scaled(nn.Conv2d(in_channels, out_channels, 1, bias=False), fan="out")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = leaky(self.conv1(leaky(x)) + self.emb(emb)[:, :, None, None])
        if self.shrink:
            x, h = fir_down(x), fir_down(h)
        return (self.skip(x) + self.conv2(h)) * SQRT_HALF


class DDGANCritic(nn.Module):
    """The critic of a denoising diffusion GAN: `critic(x, t=t, x_t=x_t) -> logits`, is x a sample of q(x_{t-1} | x_t)?

    x and x_t are concatenated; residual blocks without norm, halving with the filter [1, 3, 3, 1]; every block is told
    t; `MinibatchDeviation`; a conv, the sum over its pixels, one linear layer. A logit depends on the other samples of
    its group of 4. t enters through sines and cosines of t - 1, since its authors count from 0. Every layer has
    a double backward: R1 can be taken.

    Parameters: 12,741,633 with "small" (3 channels, made for 32 px), 27,737,217 with "large" (256 px); "8" and "28" are
    for these sizes and train on a CPU.

    Args:
        channels: of `x`, and of `x_t`.
        size: height and width in pixels, at least 2^halvings of the preset.
        preset: "8", "28", "small" or "large"; None takes the one made for `size`.
        T: the number of time steps; an attribute to read, the layers do not depend on it.
        changes: replace attributes of the preset's `Shape`.

    Raises:
        ValueError: an argument is out of its range, or there is no preset of this name or for this size.
        TypeError: `changes` names what `Shape` does not have.

    Source: Xiao, Kreis and Vahdat 2022, §4 and App. C, and their code, whose initial weights have variance 1 / fan out.
    """

    def __init__(self, channels: int, size: int, *, T: int, preset: str | None = None, **changes):
        super().__init__()
        shape = replace(PRESETS[preset_for(size, preset, PRESETS, BY_SIZE)], **changes)
        check_at_least(1, channels=channels, T=T, stem=shape.stem, widths=min(shape.widths, default=0))
        if not 0 <= shape.halvings <= len(shape.widths):
            raise ValueError(f"halvings is {shape.halvings}; it must be 0 to {len(shape.widths)}, the number of blocks")
        check_at_least(2**shape.halvings, size=size)
        self.channels, self.size, self.T, self.emb_dim = channels, size, T, shape.emb_dim
        self.time = nn.Sequential(
            variance_scaled(nn.Linear(shape.emb_dim, shape.emb_dim), fan="out"),
            nn.LeakyReLU(0.2),
            variance_scaled(nn.Linear(shape.emb_dim, shape.emb_dim), fan="out"),
            nn.LeakyReLU(0.2),
        )
        self.stem = variance_scaled(nn.Conv2d(2 * channels, shape.stem, 1), fan="out")
        self.blocks = nn.ModuleList()
        here, keep = shape.stem, len(shape.widths) - shape.halvings
        for i, width in enumerate(shape.widths):
            self.blocks.append(Block(here, width, shape.emb_dim, shrink=i >= keep))
            here = width
        self.deviation = MinibatchDeviation()
        self.head = variance_scaled(Conv2d(here + 1, here, 3, padding=1), shape.head_scale, fan="out")
        self.logit = variance_scaled(nn.Linear(here, 1), fan="out")

    def forward(self, x: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """The logits, high where the critic believes that `x` is a real x_{t-1} of this `x_t`.

        Args:
            x: [N, channels, size, size], x_{t-1} or its imitation; N at most 4, or a multiple of 4.
            t: [N] int64, 1 … T: the time of `x_t`. Values out of range are not noticed.
            x_t: [N, channels, size, size].

        Returns:
            [N].

        Raises:
            ValueError: `x` or `x_t` has another shape, or N is another number.
        """
        check_images(x, self.channels, self.size)
        check_images(x_t, self.channels, self.size, "x_t")
        emb = self.time(sinusoidal(t - 1, self.emb_dim, x.dtype))
        h = self.stem(torch.cat([x, x_t], dim=1))
        for block in self.blocks:
            h = block(h, emb)
        h = leaky(self.head(self.deviation(h)))
        return self.logit(h.sum((2, 3)))[:, 0]
