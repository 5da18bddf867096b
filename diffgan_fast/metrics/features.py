"""Features of images from a small classifier, trained on the data at hand and cached."""

import json
import os
from hashlib import blake2b
from math import ceil, log2
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import files
from ..data import Data, to_uint8
from ..data.registry import cache_dir

DIGITS_WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")
RECIPE = 1  # part of the cache's file names: raise it when the network or its training changes
IMAGES_SEEN, MAX_EPOCHS, BATCH, SEED = 60_000, 600, 128, 0


def quantise(x: Tensor) -> Tensor:
    """Images in [-1, 1] as they are once stored as uint8 (:func:`diffgan_fast.data.to_uint8`)."""
    return to_uint8(x).to(torch.float32).div_(127.5).sub_(1)


def weights_hash(net: nn.Module, about: str = "") -> str:
    """BLAKE2b (16 hex digits) of all weights of a network, and of what else makes its features what they are."""
    digest = blake2b(about.encode(), digest_size=8)
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()


class DomainClassifier(nn.Module):
    """A small convolutional classifier of one data set, whose penultimate layer gives features.

    Scores on its features compare models of that data set and say nothing beyond it: they are labelled
    "(domain)" and go with :attr:`hash`. Get one by :meth:`for_data`.

    Args:
        shape: (C, H, W) of an image, H and W at least 8.
        classes: number of classes K.

    Attributes:
        name: "domain".
        comparable: False: scores cannot be compared with published ones.
        accuracy: share of held-out images classified correctly, 0..1, set by training.
    """

    name = "domain"
    comparable = False

    def __init__(self, shape: tuple[int, ...], classes: int):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 8:
            raise ValueError(f"shape must be (C, H, W) with H and W at least 8, not {tuple(shape)}")
        if classes < 2:
            raise ValueError(f"classes must be at least 2, not {classes}")
        self.shape, self.classes, self.accuracy = tuple(shape), classes, float("nan")
        side = min(shape[1:])
        layers, width = [], shape[0]
        for i in range(max(2, ceil(log2(side / 4)))):  # halve the image down to about 4 pixels
            out, stride = min(32 << i, 128), 1 if i == 0 and side < 16 else 2
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits.

        Args:
            images: float ``[n, C, H, W]`` in [-1, 1]; rounded to uint8 values first, as if stored.

        Returns:
            Features ``[n, d]`` (d is 64, or 128 for images above 16 pixels) and class logits ``[n, K]``.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images must be [n, {', '.join(map(str, self.shape))}], not {list(images.shape)}")
        features = self.body(quantise(images))
        return features, self.head(features)

    @property
    def hash(self) -> str:
        """BLAKE2b (16 hex digits) of all weights: scores are comparable only where it is the same."""
        return weights_hash(self)

    @classmethod
    def for_data(cls, data: Data) -> "DomainClassifier":
        """The classifier of a data set: shipped (``digits``), cached, or trained now (minutes) and cached.

        Args:
            data: labelled images, normally a training split. The cache goes by their fingerprint.

        Returns:
            The classifier in evaluation mode, on the device of the data.

        Raises:
            ValueError: points, or images without labels.
        """
        if data.points:
            found = list(data.values.shape)
            raise ValueError(f"data {data.name!r} must be images [N, C, H, W], not points {found}")
        if data.labels is None:
            raise ValueError(
                f"data {data.name!r} has no labels, so no domain classifier can be trained on it: pass "
                "labels= [N] to load, or another extractor: 'effl0', or a callable, images -> features [n, d] "
                "(--extractor effl0; in training evaluate_on='effl0')"
            )
        if data.name == "digits" and data.shape == (1, 8, 8) and data.num_classes == 10:
            return cls.load(DIGITS_WEIGHTS).to(data.device)
        path = cache_dir() / "classifiers" / f"{data.fingerprint}-{RECIPE}.safetensors"
        if not path.exists():
            cls.train_on(data).save(path)
        return cls.load(path).to(data.device)

    @classmethod
    def train_on(cls, data: Data, held_out: Data | None = None) -> "DomainClassifier":
        """Train a classifier, with random numbers of its own.

        Args:
            data: labelled images.
            held_out: labelled images on which ``accuracy`` is measured; None keeps a tenth of ``data``.

        Returns:
            The trained classifier in evaluation mode, on the device of the data.
        """
        if len(data) < 2:
            raise ValueError(
                f"data {data.name!r} must hold at least 2 images to train a classifier on, not {len(data)}"
            )
        generator = torch.Generator().manual_seed(SEED)
        order = torch.randperm(len(data), generator=generator)
        tested = order[: max(1, len(data) // 10)]
        if held_out is not None:
            tested = torch.arange(len(held_out))
        else:
            held_out, order = data, order[len(tested) :]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            net = cls(data.shape, data.num_classes).to(data.device)
        net._fit(data, order, generator)
        with torch.no_grad():
            guesses = torch.cat([net(held_out.batch(part))[1].argmax(1) for part in tested.split(500)])
        net.accuracy = (guesses == held_out.labels_of(tested)).double().mean().item()
        return net

    def _fit(self, data: Data, order: Tensor, generator: torch.Generator) -> None:
        """AdamW on a one-cycle learning rate, whole epochs that add up to about IMAGES_SEEN images, or MAX_EPOCHS."""
        batch = min(BATCH, len(order))
        per_epoch = len(order) // batch
        steps = per_epoch * min(MAX_EPOCHS, max(1, round(IMAGES_SEEN / len(order))))
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        self.train()
        for step in tqdm(range(steps), desc=f"training the domain classifier of {data.name}", disable=None):
            if step % per_epoch == 0:
                order = order[torch.randperm(len(order), generator=generator)]
            index = order[step % per_epoch * batch :][:batch]
            loss = F.cross_entropy(self(data.batch(index))[1], data.labels_of(index))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        self.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike) -> None:
        """Write weights and description to one safetensors file, atomically."""
        about = {"shape": list(self.shape), "classes": self.classes, "accuracy": self.accuracy}
        content = save({k: v.cpu() for k, v in self.state_dict().items()}, {"classifier": json.dumps(about)})
        files.write(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DomainClassifier":
        """Read what :meth:`save` wrote: the classifier in evaluation mode, on the CPU."""
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["classifier"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        net = cls(tuple(about["shape"]), about["classes"])
        net.load_state_dict(weights)
        net.accuracy = about["accuracy"]
        return net.eval().requires_grad_(False)
