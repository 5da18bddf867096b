"""Networks: denoisers `model(x, t, y=None) -> ε̂`, critics `critic(x, …) -> logits`, generators."""

from .adapters import from_diffusers
from .dcgan import DCGANCritic, DCGANGenerator, init_dcgan
from .embedding import sinusoidal
from .student import StudentUNet
from .unet import UNet

__all__ = [
    "DCGANCritic",
    "DCGANGenerator",
    "StudentUNet",
    "UNet",
    "from_diffusers",
    "init_dcgan",
    "sinusoidal",
]
