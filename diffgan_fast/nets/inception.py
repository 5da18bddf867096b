"""InceptionV3 as FID defines it: the graph of TensorFlow of 2015-12-05, under the names of its PyTorch file."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = int | tuple[int, int]
SIDE = 299


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU. Without stride the size stays, unless `padding` says otherwise."""

    def __init__(self, width: int, out: int, kernel: Size = 1, stride: int = 1, padding: int | None = None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (kernel[0] // 2, kernel[1] // 2) if stride == 1 and padding is None else (padding or 0,) * 2
        self.conv = nn.Conv2d(width, out, kernel, stride, pads, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean_pool(x: Tensor) -> Tensor:
    """TensorFlow's: zeros of the padding do not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


class _Mixed(nn.Module):
    """Chains of convolutions side by side, the pooled input's last; their outputs are concatenated.

    A chain is a list of (out, kernel, stride); two such in a list see the same input, as parts a and b. A chain of one
    carries the plain name, a longer one numbers its convolutions, as the public file does.
    """

    def __init__(self, width: int, pool, **branches: list):
        super().__init__()
        self.pool, self.chains = pool, {}
        self.width = 0
        for name, convs in branches.items():
            chain, inner = [], width
            for i, step in enumerate(convs, 1):
                stem = name if len(convs) == 1 else f"{name}_{i}"
                parts = (
                    dict(zip((stem + "a", stem + "b"), step, strict=True)) if isinstance(step, list) else {stem: step}
                )
                for part, settings in parts.items():
                    self.add_module(part, _Conv(inner, *settings))
                inner = sum(settings[0] for settings in parts.values())
                chain.append(tuple(parts))
            self.chains[name] = chain
            self.width += inner

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for name, chain in self.chains.items():
            y = self.pool(x) if name == "branch_pool" else x
            for parts in chain:
                y = torch.cat([self.get_submodule(part)(y) for part in parts], 1)
            found.append(y)
        return torch.cat(found, 1)


def _block_a(width: int, pooled: int) -> _Mixed:
    return _Mixed(
        width, _mean_pool, branch1x1=[(64,)], branch5x5=[(48,), (64, 5)], branch3x3dbl=[(64,), (96, 3), (96, 3)],
        branch_pool=[(pooled,)],
    )  # fmt: skip


def _block_c(width: int, inner: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    return _Mixed(
        width, _mean_pool, branch1x1=[(192,)], branch7x7=[(inner,), (inner, row), (192, column)],
        branch7x7dbl=[(inner,), (inner, column), (inner, row), (inner, column), (192, row)], branch_pool=[(192,)],
    )  # fmt: skip


def _block_e(width: int, pool) -> _Mixed:
    split = [(384, (1, 3)), (384, (3, 1))]
    return _Mixed(
        width, pool, branch1x1=[(320,)], branch3x3=[(384,), split], branch3x3dbl=[(448,), (384, 3), split],
        branch_pool=[(192,)],
    )  # fmt: skip


class InceptionV3(nn.Module):
    """The network whose features FID, KID and the Inception score are defined on.

    Its state dict has the 566 names and shapes of ``pt_inception-2015-12-05-6726825d.pth``. It differs from
    torchvision's network in its pools (as TensorFlow has them, the last a maximum) and its 1008 classes.

    Source: Szegedy et al. 2015, arXiv:1512.00567; the graph: github.com/mseitzer/pytorch-fid, Apache-2.0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _Mixed(
            288, _shrink, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64,), (96, 3), (96, 3, 2)], branch_pool=[]
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_c(768, n) for n in (128, 160, 160, 192))
        self.Mixed_7a = _Mixed(
            768, _shrink, branch3x3=[(192,), (320, 3, 2)],
            branch7x7x3=[(192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[],
        )  # fmt: skip
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, _mean_pool), _block_e(2048, _max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[n, 2048]`` and logits ``[n, 1008]`` without their bias, as the Inception score takes them.

        Args:
            x: ``[n, 3, 299, 299]``, (0..255 - 128) / 128.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_shrink(x))))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize_like_tensorflow1(x: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear to ``[n, c, side, side]`` as TensorFlow 1 did: pixel i comes from i · size / side, no half pixel."""

    def along(x: Tensor, axis: int) -> Tensor:
        size = x.shape[axis]
        place = torch.arange(side, device=x.device, dtype=x.dtype) * (size / side)
        low = place.long()
        weight = (place - low).view([-1 if i == axis else 1 for i in range(4)])
        below = x.index_select(axis, low)
        return below + (x.index_select(axis, (low + 1).clamp(max=size - 1)) - below) * weight

    return along(along(x, 3), 2)
