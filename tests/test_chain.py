"""denoise_chain against steps written out in plain torch, float64, and against closed forms."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffgan_fast as dgf
from diffgan_fast.sampling import first_noise
from tests.nets.helpers import randomise
from tests.ops import oracle

T, BETAS, KEY = 8, (0.02, 0.3), 21
S = dgf.Schedule.linear(T, *BETAS)
ABAR = oracle.linear_schedule(T, *BETAS)[2].tolist()
RECOMPUTED = ("step", 3, 4, 50)  # 3 does not divide T, 4 does, 50 is above it
RECOMPUTE = ("none", *RECOMPUTED)


class Net(nn.Module):
    """Small, smooth, and with whatever a step may depend on: t, a shift, a scale, labels."""

    def __init__(self, *middle):
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 6), nn.Linear(6, 2)
        self.label, self.middle = nn.Embedding(4, 6), nn.Sequential(*middle)

    def forward(self, x, t, shift=0.0, scale=1.0, y=None):
        h = self.enter(x) + shift + t[:, None] / 10
        h = h if y is None else h + self.label(y)
        return scale * self.leave(self.middle(torch.tanh(h)))


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x, *, t):
        return self.layers(x) * t[:, None] / 10


def start(n=5, shape=(2,), dtype=torch.float64):
    """x_T, a leaf that wants its gradient."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def by_hand(model, x, *, key=KEY, sampler="ddpm", steps=None, eta=0.0, variance="beta", prediction="eps",
            clip_x0=False, guidance_scale=1.0, critic=None, logit_scale=1.0, logit_from=1, cond=None, uncond=None,
            last=T):  # fmt: skip
    """x_0 by the formulas, one after the other in plain torch: noise from the test's own Philox, states before `last`
    constant, and torch's generator seeded as the chain says that it does."""
    kept = range(T + 1) if steps is None else [math.floor(i * T / steps + 0.5) for i in range(steps + 1)]
    with torch.random.fork_rng():
        for i in range(len(kept) - 1, 0, -1):
            if i == last < T:
                x = x.detach()
            t, a, b = kept[i], ABAR[kept[i]], ABAR[kept[i - 1]]
            torch.manual_seed(dgf.random.fold_in(key, i, "torch"))
            told = torch.full((len(x),), t)
            out = model(x, told, **(cond or {})).to(x.dtype)
            if guidance_scale != 1.0:
                without = model(x, told, **(uncond or {})).to(x.dtype)
                out = without + guidance_scale * (out - without)
            root, rest = a**0.5, (1 - a) ** 0.5
            other = (x - root * out) / rest if prediction == "x0" else root * out + rest * x
            eps = out if prediction == "eps" else other
            if critic is not None and t >= logit_from:
                at = x if x.requires_grad else x.detach().requires_grad_()
                (g,) = torch.autograd.grad(critic(at, t=told).sum(), at, create_graph=True)
                eps = eps - logit_scale * rest * g
            x0 = (x - rest * eps) / root
            if clip_x0:
                x0 = x0.clamp(-1, 1)
                eps = (x - root * x0) / rest
            var = (1 - a / b) * (1 - b) / (1 - a)  # the posterior's; 0 in the last step
            if sampler == "ddim":
                var = eta**2 * var
                x = b**0.5 * x0 + (1 - b - var) ** 0.5 * eps
            else:
                x = b**0.5 * (1 - a / b) / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
                var = 1 - a / b if variance == "beta" and i > 1 else var
            z = torch.as_tensor(oracle.normal(x.numel(), dgf.random.fold_in(key, i))).reshape(x.shape)
            x = x + (var**0.5 * z).to(x.dtype)
    return x


def chain(model, x, **options):
    return dgf.denoise_chain(model, x, S, options.pop("key", KEY), **options)


def reward(x0):
    """A scalar in which no two elements stand alike."""
    return (x0 * torch.linspace(-1, 1, x0.numel()).to(x0).reshape(x0.shape)).sum() + (x0**2).mean()


def gradients(x0, inputs, **options):
    return torch.autograd.grad(reward(x0), inputs, allow_unused=True, **options)


def agree(got, want, tolerance=1e-10):
    for g, w in zip(got, want, strict=True):
        if w is None:
            assert g is None
        else:
            assert (g.double() - w.double()).abs().max() <= tolerance * w.double().abs().max()


