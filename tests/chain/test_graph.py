"""denoise_chain as one node among others in a graph."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.chain.by_hand import RECOMPUTED, Net, T, agree, by_hand, chain, gradients, reward, same, start


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
