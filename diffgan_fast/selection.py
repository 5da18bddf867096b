"""Scores of a run while it trains, and the checkpoint that scored best."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffgan_fast import metrics
from diffgan_fast.data import Data
from diffgan_fast.engine import TrainConfig, TrainingError, checkpoint, distributed
from diffgan_fast.metrics.cautions import LEAST_OF_MODE
from diffgan_fast.run import Run

SEED = 2  # of the samples; pictures show those of 0, `Run.evaluate` measures those of 1


class Selection:
    """Measures a run at chosen steps, and keeps the checkpoint that is best by one metric.

    Args:
        config: `evaluate_n`, `evaluate_on` and `best_by`.
        data: what the run is trained on; of images, the classifier "domain" is that of its classes.
        against: what samples are measured against: the test split where there is one, and not what the final scores are
            taken on. A checkpoint that was chosen by a score has a better one there than on new data.

    Raises:
        ValueError: the data have no labels for a classifier, `best_by` is no metric for them, or they are too few.
    """

    def __init__(self, config: TrainConfig, data: Data, against: Data):
        if against.shape != data.shape:
            theirs, ours = list(against.shape), list(data.shape)
            raise ValueError(f"the test split of data {data.name!r} must hold samples {ours} as it does, not {theirs}")
        self.n, self.against = config.evaluate_n, against
        self.metric = config.best_by or ("kl" if data.points else "kid")
        fitting = metrics.available(data)
        if self.metric not in fitting:
            raise ValueError(f"best_by must be one of {', '.join(fitting)} for data {data.name!r}, got {self.metric!r}")
        modes = getattr(data, "modes", None)
        if self.metric == "modes" and modes is not None and self.n < (least := LEAST_OF_MODE * len(modes.centres)):
            raise ValueError(
                f"best_by='modes' needs evaluate_n={least} or more for data {data.name!r}, got {self.n}: "
                f"{LEAST_OF_MODE} samples make one of its {len(modes.centres)} modes covered"
            )
        self._measured: dict[str, Any] = dict(
            metrics=sorted({self.metric, *metrics.usual(against)}),
            extractor=None if data.points else metrics.find_extractor(config.evaluate_on, data),
            floors=False,
            halves=0,
        )
        with self._quiet():  # what cannot be measured is told before training
            metrics.evaluate(against.batch(slice(0, self.n)), against, **self._measured)

    def __call__(self, run: Run) -> dict[str, Any]:
        """The run's scores now, for its history. TrainingError if a sample is not finite.

        In a run of several processes all call it; the main one keeps the checkpoint.
        """
        try:
            with self._quiet():
                scores = run.measure(self.n, SEED, self.against, **self._measured)
        except metrics.NotFinite as error:
            raise TrainingError(f"samples at step {run.state.step} are not finite") from error
        return distributed.from_main(lambda: self._choose(run, scores))

    @staticmethod
    @contextmanager
    def _quiet() -> Iterator[None]:
        """Without the warning that would come again at every step."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metrics.SmallSampleWarning)
            yield

    def _choose(self, run: Run, scores: dict[str, Any]) -> dict[str, Any]:
        """Keeps the checkpoint if it is the best so far. Of its scores, what the history says."""
        value, sign = scores[self.metric], -1 if self.metric in metrics.HIGHER_IS_BETTER else 1
        best = checkpoint.best(run.path)
        if best is None or sign * value < sign * best["value"]:
            checkpoint.save_best(run.path, run.state, {"metric": self.metric, "value": value})
        kept = ("n", "reference_n", *scores["labels"], "labels", "extractor")
        return {name: scores[name] for name in kept if name in scores}
