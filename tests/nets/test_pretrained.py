"""The networks of public weights: names and shapes of their files, and what the published code gives.

Digests and values are those of torch-fidelity 0.4.0 (FeatureExtractorInceptionV3) and efficientnet-lite-pytorch 0.1.0
on the same seeded weights; both were equal bit for bit to ours.
"""

import hashlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffgan_fast.nets.efficientnet import EfficientNetLite0
from diffgan_fast.nets.inception import InceptionV3, resize_like_tensorflow1
from diffgan_fast.nets.vgg import VGG16


def digest(net):
    """Of the names and shapes of a state dict."""
    lines = (f"{name} {list(value.shape)}\n" for name, value in sorted(net.state_dict().items()))
    return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def seeded(net):
    """Convolutions and matrices from NumPy's generator, with He's variance; the last layer without bias."""
    draw = np.random.RandomState(0).standard_normal
    for name, value in sorted(net.state_dict().items()):
        if name.endswith("fc.bias"):
            value.zero_()
        elif value.ndim > 1:
            value.copy_(torch.from_numpy(draw(value.shape) * (2 / value[0].numel()) ** 0.5))
    return net.eval().requires_grad_(False)


def values(rows, norm):
    """A few entries and the norm of all."""
    return pytest.approx(np.array([*np.ravel(rows), norm]), rel=1e-4, abs=1e-5)


def entries(found, columns):
    return np.array([*found[:, columns].flatten().tolist(), found.double().norm().item()])


def test_inception_is_that_of_the_public_file():
    with torch.device("meta"):
        net = InceptionV3()
    assert digest(net) == "535024ec684de35d" and len(net.state_dict()) == 566
    assert sum(p.numel() for p in net.parameters()) == 23_850_960


def test_inception_gives_what_torch_fidelity_gives():
    pixels = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 3, 32, 40))).float()
    features, logits = seeded(InceptionV3())((resize_like_tensorflow1(pixels) - 128) / 128)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert entries(features, [0, 700, 1500, 2047]) == values(
        [[0.10265470, 1.51290011, 0.16465710, 2.04810119], [0.10291527, 1.56254780, 0.17595303, 2.15997648]],
        44.86545352,
    )
    assert entries(logits, [0, 500, 1007]) == values(
        [[-1.24692941, -0.15604699, -0.01666552], [-1.33381677, -0.15982959, -0.01612538]], 44.04387216
    )


def test_resizing_takes_every_second_pixel_and_repeats_at_the_end():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_like_tensorflow1(x, 2)[0, 0].tolist() == [[0, 2], [0, 2]]
    assert resize_like_tensorflow1(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_efficientnet_is_that_of_the_public_file():
    with torch.device("meta"):
        net = EfficientNetLite0()
    assert digest(net) == "aca3f01a5e7ebddf" and len(net.state_dict()) == 296


def test_efficientnet_gives_what_the_published_code_gives():
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 64, 96))).float()
    net = seeded(EfficientNetLite0())
    features, logits = net(x)
    assert net.feature_maps(x).shape == (2, 1280, 2, 3)
    assert entries(features, [0, 600, 1279]) == values([[0, 0.29128975, 0.34461072], [0, 0.18718721, 0.36929402]],
                                                       97.57985552)  # fmt: skip
    assert entries(logits, [0, 500, 999]) == values([[2.61903048, 3.13889837, 0.06482673],
                                                     [2.99873495, 3.23032522, -0.56878853]], 120.12827753)  # fmt: skip


def test_vgg16_is_that_of_torchvisions_file():
    with torch.device("meta"):
        net = VGG16()
    assert sum(p.numel() for p in net.parameters()) == 138_357_544
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    layers = [f"features.{i}" for i in convs] + [f"classifier.{i}" for i in (0, 3, 6)]
    assert list(net.state_dict()) == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert shapes["features.28.weight"] == [512, 512, 3, 3] and shapes["classifier.0.weight"] == [4096, 25088]


def test_vgg16_follows_the_paper():
    """Configuration D: 2, 2, 3, 3, 3 convolutions of 3x3, each stage ends in a max-pool; three dense layers."""
    net = VGG16().eval().requires_grad_(False)
    x = torch.randn(2, 3, 224, 224)
    weights, y = iter(net.state_dict().values()), x
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            y = F.conv2d(y, next(weights), next(weights), padding=1).clamp_min(0)
        y = F.max_pool2d(y, 2)
    y = (y.reshape(2, 25088) @ next(weights).T + next(weights)).clamp_min(0)
    y = (y @ next(weights).T + next(weights)).clamp_min(0)
    features, logits = net(x)
    torch.testing.assert_close(features, y, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, y @ next(weights).T + next(weights), rtol=1e-4, atol=1e-6)
