import pytest
import torch
from torch import nn

from diffgan_fast.nets import from_diffusers

from .helpers import images

diffusers = pytest.importorskip("diffusers")


def small_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            **options,
        }
    ).eval()


def test_time_is_shifted_and_the_sample_returned():
    unet = small_unet()
    x, t = images(2, 3, 8), torch.tensor([1, 300])
    assert torch.equal(from_diffusers(unet)(x, t), unet(x, torch.tensor([0, 299])).sample)


def test_labels_go_through():
    unet = small_unet(num_class_embeds=4)
    x, t, y = images(2, 3, 8), torch.tensor([5, 6]), torch.tensor([0, 3])
    assert torch.equal(from_diffusers(unet)(x, t, y), unet(x, t - 1, class_labels=y).sample)
    with pytest.raises(ValueError):
        from_diffusers(small_unet())(x, t, y)


def test_parameters_are_the_unets_own():
    unet = small_unet()
    model = from_diffusers(unet)
    assert isinstance(model, nn.Module)
    assert [id(p) for p in model.parameters()] == [id(p) for p in unet.parameters()]
    model(images(1, 3, 8), torch.tensor([4])).square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_what_is_no_denoiser_is_refused():
    with pytest.raises(ValueError, match="unet is a Linear"):
        from_diffusers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="3 input and 6 output channels"):
        from_diffusers(small_unet(out_channels=6))
