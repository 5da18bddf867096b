"""The group norms of the U-Nets."""

from torch import Tensor, nn

from diffgan_fast.ops.norm import group_norm_silu

EPS = 1e-6


def groups_of(channels: int) -> int:
    """As many groups as fit: at most 32, each of at least 4 channels."""
    return max(g for g in range(1, 33) if channels % g == 0 and channels // g >= 4)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups_of(channels), channels, eps=EPS)


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm` and SiLU, one kernel on a CPU for networks in channels_last; see `ops.norm.group_norm_silu`."""

    def __init__(self, channels: int):
        super().__init__(groups_of(channels), channels, eps=EPS)

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and [N, C] that is added to each pixel before -> [N, C, H, W]."""
        return group_norm_silu(input, self.weight, self.bias, shift, groups=self.num_groups, eps=self.eps)
