"""The convolution of the networks that train on the CPU too."""

from torch import Tensor, nn

from diffgan_fast.ops.closed import LAYERS
from diffgan_fast.ops.conv import conv2d


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with one kernel size, stride and padding for both dimensions, trained faster on a CPU.

    For networks in channels_last, `net.to(memory_format=torch.channels_last)`; see `ops.conv.conv2d`. Its parameters,
    their names and their initial values are those of `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        return conv2d(input, self.weight, self.bias, stride=self.stride[0], padding=int(self.padding[0]))


LAYERS[Conv2d] = LAYERS[nn.Conv2d]  # for the closed form of gradient penalties
