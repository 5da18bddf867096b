"""The arithmetic of networks, counted."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MacCounter(TorchDispatchMode):
    """Counts, while it is entered, the multiply-accumulates of convolutions and products of matrices, backward passes
    included: `total`. It goes through double backward too, where torch's FlopCounterMode does not."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out) // 2
        return out


def macs(network: nn.Module, *arguments: torch.Tensor, **more: torch.Tensor) -> int:
    """Multiply-accumulate operations of `network(*arguments, **more)`, without running it.

    Those of convolutions, linear layers and attention are counted; what the library's own ops do is not, which is all
    of `nets.MLPDenoiser` and its like. Batches of one sample give those of a sample.

    Raises:
        ValueError: there is nothing that is counted.
    """
    network = copy.deepcopy(network).to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), MacCounter() as counter:
        network(*(x.to("meta") for x in arguments), **{name: x.to("meta") for name, x in more.items()})
    if not counter.total:
        raise ValueError(f"network {type(network).__name__} has no convolution, linear layer or attention to count")
    return counter.total
