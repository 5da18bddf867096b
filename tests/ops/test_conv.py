"""The direct kernel of convolutions: the gradient of weights and biases, against torch's in float64."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from diffgan_fast import nets
from diffgan_fast.ops import conv
from diffgan_fast.ops.conv import conv2d

CL = torch.channels_last
ours = pytest.mark.skipif(not conv._DIRECT, reason="the kernel needs AVX2 without AVX-512")
# samples, height, width, channels in and out, kernel, stride, padding
SHAPES = [
    (2, 5, 7, 3, 4, 3, 1, 1),
    (3, 8, 8, 16, 12, 3, 1, 1),
    (5, 4, 4, 33, 17, 3, 2, 1),
    (2, 9, 6, 18, 7, 4, 2, 1),
    (1, 3, 3, 1, 1, 3, 1, 2),
    (2, 6, 5, 20, 9, 1, 1, 0),
    (2, 7, 7, 5, 6, 5, 3, 0),
    (1, 2, 300, 16, 6, 3, 1, 1),
    (64, 8, 8, 32, 16, 3, 1, 1),  # several runs of blocks
    (2, 4, 4, 4, 5, 3, 1, 4),  # taps that see nothing of the image
]


def case(shape, dtype=torch.float32):
    n, height, width, inputs, outputs, kernel, _, _ = shape
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(n, inputs, height, width, generator=g, dtype=dtype).contiguous(memory_format=CL)
    w = torch.randn(outputs, inputs, kernel, kernel, generator=g, dtype=dtype).contiguous(memory_format=CL)
    return x.requires_grad_(), w.requires_grad_(), torch.randn(outputs, generator=g, dtype=dtype).requires_grad_()


def gradients(function, tensors, shape, seed=0):
    out = function(*tensors, stride=shape[6], padding=shape[7])
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    up = up.contiguous(memory_format=CL).to(out.dtype)
    return out, torch.autograd.grad(out, tensors, up)


@ours
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(shape):
    tensors = case(shape)
    out, got = gradients(conv2d, tensors, shape)
    assert type(out.grad_fn).__name__ == "_Conv2dBackward"
    wide = [v.detach().double().requires_grad_() for v in tensors]
    _, want = gradients(functional.conv2d, wide, shape)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 2e-6 * w.abs().max() * max(1, out.numel() / 1e4) ** 0.5
    assert got[1].is_contiguous(memory_format=CL)


@ours
def test_gradients_do_not_depend_on_the_number_of_threads():
    before, all_of = torch.get_num_threads(), []
    x, w, b = case(SHAPES[8])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            all_of.append(gradients(conv2d, (x, w, b), SHAPES[8])[1][1:])
    finally:
        torch.set_num_threads(before)
    for other in all_of[1:]:
        assert all(torch.equal(a, c) for a, c in zip(all_of[0], other, strict=True))


@ours
def test_gradients_of_gradients():
    shape = (2, 4, 5, 3, 4, 3, 1, 1)

    def second(function, tensors):
        out = function(*tensors, stride=1, padding=1)
        grads = torch.autograd.grad(out.pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    got = second(conv2d, case(shape))
    want = second(functional.conv2d, [v.detach().double().requires_grad_() for v in case(shape)])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))


@ours
def test_only_what_is_wanted_has_a_gradient():
    x, w, b = case(SHAPES[1])
    conv2d(x.detach(), w, padding=1).sum().backward()
    assert w.grad is not None and b.grad is None
    out = conv2d(x, w.detach().requires_grad_(), b.detach(), padding=1)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@ours
@pytest.mark.parametrize("why", ["contiguous", "float64", "frozen", "no_grad", "autocast", "func", "forward mode"])
def test_the_rest_is_torchs(why):
    x, w, b = case(SHAPES[1], torch.float64 if why == "float64" else torch.float32)
    if why == "contiguous":
        x = x.detach().contiguous()
    if why == "frozen":
        w = w.detach()
    want = functional.conv2d(x, w, b, padding=1)
    if why == "func":
        got = torch.func.grad(lambda v: conv2d(x, v, b, padding=1).sum())(w)
        assert torch.allclose(got, torch.autograd.grad(want.sum(), w)[0], rtol=1e-4, atol=1e-4)
        return
    if why == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(conv2d(dual, w, b, padding=1)).tangent
        assert torch.allclose(tangent, functional.conv2d(torch.ones_like(x), w, None, padding=1), atol=1e-4)
        return
    with torch.no_grad() if why == "no_grad" else torch.autocast("cpu", enabled=why == "autocast"):
        got = conv2d(x, w, b, padding=1)
    assert "_Conv2d" not in type(got.grad_fn).__name__
    assert got.dtype == (torch.bfloat16 if why == "autocast" else want.dtype)
    assert (
        torch.allclose(got.to(want.dtype), want, rtol=0.05, atol=0.3) if why == "autocast" else torch.equal(got, want)
    )


def test_a_gradient_in_another_layout():
    x, w, b = case(SHAPES[1])
    up = torch.randn(3, 12, 8, 8)
    got = torch.autograd.grad(conv2d(x, w, b, padding=1), (x, w, b), up)
    want = torch.autograd.grad(functional.conv2d(x, w, b, padding=1), (x, w, b), up)
    for g, v in zip(got, want, strict=True):
        torch.testing.assert_close(g, v, rtol=1e-4, atol=1e-4)


@ours
def test_its_operations_are_counted():
    x, w, b = case(SHAPES[3])
    counts = []
    for function in (conv2d, functional.conv2d):
        with FlopCounterMode(display=False) as counter:
            function(x, w, b, stride=2, padding=1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_layer_is_torchs_by_another_name():
    torch.manual_seed(0)
    layer = nets.Conv2d(3, 5, 3, stride=2, padding=1)
    torch.manual_seed(0)
    other = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
    assert layer.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(layer(x), other(x))


@ours
def test_the_op_refuses_what_does_not_fit():
    op = torch.ops.diffgan_fast.conv2d_weight_gradient.default
    x, grad = (torch.randn(2, c, 4, 4).contiguous(memory_format=CL) for c in (3, 5))
    with pytest.raises(RuntimeError, match="does not fit"):
        op(x, grad, 3, 1, 0)
    with pytest.raises(RuntimeError, match="channels_last"):
        op(x.contiguous(), grad, 3, 1, 1)
    with pytest.raises(RuntimeError, match="impossible"):
        op(x, grad, 3, 0, 1)
