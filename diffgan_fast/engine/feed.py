"""The order of the data: which samples make the batch of a step, as a function of (seed, step)."""

from __future__ import annotations

import torch

from diffgan_fast import random
from diffgan_fast.data import Data
from diffgan_fast.engine.method import Batch


class Feed:
    """Batches of a data set that lies on the device.

    Epochs are independent permutations, laid end to end and cut into batches, so that each sample is seen equally often
    and no batch is short. Batch `step` depends on the seed and on `step` alone.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        seed_key: int,
        device: torch.device,
        *,
        flip: bool = False,
        channels_last: bool = False,
    ):
        if flip and data.points:
            raise ValueError("flip must be False: points are not mirrored")
        self.data, self.batch_size, self.device = data.to(device), batch_size, device
        self._key, self._flip = random.fold_in(seed_key, "order"), flip
        self._channels_last = channels_last and len(data.shape) == 3
        self._epochs: dict[int, torch.Tensor] = {}

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            bits = random.bits(len(self.data), random.fold_in(self._key, epoch), device=self.device)
            self._epochs[epoch] = torch.argsort(bits, stable=True)
        return self._epochs[epoch]

    def batch(self, step: int, part: slice = slice(0, None)) -> Batch:
        """The batch of a step, counted from 0, or a part of it: the samples that the whole batch has there."""
        n, taken = len(self.data), []
        position, left = step * self.batch_size, self.batch_size
        while left:
            epoch, offset = divmod(position, n)
            some = self._permutation(epoch)[offset : offset + left]
            taken.append(some)
            position, left = position + len(some), left - len(some)
        index = (taken[0] if len(taken) == 1 else torch.cat(taken))[part]
        x = self.data.batch(index)
        if self._flip:
            key = random.fold_in(self._key, "flip", step)
            mirror = random.randint(2, len(index), key, first=part.start, device=self.device)
            x = torch.where(mirror.view(-1, 1, 1, 1).bool(), x.flip(-1), x)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return Batch(x, None if self.data.labels is None else self.data.labels_of(index), part.start)
