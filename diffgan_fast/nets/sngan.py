"""The residual generator and critic of SNGAN (Miyato et al. 2018) for small images."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.nn.utils.parametrizations import spectral_norm

from .checks import check_at_least, check_images, check_latents, resolutions
from .conv import Conv2d
from .critic import Critic, is_main_of_join

Wrap = Callable[[nn.Module], nn.Module]


def _plain(layer: nn.Module) -> nn.Module:
    return layer


class _Block(nn.Module):
    """x' + conv(act(conv(act(x)))), with x' brought to the same shape by a 1x1 convolution where it has another.

    Args:
        resize: +1 doubles the resolution before the first convolution, -1 halves it after the last.
        first: the critic's first block, which sees pixels and activates nothing before its first convolution.
        normed: batch norm before each activation.
        wrap: what each convolution goes through.
    """

    def __init__(self, here: int, out: int, resize: int = 0, *, first: bool = False, normed: bool, wrap: Wrap = _plain):
        super().__init__()
        self.resize, self.first = resize, first
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) if normed else nn.Identity() for c in (here, out))
        self.convs = nn.ModuleList(wrap(_conv(a, out, 3, 2**0.5)) for a in (here, out))
        self.shortcut = wrap(_conv(here, out, 1)) if resize or here != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h, short = x if self.first else self.norms[0](x).relu(), x
        if self.resize > 0:
            h, short = (interpolate(v, scale_factor=2) for v in (h, short))
        h = self.convs[1](self.norms[1](self.convs[0](h)).relu())
        if self.resize < 0:
            h, short = avg_pool2d(h, 2), avg_pool2d(short, 2)
        return h + self.shortcut(short)


class _SumPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().sum((2, 3))


def _conv(here: int, out: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    conv = Conv2d(here, out, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight, gain)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class SNGANCritic(Critic):
    """SNGAN's residual critic: spectral norm in every layer, the features summed over pixels, one logit an image.

    Two blocks that halve the resolution and two that keep it, `width` channels each, ReLU, sum, a linear layer. With 3
    channels and width 128 it has 1,053,825 parameters.

    Args:
        channels: of `x`, and of `x_t`.
        size: height and width in pixels, at least 4 and a multiple of 4.
        width: channels.
        inputs, T: as for `Critic`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Miyato, Kataoka, Koyama and Yoshida 2018, Table 4b.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        width: int = 128,
        inputs: tuple[str, ...] = ("x",),
        T: int | None = None,
    ):
        super().__init__(inputs, T)
        check_at_least(1, channels=channels, width=width)
        if size < 4 or size % 4:
            raise ValueError(f"size is {size}; it must be a multiple of 4, and at least 4")
        self.channels, self.size, self.features = channels, size, width
        last = nn.Linear(width, 1)
        nn.init.xavier_uniform_(last.weight)
        nn.init.zeros_(last.bias)
        self.main = nn.Sequential(
            _Block(self.joined(channels), width, -1, first=True, normed=False, wrap=spectral_norm),
            _Block(width, width, -1, normed=False, wrap=spectral_norm),
            _Block(width, width, normed=False, wrap=spectral_norm),
            _Block(width, width, normed=False, wrap=spectral_norm),
            _SumPixels(),
            spectral_norm(last),
        )

    def check(self, x: Tensor) -> None:
        check_images(x, self.channels, self.size)

    @is_main_of_join
    def forward(
        self, x: Tensor, t: Tensor | None = None, x_t: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """The logits [N] of x [N, channels, size, size]; the rest and the errors as for `DCGANCritic`."""
        return self.main(self.join(x, t, x_t, level)).flatten()


class SNGANGenerator(nn.Module):
    """SNGAN's residual generator: z -> images in [-1, 1].

    A linear layer makes the smallest image that doubling leads to `size` from: of 4 pixels, or of an odd number (7 for
    28). Then a block for each doubling, batch norm, ReLU, a 3x3 convolution, tanh. With 3 channels of 32 pixels, z of
    128 and width 256 it has 4,276,739 parameters.

    Args:
        channels: of the images.
        size: height and width in pixels: 4 or an odd number below 16, times a power of 2, and at least 8.
        z_dim: length of z.
        width: channels.

    Raises:
        ValueError: an argument is out of its range.

    Source: Miyato, Kataoka, Koyama and Yoshida 2018, Table 4a.
    """

    def __init__(self, channels: int, size: int, *, z_dim: int = 128, width: int = 256):
        super().__init__()
        check_at_least(1, channels=channels, z_dim=z_dim, width=width)
        sizes = resolutions(size)
        bottom = sizes[0]
        self.z_dim, self.width, self.bottom = z_dim, width, bottom
        self.first = nn.Linear(z_dim, width * bottom**2)
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        last = _conv(width, channels, 3)
        blocks = [_Block(width, width, +1, normed=True) for _ in sizes[1:]]
        self.main = nn.Sequential(*blocks, nn.BatchNorm2d(width), nn.ReLU(), last, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Images [N, channels, size, size] from latents z [N, z_dim]. ValueError if `z` has another shape."""
        check_latents(z, self.z_dim)
        h = self.first(z).view(-1, self.width, self.bottom, self.bottom)
        return self.main(h)
