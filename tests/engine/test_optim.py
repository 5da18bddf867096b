import copy

import pytest
import torch
from torch import nn

from diffgan_fast.engine import FlatAdamW


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.unused = nn.Conv2d(3, 5, 3), nn.Linear(5, 7), nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.to(dtype)

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_follows_torchs_adamw_with_clipping(layout, dtype, tolerance):
    mine, theirs = (Net(dtype).to(memory_format=layout) for _ in range(2))
    settings = dict(lr=3e-2, betas=(0.5, 0.9), weight_decay=0.1)
    flat = FlatAdamW(mine, **settings)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, **settings)
    for step in range(6):
        x = torch.randn(4, 3, 6, 6, dtype=dtype)
        flat.backward(mine(x).square().sum())
        flat.clip(0.5)
        flat.step()
        theirs(x).square().sum().backward()
        for p in trained:  # torch skips what has no gradient; in the vector it has one of 0, and decays
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_(trained, 0.5)
        assert step or norm > 0.5  # the limit is felt
        plain.step()
        plain.zero_grad()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_parameters_keep_their_values_and_are_views_of_the_vector():
    net = Net()
    before = copy.deepcopy(net)
    (vector,) = FlatAdamW(net, 1e-3).param_groups[0]["params"]
    for a, b in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
        inside = a.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
        assert inside == a.requires_grad
        assert not inside or a.data_ptr() % 64 == vector.data_ptr() % 64


def test_two_types_in_one_module():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2)])
    twin = copy.deepcopy(net)
    flat, plain = FlatAdamW(net, 0.1), torch.optim.AdamW(twin.parameters(), 0.1, weight_decay=0.0)

    def loss(m):
        return sum(layer(torch.ones(1, 2, dtype=layer.weight.dtype)).square().sum().float() for layer in m)

    for _ in range(3):
        flat.backward(loss(net))
        flat.step()
        plain.zero_grad()
        loss(twin).backward()
        plain.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_other_gradients_are_left_alone():
    net, other = Net(), nn.Linear(7, 1)
    FlatAdamW(net, 1e-3).backward(other(net(torch.randn(2, 3, 6, 6))).sum())
    assert all(p.grad is None for p in [*other.parameters(), *net.parameters()])


def test_gradients_from_before_and_zero_grad_do_not_matter():
    net, x = Net(), torch.randn(2, 3, 6, 6)
    flat = FlatAdamW(net, 1e-3)
    flat.backward(net(x).sum())
    want = [g.clone() for g in flat._gradients]
    flat.zero_grad(set_to_none=True)
    assert all(not g.any() for g in flat._gradients)
    net(x).sum().backward()  # gradients of another loop, left behind
    flat.backward(net(x).sum())
    for got, expected in zip(flat._gradients, want, strict=True):
        torch.testing.assert_close(got, expected)
    flat.backward(torch.zeros((), requires_grad=True))  # a loss that has nothing to do with the network
    assert all(not g.any() for g in flat._gradients)


def test_a_module_that_was_moved_is_noticed_and_a_released_one_is_its_owners():
    net = Net()
    flat = FlatAdamW(net, 1e-3)
    before = [p.clone() for p in net.parameters()]
    flat.release()
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="moved or cast"):
        flat.backward(net(torch.randn(2, 3, 6, 6)).sum())


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="ReLU has no parameter that requires gradients"):
        FlatAdamW(nn.ReLU(), 1e-3)