def same(got, want):
    assert all((g is w is None) or torch.equal(g, w) for g, w in zip(got, want, strict=True))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


# The value and its gradients, for every way to make a step.

OPTIONS = [
    dict(),
    dict(variance="posterior"),
    dict(clip_x0=True),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=1.0, clip_x0=True),
    dict(steps=5),
    dict(sampler="ddim", steps=5, eta=0.5),
    dict(prediction="x0"),
    dict(prediction="v", clip_x0=True),
    dict(guidance_scale=2.5),
    dict(critic=Critic, logit_scale=1.5, logit_from=4),
    dict(critic=Critic, guidance_scale=0.5, prediction="v", variance="posterior"),
]


def case(options, dtype):
    """(model, x_T, options with their networks and conditions, all that wants a gradient)."""
    torch.manual_seed(1)
    model, x, options = Net().to(dtype), start(dtype=dtype), dict(options)
    shift, other = (torch.randn(n, 6, dtype=torch.float64).to(dtype).requires_grad_() for n in (5, 1))
    options["cond"] = dict(shift=shift, scale=0.8, y=torch.tensor([0, 3, 1, 1, 2]))
    options["uncond"] = dict(shift=other)
    inputs = [x, shift, *model.parameters()]
    if options.get("guidance_scale"):
        inputs.append(other)
    if "critic" in options:
        options["critic"] = options["critic"]().to(dtype)
        inputs += options["critic"].parameters()
    return model, x, options, inputs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_to_make_a_step(options):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model, x, given, inputs = case(options, torch.float64)
        want = by_hand(model, x, **given)
        expected = gradients(want, inputs)
        assert all(g is not None and g.any() for g in expected if g is not expected[-1])
        model, x, given, inputs = case(options, dtype)
        for recompute in RECOMPUTE:
            got = chain(model, x, recompute=recompute, **given)
            assert got.dtype == dtype
            agree([got], [want], tolerance)
            agree(gradients(got, inputs), expected, tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_value_is_that_of_sample(options, recompute):
    model, _, options, _ = case(options, torch.float32)
    want = dgf.sample(model, (5, 2), S, KEY, **options)
    assert torch.equal(chain(model, first_noise((5, 2), KEY), recompute=recompute, **options), want)


@pytest.mark.parametrize("recompute", ("none", "step", 15, 17, 301))
def test_golden_of_a_linear_network(recompute):
    """eps_hat = k x makes every step linear: dx_0/dx_T = prod_t (1 - k beta_t / sqrt(1 - abar_t)) / sqrt(alpha_t)."""
    k, (beta, alpha, abar) = 0.5, oracle.linear_schedule(300)
    product = math.prod((1 - k * beta[t] / (1 - abar[t]) ** 0.5) / alpha[t] ** 0.5 for t in range(1, 301))
    assert abs(product - 0.51750970) < 1e-8
    x = start(3)
    x0 = dgf.denoise_chain(lambda x, t: k * x, x, dgf.Schedule.linear(300), KEY, recompute=recompute)
    (g,) = torch.autograd.grad(x0.sum(), x)
    torch.testing.assert_close(g, torch.full_like(g, product), rtol=1e-12, atol=0)


def test_x_T_needs_no_gradient():
    """Neither with a critic, whose gradient is then taken at a copy of x_T."""
    model, x, given, _ = case(OPTIONS[-1], torch.float64)
    inputs = [*model.parameters(), *given["critic"].parameters()]
    want = gradients(by_hand(model, x.detach(), **given), inputs)
    for recompute in RECOMPUTED:
        agree(gradients(chain(model, x.detach(), recompute=recompute, **given), inputs), want)


# Networks.


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


# One node among others in a graph.


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_gradients_are_handed_over_once(recompute):
    """.grad stays as it was until the end; hooks see the whole gradient, once, and may change it."""
    model, x, seen = Net().double(), start(), []
    (want,) = gradients(by_hand(model, x), [model.leave.weight])

    def watched(x, t):
        seen.append(model.leave.weight.grad.clone())
        return model(x, t)

    before = torch.ones_like(want)
    model.leave.weight.grad = before.clone()
    hooked, after = [], []
    model.leave.weight.register_hook(lambda g: hooked.append(g.clone()) or 3 * g)
    model.leave.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    reward(chain(watched, x, recompute=recompute, parameters=[*model.parameters()])).backward()
    assert len(seen) == T * (2 if recompute == "step" else 3) - (0 if recompute == "step" else -(-T // recompute))
    same(seen, [before] * len(seen))
    agree(hooked, [want])
    agree([*after, model.leave.weight.grad], [before + 3 * want] * 2)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_backward_for_some_inputs_and_twice(recompute):
    model, x = Net().double(), start()
    inputs = [x, *model.enter.parameters()]
    want = gradients(by_hand(model, x), inputs)
    x0 = chain(model, x, recompute=recompute)
    reward(x0).backward(inputs=inputs[:2], retain_graph=True)
    agree([v.grad for v in inputs], [*want[:2], None])
    assert all(p.grad is None for p in model.leave.parameters())
    first, second = gradients(x0, inputs, retain_graph=True), gradients(x0, inputs)
    agree(first, want)
    same(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x0, inputs)


def test_there_is_no_second_order():
    model, x = Net().double(), start()
    (g,) = torch.autograd.grad(reward(chain(model, x)), model.enter.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    (g,) = torch.autograd.grad(reward(chain(model, x, recompute="none")), model.enter.weight, create_graph=True)
    assert torch.autograd.grad(g.sum(), model.leave.weight)[0].any()


@pytest.mark.parametrize("what", ("x_T", "a parameter", "a frozen parameter", "a condition"))
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_inputs_changed_in_place_are_noticed(what, recompute):
    model, x, shift = Net().double(), start(), torch.zeros(5, 6, dtype=torch.float64)
    model.enter.weight.requires_grad_(False)
    x0 = chain(model, x, recompute=recompute, cond=dict(shift=shift))
    changed = {
        "x_T": x, "a parameter": model.leave.weight, "a frozen parameter": model.enter.weight, "a condition": shift
    }[what]  # fmt: skip
    want = torch.autograd.grad(reward(x0), model.leave.weight, retain_graph=True)
    with torch.no_grad():
        changed.add_(1)
    if what == "x_T":  # its copy is what counts
        same(torch.autograd.grad(reward(x0), model.leave.weight), want)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reward(x0).backward()


def test_other_graphs_of_the_same_network_stay_valid():
    """Batch norm's buffers are saved by them; that the backward pass puts these back must not count as a change."""
    model, x = Net(nn.BatchNorm1d(6)).double(), start()
    t = torch.ones(5)
    twin = copy.deepcopy(model)
    for net, run in ((twin, by_hand), (model, chain)):
        early = net(x, t)
        x0 = run(net, x)
        late = net.eval()(x, t)
        net.train()
        (reward(x0) + reward(early)).backward()
        reward(late).backward()
    agree([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    agree(model.buffers(), twin.buffers(), 1e-12)


def test_two_chains_in_one_graph():
    model, x = Net(nn.BatchNorm1d(6)).double(), start()
    inputs = [x, model.enter.weight, model.leave.weight]
    want = gradients(by_hand(model, by_hand(model, x)) + by_hand(model, x), inputs)
    agree(gradients(chain(model, chain(model, x)) + chain(model, x, recompute=3), inputs), want)


def test_saved_tensors_hooks_and_checkpoints_around_a_chain():
    model, x = Net().double(), start()
    inputs = [x, *model.enter.parameters()]
    want = gradients(by_hand(model, x), inputs)
    with torch.autograd.graph.save_on_cpu():
        x0 = chain(model, x)
    agree(gradients(x0, inputs), want)
    agree(gradients(checkpoint(lambda x: chain(model, x), x, use_reentrant=False), inputs), want)


def test_without_gradients():
    model, x = Net().double(), start()
    with torch.no_grad():
        assert not chain(model, x).requires_grad
    model.requires_grad_(False)
    assert not chain(model, x.detach()).requires_grad
    with torch.inference_mode():
        chain(model, x)


# Modules whose second run is not like the first.


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


# Truncation.


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("last", (1, 3, T))
def test_only_the_last_steps_carry_gradients(last, recompute):
    model, x = Net(nn.BatchNorm1d(6)).double(), start()
    twin = copy.deepcopy(model)
    shifts = [torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    nets = zip((twin, model), shifts, strict=True)
    inputs = [[x, shift, *net.enter.parameters(), *net.leave.parameters()] for net, shift in nets]
    whole = by_hand(copy.deepcopy(twin), x)
    want = gradients(by_hand(twin, x, last=last, cond=dict(shift=shifts[0])), inputs[0])
    assert (want[0] is None) == (last < T)
    x0 = chain(model, x, recompute=recompute, grad_steps=last, cond=dict(shift=shifts[1]))
    agree([x0], [whole])
    agree(gradients(x0, inputs[1]), want)
    agree(model.buffers(), twin.buffers(), 1e-12)


def test_the_key_draws_how_many_steps_carry_gradients():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def steps(key, grad_steps, recompute="none"):
        count = 0

        def model(x, t):
            nonlocal count
            count += torch.is_grad_enabled()
            return weight * x

        x0 = chain(model, start(), key=key, grad_steps=grad_steps, parameters=[weight], recompute=recompute)
        reward(x0).backward()
        return count

    found = [steps(key, (2, 5)) for key in range(40)]
    assert set(found) == {2, 3, 4, 5}
    assert [steps(key, (2, 5), "step") for key in range(40)] == found
    assert {steps(key, (3, 3)) for key in range(3)} == {3}


# Kept states.


def test_states_kept_in_bfloat16_and_on_a_device():
    model, x = Net(), start(dtype=torch.float32)
    inputs = [x, *model.enter.parameters()]
    exact = chain(model, x)
    want = gradients(exact, inputs)
    for recompute in RECOMPUTED:
        rounded = chain(model, x, recompute=recompute, keep_dtype=torch.bfloat16)
        assert torch.equal(rounded, exact)
        found = gradients(rounded, inputs)
        agree(found, want, 0.02)
        assert not any(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    same(gradients(chain(model, x, keep_on="cpu"), inputs), want)


def kept_by(run):
    """Bytes of the tensors that the graph of run() keeps."""
    kept = []

    def pack(v):
        kept.append(v)
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        x0 = run()
    assert x0.requires_grad
    return sum({v.data_ptr(): v.nbytes for v in kept}.values())


@pytest.mark.parametrize("recompute, states", [("step", 1), (2, 1 / 2), (10, 1 / 10)])
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_what_a_graph_keeps_grows_by_the_states_alone(recompute, states, dtype):
    model, x = Net(nn.Linear(6, 500), nn.Tanh(), nn.Linear(500, 6)), start(50, dtype=torch.float32)

    def kept(steps, recompute):
        options = {} if recompute == "none" else dict(keep_dtype=dtype)
        schedule = dgf.Schedule.linear(steps)
        return kept_by(lambda: dgf.denoise_chain(model, x, schedule, KEY, recompute=recompute, **options))

    state = x.nbytes if dtype is None else x.nbytes // 2
    assert kept(60, recompute) - kept(20, recompute) == 40 * states * state
    parameters = sum(p.nbytes for p in model.parameters())
    assert kept(20, recompute) <= parameters + x.nbytes + 20 * states * state
    assert kept(60, "none") - kept(20, "none") > 40 * 50 * 500 * 4  # plain autograd keeps the hidden layers


class Token:
    """Lives as long as the graph that holds it."""


class Marked(torch.autograd.Function):
    alive: weakref.WeakSet = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        Marked.alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("recompute, most", [("none", T), ("step", 1), (3, 1)])
def test_one_step_has_a_graph_at_a_time(recompute, most):
    alive = []

    def model(x, t):
        x = Marked.apply(x)
        alive.append(len(Marked.alive))
        return x / 2

    x0 = chain(model, start(), recompute=recompute)
    assert len(Marked.alive) == (T if recompute == "none" else 0)
    reward(x0).backward()
    assert max(alive) == most
    del x0
    assert not Marked.alive


# Randomness, batches, arguments.


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_callers_generator_stays_as_it_is(recompute):
    model, x = Net(nn.Dropout(0.5)).double(), start()
    state = torch.get_rng_state()
    x0 = chain(model, x, recompute=recompute)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    state = torch.get_rng_state()
    reward(x0).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(chain(model, x, recompute=recompute), x0)  # whatever it is
    assert not torch.equal(chain(model, x, recompute=recompute, key=KEY + 1), x0)


def test_every_step_has_its_own_masks():
    masks = []

    def model(x, t):
        masks.append(F.dropout(torch.ones(64), 0.5))
        return 0 * x

    reward(chain(model, start(), recompute="step")).backward()
    forward, backward = masks[:T], masks[: -T - 1 : -1]
    same(forward, backward)
    assert len({tuple(m.tolist()) for m in forward}) == T


def test_a_batch_in_parts():
    model, x = Net().double(), start(9)
    want = chain(model, x)
    expected = torch.autograd.grad((want**2).sum(), [x, *model.enter.parameters()])
    for recompute in RECOMPUTE:
        sums = [torch.zeros_like(g) for g in expected]
        for a, b in ((0, 2), (2, 9)):
            part = chain(model, x[a:b], first_sample=a, recompute=recompute)
            agree([part], [want[a:b]], 1e-12)
            for total, g in zip(
                sums, torch.autograd.grad((part**2).sum(), [x, *model.enter.parameters()]), strict=True
            ):
                total += g
        agree(sums, expected)


def test_memory_format_is_kept():
    wide = nn.Conv2d(3, 3, 3, padding=1).double()
    x = start(4, (3, 6, 6)).detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def model(x, t):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return wide(x)

    x0 = chain(model, x, parameters=[*wide.parameters()])
    assert x0.is_contiguous(memory_format=torch.channels_last)
    want = gradients(by_hand(lambda x, t: wide(x), x), [x, wide.weight])
    agree(gradients(x0, [x, wide.weight]), want)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recompute="all"), "recompute must be 'none', 'step' or an int >= 1, got 'all'"),
        (dict(recompute=0), "recompute must be"),
        (dict(recompute=True), "recompute must be"),
        (dict(recompute=2.0), "recompute must be"),
        (dict(grad_steps=0), rf"grad_steps must be in 1..{T}, or a pair \(low, high\) of such; got 0"),
        (dict(grad_steps=T + 1), "grad_steps must be"),
        (dict(grad_steps=(3, 2)), "grad_steps must be"),
        (dict(grad_steps=(1, 2, 3)), "grad_steps must be"),
        (dict(grad_steps=(0, 2)), "grad_steps must be"),
        (dict(grad_steps=2.0), "grad_steps must be"),
        (dict(grad_steps=True), "grad_steps must be"),
        (dict(grad_steps=5, steps=4), "grad_steps must be in 1..4"),
        (dict(key=-1), r"key must be an int in \[0, 2\*\*63\)"),
        (dict(key=1.0), "key must be"),
        (dict(key=torch.tensor([3])), "key must be"),
        (dict(recompute="none", keep_dtype=torch.bfloat16), "keep_dtype and keep_on are None with recompute='none'"),
        (dict(recompute="none", keep_on="cpu"), "keep_dtype and keep_on"),
        (dict(sampler="heun"), "sampler must be"),
        (dict(steps=T + 1), "steps must be"),
        (dict(prediction="score"), "prediction must be"),
        (dict(logit_scale=2.0), "logit_scale=2.0 needs a critic"),
        (dict(first_sample=-1), "first_sample must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        chain(Net().double(), start(), **options)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="smapler"):
        chain(Net().double(), start(), smapler="ddim")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_on_a_gpu_with_states_on_the_host(recompute):
    """The CPU's samples and gradients, states in pinned memory, and masks of the GPU's own that are the same again."""
    model, x = Net(nn.Linear(6, 6), nn.SiLU()), start(dtype=torch.float32)
    inputs = [x, *model.enter.parameters()]
    want = chain(model, x)
    expected = gradients(want, inputs)
    model, x = model.cuda(), x.detach().cuda().requires_grad_()
    inputs = [x, *model.enter.parameters()]
    kept: list = []
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        got = chain(model, x, recompute=recompute, keep_on="cpu")
    assert [v.shape for v in kept if v.is_pinned()] == [x.shape] * -(-T // (1 if recompute == "step" else recompute))
    agree([got.cpu()], [want], 1e-4)
    agree([g.cpu() for g in gradients(got, inputs)], expected, 1e-4)
    model.middle.append(nn.Dropout(0.5))
    same_masks = [gradients(chain(model, x, recompute=r), inputs) for r in ("none", recompute)]
    agree(*same_masks, 1e-4)
    same((torch.get_rng_state(), torch.cuda.get_rng_state()), states)
