"""What denoise_chain keeps for the backward pass, and how far back that goes."""

import copy
import weakref

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from tests.chain.by_hand import (
    KEY,
    RECOMPUTE,
    RECOMPUTED,
    Net,
    T,
    agree,
    by_hand,
    chain,
    gradients,
    reward,
    same,
    start,
)


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
