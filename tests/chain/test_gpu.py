"""denoise_chain on a GPU."""

import pytest
import torch
from torch import nn

from tests.chain.by_hand import RECOMPUTED, Net, T, agree, chain, gradients, same, start

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("recompute", ("none", *RECOMPUTED))
def test_steps_in_cuda_graphs(recompute):
    """Forward and backward pass of a step replayed: the samples and gradients of launches one by one.

    Plain autograd ("none") cannot have them: the buffers of a replay hold one step's activations.
    """
    model, x = Net(nn.Linear(6, 6), nn.SiLU()).cuda(), start(dtype=torch.float32).detach().cuda().requires_grad_()
    inputs = [x, *model.enter.parameters()]
    want = chain(model, x, recompute=recompute)
    expected = gradients(want, inputs)
    t = torch.full((len(x),), T, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (x.detach().clone().requires_grad_(), t))
    got = chain(graphed, x, recompute=recompute)
    agree([got], [want], 1e-5)
    if recompute != "none":
        agree(gradients(got, inputs), expected, 1e-5)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_a_network_compiled_with_cuda_graphs(recompute):
    model, x = Net(nn.Linear(6, 6), nn.SiLU()).cuda(), start(dtype=torch.float32).detach().cuda().requires_grad_()
    inputs = [x, *model.enter.parameters()]
    want = chain(model, x, recompute=recompute)
    expected = gradients(want, inputs)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):  # graphs are recorded at the second call
        got = chain(compiled, x, recompute=recompute)
        agree([got], [want], 1e-5)
        agree(gradients(got, inputs), expected, 1e-5)
