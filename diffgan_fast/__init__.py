"""diffgan_fast: a fast engine for hybrids of diffusion models and GANs."""

from diffgan_fast import ops, random
from diffgan_fast.backends import BackendError, backend, info
from diffgan_fast.schedule import Schedule

__all__ = ["BackendError", "Schedule", "backend", "info", "ops", "random"]
