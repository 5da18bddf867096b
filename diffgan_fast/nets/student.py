"""The U-Net of "Exploring the Combination of Diffusion Models and GANs" (its MNIST notebooks)."""

import torch
from torch import Tensor, nn

from .checks import check_at_least, check_images, check_labels
from .conv import Conv2d
from .embedding import time_fraction

WIDTH = 64
SIZE = 28


def conv_block(first: nn.Module, channels: int) -> nn.Sequential:
    """`first` and a 3x3 conv, each followed by batch norm and GELU; both give `channels` channels."""
    return nn.Sequential(
        first,
        nn.BatchNorm2d(channels),
        nn.GELU(),
        Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.GELU(),
    )


def plain(in_channels: int, out_channels: int) -> nn.Sequential:
    return conv_block(Conv2d(in_channels, out_channels, 3, padding=1), out_channels)


def down(in_channels: int, out_channels: int) -> nn.Sequential:
    return conv_block(Conv2d(in_channels, out_channels, 3, stride=2, padding=1), out_channels)


def up(in_channels: int, out_channels: int) -> nn.Sequential:
    return conv_block(nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1), out_channels)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class Modulation(nn.Module):
    """h · class(y) + time(t) per channel, h [N, C, H, W]; without classes h + time(t)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.time = mlp(1, channels)
        self.label = mlp(num_classes, channels) if num_classes else None

    def forward(self, h: Tensor, time: Tensor, one_hot: Tensor | None) -> Tensor:
        if self.label is not None:
            h = h * self.label(one_hot)[:, :, None, None]
        return h + self.time(time)[:, :, None, None]


class StudentUNet(nn.Module):
    """The student report's U-Net for 28 px images, a denoiser `model(x, t, y=None) -> ε̂`.

    1,737,153 parameters, 1,759,937 with 10 classes (one image channel). It is fed (t - 1) / T as one scalar:
    its authors count time from 0, our t runs over 1 … T, and the shift is made here. "No label" is the zero
    vector in place of the one-hot vector. It uses batch norm: call `eval()` to sample.

    Args:
        channels: of the images.
        num_classes: 0 for a network without labels.
        T: the number of time steps it is trained with.

    Raises:
        ValueError: `channels` or `T` is below 1, or `num_classes` below 0.

    Source: "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §3.1 and its
    notebooks.
    """

    def __init__(self, channels: int = 1, num_classes: int = 0, T: int = 300):
        super().__init__()
        check_at_least(1, channels=channels, T=T)
        check_at_least(0, num_classes=num_classes)
        self.channels, self.size, self.num_classes, self.T = channels, SIZE, num_classes, T
        self.stem = plain(channels, WIDTH)
        self.down1 = down(WIDTH, WIDTH)
        self.down2 = down(WIDTH, 2 * WIDTH)
        self.squeeze = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.expand = nn.Sequential(nn.ConvTranspose2d(2 * WIDTH, 2 * WIDTH, 7), nn.GELU())
        self.modulate1 = Modulation(2 * WIDTH, num_classes)
        self.up1 = up(4 * WIDTH, WIDTH)
        self.modulate2 = Modulation(WIDTH, num_classes)
        self.up2 = up(2 * WIDTH, WIDTH)
        self.head = nn.Sequential(plain(2 * WIDTH, WIDTH), Conv2d(WIDTH, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """ε̂ for noisy images.

        Args:
            x: [N, channels, 28, 28].
            t: [N] int64, 1 … T.
            y: [N] int64, 0 … num_classes; num_classes, or no `y` at all, means "no label".

        Returns:
            [N, channels, 28, 28].

        Raises:
            ValueError: `x` has another shape, or `y` is given to a network without labels.
        """
        check_images(x, self.channels, SIZE)
        check_labels(y, self.num_classes)
        time = time_fraction(t, self.T, x.dtype)[:, None]
        one_hot = self._one_hot(x, y) if self.num_classes else None
        full = self.stem(x)  # 28 px
        half = self.down1(full)  # 14 px
        quarter = self.down2(half)  # 7 px
        h = self.modulate1(self.expand(self.squeeze(quarter)), time, one_hot)
        h = self.modulate2(self.up1(torch.cat([h, quarter], dim=1)), time, one_hot)
        h = self.up2(torch.cat([h, half], dim=1))
        return self.head(torch.cat([h, full], dim=1))

    def _one_hot(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return x.new_zeros(len(x), self.num_classes)
        classes = torch.arange(self.num_classes, device=x.device)
        return (y[:, None] == classes).to(x.dtype)
