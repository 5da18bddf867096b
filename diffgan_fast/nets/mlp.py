"""Fully connected networks for points."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffgan_fast.ops.mlp import mlp

from .checks import check_at_least, check_latents
from .critic import Critic, is_main_of_join
from .embedding import sinusoidal

EMBEDDING = 128  # numbers that each coordinate and the time become
SCALE = 25.0  # of the coordinates in their embedding
SLOPE = 0.01  # of the GANs' LeakyReLU: torch's own, for the paper does not say


def _check_points(x: Tensor, dim: int) -> None:
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"x is {list(x.shape)}; it must be [N, {dim}]")


def _parameters(layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the biases of the linear layers among `layers`."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return [layer.weight for layer in linears], [layer.bias for layer in linears]


class MLPDenoiser(nn.Module):
    """A denoiser of points, `model(x, t) -> ε̂`: sinusoidal embeddings, then a residual MLP.

    Every coordinate, times 25, and the time become 128 sines and cosines each. A linear layer, `layers` times
    h + Linear(ReLU(h)), ReLU, a linear layer. With the defaults 296,450 parameters. It is fed t - 1: its authors count
    time from 0, our t runs over 1 … T.

    Args:
        dim: coordinates of a point.
        hidden: width of the layers.
        layers: residual layers.

    Raises:
        ValueError: an argument is below 1.

    Source: "GAN-Enhanced Diffusion" and its code, which took it from tanelp/tiny-diffusion.
    """

    def __init__(self, dim: int = 2, hidden: int = 256, layers: int = 3):
        super().__init__()
        check_at_least(1, dim=dim, hidden=hidden, layers=layers)
        self.dim = dim
        widths = [EMBEDDING * (dim + 1), *[hidden] * (layers + 1), dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """ε̂ for noisy points.

        Args:
            x: [N, dim].
            t: [N] int64, 1 … T. One number expanded over the batch (`t.expand(N)`) is embedded once.

        Returns:
            [N, dim].

        Raises:
            ValueError: `x` or `t` has another shape.
        """
        _check_points(x, self.dim)
        if t.shape != x.shape[:1]:
            raise ValueError(f"t is {list(t.shape)}; it must be [{len(x)}], a time for every point")
        weights, biases = _parameters(self.layers)
        coordinates = SCALE * x.to(torch.promote_types(x.dtype, torch.float32))  # half the bits hold no t above 256
        if len(x) > 1 and t.stride(0) == 0:  # the time adds the same to every row of the first layer
            told = sinusoidal(t[:1] - 1, EMBEDDING, x.dtype)
            first, time = weights[0].split([self.dim * EMBEDDING, EMBEDDING], 1)
            weights[0], biases[0] = first.contiguous(), torch.addmv(biases[0], time, told[0])
        else:
            coordinates = torch.cat((coordinates, (t - 1)[:, None].to(coordinates.dtype)), 1)
        features = sinusoidal(coordinates.flatten(), EMBEDDING, x.dtype).view(len(x), weights[0].shape[1])
        return mlp(features, weights, biases, skip=True)


class DDGANPointGenerator(nn.Module):
    """The generator of a denoising diffusion GAN of points, `generator(x_t, t, z) -> x̂0`: a residual MLP.

    It sees x_t, z and 128 sines and cosines of t - 1 (as `DDGANGenerator`, which counts time from 0) side by side. A
    linear layer, `layers` times h + Linear(ReLU(h)), ReLU, a linear layer. `MLPCritic` with the inputs
    ("x", "x_t", "t") is its critic. z = 0 for all samples gives the ablation without a latent.

    Args:
        dim: coordinates of a point.
        hidden: width of the layers.
        layers: residual layers.
        T: the number of time steps; an attribute to read, the layers do not depend on it.
        z_dim: length of z.

    Raises:
        ValueError: an argument is below 1.

    Source: Xiao, Kreis and Vahdat 2022, §4, with the MLP of tanelp/tiny-diffusion.
    """

    def __init__(self, dim: int = 2, hidden: int = 256, layers: int = 3, *, T: int, z_dim: int = 8):
        super().__init__()
        check_at_least(1, dim=dim, hidden=hidden, layers=layers, T=T, z_dim=z_dim)
        self.dim, self.T, self.z_dim = dim, T, z_dim
        widths = [dim + z_dim + EMBEDDING, *[hidden] * (layers + 1), dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x̂0, a guess at the clean points.

        Args:
            x: [N, dim], noisy points x_t.
            t: [N] int64, 1 … T. Values out of range are not noticed.
            z: [N, z_dim], standard normal.

        Returns:
            [N, dim], not bounded.

        Raises:
            ValueError: `x` or `z` has another shape.
        """
        _check_points(x, self.dim)
        check_latents(z, self.z_dim)
        seen = torch.cat([x, z, sinusoidal(t - 1, EMBEDDING, x.dtype)], dim=1)
        return mlp(seen, *_parameters(self.layers), skip=True)


