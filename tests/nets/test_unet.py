import pytest
import torch

from diffgan_fast.nets import UNet, from_diffusers

from .helpers import count, images, randomise


def tiny(**options):
    return UNet(1, 4, **{"width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (2,), **options})


def test_cifar_preset_has_the_published_number_of_parameters():
    assert count(UNet.preset(32, 3)) == 35_746_307  # Ho et al. 2020, App. B: 35.7 million


@pytest.mark.parametrize("size, parameters", [(8, 701_345), (28, 6_469_889)])
def test_presets_have_a_fixed_number_of_parameters(size, parameters):
    assert count(UNet.preset(size, 1)) == parameters
    assert count(UNet.preset(size, 1, num_classes=10)) == parameters + 11 * 4 * UNet.preset(size, 1).width


def test_28_px_goes_through_14_and_7():
    model = UNet.preset(28, 1)
    heights = []
    for level in model.down:
        level.register_forward_hook(lambda module, inputs, output: heights.append(output.shape[-1]))
    assert model(images(1, 1, 28), torch.tensor([5])).shape == (1, 1, 28, 28)
    assert heights == [14, 7, 7]


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 3)])
def test_output_is_zero_at_initialisation(size, channels):
    model = UNet.preset(size, channels)
    assert not model(images(2, channels, size), torch.tensor([1, 300])).any()


def test_agrees_with_diffusers():
    """The same weights in diffusers' own implementation give the same ε̂."""
    diffusers = pytest.importorskip("diffusers")
    ours = randomise(UNet(3, 8, width=128, multipliers=(1, 2), blocks=1, attention=(4,)), scale=0.05).eval()
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    x, t = images(2, 3, 8), torch.tensor([3, 250])
    with torch.no_grad():
        expected = from_diffusers(theirs)(x, t + 1)  # diffusers is handed t
        torch.testing.assert_close(ours(x, t), expected, rtol=1e-4, atol=1e-4)


def to_diffusers(state):
    """Our U-Net's weights under the keys of diffusers' `UNet2DModel`."""
    renames = [
        ("stem.", "conv_in."),
        ("time.0.", "time_embedding.linear_1."),
        ("time.2.", "time_embedding.linear_2."),
        ("head.0.", "conv_norm_out."),
        ("head.1.", "conv_out."),
        ("middle.0.residual.", "mid_block.resnets.0."),
        ("middle.0.attention.", "mid_block.attentions.0."),
        ("middle.1.residual.", "mid_block.resnets.1."),
        ("down.", "down_blocks."),
        ("up.", "up_blocks."),
        (".shrink.", ".downsamplers.0.conv."),
        (".grow.1.", ".upsamplers.0.conv."),
        (".emb.", ".time_emb_proj."),
        (".skip.", ".conv_shortcut."),
        (".out.", ".to_out.0."),
    ]
    result = {}
    for key, value in state.items():
        parts = key.split(".")
        if "blocks" in parts:  # down.0.blocks.1.residual.* -> down.0.resnets.1.*
            kind = {"residual": "resnets", "attention": "attentions"}[parts[4]]
            key = ".".join([*parts[:2], kind, parts[3], *parts[5:]])
        for old, new in renames:
            key = new + key[len(old) :] if key.startswith(old) else key
            key = key.replace(old, new) if old.startswith(".") else key
        if "attentions" in key:
            key = key.replace(".norm.", ".group_norm.")
        if ".qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[key.replace("qkv", f"to_{name}")] = part
        else:
            result[key] = value
    return result


def test_labels_shift_the_time_embedding():
    """With a zero label table every label, none included, gives the network without labels."""
    plain, labelled = randomise(tiny()), tiny(num_classes=3)
    labelled.load_state_dict({**plain.state_dict(), "label.weight": torch.zeros(4, 16)})
    x, t = images(4, 1, 4), torch.tensor([1, 2, 3, 4])
    assert torch.equal(labelled(x, t, torch.tensor([0, 1, 2, 3])), plain(x, t))


def test_no_label_is_the_last_index():
    model = randomise(tiny(num_classes=3), scale=0.5)
    x, t = images(2, 1, 4), torch.tensor([5, 6])
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([0, 1])))


def test_samples_do_not_see_each_other():
    model = randomise(tiny(), scale=0.5)
    x, t = images(3, 1, 4), torch.tensor([1, 50, 300])
    alone = torch.cat([model(x[n : n + 1], t[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(model(x, t), alone)
    assert not torch.allclose(model(x, t), model(x, t + 1))


def test_gradient_agrees_with_finite_differences():
    model = randomise(tiny(num_classes=2).double(), scale=0.3)
    x = images(2, 1, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, torch.tensor([1, 9]), torch.tensor([0, 2])), x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 6, "multipliers": (1, 2, 2)}, "size is 6"),
        ({"size": 0}, "size is 0"),
        ({"width": 5}, "width is 5"),
        ({"width": 2}, "width is 2"),
        ({"blocks": 0}, "blocks is 0"),
        ({"multipliers": ()}, r"multipliers is \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers is \(1, 0\)"),
        ({"attention": (3,)}, r"attention is \(3,\)"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"channels": 1, "size": 8, "multipliers": (1, 2), **options})


def test_bad_calls_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"x is \[2, 1, 8, 8\]"):
        model(images(2, 1, 8), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="y is given"):
        model(images(1, 1, 4), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="size is 20"):
        UNet.preset(20, 1)
