import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffgan_fast.nets import DDGANGenerator, DDGANPointGenerator
from diffgan_fast.nets.ddgan import AdaptiveGroupNormSiLU

from .helpers import count, images, randomise
from .test_embedding import closed_form
from .test_fir import filtered

T3 = torch.tensor([1, 2, 4])
TINY = dict(preset="8", T=4, z_dim=5, width=8, attention=(2,), latent=6, mapping=1)


def tiny(size=4, **changes):
    return DDGANGenerator(1, size, **{**TINY, **changes})


def latents(n, z_dim=5, seed=3):
    return images(n, z_dim, 1, seed=seed)[:, :, 0, 0]


def test_parameters_are_the_reference_s():
    with torch.device("meta"):
        assert count(DDGANGenerator(3, 32, preset="cifar10", T=4)) == 48_432_515
        assert count(DDGANGenerator(3, 256, preset="256", T=4)) == 39_726_979
        assert count(DDGANGenerator(1, 8, T=4)) == 915_393
        assert count(DDGANGenerator(1, 28, T=4)) == 1_840_385
        assert count(DDGANPointGenerator(T=4)) == 233_474


@pytest.mark.parametrize("size, preset", [(8, "8"), (28, "28"), (32, "cifar10"), (256, "256")])
def test_without_a_preset_the_size_decides(size, preset):
    with torch.device("meta"):
        chosen, named = DDGANGenerator(3, size, T=4), DDGANGenerator(3, size, preset=preset, T=4)
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (chosen, named)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size, channels", [(8, 1), (8, 3), (28, 1)])
def test_output_is_nearly_zero_at_initialisation(size, channels):
    torch.manual_seed(0)
    model = DDGANGenerator(channels, size, T=4)
    x0 = model(images(3, channels, size), T3, latents(3, 100))
    assert x0.shape == (3, channels, size, size)
    assert 0 < x0.abs().max() < 1e-3


def test_output_stays_in_range():
    model = randomise(tiny(), scale=1.0)
    x0 = model(10 * images(3, 1, 4), T3, latents(3))
    assert 0.5 < x0.abs().max() <= 1


def test_without_bounds_the_output_is_what_tanh_would_bound():
    torch.manual_seed(0)
    bounded, free = randomise(tiny(), scale=1.0), tiny(bounded=False)
    free.load_state_dict(bounded.state_dict())
    x, z = 10 * images(3, 1, 4), latents(3)
    out = free(x, T3, z)
    assert out.abs().max() > 1
    torch.testing.assert_close(out.tanh(), bounded(x, T3, z))


def test_28_px_goes_through_14_and_7():
    model = DDGANGenerator(1, 28, T=4)
    heights = []
    for level in [*model.down, *model.up]:
        level.register_forward_hook(lambda module, inputs, output: heights.append(output.shape[-1]))
    model(images(1, 1, 28), torch.tensor([3]), latents(1, 100))
    assert heights == [14, 7, 7, 14, 28, 28]


