"""The optimiser of the engine: AdamW over all parameters of a network as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = (
    16  # elements: where each parameter starts in the vector, so that vector loads of its own kernels are aligned
)


class FlatAdamW(torch.optim.AdamW):
    """AdamW (without decay: Adam) in torch's fused form, over a module's trainable parameters as one vector.

    The parameters become views of the vector, in the memory format they have. A step, a norm or an exchange between
    processes is then one operation, whatever the number of layers; of small networks these would else cost as much as
    the gradients. One vector for each dtype.

    Args:
        module: on its device; moving it afterwards cuts it off from the optimiser.
        lr, betas, weight_decay: as for `torch.optim.AdamW`.

    Raises: ValueError if no parameter of the module is trainable.
    """

    def __init__(
        self, module: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ):
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"{type(module).__name__} has no parameter that requires gradients")
        self.names, self.parameters = list(named), list(named.values())
        self._gradients: list[Tensor] = []
        dtypes = dict.fromkeys(p.dtype for p in self.parameters)
        vectors = [self._flatten([p for p in self.parameters if p.dtype == dtype]) for dtype in dtypes]
        self.parameters.sort(key=lambda p: list(dtypes).index(p.dtype))  # as their gradients stand in the vectors
        super().__init__(vectors, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def _flatten(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        starts, end = [], 0
        for p in parameters:
            starts.append(end)
            end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        vector = nn.Parameter(parameters[0].new_zeros(end))
        vector.grad = torch.zeros_like(vector)
        for p, start in zip(parameters, starts, strict=True):
            strides = torch.empty_like(p).stride()  # dense, in p's memory format
            place = vector.detach().as_strided(p.shape, strides, start)
            place.copy_(p.detach())
            p.data = place
            self._gradients.append(vector.grad.as_strided(p.shape, strides, start))
        return vector

    def backward(self, loss: Tensor) -> None:
        """Puts a loss's gradient into the vectors. No other parameters' gradients are computed."""
        vector = self.param_groups[0]["params"][0]
        if self.parameters[0].untyped_storage().data_ptr() != vector.untyped_storage().data_ptr():
            raise RuntimeError("the module was moved or cast after its optimiser was made: it would not train")
        found, places = [], []
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for gradient, place in zip(gradients, self._gradients, strict=True):
            if gradient is None:  # the loss does not depend on it
                place.zero_()
            else:
                found.append(gradient)
                places.append(place)
        if found:
            torch._foreach_copy_(places, found)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """That of `torch.optim.AdamW` without its hooks and checks, which take longer than a small network's update."""
        found_inf = getattr(self, "found_inf", None)  # a GradScaler's word: if 1, nothing is to change
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            known: list[list[Tensor]] = [[], [], [], [], [], []]
            self._init_group(group, *known)
            vectors, gradients, means, squares, _, steps = known
            for vector, gradient, mean, square, step in zip(vectors, gradients, means, squares, steps, strict=True):
                step += 1
                torch._fused_adamw_(
                    [vector],
                    [gradient],
                    [mean],
                    [square],
                    [],
                    [step],
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    found_inf=found_inf,
                )
                if found_inf is not None:
                    step -= found_inf

    step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it in its hooks

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the gradient in place: the vectors' gradients are what `backward` fills."""
        super().zero_grad(set_to_none=False)

    def release(self) -> None:
        """Gives every parameter memory of its own again, once training is over."""
        for p in self.parameters:
            p.data = p.data.clone()

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.parameters[0].device

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient, a vector for each dtype."""
        return [vector.grad for group in self.param_groups for vector in group["params"]]

    @torch.no_grad()
    def clip(self, largest: float) -> None:
        """Scales the gradient down to a Euclidean norm of `largest`, if it has more."""
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g).double() for g in self.gradients]))
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for g in self.gradients:
            g.mul_(factor)
