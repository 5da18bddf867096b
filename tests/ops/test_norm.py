"""Group norm and SiLU in one, against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from diffgan_fast import nets
from diffgan_fast.ops import norm
from diffgan_fast.ops.norm import group_norm_silu

CL = torch.channels_last
ours = pytest.mark.skipif(not norm._EXISTS, reason="the CPU library is not there")
# samples, channels, height, width, groups, whether scale and bias are a sample's, whether there is a shift
CASES = [
    (2, 8, 3, 5, 2, False, False),
    (3, 32, 8, 8, 8, False, True),
    (2, 96, 8, 8, 24, True, True),
    (2, 130, 4, 4, 13, False, True),  # parts of 60, 60 and 10 channels
    (4, 64, 28, 28, 16, True, False),
    (1, 256, 12, 12, 4, False, True),  # groups as wide as a part can be
    (2, 6, 1, 1, 1, False, False),
]


def definition(x, scale, bias, shift=None, *, groups, eps=1e-5):
    if shift is not None:
        x = x + shift[:, :, None, None]
    parts = x.reshape(len(x), groups, -1)
    normed = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, correction=0, keepdim=True) + eps).sqrt()
    across = (slice(None) if scale.dim() == 2 else None, slice(None), None, None)
    z = normed.reshape(x.shape) * scale[across] + bias[across]
    return z / (1 + torch.exp(-z))


def tensors(case, dtype=torch.float32):
    n, c, h, w, _, rows, shifted = case
    g = torch.Generator().manual_seed(sum(case[:5]))
    size = (n, c) if rows else (c,)
    x = (2 * torch.randn(n, c, h, w, generator=g) + 0.7).contiguous(memory_format=CL)
    all_of = [x, torch.randn(size, generator=g), torch.randn(size, generator=g)]
    if shifted:
        all_of.append(torch.randn(n, c, generator=g))
    return [v.to(dtype).requires_grad_() for v in all_of]


def gradients(function, inputs, groups, **options):
    out = function(*inputs, groups=groups)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, up.contiguous(memory_format=CL), **options)


@ours
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(case):
    got = gradients(group_norm_silu, tensors(case), case[4])
    assert type(got[0].grad_fn).__name__ == "_GroupNormSiLUBackward"
    want = gradients(definition, tensors(case, torch.float64), case[4])
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g - w).abs().max() <= 2e-6 * w.abs().max()
    assert all(v.is_contiguous(memory_format=CL) for v in got[:2])


@ours
def test_far_from_zero_and_saturated():
    x, scale, bias = tensors(CASES[0])
    far = (x.detach() + 1000).requires_grad_()
    torch.testing.assert_close(
        group_norm_silu(far, scale, bias, groups=2),
        definition(far.double(), scale.double(), bias.double(), groups=2).float(),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    extreme = torch.tensor([-200.0, -90.0, 0.0, 30.0, 90.0, 200.0, 1e30, -1e30])
    got = group_norm_silu(x, torch.zeros(8), extreme, groups=2)[0, :, 0, 0]
    torch.testing.assert_close(got, functional.silu(extreme))
    x.data[1] = float("nan")
    out = group_norm_silu(x, scale, bias, groups=2)
    assert out[0].isfinite().all() and out[1].isnan().all()


@ours
def test_results_do_not_depend_on_the_number_of_threads():
    before, all_of = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            all_of.append(gradients(group_norm_silu, tensors(CASES[3]), 13))
    finally:
        torch.set_num_threads(before)
    for other in all_of[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_of[0], other, strict=True))


@ours
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_gradients_of_gradients(case):
    def second(function, inputs):
        _, *grads = gradients(function, inputs, case[4], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for g, w in zip(
        second(group_norm_silu, tensors(case)), second(definition, tensors(case, torch.float64)), strict=True
    ):
        assert (g - w).abs().max() <= 1e-4 * w.abs().max()


@ours
def test_only_what_is_wanted_has_a_gradient():
    x, scale, bias, shift = tensors(CASES[1])
    out = group_norm_silu(x.detach(), scale, bias.detach(), shift, groups=8)
    got = torch.autograd.grad(out.square().sum(), (scale, shift))
    wide = [v.detach().double().requires_grad_() for v in (x, scale, bias, shift)]
    want = torch.autograd.grad(definition(*wide, groups=8).square().sum(), (wide[1], wide[3]))
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-5 * w.abs().max()


@ours
@pytest.mark.parametrize("why", ["contiguous", "float64", "autocast", "func", "wide groups"])
def test_the_rest_is_torchs(why):
    x, scale, bias, shift = (v.detach() for v in tensors(CASES[1]))
    groups = 8
    if why == "contiguous":
        x = x.contiguous()
    elif why == "float64":
        x, scale, bias, shift = (v.double() for v in (x, scale, bias, shift))
    elif why == "wide groups":
        groups, x = 1, torch.randn(2, 65, 2, 2).contiguous(memory_format=CL)
        scale, bias, shift = torch.randn(65), torch.randn(65), torch.randn(2, 65)
    x.requires_grad_()
    want = definition(x, scale, bias, shift, groups=groups)
    if why == "func":
        got = torch.func.grad(lambda v: group_norm_silu(v, scale, bias, shift, groups=groups).sum())(x)
        torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x)[0], rtol=1e-3, atol=1e-4)
        return
    with torch.autocast("cpu", enabled=why == "autocast"):
        got = group_norm_silu(x, scale, bias, shift, groups=groups)
    assert "_GroupNormSiLU" not in type(got.grad_fn).__name__
    torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-4, atol=1e-4)


@ours
def test_networks_use_it(monkeypatch):
    calls = []
    monkeypatch.setattr(norm, "_plain", lambda *_: calls.append("torch's"))
    for net, z in ((nets.UNet.preset(8, 1), ()), (nets.DDGANGenerator(1, 8, T=4, preset="8"), (torch.randn(3, 100),))):
        out = net.to(memory_format=CL)(torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3]), *z)
        assert out.isfinite().all() and not calls