class MLPCritic(Critic):
    """A critic of points: an MLP with one logit a point.

    With dim 2 and hidden 256: 132,609 / 198,401 / 329,985 parameters for 3 / 4 / 6 layers.

    Args:
        dim: coordinates of a point.
        hidden: width of the layers.
        layers: hidden layers, at least 1.
        slope: of the activation below 0: 0 is a ReLU, else a LeakyReLU.
        inputs, T: as for `Critic`.

    Raises:
        ValueError: an argument is out of its range.

    Source: "GAN-Enhanced Diffusion" and its code; with slope 0.01, two layers and width 128 the critic of points of
    Wang et al. 2023, "Diffusion-GAN".
    """

    def __init__(
        self,
        dim: int = 2,
        hidden: int = 256,
        layers: int = 3,
        *,
        slope: float = 0.0,
        inputs: tuple[str, ...] = ("x",),
        T: int | None = None,
    ):
        super().__init__(inputs, T)
        check_at_least(1, dim=dim, hidden=hidden, layers=layers)
        self.dim, self.slope, self.features = dim, slope, hidden
        self.main = _stack(self.joined(dim), hidden, layers, 1, slope)

    def check(self, x: Tensor) -> None:
        _check_points(x, self.dim)

    @is_main_of_join
    def forward(
        self, x: Tensor, t: Tensor | None = None, x_t: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """The logits, high where the critic believes that `x` is real.

        Args:
            x: [N, dim].
            t: [N] int64, 1 … T; used if `inputs` has "t".
            x_t: [N, dim]; used if `inputs` has "x_t".
            level: [N], noise levels in [0, 1]; used if `inputs` has "level".

        Returns:
            [N].

        Raises:
            ValueError: `x` has another shape, or what `inputs` names is missing.
        """
        return mlp(self.join(x, t, x_t, level), *_parameters(self.main), slope=self.slope).flatten()


class MLPGenerator(nn.Module):
    """A generator of points: an MLP with LeakyReLU 0.01, z -> x.

    Args:
        dim: coordinates of a point.
        z_dim: length of z.
        hidden: width of the layers.
        layers: hidden layers, at least 1.

    Raises:
        ValueError: an argument is below 1.

    Source: Wang et al. 2023, "Diffusion-GAN", §4.2: two layers of 128.
    """

    def __init__(self, dim: int = 2, *, z_dim: int = 100, hidden: int = 128, layers: int = 2):
        super().__init__()
        check_at_least(1, dim=dim, z_dim=z_dim, hidden=hidden, layers=layers)
        self.z_dim = z_dim
        self.main = _stack(z_dim, hidden, layers, dim, SLOPE)

    def forward(self, z: Tensor) -> Tensor:
        """Points [N, dim] from latents z [N, z_dim], standard normal. ValueError if `z` has another shape."""
        check_latents(z, self.z_dim)
        return mlp(z, *_parameters(self.main), slope=SLOPE)


def _stack(dim: int, hidden: int, layers: int, out: int, slope: float) -> nn.Sequential:
    """Linear layers with activations between."""
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack += [nn.Linear(dim, hidden), nn.LeakyReLU(slope) if slope else nn.ReLU()]
        dim = hidden
    return nn.Sequential(*stack, nn.Linear(dim, out))
