"""What all methods share: settings, state, the loop, checkpoints."""

from diffgan_fast.engine.config import TrainConfig, option
from diffgan_fast.engine.feed import Feed
from diffgan_fast.engine.loop import Loop, TrainingError, out_of_memory
from diffgan_fast.engine.method import Batch, Method
from diffgan_fast.engine.optim import FlatAdamW
from diffgan_fast.engine.state import State, evaluating, frozen, measures_batch, sample_group, together
from diffgan_fast.engine.steps import Steps

__all__ = [
    "Batch",
    "Feed",
    "FlatAdamW",
    "Loop",
    "Method",
    "State",
    "Steps",
    "TrainConfig",
    "TrainingError",
    "evaluating",
    "frozen",
    "measures_batch",
    "option",
    "out_of_memory",
    "sample_group",
    "together",
]
