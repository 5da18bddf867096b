"""denoise_chain of networks whose second run is not like the first: dropout, batch norm, autocast, wrappers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import diffgan_fast as dgf
from tests.chain.by_hand import (
    RECOMPUTE,
    RECOMPUTED,
    Critic,
    Net,
    T,
    agree,
    by_hand,
    chain,
    gradients,
    reward,
    start,
    trained,
)
from tests.nets.helpers import randomise


class Pictures(nn.Module):
    """Convolutions with batch norm, one layer measuring and one in eval mode, and dropout of both kinds."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.fixed = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.leave = nn.Dropout(0.3), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t):
        h = F.gelu(self.norm(self.enter(x)) + t[:, None, None, None] / 10)
        return self.leave(F.dropout(F.gelu(self.fixed(self.inner(self.drop(h)))), 0.2))


def pictures():
    net = Pictures()
    with torch.no_grad():
        net.fixed.running_mean.normal_(), net.fixed.running_var.uniform_(0.5, 2)
    net.fixed.eval()
    return net


def unet():
    return dgf.nets.UNet(1, 8, width=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.2)


def partly_frozen():
    net = pictures()
    net.enter.requires_grad_(False), net.norm.requires_grad_(False)
    return net


NETWORKS = {
    "mlp": (lambda: Net(nn.Linear(6, 6), nn.SiLU()), (2,)),
    "dropout": (lambda: Net(nn.Dropout(0.5)), (2,)),
    "batch norm": (lambda: Net(nn.BatchNorm1d(6)), (2,)),
    "batch norm with a cumulative average": (lambda: Net(nn.BatchNorm1d(6, momentum=None)), (2,)),
    "convolutions": (pictures, (1, 6, 6)),
    "partly frozen": (partly_frozen, (1, 6, 6)),
    "attention": (lambda: randomise(unet(), scale=0.15), (1, 8, 8)),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, recompute):
    """In train mode: masks are the same in every run of a step, and statistics change as in T runs."""
    make, shape = NETWORKS[name]
    model = make().double()
    modes = [m.training for m in model.modules()]
    twin, x = copy.deepcopy(model), start(4, shape)
    want = by_hand(twin, x)
    reward(want).backward()
    expected, x.grad = x.grad, None
    got = chain(model, x, recompute=recompute)
    agree([got], [want])
    agree(model.buffers(), twin.buffers(), 1e-12)
    reward(got).backward()
    agree([x.grad], [expected])
    agree([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    agree(model.buffers(), twin.buffers(), 1e-12)
    assert {int(b) for b in model.buffers() if b.dtype == torch.int64} <= {0, T}  # num_batches_tracked
    assert [m.training for m in model.modules()] == modes


def test_in_float32():
    for make, shape in NETWORKS.values():
        model = make()
        wide, x = copy.deepcopy(model).double(), start(4, shape)
        want = gradients(by_hand(wide, x), [x, *trained(wide)])
        x = start(4, shape, torch.float32)
        agree(gradients(chain(model, x), [x, *trained(model)]), want, 1e-4)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_modes_that_change_before_the_backward_pass(recompute):
    """The backward pass sees the modes of the call, and leaves the new ones."""

    def after_change(run):
        torch.manual_seed(0)
        model, x = partly_frozen().double(), start(4, (1, 6, 6))
        x0 = run(model, x)
        model.eval()
        model.drop.train()
        model.requires_grad_(False)
        model.enter.requires_grad_(True)
        model.leave.requires_grad_(True)
        changed = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        reward(x0).backward()
        assert changed == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
        return [x.grad, *(p.grad for p in model.parameters())]

    want = after_change(by_hand)
    assert [g is not None for g in want] == [True] + [False] * 7 + [True, True]
    agree(after_change(lambda model, x: chain(model, x, recompute=recompute)), want)


def test_a_listed_parameter_of_a_callable_that_is_frozen_before_the_backward_pass():
    model, x = Net().double(), start()
    (want,) = gradients(by_hand(model, x), [x])
    x0 = chain(lambda x, t: model(x, t), x, parameters=[*model.parameters()])
    model.requires_grad_(False)
    agree(gradients(x0, [x]), [want])
    assert not trained(model)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(recompute):
    model, x = Net(nn.Linear(6, 6), nn.SiLU()), start(dtype=torch.float32)
    inputs = [x, *model.enter.parameters(), *model.middle.parameters(), *model.leave.parameters()]
    plain = gradients(by_hand(model, x), inputs)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # with it, weights' gradients add up in bfloat16
        want = chain(model, x, recompute="none")
        expected = gradients(want, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        x0 = chain(model, x, recompute=recompute)
        later = gradients(model(x, torch.ones(5)), inputs)
    assert torch.equal(x0, want)
    agree(gradients(x0, inputs), expected, 1e-5)
    for g, w in zip(expected, plain, strict=True):  # without autocast they would differ by more
        assert (g - w).abs().max() > 1e-4 * w.abs().max()
    assert all(g is not None and g.any() for g in later)
    x0 = chain(model, x, recompute=recompute)
    with torch.autocast("cpu", torch.bfloat16):  # what stands around the backward pass does not reach into it
        agree(gradients(x0, inputs), plain, 1e-4)


def test_autocast_before_the_steps_that_carry_gradients():
    """What runs without a graph must not leave its casts of the weights to what runs with one."""
    model, x = Net(), start(dtype=torch.float32)
    weights = [model.enter.weight, model.leave.weight]
    for recompute in ("none", "step"):
        with torch.autocast("cpu", torch.bfloat16):
            x0 = chain(model, x, recompute=recompute, grad_steps=2)
            later = model(x, torch.ones(5))
        assert all(g.any() for v in (x0, later) for g in gradients(v, weights))


def test_a_compiled_network():
    model, x = Net(nn.BatchNorm1d(6)).double(), start()
    twin = copy.deepcopy(model)
    inputs = [model.enter.weight, model.middle[0].weight, model.leave.bias, x]
    want = gradients(by_hand(twin, x), [twin.enter.weight, twin.middle[0].weight, twin.leave.bias, x])
    torch._dynamo.reset()
    agree(gradients(chain(torch.compile(model, backend="aot_eager"), x, recompute=3), inputs), want)
    torch._dynamo.reset()
    agree(model.buffers(), twin.buffers(), 1e-12)


def test_parameters_that_are_no_leaves():
    """A weight W = base + A B that a callable works with, as adapters of low rank make it."""
    leaves = base, a, b = [
        torch.randn(n, m, dtype=torch.float64, requires_grad=True) for n, m in ((2, 2), (2, 1), (1, 2))
    ]

    def model(x, t):
        return torch.tanh(x @ weight + t[:, None] / 10)

    x = start()
    weight = base + a @ b
    want = gradients(by_hand(model, x), [x, *leaves])
    for recompute in RECOMPUTED:
        weight = base + a @ b
        weight.retain_grad()
        x0 = chain(model, x, recompute=recompute, parameters=[weight])
        agree(gradients(x0, [x, *leaves], retain_graph=True), want)
        weight.grad = None
        reward(x0).backward()
        agree([weight.grad], [want[1]])  # once, as for base


def test_one_of_two_parameters_from_one_node():
    """Parts of a tensor have one node in the graph: that one is listed does not stand for the other."""
    whole, x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True), start()
    first, second = whole.unbind()

    def model(x, t):
        return torch.tanh(x @ first) @ second

    want = gradients(by_hand(model, x), [whole])
    agree(gradients(chain(model, x, parameters=[first, second]), [whole], retain_graph=True), want)
    with pytest.raises(RuntimeError, match=r"shape \[2, 2, 2\]"):
        gradients(chain(model, x, parameters=[first]), [whole])


def test_a_callable_names_its_parameters():
    model, x = Net().double(), start()
    inputs = [*model.enter.parameters(), *model.leave.parameters()]
    want = gradients(by_hand(model, x), inputs)

    def call(x, t):
        return model(x, t)

    agree(gradients(chain(call, x, parameters=inputs), inputs), want)
    agree(gradients(chain(call, x, parameters=inputs + inputs), inputs), want)
    x0 = chain(call, x)
    with pytest.raises(RuntimeError, match=r"trainable tensor of shape \[(6|2|6, 2|2, 6)\] .* name it in parameters="):
        gradients(x0, [x])


def test_a_trainable_tensor_that_is_no_input_is_an_error():
    model, x = Net().double(), start()
    shape = r"shape \[2, 6\]"
    with pytest.raises(RuntimeError, match=shape):
        reward(chain(model, x, parameters=[p for p in model.parameters() if p is not model.leave.weight])).backward()
    held = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"shape \[1, 3, 2\]"):
        reward(chain(lambda x, t: model(x, t) + (2 * held).sum(), x, parameters=[*model.parameters()])).backward()
    with pytest.raises(RuntimeError, match=r"shape \[1, 3, 2\]"):  # in a list: no input
        x0 = chain(lambda x, t, more: x * more[0].mean(), x, cond=dict(more=[held]))
        reward(x0).backward()
    assert all(p.grad is None for p in (held, x, *model.parameters()))
    model.leave.weight.requires_grad_(False)  # then the others may be all
    reward(chain(model, x, parameters=trained(model))).backward()


class Holds(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t)


@pytest.fixture
def process_group():
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_that_exchange_gradients_are_refused(process_group):
    x = start(dtype=torch.float32)
    for wrap in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        for model, where in ((wrap(Net()), "itself"), (Holds(wrap(Net())), "net")):
            with pytest.raises(ValueError, match=rf"model: '{where}' \({wrap.__name__}\) exchanges gradients"):
                chain(model, x)
            chain(getattr(model, "net", model).module, x)


SPECTRAL = [
    (nn.utils.spectral_norm, r"'enter' \(Linear\)"),
    (nn.utils.parametrizations.spectral_norm, r"'enter\.parametrizations\.weight\.0' \(_SpectralNorm\)"),
]


@pytest.mark.parametrize("norm, where", SPECTRAL, ids=("old", "new"))
def test_spectral_norm(norm, where):
    model, x = Net().double(), start()
    norm(model.enter)
    with pytest.raises(ValueError, match=f"model: {where} changes its weight"):
        chain(model, x)
    critic = Critic().double()
    norm(critic.layers[0])
    with pytest.raises(ValueError, match=r"critic: 'layers\.0.* changes its weight"):
        chain(Net().double(), x, critic=critic)
    model.eval()
    inputs = [x, *trained(model.enter), *trained(model.leave)]
    want = gradients(by_hand(model, x), inputs)
    for recompute in RECOMPUTED:
        agree(gradients(chain(model, x, recompute=recompute), inputs), want)


def test_weight_norm():
    model, x = Net().double(), start()
    parametrizations.weight_norm(model.enter)
    inputs = [x, *trained(model.enter), *trained(model.leave)]
    want = gradients(by_hand(model, x), inputs)
    for recompute in RECOMPUTED:
        agree(gradients(chain(model, x, recompute=recompute), inputs), want)
        with parametrize.cached(), pytest.raises(ValueError, match="cached.. must not be around a chain"):
            chain(model, x, recompute=recompute)
