import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from diffgan_fast.nets import DCGANGenerator, StudentUNet
from diffgan_fast.nets.folding import folded


def trained(net):
    """With running statistics and affine maps of all kinds."""
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.3, 3)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 2)
                nn.init.uniform_(m.bias, -1, 1)
    return net.double().eval()


def norms(net):
    return [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


NETS = {
    "student": (lambda: StudentUNet(T=9), lambda: (torch.randn(3, 1, 28, 28).double(), torch.tensor([1, 5, 9])), 0),
    "generator": (lambda: DCGANGenerator(1, 28, width=4), lambda: (torch.randn(3, 100).double(),), 0),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5)),
               lambda: (torch.randn(3, 4).double(),), 1),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)),
                   lambda: (torch.randn(3, 2, 5, 5).double(),), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_the_same_up_to_rounding(name):
    make, arguments, left = NETS[name]
    net, arguments = trained(make()), arguments()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        found = folded(net)
        torch.testing.assert_close(found(*arguments), net(*arguments), rtol=1e-10, atol=1e-10)
    assert len(norms(found)) == left and len(norms(net)) > left
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_memory_format_stays():
    net = trained(StudentUNet(T=9)).to(memory_format=torch.channels_last)
    assert folded(net).down1[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)).eval(),
        nn.Sequential(parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), nn.BatchNorm2d(2)).eval(),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)).eval(),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train(),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)).eval(),
        type("Own", (nn.Sequential,), {})(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(),
    ],
    ids=["not neighbours", "reparametrised", "by the batch", "training", "other norm", "own forward"],
)
def test_what_cannot_be_folded_stays(net):
    assert folded(net) is net


def test_layers_with_hooks_stay():
    net = trained(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    assert folded(net) is net
