"""diffgan_fast: a fast engine for hybrids of diffusion models and GANs."""

from typing import TYPE_CHECKING

from diffgan_fast import data, metrics, nets, ops, random
from diffgan_fast.api import compare, plan, train
from diffgan_fast.backends import BackendError, backend, info
from diffgan_fast.chain import denoise_chain
from diffgan_fast.data import datasets
from diffgan_fast.engine import TrainingError
from diffgan_fast.instance_noise import AdaptiveDiffusion
from diffgan_fast.run import Run, load
from diffgan_fast.sampling import sample
from diffgan_fast.schedule import Schedule

if TYPE_CHECKING:
    from diffgan_fast.methods import package as methods
else:
    from diffgan_fast import methods

__all__ = [
    "AdaptiveDiffusion",
    "BackendError",
    "Run",
    "Schedule",
    "TrainingError",
    "backend",
    "compare",
    "data",
    "datasets",
    "denoise_chain",
    "info",
    "load",
    "methods",
    "metrics",
    "nets",
    "ops",
    "plan",
    "random",
    "sample",
    "train",
]
