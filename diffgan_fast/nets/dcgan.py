"""DCGAN's critic and generator (Radford et al. 2016) for small images."""

from torch import Tensor, nn

from .checks import check_at_least, check_images, check_latents
from .conv import Conv2d
from .critic import Critic, is_main_of_join

SLOPE = 0.2  # of the critic's LeakyReLUs


def init_dcgan(network: nn.Module) -> None:
    """DCGAN's initialisation, in place: conv weights N(0, 0.02²), norm scales N(1, 0.02²), norm shifts 0.

    Source: Radford et al. 2016, §4; the norm layers as in PyTorch's DCGAN example.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


class DCGANCritic(Critic):
    """DCGAN's discriminator without the sigmoid: exactly one logit per image.

    4x4 convs of stride 2 halve the image (width, 2·width, … at most 8·width channels, LeakyReLU 0.2, the
    norm from the second on) until 2 or 3 pixels are left. One last conv covers those: 2x2, or 4x4 with
    padding 1 for 3 pixels. No conv has a bias. The layers are `main`, an nn.Sequential whose keys are those
    of the csinva repository's `netD` weights (MNIST at 28 px, CIFAR at 32 px), so that these load as they
    are.

    Args:
        channels: of `x`, and of `x_t`.
        size: height and width in pixels, at least 4.
        width: channels after the first conv.
        depth: convs at each resolution: after a strided one depth - 1 of 3x3, each with norm and LeakyReLU.
        norm: "batch", "layer" (over channels and pixels, with a scale and shift per channel), or None. For a
            gradient penalty take "layer" or None: under batch norm a logit depends on the other samples.
        inputs, T: as for `Critic`.
        init: "default" is PyTorch's, "dcgan" is `init_dcgan`, "he" keeps the activations' size from layer to layer
            (He et al. 2015, Eq. 15), which without a norm the other two shrink to a thousandth.

    Raises:
        ValueError: an argument is out of its range.

    Source: Radford, Metz and Chintala 2016, §3; github.com/csinva/gan-vae-pretrained-pytorch; the inputs:
    "Exploring the Combination of Diffusion Models and Generative Adversarial Networks", §3 and §4.2.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        width: int = 64,
        depth: int = 1,
        norm: str | None = "batch",
        inputs: tuple[str, ...] = ("x",),
        T: int | None = None,
        init: str = "default",
    ):
        super().__init__(inputs, T)
        check_at_least(1, channels=channels, width=width, depth=depth)
        check_at_least(4, size=size)
        if init not in ("default", "dcgan", "he"):
            raise ValueError(f"init is {init!r}; it may be 'default', 'dcgan' or 'he'")
        self.channels, self.size = channels, size

        here = self.joined(channels)
        layers: list[nn.Module] = []
        out = width
        while size > 3:
            layers.append(nn.Conv2d(here, out, 4, stride=2, padding=1, bias=False))
            if len(layers) > 1:
                layers.extend(_norm(norm, out))
            layers.append(nn.LeakyReLU(SLOPE))
            for _ in range(depth - 1):
                layers += [Conv2d(out, out, 3, padding=1, bias=False), *_norm(norm, out), nn.LeakyReLU(SLOPE)]
            here, out, size = out, min(2 * out, 8 * width), size // 2
        self.features = here * size**2
        kernel, padding = (2, 0) if size == 2 else (4, 1)
        layers.append(nn.Conv2d(here, 1, kernel, stride=2, padding=padding, bias=False))
        self.main = nn.Sequential(*layers)
        if init == "dcgan":
            init_dcgan(self)
        elif init == "he":
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, a=SLOPE)

    def check(self, x: Tensor) -> None:
        check_images(x, self.channels, self.size)

    @is_main_of_join
    def forward(
        self, x: Tensor, t: Tensor | None = None, x_t: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """The logits, high where the critic believes that `x` is real.

        Args:
            x: [N, channels, size, size].
            t: [N] int64, 1 … T; used if `inputs` has "t".
            x_t: [N, channels, size, size]; used if `inputs` has "x_t".
            level: [N], noise levels in [0, 1]; used if `inputs` has "level".

        Returns:
            [N].

        Raises:
            ValueError: `x` has another shape, or what `inputs` names is missing.
        """
        return self.main(self.join(x, t, x_t, level)).flatten()


class DCGANGenerator(nn.Module):
    """DCGAN's generator: z -> images in [-1, 1].

    A 4x4 transposed conv makes 4 px of z, further ones of stride 2 double the resolution and halve the
    channels, until `size` is reached or passed with `width` channels. A 1x1 transposed conv then makes the
    image, and its padding cuts off what is too much (32 -> 28). Batch norm and ReLU between, tanh at the
    end; initialised by `init_dcgan`. One channel at 28 px: 3,573,696 parameters, under the keys of the
    csinva repository's `netG`.

    Args:
        channels: of the images.
        size: height and width in pixels, even and at least 8.
        z_dim: length of z.
        width: channels before the last layer.

    Raises:
        ValueError: `size` is odd or below 8, or another argument below 1.

    Source: Radford, Metz and Chintala 2016, §3; github.com/csinva/gan-vae-pretrained-pytorch.
    """

    def __init__(self, channels: int, size: int, *, z_dim: int = 100, width: int = 64):
        super().__init__()
        if size < 8 or size % 2:
            raise ValueError(f"size is {size}; it must be even and at least 8")
        check_at_least(1, channels=channels, z_dim=z_dim, width=width)
        self.channels, self.size, self.z_dim = channels, size, z_dim
        doublings = (size - 1).bit_length() - 2
        out = width * 2**doublings
        layers = [nn.ConvTranspose2d(z_dim, out, 4, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        for _ in range(doublings):
            layers += [
                nn.ConvTranspose2d(out, out // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out // 2),
                nn.ReLU(inplace=True),
            ]
            out //= 2
        excess = 4 * 2**doublings - size
        layers += [nn.ConvTranspose2d(out, channels, 1, padding=excess // 2, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)
        init_dcgan(self)

    def forward(self, z: Tensor) -> Tensor:
        """Images from latents.

        Args:
            z: [N, z_dim], standard normal.

        Returns:
            [N, channels, size, size] in [-1, 1].

        Raises:
            ValueError: `z` has another shape.
        """
        check_latents(z, self.z_dim)
        return self.main(z[:, :, None, None])


def _norm(norm: str | None, channels: int) -> list[nn.Module]:
    """The norm layer of a critic as a list: empty for None."""
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "layer":
        return [nn.GroupNorm(1, channels)]
    if norm is None:
        return []
    raise ValueError(f"norm is {norm!r}; it may be 'batch', 'layer' or None")
