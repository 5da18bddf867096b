"""A training run: made by `dgf.train`, found again by `dgf.load`, ready to sample from, to measure and to go on."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from diffgan_fast import data as data_sets
from diffgan_fast import files, random
from diffgan_fast import metrics as measures
from diffgan_fast.engine import Method, State, checkpoint, distributed, out_of_memory
from diffgan_fast.engine.memory import placed
from diffgan_fast.engine.precision import Precision, reduced
from diffgan_fast.engine.precision import check as check_precision
from diffgan_fast.methods import find
from diffgan_fast.metrics.evaluation import MAX_REFERENCE
from diffgan_fast.metrics.extraction import Seen, describe, see
from diffgan_fast.metrics.extractors import chosen_extractor

# In images that are drawn at a time, unless told: at 256 pixels DDGAN's generator takes 190 MB for each
NUMBERS = 500 * 3 * 32 * 32


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return picked


def fingerprint(net: nn.Module) -> str:
    """BLAKE2b of a network's weights: who it is."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def build(method: Method, given: dict[str, nn.Module], seed: int, device: torch.device) -> State:
    """A method's networks, initialised from the seed, on the device, with their optimisers."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(random.fold_in(random.key(seed), "networks"))
        nets = method.networks(given)
    layout = torch.channels_last if method.config.channels_last else torch.contiguous_format
    # torch's stubs leave `memory_format` out
    nets = {name: net.to(device=device, memory_format=layout) for name, net in nets.items()}  # type: ignore[call-overload]
    return State(nets, method.optimizers(nets), method.averaged, method.config)


class Run:
    """One run and its directory.

    Attributes:
        path: the directory.
        method, state: the training method, and its networks as they are now.
        seed: the run's seed.
        data_name: what the data is called.
        given: names of the networks that were the user's own.
        best: whether this is the checkpoint that scored best in training, and not the last.
    """

    def __init__(
        self,
        path: Path,
        method: Method,
        state: State,
        seed: int,
        data: Any,
        settings: dict[str, Any],
        *,
        best: bool = False,
    ):
        self.path, self.method, self.state, self.seed, self.best = path, method, state, seed, best
        self._data, self.data_name, self.given = data, settings["data"], tuple(settings["given"])
        self._size = settings.get("size")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.method.name}, step {self.state.step} of {self.method.config.steps})"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: scalars, one row a logged step."""
        return checkpoint.read_rows(self.path / "metrics.jsonl")

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.history[-1]["seconds"] if self.history else 0.0

    @property
    def _device(self) -> torch.device:
        return next(p for net in self.state.nets.values() for p in net.parameters()).device

    @property
    def named(self) -> bool:
        """Whether the data are one of `dgf.datasets()`."""
        return isinstance(self._data, str) and self._data in data_sets.datasets()

    def sample(
        self,
        n: int,
        seed: int = 0,
        first: int = 0,
        *,
        ema: bool = True,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        batch: int | None = None,
        precision: Precision = "fp32",
        progress: bool = False,
        together: bool = False,
        **how: Any,
    ) -> torch.Tensor:
        """Samples first … first + n of the endless sequence of a seed.

        Args:
            n: how many, at least 1.
            ema: from the averaged weights, if the run has them.
            labels: the class of all samples, or of each, 0..num_classes-1, of a conditional run; by default in turn.
            batch: how many at a time, by default 10,000 points, or images of 1.5 million numbers in all, at most 500
                (of 3x32x32 500, of 3x256x256 7); it does not change the noise.
            precision: what the networks compute in; see docs/runs.md. The samples' own arithmetic is float32.
            progress: show a progress bar, on a terminal.
            together: every process of a run calls this alike; each draws its part, and all return all samples. Else
                this process draws all of them, without the others.
            how: what the method's `sampling_options` name, in place of the run's settings; of a denoiser steps=,
                sampler=, eta=, variance=, clip_x0=, guidance_scale=, as for `sampling.Reverse`.

        Returns: float32 [n, C, H, W] in [-1, 1], or points [n, D], on the CPU.
        Raises: ValueError for arguments out of range; torch.OutOfMemoryError, which tells what to do.
        """
        with distributed.acting(together):
            options: dict[str, Any] = dict(ema=ema, labels=labels, batch=batch, precision=precision, progress=progress)
            draw = self._drawing(n, seed, first, **options, **how)
            parts = distributed.gather(draw, everywhere=True)
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _drawing(
        self,
        n: int,
        seed: int,
        first: int = 0,
        *,
        ema: bool = True,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        batch: int | None = None,
        precision: Precision = "fp32",
        progress: bool = False,
        **how: Any,
    ) -> Callable[[], torch.Tensor]:
        """What draws the part of the samples that `sample` names which is this process's, once they are checked."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if batch is not None and batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        device = self._device
        check_precision(precision, device)
        if unknown := how.keys() - set(self.method.sampling_options):
            known = ", ".join(self.method.sampling_options) or "none"
            wrong = ", ".join(sorted(unknown))
            raise ValueError(f"no options of sampling by method {self.method.name!r}: {wrong} (there are: {known})")
        if labels is not None:
            if not self.method.num_classes:
                raise ValueError(f"labels must be None: the data {self.data_name!r} have no classes")
            labels = torch.as_tensor(labels)
            top, whole = self.method.num_classes - 1, labels.dtype == torch.int64
            if not whole or labels.shape not in ((), (n,)) or not 0 <= labels.min() <= labels.max() <= top:
                raise ValueError(f"labels must be one int or {n} ints in 0..{top}, got {labels.tolist()}")
            labels = labels.expand(n)
        asked = dict(n=n, seed=seed, first=first, ema=ema, labels=labels if labels is None else labels.tolist(), **how)
        distributed.check_same({**asked, "precision": precision, "step": self.state.step})
        numbers = math.prod(self.method.shape)
        batch = batch or (max(1, min(500, NUMBERS // numbers)) if len(self.method.shape) == 3 else 10_000)
        key, mine = random.fold_in(random.key(seed), "sample"), distributed.part(n)
        shown = progress and distributed.is_main()

        def draw() -> torch.Tensor:
            parts = [torch.empty(0, *self.method.shape, dtype=torch.float32)]
            with tqdm(total=mine.stop - mine.start, desc="samples", unit="sample", disable=not shown or None) as bar:
                for i in range(mine.start, mine.stop, batch):
                    end = min(i + batch, mine.stop)
                    given = None if labels is None else labels[i:end]
                    options: dict[str, Any] = dict(first=first + i, ema=ema, labels=given, **how)
                    try:
                        with reduced(precision, device):
                            parts.append(self.method.sample(self.state, end - i, key, **options).cpu())
                    except RuntimeError as error:
                        if not out_of_memory(error):
                            raise
                        told = f"out of memory with {batch} samples at a time: give a smaller batch"
                        raise torch.OutOfMemoryError(told) from error
                    bar.update(end - i)
            return torch.cat(parts)

        return draw

    def reference(self, split: str = "train") -> data_sets.Data:
        """All of "train", also if a subset was trained on, or the "test" split of a named data set or a folder."""
        if self._data is None:
            raise ValueError("this run was trained on your own data: pass it to dgf.load as data=")
        if split != "train" and not isinstance(self._data, str):
            raise ValueError(f"split must be 'train': {self.data_name!r} has no other")
        return data_sets.load(self._data, split=split, size=self._size)

    def evaluate(
        self,
        n: int = 2000,
        *,
        metrics: Sequence[str] | None = None,
        seed: int = 1,
        extractor: Any = None,
        max_reference: int | None = MAX_REFERENCE,
        together: bool = False,
        **how: Any,
    ) -> dict[str, Any]:
        """Measures n samples against the training data, by default with all metrics for this kind of data.

        See `metrics.evaluate`. Beside its scores stand `sample_seconds`, which drawing the n samples took, and, where a
        method on points tells it, `eval_loss` on the test split; `sampling` is `how`, which `sample` is given. The
        result is kept as evaluation.json (of the best checkpoint: evaluation-best.json).

        With together=True every process of a run calls this alike: each draws its part of the samples and takes its
        features, and all return what the main one makes of them. Else this process does it without the others.
        """
        with distributed.acting(together):
            device = self._device
            with distributed.main_first():  # what has to be fetched is fetched once
                reference, held_out = self.reference(), data_sets.load_test(self._data, size=self._size)
            data_on = self.method.config.data_on
            reference = placed(reference, device, data_on)
            held_out = None if held_out is None else placed(held_out, device, data_on)
            given: dict[str, Any] = dict(metrics=metrics, extractor=extractor, max_reference=max_reference)
            result = self.measure(n, seed, reference, held_out=held_out, how=how, **given)
            return distributed.from_main(lambda: self._keep(result, held_out, seed, how))

    def _keep(self, result: dict[str, Any], held_out: data_sets.Data | None, seed: int, how: dict) -> dict[str, Any]:
        """Writes an evaluation, with what the run adds to its scores."""
        if held_out is not None and held_out.points:
            key = random.fold_in(random.key(seed), "evaluation")
            loss = self.method.evaluation_loss(self.state, held_out.batch(slice(None)), key)
            result |= {} if loss is None else {"eval_loss": loss}
        if self.best and held_out is None:
            result["warnings"] += ["This checkpoint was chosen on the data that it is scored on, which flatters it."]
        result |= {"step": self.state.step, "seed": seed, "sampling": how}
        files.write(self._evaluation, json.dumps(result, indent=1) + "\n")
        return result

    def measure(
        self,
        n: int,
        seed: int,
        data: data_sets.Data,
        *,
        extractor: Any = None,
        how: dict[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Scores of n samples against a data set, which nothing keeps: what `evaluate` and the engine are built on.

        In a run of several processes all call it, unless inside `distributed.acting(together=False)`.

        Args:
            data: their batches on the device that computes.
            how: as for `sample`.
            options: of `metrics.evaluate`.

        Returns: what `metrics.evaluate` does, and `sample_seconds`, of the process that drew the longest.
        Raises: ValueError as `sample` and `metrics.evaluate`, or if processes would take features differently.
        """
        draw, shown = self._drawing(n, seed, progress=True, **how or {}), distributed.is_main()
        with distributed.main_first():  # what has to be trained is trained once
            extractor = chosen_extractor(extractor, data)
        distributed.check_same({"features": describe(extractor)})

        def look() -> tuple[Seen | None, float]:
            started = time.perf_counter()
            samples = draw()
            seconds = time.perf_counter() - started
            on = samples.to(data.device)
            return see(on, data, extractor, progress=shown).to("cpu") if len(samples) else None, seconds

        found = distributed.gather(look)

        def judge() -> dict[str, Any]:
            seen = Seen.joined([part for part, _ in found if part is not None])
            scores = measures.evaluate(seen, data, extractor=extractor, **options)
            return scores | {"sample_seconds": max(seconds for _, seconds in found)}

        return distributed.from_main(judge)

    @property
    def _evaluation(self) -> Path:
        return self.path / ("evaluation-best.json" if self.best else "evaluation.json")

    def evaluated(self, n: int = 2000, seed: int = 1, *, together: bool = False) -> dict[str, Any]:
        """What `evaluate(n, seed=seed)` gives: read from the file that it is kept in, if that holds it."""
        with distributed.acting(together):
            stored = distributed.from_main(lambda: self._stored(n, seed))
        return self.evaluate(n, seed=seed, together=together) if stored is None else stored

    def _stored(self, n: int, seed: int) -> dict[str, Any] | None:
        stored = json.loads(self._evaluation.read_text()) if self._evaluation.exists() else {}
        data = self.reference()
        reference_n = len(data) if data.points else min(len(data), MAX_REFERENCE)
        wanted_facts = {"n": n, "step": self.state.step, "seed": seed, "reference_n": reference_n}
        known = all(stored.get(name) == value for name, value in wanted_facts.items())
        usual = stored.get("extractor", {}).get("name", "domain") == "domain" and not stored.get("sampling")
        wanted = set(measures.usual(data))
        return stored if known and usual and wanted <= stored["labels"].keys() else None

    def export(self, path: str | Path, *, ema: bool = True) -> Path:
        """Writes the sampling network's weights as one safetensors file for plain torch.

        An existing file is an error.
        """
        path = Path(path)
        if path.exists():
            raise ValueError(f"path {path} exists already")
        name = self.state.generating[0]
        weights = {k: v.contiguous().cpu() for k, v in self.state.sampling_net(name, ema).state_dict().items()}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            save_file(weights, part, metadata={"method": self.method.name, "network": name, "data": self.data_name})
            part.replace(path)
        return path


