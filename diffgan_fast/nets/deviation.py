"""How much samples differ, for a critic to see."""

import torch
from torch import Tensor, nn


class MinibatchDeviation(nn.Module):
    """One further channel: how much the samples of a group differ, √(variance + 1e-8) averaged over all else.

    With 4 a group, samples 4k … 4k + 3 are one, so that in the global batch the groups are the same however it is
    divided among processes or micro-batches, if each takes a multiple of 4. (The reference groups n, n + N/4, n + N/2
    and n + 3N/4: for a random batch the same statistic.) Fewer samples than a group has are one group.

    Args:
        group: samples that are compared.

    Source: Karras et al. 2018, §3; in groups: Karras et al. 2020, and their code.
    """

    def __init__(self, group: int = 4):
        super().__init__()
        self.sample_group = group  # several processes must each have whole groups

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + 1, H, W]. ValueError unless N is at most the group, or a multiple of it."""
        n, group = len(x), self.sample_group
        size = min(n, group)
        if n == 0 or n % size:
            raise ValueError(
                f"x holds {n} samples; a critic that compares them in groups takes 1 to {group}, or a multiple of "
                f"{group}"
            )
        groups = x.unflatten(0, (-1, size)).to(torch.promote_types(x.dtype, torch.float32))
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        channel = deviation.repeat_interleave(size).to(x.dtype)
        return torch.cat([x, channel[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
