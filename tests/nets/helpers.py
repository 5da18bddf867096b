"""What several tests of the networks share."""

import torch


def count(network):
    """The number of parameters."""
    return sum(p.numel() for p in network.parameters())


def randomise(network, seed=0, scale=0.1):
    """`network` with every parameter drawn from N(0, scale²), so that no zeroed layer hides a part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * noise)
    return network


def images(n, channels, size, seed=1, dtype=torch.float32):
    """Standard normal images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
