"""Scores of a run while it trains, and the checkpoint that scored best."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from diffgan_fast import metrics
from diffgan_fast.data import Data
from diffgan_fast.engine import TrainConfig, TrainingError, checkpoint
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
        self.extractor = None if data.points else metrics.find_extractor(config.evaluate_on, data)
        self._scores(against.batch(slice(0, self.n)))  # what cannot be measured is told before training

    def _scores(self, samples: Tensor) -> dict[str, Any]:
        names = {self.metric, *metrics.usual(self.against)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metrics.SmallSampleWarning)  # it would come again at every step
            return metrics.evaluate(
                samples, self.against, metrics=sorted(names), extractor=self.extractor, floors=False, halves=0
            )

    def __call__(self, run: Run) -> dict[str, Any]:
        """The run's scores now, for its history. TrainingError if a sample is not finite."""
        samples, step = run.sample(self.n, SEED), run.state.step
        if not samples.isfinite().all():
            raise TrainingError(f"samples at step {step} are not finite")
        scores = self._scores(samples)
        value, sign = scores[self.metric], -1 if self.metric in metrics.HIGHER_IS_BETTER else 1
        best = checkpoint.best(run.path)
        if best is None or sign * value < sign * best["value"]:
            checkpoint.save_best(run.path, run.state, {"metric": self.metric, "value": value})
        kept = ("n", "reference_n", *scores["labels"], "labels", "extractor")
        return {name: scores[name] for name in kept if name in scores}
