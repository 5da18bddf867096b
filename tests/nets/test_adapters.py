import sys

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


def test_a_local_folder_is_read(tmp_path):
    unet = small_unet()
    unet.save_pretrained(tmp_path)
    x, t = images(2, 3, 8), torch.tensor([1, 300])
    for folder in (tmp_path, str(tmp_path)):
        model = from_diffusers(folder)
        assert torch.equal(model(x, t), unet(x, t - 1).sample)
        assert all(p.requires_grad for p in model.parameters())


def test_a_folder_without_such_a_network_is_refused(tmp_path):
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no folder of a diffusers model"):
            from_diffusers(missing)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="holds a VQModel"):
        from_diffusers(tmp_path)
    small_unet(out_channels=6).save_pretrained(tmp_path / "variance")
    with pytest.raises(ValueError, match="3 input and 6 output channels"):
        from_diffusers(tmp_path / "variance")


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    small_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    bias = weights.pop("conv_in.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, 0 unexpected"):
        from_diffusers(tmp_path)
    save_file({**weights, "conv_in.bias": bias[:3].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be read"):
        from_diffusers(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        from_diffusers(tmp_path)


def test_without_diffusers_a_folder_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install"):
        from_diffusers(tmp_path)
