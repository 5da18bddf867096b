"""What a training method is: its settings, its networks, one step, and how to sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from diffgan_fast.engine.config import TrainConfig
from diffgan_fast.engine.optim import FlatAdamW
from diffgan_fast.engine.state import State
from diffgan_fast.random import Key


@dataclass(frozen=True)
class Batch:
    """One step's data on the device: x [N, …] (images in [-1, 1]), labels [N] or None, number of its first sample."""

    x: torch.Tensor
    labels: torch.Tensor | None = None
    first_sample: int = 0


class Method(ABC):
    """One training method. A subclass is one file that reads like the algorithm box of its paper.

    Attributes: `name` and `help` (for lists and the command line), `Config` (its settings), `fine_tunes` (whether it
    starts from a trained `ddpm`), `has_denoiser` (whether it may start from another run's denoiser),
    `sampling_options` (what `sample` may be told beside, by name).
    """

    name: ClassVar[str]
    help: ClassVar[str]
    Config: ClassVar[type[TrainConfig]]
    fine_tunes: ClassVar[bool] = False
    has_denoiser: ClassVar[bool] = False
    sampling_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TrainConfig, shape: tuple[int, ...], num_classes: int = 0):
        self.config, self.shape, self.num_classes = config, shape, num_classes

    @abstractmethod
    def networks(self, given: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """All networks by name, on the CPU; those in `given` (the user's, or a base run's) are taken as they are."""

    @abstractmethod
    def optimizers(self, nets: dict[str, nn.Module]) -> dict[str, FlatAdamW]:
        """The optimiser of each network that trains."""

    def prepare(self, state: State, key: int, folder: Path) -> None:  # noqa: B027 (a hook that most leave empty)
        """What has to be done before the first step of a run, or of what is left of it. Nothing by default.

        In a run of several processes all call it; the main one writes.
        """

    @abstractmethod
    def step(self, state: State, batch: Batch, key: Key) -> dict[str, torch.Tensor]:
        """One training step. Returns the scalars to log, on the device.

        What it does depends on the host through `phase` alone, and it asks for no value of the device, so that it can
        be captured in a CUDA graph: all else that differs between steps lies in tensors. The key is then one, too.
        """

    def phase(self, step: int) -> Hashable:
        """What step `step` does: those of one phase do the same, with other numbers."""
        return None

    @abstractmethod
    def sample(
        self,
        state: State,
        n: int,
        key: int,
        *,
        first: int = 0,
        ema: bool = True,
        labels: torch.Tensor | None = None,
        **how: Any,
    ) -> torch.Tensor:
        """Samples first … first + n of the endless sequence that `key` names: [n, …], images in [-1, 1].

        Args:
            labels: int64 [n], the classes of the samples where the method has them; by default in turn. ValueError if
                it has none.
            how: of `sampling_options`, in place of what the config says.
        """

    @classmethod
    def pretrained_critic(cls, config: TrainConfig) -> str | None:
        """The method whose critic this one's starts from, if it does: it is trained first where none is given."""
        return None

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the networks that sampling uses, whose weights are averaged."""
        return ("denoiser",)

    def strips(self, state: State, x: torch.Tensor, key: int) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """Rows of a report's pictures over noise levels: name -> [(t, images)], from images x. None by default."""
        return {}

    def diagnose(self, state: State, batch: Batch, key: int) -> dict[str, list]:
        """Curves that a report shows, computed at the end of a run. None by default."""
        return {}

    def evaluation_loss(self, state: State, x: torch.Tensor, key: int) -> float | None:
        """The loss, with fresh noise, on samples x [N, …] that were not trained on. None where a method has none."""
        return None
