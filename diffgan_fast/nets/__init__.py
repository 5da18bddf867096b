"""Networks: denoisers `model(x, t, y=None) -> ε̂`, critics `critic(x, …) -> logits`, generators."""

from .adapters import from_diffusers
from .conditioning import LevelCritic, LevelEmbedding
from .conv import Conv2d
from .critic import Critic, is_main_of_join
from .dcgan import DCGANCritic, DCGANGenerator, init_dcgan
from .ddgan import DDGANGenerator
from .ddgan_critic import DDGANCritic
from .embedding import sinusoidal
from .macs import macs
from .mlp import DDGANPointGenerator, MLPCritic, MLPDenoiser, MLPGenerator
from .sngan import SNGANCritic, SNGANGenerator
from .student import StudentUNet
from .stylegan2 import StyleGAN2Critic, StyleGAN2Generator
from .unet import UNet
from .weights import load_weights

__all__ = [
    "Conv2d",
    "Critic",
    "DCGANCritic",
    "DCGANGenerator",
    "DDGANCritic",
    "DDGANGenerator",
    "DDGANPointGenerator",
    "LevelCritic",
    "LevelEmbedding",
    "MLPCritic",
    "MLPDenoiser",
    "MLPGenerator",
    "SNGANCritic",
    "SNGANGenerator",
    "StudentUNet",
    "StyleGAN2Critic",
    "StyleGAN2Generator",
    "UNet",
    "from_diffusers",
    "init_dcgan",
    "is_main_of_join",
    "load_weights",
    "macs",
    "sinusoidal",
]
