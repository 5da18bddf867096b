"""The arithmetic of a network's call."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def macs(network: nn.Module, *arguments: torch.Tensor, **more: torch.Tensor) -> int:
    """Multiply-accumulate operations of `network(*arguments, **more)`, without running it.

    Those of convolutions, linear layers and attention are counted; what the library's own ops do is not, which is all
    of `nets.MLPDenoiser` and its like. Batches of one sample give those of a sample.

    Raises:
        ValueError: there is nothing that is counted.
    """
    network = copy.deepcopy(network).to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*(x.to("meta") for x in arguments), **{name: x.to("meta") for name, x in more.items()})
    if not counter.get_total_flops():
        raise ValueError(f"network {type(network).__name__} has no convolution, linear layer or attention to count")
    return counter.get_total_flops() // 2
