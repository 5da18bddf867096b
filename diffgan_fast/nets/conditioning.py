"""How a critic is told the noise level of what it sees: Diffusion-GAN's helpers.

The simplest is one more channel that holds the level: `inputs=("x", "level")` of any critic here. `LevelCritic` joins
it to the features instead. Both are told `AdaptiveDiffusion.level(t)` = sqrt(1 - abar_t), in [0, 1]: as T adapts, one
and the same t means another noise. The published code feeds t itself, a raw integer, which is `as_coded`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from .checks import check_at_least
from .embedding import sinusoidal
from .equalised import GAIN, SLOPE, EqualisedLinear

Joining = Literal["concat", "projection", "mapping"]

Layers = Literal["plain", "spectral", "equalised"]
LAYERS: dict[str, Callable[..., nn.Module]] = {  # of (inputs, outputs, gain), the gain for what does not keep its own
    "plain": lambda here, out, gain=1.0: nn.Linear(here, out),
    "spectral": lambda here, out, gain=1.0: spectral_norm(nn.Linear(here, out)),
    "equalised": lambda here, out, gain=1.0: EqualisedLinear(here, out, gain=gain),
}

SCALE = 1000.0  # of the level before its sines and cosines, whose frequencies are made for steps up to 1000


def _unit(x: Tensor) -> Tensor:
    """Each row with a root mean square of 1; a row of zeros stays one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 1e-8 is no float16
    return (wide * (wide.square().mean(1, keepdim=True) + 1e-8).rsqrt()).to(x.dtype)


class LevelEmbedding(nn.Module):
    """The noise level as a vector: 128 sines and cosines of 1000 · level, and a linear layer.

    Args:
        dim: length of the vector.
        as_coded: embed the raw integer t instead: a linear layer without bias at first, then each row scaled to a root
            mean square of 1. At first it can only tell t = 0, which gives 0, from t > 0, which give one vector.
        equalised: a linear layer of StyleGAN2's kind, for a critic whose learning rate is that of such layers.

    Source: Wang et al. 2023, "Diffusion-GAN", Appendix H, and its code.
    """

    def __init__(self, dim: int, *, as_coded: bool = False, equalised: bool = False):
        super().__init__()
        check_at_least(1, dim=dim)
        self.as_coded = as_coded
        here = 1 if as_coded else 128
        self.linear = EqualisedLinear(here, dim) if as_coded or equalised else nn.Linear(here, dim)

    def forward(self, t: Tensor | None, level: Tensor | None) -> Tensor:
        """[N, dim] from t int64 [N] (as coded) or from the level [N] in [0, 1]."""
        name, told = ("t", t) if self.as_coded else ("level", level)
        if told is None or told.dim() != 1:
            raise ValueError(
                f"{name} must be [N], one for each sample; got {None if told is None else list(told.shape)}"
            )
        dtype = self.linear.weight.dtype
        if self.as_coded:
            return _unit(self.linear(told.to(dtype)[:, None]))
        return self.linear(sinusoidal(SCALE * told, 128, dtype))


class LevelCritic(nn.Module):
    """A critic that is told the noise level beside its features: `critic(x, t=t, level=level)` -> logits [N].

    Args:
        features: x -> [N, width].
        width: numbers a sample that `features` gives.
        joining: how level and features meet. "concat": the embedding beside the features, a hidden layer, a logit (as
            the authors did for DCGAN and SNGAN). "projection": a logit of the features plus their product with the
            embedding (Miyato and Koyama 2018). "mapping": the product of the features with what a mapping network makes
            of the embedding, over sqrt(dim) (StyleGAN2, where the level takes the place of the class).
        dim: length of the embedding, and width of the hidden or mapping layers; with "projection" it is `width`.
        as_coded: embed the raw integer t, and map it by eight layers of a hundredth of the learning rate.
        layers: those that see features: "plain", "spectral" (with spectral norm) or "equalised" (StyleGAN2's, in the
            embedding too).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        features: nn.Module,
        width: int,
        joining: Joining = "concat",
        *,
        dim: int = 128,
        as_coded: bool = False,
        layers: Layers = "plain",
    ):
        super().__init__()
        check_at_least(1, width=width, dim=dim)
        if joining not in get_args(Joining):
            raise ValueError(f"joining must be one of {', '.join(get_args(Joining))}; got {joining!r}")
        if layers not in LAYERS:
            raise ValueError(f"layers must be one of {', '.join(LAYERS)}; got {layers!r}")
        layer = LAYERS[layers]
        self.features, self.joining = features, joining
        length, equalised = width if joining == "projection" else dim, layers == "equalised"
        self.embedding = LevelEmbedding(length, as_coded=as_coded, equalised=equalised)
        if joining == "concat":
            self.head: nn.Module = nn.Sequential(layer(width + dim, dim, GAIN), nn.LeakyReLU(SLOPE), layer(dim, 1))
        else:
            self.head = layer(width, dim if joining == "mapping" else 1)
        if joining == "mapping":
            rate, depth = (0.01, 8) if as_coded else (1.0, 2)
            self.mapping = nn.ModuleList(EqualisedLinear(dim, dim, rate, gain=GAIN) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor | None = None, level: Tensor | None = None, **_) -> Tensor:
        """The logits, high where the critic believes that the clean x is real.

        Args:
            x: what `features` takes.
            t: [N] int64; used if `as_coded`.
            level: [N], in [0, 1]; used otherwise.

        Returns:
            [N].

        Raises:
            ValueError: t or level is missing, or not [N].
        """
        h, embedded = self.features(x), self.embedding(t, level)
        if self.joining == "concat":
            return self.head(torch.cat((h, embedded.to(h.dtype)), 1)).flatten()
        if self.joining == "projection":
            return self.head(h).flatten() + (h * embedded).sum(1) / h.shape[1] ** 0.5
        for mapping in self.mapping:
            embedded = leaky_relu(mapping(embedded), SLOPE)
        return (self.head(h) * embedded).sum(1) / embedded.shape[1] ** 0.5
