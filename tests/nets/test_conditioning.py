import pytest
import torch
from torch import nn

from diffgan_fast import nets

JOININGS = ("concat", "projection", "mapping")
X = torch.randn(1, 6).expand(5, 6)
T = torch.tensor([0, 1, 7, 400, 1000])
LEVEL = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])


def make(joining, **options):
    torch.manual_seed(3)
    return nets.LevelCritic(nn.Identity(), 6, joining, dim=16, **options)


@pytest.mark.parametrize("joining", JOININGS)
def test_the_level_tells_equal_samples_apart(joining):
    out = make(joining)(X, t=T, level=LEVEL)
    assert out.shape == (5,) and len(out.unique()) == 5


@pytest.mark.parametrize("joining", JOININGS)
def test_as_coded_all_t_above_0_look_alike_at_first(joining):
    out = make(joining, as_coded=True)(X, t=T)
    torch.testing.assert_close(out[1:], out[1:2].expand(4))
    assert (out[0] - out[1]).abs() > 1e-3
    if joining == "mapping":
        assert out[0] == 0


def test_the_mapping_as_coded_is_stylegan2s():
    """The raw t through a linear layer, to unit root mean square, then eight layers of gain sqrt(2)."""
    critic = make("mapping", as_coded=True).double()
    embed = critic.embedding.linear
    with torch.no_grad():
        embed.bias.normal_()
    h = T.double()[:, None] * embed.weight[:, 0] + embed.bias
    h = h / (h.square().mean(1, keepdim=True) + 1e-8).sqrt()
    assert len(critic.mapping) == 8
    for layer in critic.mapping:
        h = nn.functional.leaky_relu(h @ (layer.weight * 0.01 / 4).T, 0.2) * 2**0.5
    want = (critic.head(X.double()) * h).sum(1) / 4
    torch.testing.assert_close(critic(X.double(), t=T), want)


@pytest.mark.parametrize("joining", JOININGS)
def test_equalised_layers_learn_alike(joining):
    """A step of Adam moves every weight by the same part of its size, those that see the level too."""
    critic = make(joining, layers="equalised")
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.99))
    before = {name: p.detach().clone() for name, p in critic.named_parameters() if name.endswith("weight")}
    critic(torch.randn(5, 6), t=T, level=LEVEL).square().mean().backward()
    optimizer.step()
    for name, p in critic.named_parameters():
        if name in before:
            assert 3e-4 < (p - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt() < 3e-3, name


def test_the_projection_is_a_product_with_the_features():
    critic = make("projection")
    embedded = critic.embedding(None, LEVEL)
    want = critic.head(X).flatten() + torch.einsum("nd,nd->n", X, embedded) / 6**0.5
    torch.testing.assert_close(critic(X, level=LEVEL), want)


def test_the_embedding_is_of_sines():
    embedding = nets.LevelEmbedding(3)
    torch.testing.assert_close(embedding(None, LEVEL), embedding.linear(nets.sinusoidal(1000 * LEVEL, 128)))


def test_a_plane_is_one_more_channel():
    for critic, x in (
        (nets.MLPCritic(2, 8, 2, slope=0.2, inputs=("x", "level")), torch.randn(5, 2)),
        (nets.DCGANCritic(1, 8, width=4, norm=None, inputs=("x", "level")), torch.randn(5, 1, 8, 8)),
        (nets.SNGANCritic(1, 8, width=4, inputs=("x", "level")).eval(), torch.randn(5, 1, 8, 8)),
    ):
        plane = LEVEL.view(-1, *[1] * (x.dim() - 1)) * torch.ones_like(x[:, :1])
        torch.testing.assert_close(critic(x, t=T, level=LEVEL), critic.main(torch.cat((x, plane), 1)).flatten())
        with pytest.raises(ValueError, match="level is None; it must be given to a critic with inputs="):
            critic(x)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="joining must be one of concat, projection, mapping; got 'plane'"):
        make("plane")
    with pytest.raises(ValueError, match=r"level must be \[N\], one for each sample; got None"):
        make("concat")(X, t=T)
    with pytest.raises(ValueError, match=r"t must be \[N\], one for each sample; got \[5, 1\]"):
        make("concat", as_coded=True)(X, t=T[:, None])
