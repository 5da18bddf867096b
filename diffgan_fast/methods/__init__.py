"""The training methods, one file each. `dgf.methods()` lists them; each module's `losses` serves one's own loop."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from diffgan_fast.engine import Method
from diffgan_fast.methods import (
    ddgan,
    ddpm,
    diffusion_gan,
    gan,
    gan_enhanced,
    guidance,
    method1,
    method2,
    method3,
    method4,
    method35,
)

_KINDS: tuple[type[Method], ...] = (
    ddpm.DDPM,
    method1.Method1,
    method2.Method2,
    method3.Method3,
    method35.Method35,
    method4.Method4,
    guidance.DiscriminatorGuidance,
    gan_enhanced.GANEnhanced,
    gan.GAN,
    ddgan.DDGAN,
    diffusion_gan.DiffusionGAN,
)
_ALL = {kind.name: kind for kind in _KINDS}

__all__ = [
    "ddgan",
    "ddpm",
    "diffusion_gan",
    "find",
    "gan",
    "gan_enhanced",
    "guidance",
    "method1",
    "method2",
    "method3",
    "method35",
    "method4",
]


def find(name: str) -> type[Method]:
    """The method of this name. ValueError with the known names if there is none."""
    if name not in _ALL:
        raise ValueError(f"method must be one of {', '.join(_ALL)}; got {name!r}")
    return _ALL[name]


class _Methods(ModuleType):
    """The package itself, callable: `dgf.methods()` lists what `dgf.methods.method3.losses` belongs to."""

    def __call__(self) -> dict[str, str]:
        """Each method's name with a line of help."""
        return {name: method.help for name, method in _ALL.items()}

    if TYPE_CHECKING:
        find = staticmethod(find)


sys.modules[__name__].__class__ = _Methods
if TYPE_CHECKING:
    package: _Methods  # this module, as type checkers should see it: to them no module is callable