def test_adaptive_group_norm_is_its_formula():
    layer = randomise(AdaptiveGroupNormSiLU(8, 3).double(), scale=0.7)  # 8 channels: 2 groups of 4
    x, w = images(2, 8, 5, dtype=torch.float64), torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, -0.2]], dtype=torch.float64)
    a, weight, bias = x.numpy(), layer.style.weight.detach().numpy(), layer.style.bias.detach().numpy()
    expected = np.empty_like(a)
    for n in range(2):
        style = weight @ w[n].numpy() + bias
        for c in range(8):
            group = a[n, c // 4 * 4 : c // 4 * 4 + 4]
            normed = (a[n, c] - group.mean()) / np.sqrt(group.var() + 1e-6)
            z = style[c] * normed + style[8 + c]
            expected[n, c] = z / (1 + np.exp(-z))
    np.testing.assert_allclose(layer(x, w).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_adaptive_group_norm_starts_as_a_plain_one():
    layer, x = AdaptiveGroupNormSiLU(8, 3), images(2, 8, 5)
    torch.testing.assert_close(layer(x, torch.zeros(2, 3)), F.silu(F.group_norm(x, 2, eps=1e-6)))
    assert not torch.allclose(layer(x, torch.ones(2, 3)), layer(x, torch.zeros(2, 3)))


class Written:
    """The tiny generator written out step by step, in float64, from the facts of the paper's network."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x):  # the groups of 8 … 24 channels: C / 4
        groups = x.reshape(len(x), x.shape[1] // 4, -1)
        spread = groups.var(-1, correction=0, keepdim=True) + 1e-6
        return ((groups - groups.mean(-1, keepdim=True)) / spread.sqrt()).view(x.shape)

    def adaptive(self, name, x):
        style = self.linear(f"{name}.style", self.w)[:, :, None, None]
        return style[:, : x.shape[1]] * self.norm(x) + style[:, x.shape[1] :]

    def resampled(self, x, up, down):
        return torch.from_numpy(filtered(x.numpy(), up, down, up, 1))

    def block(self, name, x, up=1, down=1):
        h = F.silu(self.adaptive(f"{name}.norm1", x))
        if (up, down) != (1, 1):
            x, h = self.resampled(x, up, down), self.resampled(h, up, down)
        h = self.conv(f"{name}.conv1", h, padding=1) + self.linear(f"{name}.emb", self.emb)[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.adaptive(f"{name}.norm2", h)), padding=1)
        return ((self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.state else x) + h) / 2**0.5

    def attention(self, name, x):
        scale, shift = self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"]
        pixels = (self.norm(x) * scale[:, None, None] + shift[:, None, None]).flatten(2).mT
        q, k, v = self.linear(f"{name}.qkv", pixels).chunk(3, -1)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return (x + self.linear(f"{name}.out", attended).mT.reshape(x.shape)) / 2**0.5

    def __call__(self, x, t, z):
        told = torch.tensor([closed_form(n - 1, 8) for n in t.tolist()], dtype=torch.float64)
        self.emb = F.silu(self.linear("time.2", F.silu(self.linear("time.0", told))))
        w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
        for layer in (1, 3):
            w = F.silu(self.linear(f"mapping.{layer}", w))
        self.w = w
        stem = self.conv("stem", x, padding=1)
        first = self.block("down.0.blocks.0", stem)
        blurred = torch.from_numpy(filtered(x.numpy(), 1, 1, 2, 2))
        halved = (self.conv("down.0.reduce", blurred, stride=2) + self.block("down.0.shrink", first, down=2)) / 2**0.5
        second = self.attention("down.1.attentions.0", self.block("down.1.blocks.0", halved))
        h = self.attention("middle.1", self.block("middle.0", second))
        h = self.block("middle.2", h)
        for i, skip in enumerate((second, halved)):
            h = self.block(f"up.0.blocks.{i}", torch.cat([h, skip], 1))
        h = self.block("up.0.grow", self.attention("up.0.attention", h), up=2)
        for i, skip in enumerate((first, stem)):
            h = self.block(f"up.1.blocks.{i}", torch.cat([h, skip], 1))
        scale, shift = self.state["head.0.weight"], self.state["head.0.bias"]
        h = self.norm(h) * scale[:, None, None] + shift[:, None, None]
        return self.conv("head.1", F.silu(h), padding=1).tanh()


def test_the_generator_follows_its_description():
    model = randomise(tiny().double(), scale=0.3)
    x, z = images(3, 1, 4, dtype=torch.float64), latents(3).double()
    with torch.no_grad():
        expected = Written(model.state_dict())(x, T3, z)
        torch.testing.assert_close(model(x, T3, z), expected, rtol=1e-10, atol=1e-12)


def test_depends_on_all_it_is_given_and_on_no_other_sample():
    model = randomise(tiny(), scale=0.3)
    x, z = images(3, 1, 4), latents(3)
    x0 = model(x, T3, z)
    alone = torch.cat([model(x[n : n + 1], T3[n : n + 1], z[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(x0, alone)
    for changed in (model(x + 0.1, T3, z), model(x, T3 % 4 + 1, z), model(x, T3, z.flip(1))):
        assert (changed - x0).abs().amax((1, 2, 3)).min() > 1e-4


def test_only_the_direction_of_the_latent_counts():
    model = randomise(tiny().double(), scale=0.3)
    x, z = images(3, 1, 4, dtype=torch.float64), latents(3).double()
    torch.testing.assert_close(model(x, T3, 3 * z), model(x, T3, z), rtol=1e-6, atol=1e-7)
    assert model(x, T3, torch.zeros_like(z)).isfinite().all()


def test_gradient_agrees_with_finite_differences():
    model = randomise(tiny().double(), scale=0.3)
    x, z = images(2, 1, 4, dtype=torch.float64).requires_grad_(), latents(2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: model(x, torch.tensor([1, 4]), z), (x, z))


def test_the_first_queries_keys_and_values_are_each_a_tenth():
    torch.manual_seed(0)
    model = DDGANGenerator(1, 28, T=4)
    for part in model.middle[1].qkv.weight.chunk(3):  # 64 to 64 channels each
        assert part.var().item() == pytest.approx(0.1 / 64, rel=0.1)


@pytest.mark.parametrize("dim", [2, 5])
def test_the_generator_of_points_follows_its_description(dim):
    model = randomise(DDGANPointGenerator(dim, 16, 2, T=4, z_dim=3).double(), scale=0.3)
    x, z = images(3, dim, 1, dtype=torch.float64)[:, :, 0, 0], latents(3, 3).double()
    told = torch.tensor([closed_form(n - 1, 128) for n in T3.tolist()], dtype=torch.float64)
    first, *blocks, last = model.layers
    h = first(torch.cat([x, z, told], 1))
    for block in blocks:
        h = h + block(h.relu())
    torch.testing.assert_close(model(x, T3, z), last(h.relu()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 5}, "size is 5"),
        ({"width": 7}, "width is 7"),
        ({"attention": (3,)}, r"attention is \(3,\)"),
        ({"blocks": 0}, "blocks is 0"),
        ({"mapping": -1}, "mapping is -1"),
        ({"latent": 0}, "latent is 0"),
        ({"T": 0}, "T is 0"),
        ({"z_dim": 0}, "z_dim is 0"),
        ({"preset": "cifar100"}, "preset is 'cifar100'"),
        ({"preset": None, "size": 64}, "size is 64"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_calls_are_named():
    model, points = tiny(), DDGANPointGenerator(T=4)
    with pytest.raises(ValueError, match=r"x is \[3, 1, 8, 8\]"):
        model(images(3, 1, 8), T3, latents(3))
    with pytest.raises(ValueError, match=r"z is \[3, 4\]; it must be \[N, 5\]"):
        model(images(3, 1, 4), T3, latents(3, 4))
    with pytest.raises(ValueError, match=r"x is \[3, 3\]"):
        points(latents(3, 3), T3, latents(3, 8))
    with pytest.raises(ValueError, match=r"z is \[3, 2\]; it must be \[N, 8\]"):
        points(latents(3, 2), T3, latents(3, 2))
    with pytest.raises(ValueError, match="hidden is 0"):
        DDGANPointGenerator(hidden=0, T=4)
    with pytest.raises(TypeError, match="channels_of_nothing"):
        tiny(channels_of_nothing=3)
