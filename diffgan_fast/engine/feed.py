"""The order of the data: which samples make the batch of a step, as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffgan_fast import random
from diffgan_fast.data import Data
from diffgan_fast.engine.memory import DataOn, placed
from diffgan_fast.engine.method import Batch
from diffgan_fast.engine.prefetch import Prefetch

WHOLE = slice(0, None)


class Order:
    """Which samples make a batch.

    Epochs are independent permutations, laid end to end and cut into batches, so that each sample is seen equally often
    and no batch is short. Batch `step` depends on the key and on `step` alone.
    """

    def __init__(self, samples: int, batch_size: int, key: int, device: torch.device):
        self._samples, self._batch_size, self._key, self._device = samples, batch_size, key, device
        self._epochs: dict[int, torch.Tensor] = {}

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            bits = random.bits(self._samples, random.fold_in(self._key, epoch), device=self._device)
            self._epochs[epoch] = torch.argsort(bits, stable=True)
        return self._epochs[epoch]

    def batch(self, step: int) -> torch.Tensor:
        """The samples of the batch of a step, counted from 0: int64 [batch_size]."""
        taken, position, left = [], step * self._batch_size, self._batch_size
        while left:
            epoch, offset = divmod(position, self._samples)
            some = self._permutation(epoch)[offset : offset + left]
            taken.append(some)
            position, left = position + len(some), left - len(some)
        return taken[0] if len(taken) == 1 else torch.cat(taken)


class Feed:
    """Batches of a data set, on the device, in an `Order`. They are the same wherever the data lie, bit for bit.

    Args:
        data: at least one sample.
        data_on: where it lies: see `placed`.
        flip: mirror half of the images.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        seed_key: int,
        device: torch.device,
        *,
        data_on: DataOn = "auto",
        flip: bool = False,
        channels_last: bool = False,
    ):
        if flip and data.points:
            raise ValueError("flip must be False: points are not mirrored")
        self.data, self.batch_size, self.device = placed(data, device, data_on), batch_size, device
        self._key, self._flip = random.fold_in(seed_key, "order"), flip
        self._channels_last = channels_last and len(data.shape) == 3
        self._order = self._ordered()

    def _ordered(self) -> Order:
        return Order(len(self.data), self.batch_size, self._key, self.data.values.device)

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """The batch of a step, counted from 0, or a part of it: the samples that the whole batch has there."""
        index = self._order.batch(step)[part]
        labels = None if self.data.labels is None else self.data.labels_of(index)
        return self._finished(step, part, self.data.batch(index), labels)

    @contextmanager
    def batches(self, steps: range, part: slice = WHOLE) -> Iterator[Iterator[Batch]]:
        """An iterator over what `batch` gives for these steps. Of data on the host they are gathered ahead."""
        if self.data.batch_device is None:
            yield (self.batch(step, part) for step in steps)
            return
        order, size = self._ordered(), len(range(*part.indices(self.batch_size)))  # one of the thread's own
        with Prefetch(self.data, lambda step: order.batch(step)[part], steps, size, self.device) as stored:
            yield (
                self._finished(step, part, self.data.ready(values), labels)
                for step, (values, labels) in zip(steps, stored, strict=True)
            )

    def _finished(self, step: int, part: slice, x: torch.Tensor, labels: torch.Tensor | None) -> Batch:
        if self._flip:
            key = random.fold_in(self._key, "flip", step)
            mirror = random.randint(2, len(x), key, first=part.start, device=self.device)
            x = torch.where(mirror.view(-1, 1, 1, 1).bool(), x.flip(-1), x)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return Batch(x, labels, part.start)
