"""EfficientNet-Lite0, under the names of the public PyTorch file."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (kernel, stride of the first, expansion, out, repeats)
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
          (3, 1, 6, 320, 1))  # fmt: skip


class _SameConv(nn.Conv2d):
    """Padded as TensorFlow pads even sizes: k - stride zeros on an axis, the odd one behind."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(width, out, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self.pads = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pads) if any(self.pads) else x)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual: expand, convolve each channel, project; no activation after the last."""

    def __init__(self, width: int, kernel: int, stride: int, expansion: int, out: int):
        super().__init__()
        inner = width * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _SameConv(width, inner), _norm(inner)
        self._depthwise_conv, self._bn1 = _SameConv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _SameConv(inner, out), _norm(out)
        self.expands, self.skips = expansion != 1, stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """4.7 million parameters; its state dict has the names and shapes of ``efficientnet-lite0-57934424.pth``.

    Source: Tan and Le 2019, arXiv:1905.11946; Lite: github.com/tensorflow/tpu, models/official/efficientnet/lite.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for kernel, stride, expansion, out, repeats in STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, kernel, stride if i == 0 else 1, expansion, out))
                width = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _SameConv(width, 1280), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def feature_maps(self, x: Tensor) -> Tensor:
        """``[n, 3, H, W]``, (0..255 - 127) / 128, to ``[n, 1280, H/32, W/32]``."""
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features ``[n, 1280]`` and ImageNet logits ``[n, 1000]`` (at 224 pixels it was trained)."""
        features = torch.mean(self.feature_maps(x), (2, 3))
        return features, self._fc(features)
