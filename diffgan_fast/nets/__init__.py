"""Networks: denoisers `model(x, t, y=None) -> ε̂`, critics `critic(x, …) -> logits`, generators."""

from .adapters import from_diffusers
from .conditioning import LevelCritic, LevelEmbedding
from .critic import Critic, is_main_of_join
from .dcgan import DCGANCritic, DCGANGenerator, init_dcgan
from .embedding import sinusoidal
from .mlp import MLPCritic, MLPDenoiser, MLPGenerator
from .sngan import SNGANCritic, SNGANGenerator
from .student import StudentUNet
from .unet import UNet
from .weights import load_weights

__all__ = [
    "Critic",
    "DCGANCritic",
    "DCGANGenerator",
    "LevelCritic",
    "LevelEmbedding",
    "MLPCritic",
    "MLPDenoiser",
    "MLPGenerator",
    "SNGANCritic",
    "SNGANGenerator",
    "StudentUNet",
    "UNet",
    "from_diffusers",
    "init_dcgan",
    "is_main_of_join",
    "load_weights",
    "sinusoidal",
]
