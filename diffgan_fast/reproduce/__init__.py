"""The studies of the source documents again: each trains, measures, and sets the result beside the published values."""

from diffgan_fast.reproduce.ddgan import reproduce_ddgan
from diffgan_fast.reproduce.ddgan_page import tradeoff_table
from diffgan_fast.reproduce.diffusion_gan import diffusion_gan_table, reproduce_diffusion_gan
from diffgan_fast.reproduce.gaussians import modes_table, reproduce_gaussians
from diffgan_fast.reproduce.images import reproduce_table1, table1_folder
from diffgan_fast.reproduce.images_page import gain_table, score_table
from diffgan_fast.reproduce.points import kl_table, reproduce_2d
from diffgan_fast.reproduce.study import pictures
from diffgan_fast.reproduce.toy import reproduce_toy

__all__ = [
    "diffusion_gan_table",
    "gain_table",
    "kl_table",
    "modes_table",
    "pictures",
    "reproduce_2d",
    "reproduce_ddgan",
    "reproduce_diffusion_gan",
    "reproduce_gaussians",
    "reproduce_table1",
    "reproduce_toy",
    "score_table",
    "table1_folder",
    "tradeoff_table",
]
