"""What all critics share: what they see beside x, and how it is joined."""

import torch
from torch import Tensor, nn

from .embedding import time_fraction

INPUTS = (("x",), ("x", "t"), ("x", "x_t"), ("x", "x_t", "t"), ("x", "level"))


def is_main_of_join(forward):
    """Marks the `forward` of a critic whose logits are main(join(x, t, x_t)): see `ops.gradient_penalty`."""
    forward.is_main_of_join = True
    return forward


class Critic(nn.Module):
    """Base of the critics: logits = main(join(x, t, x_t)).

    Of its arguments a call uses only what `inputs` names, so that a method can call every critic in the same way. With
    x in the first channels of what `main` sees, `ops.gradient_penalty` can take `main` in closed form.

    Args:
        inputs: ("x",), ("x", "t"), ("x", "x_t"), ("x", "x_t", "t") or ("x", "level"): what is concatenated along the
            channels, in this order: "x", what is judged; "x_t", another of the same shape; "t", one constant channel
            (t - 1) / T; "level", one constant channel, the noise level in [0, 1] (see `AdaptiveDiffusion.level`).
        T: the number of time steps, needed where `inputs` has "t".

    Raises:
        ValueError: an argument is out of its range.
    """

    main: nn.Sequential
    features: int  # numbers a sample that the last layer of `main` judges

    def __init__(self, inputs: tuple[str, ...], T: int | None):
        super().__init__()
        if tuple(inputs) not in INPUTS:
            raise ValueError(f"inputs is {inputs!r}; it may be {', '.join(map(str, INPUTS))}")
        if "t" in inputs and (T is None or T < 1):
            raise ValueError(f"T is {T}; with the input 't' it must be the number of time steps, at least 1")
        self.inputs, self.T = tuple(inputs), T

    def joined(self, channels: int) -> int:
        """The channels that `main` sees where x has `channels`."""
        return channels * (1 + ("x_t" in self.inputs)) + ("t" in self.inputs) + ("level" in self.inputs)

    def check(self, x: Tensor) -> None:
        """ValueError where the critic is not made for the shape of `x`; of a subclass without its own, never."""

    def join(
        self, x: Tensor, t: Tensor | None = None, x_t: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """What `main` sees: `x` and whatever else `inputs` names, concatenated along the channels."""
        self.check(x)  # here, for the closed form of the gradient penalty calls this and not `forward`
        for name, given in (("t", t), ("x_t", x_t), ("level", level)):
            if name in self.inputs and given is None:
                raise ValueError(f"{name} is None; it must be given to a critic with inputs={self.inputs}")
        if self.inputs == ("x",):
            return x
        parts = [x]
        if "x_t" in self.inputs:
            assert x_t is not None  # checked above
            parts.append(x_t)
        if "t" in self.inputs:
            assert t is not None and self.T is not None  # checked above, and when the critic was made
            parts.append(_plane(time_fraction(t, self.T, x.dtype), x))
        if "level" in self.inputs:
            assert level is not None  # checked above
            parts.append(_plane(level.to(x.dtype), x))
        return torch.cat(parts, dim=1)


def _plane(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample, [N], as a channel of x."""
    if values.shape != x.shape[:1]:
        raise ValueError(f"t and level must be [{len(x)}] here, one a sample; got {list(values.shape)}")
    return values.view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])
