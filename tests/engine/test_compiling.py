"""Compiled networks against the same run without: losses, weights, names, and what stays eager."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast.engine import compiling
from diffgan_fast.engine.compiling import compiled
from diffgan_fast.ops import gradient_penalty, r1_penalty
from tests.engine import methods

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch):
    """Networks are traced, forward and backward, as for the compiler, but run by torch: no minutes of C++.

    How many graphs were made.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiling, "SETTINGS", {"dynamic": False, "backend": backend})
    yield graphs
    torch._dynamo.reset()


class Denoiser(nn.Module):
    """With batch norm, dropout and a time embedding. A U-Net takes a minute to trace."""

    def __init__(self):
        super().__init__()
        self.enter, self.time = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(1, 6)
        self.norm, self.drop, self.leave = nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x, t):
        h = self.enter(x) + self.time(t[:, None].to(x.dtype) / 10)[:, :, None, None]
        return self.leave(self.drop(torch.relu(self.norm(h))))


OWN = ["ddpm", "method1", "method2", "method2, every second state", "method2, plain autograd", "method3.5", "method4"]
OTHERS = ["gan-enhanced", "gan, R1", "gan, residual", "ddgan of points", "diffusion-gan, as coded"]


@pytest.mark.parametrize(
    "case", [*OWN, *OTHERS, *(pytest.param(c, marks=pytest.mark.slow) for c in ("ddgan", "method3"))]
)
def test_a_compiled_run_is_the_eager_run(case, traced):
    """Dropout, batch norm, penalties and the chain included; three steps make no more graphs than two."""
    torch.manual_seed(4)
    own = Denoiser()

    def run(how):
        given = {"denoiser": copy.deepcopy(own)} if case in OWN else {}
        method, state, batch = methods.start(case, given)
        with compiled(state.nets, how, CPU):
            rows = [methods.step(method, state, batch) for _ in range(2)]
            made = len(traced)
            rows.append(methods.step(method, state, batch))
        return rows, methods.weights(state), made

    (plain, want, none), (rows, got, made) = run(False), run(True)
    assert none == 0 and 0 < made == len(traced)
    for row, exact in zip(rows, plain, strict=True):
        assert row == pytest.approx(exact, rel=1e-3, abs=1e-4)
    begun = methods.weights(methods.start(case, {"denoiser": own} if case in OWN else {})[1])
    assert (got - want).norm() < 0.03 * (want - begun).norm()  # Adam moves weights by rounding too


class Critic(nn.Module):
    """Smooth: not in closed form."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.leave(nn.functional.softplus(self.enter(x)))


def critic():
    torch.manual_seed(1)
    return Critic()


def test_penalties_of_a_compiled_critic(traced):
    net, twin = critic(), critic()
    x, other = torch.randn(2, 5, 2)
    with compiled({"critic": net}, True, CPU):
        for call in (lambda d: r1_penalty(d, x), lambda d: gradient_penalty(d, x, other, 3, mode="forward")):
            got, want = call(net), call(twin)
            assert torch.equal(got, want)
            for a, b in zip(*(torch.autograd.grad(v, d.parameters(), allow_unused=True)
                              for v, d in ((got, net), (want, twin))), strict=True):  # fmt: skip
                assert (a is None and b is None) or torch.equal(a, b)
        assert not traced
        net(x)
        assert len(traced) == 1


def test_a_network_is_itself_again(traced):
    net, plain = critic(), critic()
    names = list(net.state_dict())
    with compiled({"net": net, "noise": dgf.AdaptiveDiffusion()}, True, CPU):
        net(torch.ones(1, 2))
        assert list(net.state_dict()) == names
        copied = copy.deepcopy(net)
    for each in (net, copied):
        assert torch.equal(each(torch.zeros(3, 2)), plain(torch.zeros(3, 2)))
    assert len(traced) == 1
    with compiled({"net": net}, "auto", CPU), compiled({"net": net}, False, CPU):
        net(torch.zeros(5, 2))
    assert len(traced) == 1  # auto is for CUDA


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.layer(self.drop(x.flatten(1))).view_as(x) + (t / 10).view(-1, 1, 1, 1)


def net():
    torch.manual_seed(2)
    return Net()


def test_a_run_by_the_compiler_itself(tmp_path, monkeypatch):
    """With dropout: the masks are those of the eager run. It stops and goes on; pictures are drawn eagerly."""
    monkeypatch.setattr("diffgan_fast.api.GRID", 4)
    options = dict(batch_size=8, T=4, log_every=1, sample_every=2, checkpoint_every=0, progress=False, device="cpu")
    runs = [
        dgf.train("ddpm", "digits", tmp_path / str(how), model=net(), steps=4, compile=how, **options)
        for how in (False, True)
    ]
    plain, whole = (methods.weights(run.state) for run in runs)
    assert torch.allclose(plain, whole, atol=1e-5)

    def stop(run, row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    folder, options = tmp_path / "cut", dict(options, compile=True)
    with pytest.raises(KeyboardInterrupt):
        dgf.train("ddpm", "digits", folder, model=net(), steps=4, callbacks=[stop], **options)
    cut = dgf.train("ddpm", "digits", folder, model=net(), steps=4, resume=True, **options)
    assert torch.equal(methods.weights(cut.state), whole)
    assert cut.state["denoiser"]._compiled_call_impl is None
    assert torch.equal(dgf.load(folder, model=net()).sample(2), cut.sample(2))
