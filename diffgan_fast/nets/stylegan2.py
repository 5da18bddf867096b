"""The generator and the critic of StyleGAN2 (Karras et al. 2020), in the form that Diffusion-GAN trains."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, leaky_relu

from diffgan_fast.ops.conv import conv2d

from .checks import check_at_least, check_images, check_latents, resolutions
from .critic import Critic
from .deviation import MinibatchDeviation
from .equalised import GAIN, SLOPE, EqualisedConv2d, EqualisedLinear
from .fir import fir_blur, fir_down, fir_up
from .scaled import SQRT_HALF

BASE = 32768  # channels times pixels of a side, at most


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by what a style says, for each sample.

    The product of scales and weights is not made for each sample: the image is scaled before a convolution that all
    samples share, and after it divided by what the norm of each output channel's scaled weights would be.

    Args:
        latent: length of the style w.
        doubles: whether it doubles the resolution: a transposed convolution of stride 2, then the filter [1, 3, 3, 1].
        demodulate: whether output channels are divided by those norms, and multiplied by √2.

    Source: Karras et al. 2020, §2.2, Eqs. 1 to 3; the filter: App. B.
    """

    def __init__(
        self, here: int, out: int, kernel: int, latent: int, *, doubles: bool = False, demodulate: bool = True
    ):
        super().__init__()
        self.style = EqualisedLinear(latent, here, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, here, kernel, kernel))
        self.scale, self.doubles, self.demodulate = (here * kernel**2) ** -0.5, doubles, demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """[N, here, H, W], [N, latent] -> [N, out, H, W], or of twice the size."""
        weight = self.weight * self.scale
        with _full(w):
            style = self.style(w)
            norms = (style.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt() if self.demodulate else None
        x = x * style[:, :, None, None].to(x.dtype)
        if self.doubles:
            x = fir_blur(conv_transpose2d(x, weight.transpose(0, 1), stride=2), padding=1, gain=4.0)
        else:
            x = conv2d(x, weight, padding=weight.shape[-1] // 2)
        return x if norms is None else x * (GAIN * norms)[:, :, None, None].to(x.dtype)


def _full(x: Tensor) -> torch.autocast:
    """Leaves autocast for what is small and loses by half precision: styles, norms, sums of images."""
    return torch.autocast(x.device.type, enabled=False)


class StyledLayer(nn.Module):
    """A modulated convolution, noise of a learnt strength, a bias, LeakyReLU.

    In training the noise is new for each sample and pixel, from torch's generator; otherwise it is one fixed image.
    """

    noise: Tensor

    def __init__(self, here: int, out: int, size: int, latent: int, *, doubles: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(here, out, 3, latent, doubles=doubles)
        self.bias, self.strength = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(1, 1, size, size))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w)
        noise = torch.randn_like(x[:, :1]) if self.training else self.noise.to(x.dtype)
        strength, bias = ((GAIN * v).to(x.dtype) for v in (self.strength, self.bias))
        return leaky_relu(x + noise * strength + bias[:, None, None], SLOPE)


class ToImage(nn.Module):
    """A modulated 1x1 convolution to the image's channels, which nothing divides."""

    def __init__(self, here: int, channels: int, latent: int):
        super().__init__()
        self.conv = ModulatedConv2d(here, channels, 1, latent, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return (self.conv(x, w) + self.bias[:, None, None]).to(w.dtype)


class StyleGAN2Generator(nn.Module):
    """StyleGAN2's generator with skip connections: z -> images, which nothing bounds.

    A mapping network makes a style w of z; a learnt constant image goes through two styled layers at each resolution
    (one at the first), and what each resolution makes of it as an image is added to the doubled image of the one
    before. In training the layers get noise, and with `style_mixing` those from a random one on the style of another
    z, both from torch's generator. In evaluation mode an image is a function of its z.

    3 channels of 32 pixels and the defaults have 19,947,539 parameters.

    Args:
        channels: of the images.
        size: height and width in pixels: 4 or an odd number below 16, times a power of 2, and at least 8.
        z_dim: length of z.
        width: channels of a layer, where 32768 / pixels of a side are not fewer.
        latent: length of w.
        mapping: layers of the mapping network, which learn at a hundredth of the rate.
        style_mixing: the part of training batches of which styles are mixed, in [0, 1].

    Raises:
        ValueError: an argument is out of its range.

    Source: Karras et al. 2020, §2 and App. B; the settings of Wang et al. 2023 for CIFAR-10.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        z_dim: int = 512,
        width: int = 512,
        latent: int = 512,
        mapping: int = 2,
        style_mixing: float = 0.0,
    ):
        super().__init__()
        sizes = resolutions(size)
        check_at_least(1, channels=channels, z_dim=z_dim, width=width, latent=latent, mapping=mapping)
        if not 0 <= style_mixing <= 1:
            raise ValueError(f"style_mixing is {style_mixing}; it must be in [0, 1]")
        self.z_dim, self.latent, self.style_mixing = z_dim, latent, style_mixing
        inputs = (z_dim, *[latent] * (mapping - 1))
        self.mapping = nn.ModuleList(EqualisedLinear(here, latent, 0.01, gain=GAIN) for here in inputs)
        widths = [min(width, BASE // pixels) for pixels in sizes]
        self.constant = nn.Parameter(torch.randn(widths[0], sizes[0], sizes[0]))
        self.layers, self.images = nn.ModuleList(), nn.ModuleList()
        for i, (pixels, out) in enumerate(zip(sizes, widths, strict=True)):
            if i:
                self.layers.append(StyledLayer(widths[i - 1], out, pixels, latent, doubles=True))
            self.layers.append(StyledLayer(out, out, pixels, latent))
            self.images.append(ToImage(out, channels, latent))
        self.styled = len(self.layers) + 1

    def styles(self, z: Tensor) -> Tensor:
        """z [N, z_dim] -> w [N, latent]. ValueError if `z` has another shape."""
        check_latents(z, self.z_dim)
        with _full(z):
            w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
            for layer in self.mapping:
                w = leaky_relu(layer(w), SLOPE)
        return w

    def synthesis(self, ws: Tensor) -> Tensor:
        """Images [N, channels, size, size] from L = `styled` styles each, [N, L, latent].

        A layer takes one style; what makes an image of a resolution takes that of the layer that follows, and at the
        last resolution one of its own. ValueError if `ws` has another shape.
        """
        if ws.shape[1:] != (self.styled, self.latent):
            raise ValueError(f"ws is {list(ws.shape)}; it must be [N, {self.styled}, {self.latent}]")
        w = ws.unbind(1)
        x = self.layers[0](self.constant.expand(len(ws), *self.constant.shape), w[0])
        image = self.images[0](x, w[1])
        for i, to_image in enumerate(self.images[1:], 1):
            for j in (2 * i - 1, 2 * i):
                x = self.layers[j](x, w[j])
            with _full(image):
                larger = fir_up(image)
            image = larger + to_image(x, w[2 * i + 1])
        return image

    def forward(self, z: Tensor) -> Tensor:
        """Images [N, channels, size, size] from latents z [N, z_dim]. ValueError if `z` has another shape."""
        return self.synthesis(self.mixed(z))

    def mixed(self, z: Tensor) -> Tensor:
        """The styles [N, L, latent] of z, in training mixed as `style_mixing` says."""
        L = self.styled
        ws = self.styles(z)[:, None].expand(-1, L, -1)
        if not (self.training and self.style_mixing):
            return ws
        first = torch.randint(1, L, (), device=z.device)
        first = torch.where(torch.rand((), device=z.device) < self.style_mixing, first, L)
        other = self.styles(torch.randn_like(z))[:, None]
        return torch.where((torch.arange(L, device=z.device) < first)[:, None], ws, other)


class PathLength(nn.Module):
    """The lengths of a generator's paths, |Jᵀ y| with J an image's derivative by its styles and y noise; their mean.

    Their spread around the running mean is what the path length penalty holds down.

    Source: Karras et al. 2020, §3.2, Eq. 4; the mean moves by a hundredth, App. B.
    """

    mean: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, generator: StyleGAN2Generator, z: Tensor, noise: Tensor) -> Tensor:
        """The lengths [N], with a graph: the root of the mean, over an image's L styles, of their squares.

        Args:
            z: latents [N, z_dim].
            noise: standard normal, like the images.
        """
        ws = generator.mixed(z)
        images = generator.synthesis(ws)
        reached = (images.to(noise.dtype) * noise).sum() / (images[0, 0].numel()) ** 0.5
        (gradient,) = torch.autograd.grad(reached, ws, create_graph=True)
        return (gradient.square().sum(2).mean(1) + 1e-8).sqrt()  # where a length is 0, the root has a gradient too

    @torch.no_grad()
    def follow(self, length: Tensor) -> None:
        """Moves the running mean by a hundredth of the way to `length`, the mean of a step's lengths."""
        self.mean.lerp_(length.to(self.mean.dtype), 0.01)


class _Halving(nn.Module):
    """Two 3x3 convolutions, of which the second halves the image behind the filter [1, 3, 3, 1]; with a skip connection
    the mean of both ways, times √2."""

    def __init__(self, here: int, out: int, skip: bool):
        super().__init__()
        second = EqualisedConv2d(here, out, 3, stride=2, padding=0, gain=GAIN)
        self.convs = nn.ModuleList([EqualisedConv2d(here, here, 3, gain=GAIN), second])
        self.skip = EqualisedConv2d(here, out, 1, bias=False) if skip else None

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.convs[0](x), SLOPE)
        h = leaky_relu(self.convs[1](fir_blur(h)), SLOPE)
        return h if self.skip is None else (h + self.skip(fir_down(x))) * SQRT_HALF


class StyleGAN2Critic(Critic):
    """StyleGAN2's critic: one logit an image, which depends on the other images of its group.

    A 1x1 convolution, two 3x3 convolutions at each resolution, `MinibatchDeviation`, one more, two linear layers. 3
    channels of 32 pixels and the defaults have 20,720,641 parameters.

    Args:
        channels: of `x`, and of `x_t`.
        size: as for `StyleGAN2Generator`.
        width: as there.
        residual: whether each resolution has a skip connection; Diffusion-GAN's for CIFAR-10 has none.
        group: samples that are compared.
        inputs, T: as for `Critic`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Karras et al. 2020, §4.1 and App. B; the settings of Wang et al. 2023 for CIFAR-10.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        width: int = 512,
        residual: bool = False,
        group: int = 4,
        inputs: tuple[str, ...] = ("x",),
        T: int | None = None,
    ):
        super().__init__(inputs, T)
        sizes = resolutions(size)[::-1]
        check_at_least(1, channels=channels, width=width, group=group)
        widths = [min(width, BASE // pixels) for pixels in sizes]
        self.channels, self.size = channels, size
        self.features = widths[-1]
        self.main = nn.Sequential(
            EqualisedConv2d(self.joined(channels), widths[0], 1, gain=GAIN),
            nn.LeakyReLU(SLOPE),
            *(_Halving(a, b, residual) for a, b in zip(widths, widths[1:], strict=False)),
            MinibatchDeviation(group),
            EqualisedConv2d(self.features + 1, self.features, 3, gain=GAIN),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            EqualisedLinear(self.features * sizes[-1] ** 2, self.features, gain=GAIN),
            nn.LeakyReLU(SLOPE),
            EqualisedLinear(self.features, 1),
        )

    def check(self, x: Tensor) -> None:
        check_images(x, self.channels, self.size)

    def forward(
        self, x: Tensor, t: Tensor | None = None, x_t: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """The logits [N] of x [N, channels, size, size], N at most `group` or a multiple of it; the rest and the errors
        as for `DCGANCritic`."""
        return self.main(self.join(x, t, x_t, level)).flatten()