def load(
    path: str | Path,
    *,
    data: Any = None,
    device: str | torch.device = "auto",
    best: bool = False,
    **given: nn.Module | None,
) -> Run:
    """A run from its directory, at its last checkpoint.

    Args:
        path: the run's directory.
        data: the data it was trained on, where that was no named data set (needed only to evaluate).
        best: at the checkpoint that scored best instead, of a run that was trained with `evaluate_every`.
        given: networks that were passed to `train` as `model=`, `critic=` or `generator=`, of the same architecture.

    Raises: ValueError if the directory holds no run, or the networks do not fit.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"path {path} holds no run (there is no config.json)")
    stored = json.loads((path / "config.json").read_text())
    kind = find(stored["method"])
    method = kind(kind.Config(**stored["config"]), tuple(stored["shape"]), stored["num_classes"])
    own = {"denoiser" if name == "model" else name: net for name, net in given.items() if net is not None}
    for name in stored["given"]:
        if name not in own:
            keyword = "model" if name == "denoiser" else name
            raise ValueError(f"this run was trained with your own {name!r}: pass the same architecture as {keyword}=")
    own = {name: copy.deepcopy(own[name]) for name in stored["given"]}
    state = build(method, own, stored["seed"], pick_device(device))
    checkpoint.load(path, state, best=best)
    source = stored["data"] if stored["data_is_named"] else data
    return Run(path, method, state, stored["seed"], source, stored, best=best)
