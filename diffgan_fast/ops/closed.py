"""The gradient penalty of piecewise linear critics in closed form: four passes, no autograd graph.

Within a linear piece D(x) = J x + const, with J a product of the layers' matrices and the activations' slopes. With
g = J^T 1 the penalty P(g) has the parameter gradient d<v, g>/dW, v = dP/dg, and

    d<v, g>/dW_i = S_i^T h_i,   S_i = the outputs' gradient at layer i's output,   h_i = its input's tangent along v

so that a forward pass (for the slopes), an input gradient (S), a tangent pass (h) and the products are all there is.
Autograd's double backward computes the same, and beside it the zeros that come back through the slopes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from diffgan_fast.ops.mlp import penalty_op, split

Penalty = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # g -> (P, v = dP/dg)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def reason_against(net: nn.Module) -> str | None:
    """Why the closed form does not take a network, or None if it does."""
    if not isinstance(net, nn.Sequential):
        return f"{type(net).__name__} is no nn.Sequential (nor a critic with one as `main` and a `join`)"
    if type(net).forward is not nn.Sequential.forward or has_hooks(net):
        return f"{type(net).__name__} has a forward or hooks of its own"
    for name, layer in net.named_children():
        what = f"layer {name!r} ({type(layer).__name__})"
        if type(layer) not in LAYERS:
            return f"{what} is none of {', '.join(dict.fromkeys(kind.__name__ for kind in LAYERS))}"
        if has_hooks(layer):
            return f"{what} has hooks"
        if isinstance(layer, nn.BatchNorm2d) and (layer.training or layer.running_var is None):
            return f"{what} normalises by the batch: call eval() on it"
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            return f"{what} has padding {layer.padding!r} of mode {layer.padding_mode!r}; numbers of zeros are possible"
    return None


class _Piece(NamedTuple):
    """A layer at its input: what it gives, and the linear map that it is there."""

    output: torch.Tensor
    tangent: Callable[[torch.Tensor], torch.Tensor]  # of the input -> of the output
    back: Callable[[torch.Tensor], torch.Tensor]  # gradient of the output -> of the input
    weight: torch.Tensor | None = None  # what the map depends on,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # and d<s, map(h)>/d weight of (s, h)


def _linear(layer: nn.Linear, x: torch.Tensor) -> _Piece:
    w = layer.weight
    return _Piece(
        layer(x),
        lambda h: linear(h, w),
        lambda s: s @ w,
        w,
        lambda s, h: s.flatten(0, -2).t() @ h.flatten(0, -2),
    )


def _conv2d(layer: nn.Conv2d, x: torch.Tensor) -> _Piece:
    w, shape = layer.weight, (layer.stride, layer.padding, layer.dilation)

    def backward(s, h, which):
        no_bias, no_output_padding = None, (0, 0)
        return torch.ops.aten.convolution_backward(
            s, h, w, no_bias, *shape, False, no_output_padding, layer.groups, which
        )

    return _Piece(
        layer(x),
        lambda h: conv2d(h, w, None, *shape, layer.groups),  # type: ignore[arg-type]
        lambda s: backward(s, x, (True, False, False))[0],
        w,
        lambda s, h: backward(s, h, (False, True, False))[1],
    )


def _batch_norm(layer: nn.BatchNorm2d, x: torch.Tensor) -> _Piece:
    """With fixed statistics: a factor for each channel."""
    deviation = (layer.running_var + layer.eps).rsqrt().to(x.dtype).view(-1, 1, 1)  # type: ignore[operator, union-attr]
    factor = deviation if layer.weight is None else deviation * layer.weight.view(-1, 1, 1)
    return _Piece(
        layer(x),
        lambda h: h * factor,
        lambda s: s * factor,
        layer.weight,
        lambda s, h: (s * h * deviation).sum((0, 2, 3)),
    )


def _slope(layer: nn.ReLU | nn.LeakyReLU, x: torch.Tensor) -> _Piece:
    slope = torch.full_like(x, getattr(layer, "negative_slope", 0.0)).masked_fill_(x > 0, 1)
    return _Piece(x * slope, lambda h: h * slope, lambda s: s * slope)


def _flatten(layer: nn.Flatten, x: torch.Tensor) -> _Piece:
    return _Piece(layer(x), layer, lambda s: s.reshape(x.shape))


LAYERS: dict[type[nn.Module], Callable[..., _Piece]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.ReLU: _slope,
    nn.LeakyReLU: _slope,
    nn.Flatten: _flatten,
    nn.BatchNorm2d: _batch_norm,
}


def _four_passes(net: nn.Sequential, x: torch.Tensor, judged: int, penalty: Penalty):
    """(P, gradient of every weight that P depends on, in the order of `weights_of`)."""
    pieces = []
    y = x
    for layer in net:
        pieces.append(LAYERS[type(layer)](layer, y))
        y = pieces[-1].output
    gradients = [torch.ones_like(y)]  # at every layer's output, from the last to the first
    for piece in reversed(pieces):
        gradients.append(piece.back(gradients[-1]))
    value, v = penalty(gradients.pop()[:, :judged])
    h = v if judged == x.shape[1] else torch.cat((v, torch.zeros_like(x[:, judged:])), 1)
    products = []
    for piece in pieces:
        s = gradients.pop()
        if piece.product is not None and piece.weight is not None:
            products.append(piece.product(s, h))
        h = piece.tangent(h)
    return value, products


def weights_of(net: nn.Sequential) -> list[torch.Tensor]:
    """The parameters that the penalty of a piecewise linear network depends on: no bias is one of them."""
    return [w for layer in net if (w := getattr(layer, "weight", None)) is not None]


def check_first_order(mode: str) -> None:
    """RuntimeError in a backward that shall be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"a gradient penalty of mode {mode!r} is of first order: use mode 'double' (create_graph=True)"
        )


class _Closed(torch.autograd.Function):
    """A value whose gradients, `products`, are known already. `tensors`: the products, then what they belong to."""

    @staticmethod
    def forward(ctx, value, count, *tensors):
        ctx.save_for_backward(*tensors[:count])
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        check_first_order("closed")
        products = ctx.saved_tensors
        return None, None, *([None] * len(products)), *(p * grad for p in products)


def as_mlp(net: nn.Sequential) -> tuple[list[torch.Tensor], list[torch.Tensor | None], float] | None:
    """The weights, biases and slope of linear layers with one kind of (Leaky)ReLU between, else None."""
    layers = list(net)
    linears = [layer for layer in layers[::2] if type(layer) is nn.Linear]
    activations = [layer for layer in layers[1::2] if isinstance(layer, nn.ReLU | nn.LeakyReLU)]
    slopes = {getattr(layer, "negative_slope", 0.0) for layer in activations}
    if len(linears) != len(activations) + 1 or len(linears) + len(activations) != len(layers) or len(slopes) != 1:
        return None
    return [layer.weight for layer in linears], [layer.bias for layer in linears], slopes.pop()


def closed_penalty(net: nn.Sequential, x: torch.Tensor, judged: int, center: float, penalty: Penalty) -> torch.Tensor:
    """The penalty of g, the gradient of the sum of net(x)'s outputs with respect to x's first `judged` channels."""
    weights = weights_of(net)
    with torch.no_grad():
        if (mlp := as_mlp(net)) and (op := penalty_op(x, *mlp)):
            value, flat = op(x.contiguous(), *mlp, judged, center)
            products = split(flat, weights, False)
        else:
            value, products = _four_passes(net, x, judged, penalty)
    return _Closed.apply(value, len(products), *products, *weights)
