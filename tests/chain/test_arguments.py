"""Randomness, batches, memory formats and arguments of denoise_chain."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.chain.by_hand import KEY, RECOMPUTE, Net, T, agree, by_hand, chain, gradients, reward, same, start


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
        (dict(key=torch.tensor([3.0])), "key must be"),
        (dict(recompute="none", keep_dtype=torch.bfloat16), "keep_dtype and keep_on are None with recompute='none'"),
        (dict(recompute="none", keep_on="cpu"), "keep_dtype and keep_on"),
        (dict(keep_dtype=torch.int16), "keep_dtype must be a floating-point type, got torch.int16"),
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
