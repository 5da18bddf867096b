"""3x3 convolutions by Winograd's algorithm, against the definition in float64."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.ops import conv
from diffgan_fast.ops.conv import conv2d

pytestmark = pytest.mark.skipif(not conv._WINOGRAD, reason="the kernels need AVX2")
CL = torch.channels_last
RAW = torch.ops.diffgan_fast
# samples, channels in and out, height, width
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 5, 7, 9, 13),
    (2, 33, 40, 5, 3),
    (9, 24, 24, 4, 4),
    (2, 32, 70, 1, 300),
    (8, 150, 136, 4, 8),  # more inputs than are transformed at a time; fewer tiles than outputs
    (40, 40, 72, 10, 11),  # several runs of the weights' gradient, and outputs for more than one task
    (2, 200, 24, 28, 28),
]


def case(shape, dtype=torch.float32, layout=CL):
    n, inputs, outputs, height, width = shape
    g = torch.Generator().manual_seed(sum(shape))

    def tensor(*size):
        return torch.randn(size, generator=g, dtype=dtype)

    x, w = tensor(n, inputs, height, width).contiguous(memory_format=CL), tensor(outputs, inputs, 3, 3)
    up = tensor(n, outputs, height, width).contiguous(memory_format=CL)
    return x, w.contiguous(memory_format=layout), tensor(outputs), up


def differentiated(function, x, w, b, up):
    given = [v.detach().requires_grad_() for v in (x, w, b)]
    out = function(*given, padding=1)
    return [out, *torch.autograd.grad(out, given, up)]


def close(got, want, factor=1.0):
    """Within a few roundings of the largest value, of sums that grow with the square root of their length."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= factor * 4e-6 * want.abs().max()


@pytest.mark.parametrize("layout", [CL, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_the_definition(shape, layout):
    x, w, b, up = case(shape, layout=layout)
    out, grad_x, grad_w, grad_b = differentiated(functional.conv2d, *(v.double() for v in (x, w, b, up)))
    got = RAW.conv2d_winograd(x, w, b, False)
    close(got, out)
    assert got.is_contiguous(memory_format=CL)
    close(RAW.conv2d_winograd(up, w, None, True), grad_x)
    weight, bias = RAW.conv2d_winograd_weight_gradient(x, up)
    close(weight, grad_w)
    close(bias, grad_b)


def test_errors_are_a_small_multiple_of_the_definitions_in_float32():
    x, w, b, up = case((16, 64, 64, 28, 28))
    want = differentiated(functional.conv2d, *(v.double() for v in (x, w, b, up)))
    plain, got = differentiated(functional.conv2d, x, w, b, up), differentiated(conv2d, x, w, b, up)
    assert "Conv2d" in type(got[0].grad_fn).__name__
    # root mean squares: the usual points of evaluation, 0, ±1 and ±2, would be above 4
    for g, p, v in list(zip(got, plain, want, strict=True))[:2]:
        assert (g - v).square().mean().sqrt() < 3 * (p - v).square().mean().sqrt()


@pytest.mark.parametrize("shape", [(9, 24, 24, 4, 4), (8, 150, 136, 4, 8), (40, 40, 72, 10, 11)], ids=str)
def test_neither_threads_nor_other_samples_matter(shape):
    x, w, b, up = case(shape)
    before, all_of = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            all_of.append(differentiated(conv2d, x, w, b, up))
    finally:
        torch.set_num_threads(before)
    for other in all_of[1:]:
        assert all(torch.equal(a, c) for a, c in zip(all_of[0], other, strict=True))
    some = slice(len(x) // 2, None)
    assert torch.equal(RAW.conv2d_winograd(x[some], w, b, False), all_of[0][0][some])


def test_nothing_outside_of_the_tensors_is_used():
    def inside(v):  # the same values, amid NaN
        room = torch.full((v.numel() + 96,), float("nan"))
        view = room[48 : 48 + v.numel()].as_strided(v.shape, v.stride())
        return view.copy_(v)

    x, w, b, up = case((2, 27, 29, 6, 5))
    want = RAW.conv2d_winograd(x, w, b, False), *RAW.conv2d_winograd_weight_gradient(x, up)
    x, w, up = (inside(v) for v in (x, w, up))
    got = RAW.conv2d_winograd(x, w, inside(b), False), *RAW.conv2d_winograd_weight_gradient(x, up)
    assert all(torch.equal(g, v) for g, v in zip(got, want, strict=True))


def test_it_is_used_wherever_a_network_runs():
    x, w, b, up = case((2, 24, 32, 8, 8))
    with torch.no_grad():
        quiet = conv2d(x, w, b, padding=1)
    assert torch.equal(quiet, RAW.conv2d_winograd(x, w, b, False))
    assert torch.equal(quiet, differentiated(conv2d, x, w, b, up)[0])
    frozen = conv2d(x.requires_grad_(), w, b, padding=1)  # as a critic's gradient with respect to images
    assert torch.equal(torch.autograd.grad(frozen, x, up)[0], RAW.conv2d_winograd(up, w, None, True))
    assert torch.equal(conv2d(x.detach().contiguous(), w, b, padding=1), quiet)
    layer = nets.Conv2d(24, 32, 3, padding=1).to(memory_format=CL)
    assert torch.equal(layer(x), RAW.conv2d_winograd(x.detach(), layer.weight.detach(), layer.bias.detach(), False))


def test_only_what_is_wanted_has_a_gradient():
    x, w, b, up = case((2, 24, 24, 8, 8))
    want = differentiated(conv2d, x, w, b, up)
    for wanted in range(3):
        given = [v.detach().requires_grad_(i == wanted) for i, v in enumerate((x, w, b))]
        conv2d(*given, padding=1).backward(up)
        assert [v.grad is not None for v in given] == [i == wanted for i in range(3)]
        assert torch.equal(given[wanted].grad, want[1 + wanted])


def test_a_layer_without_a_bias():
    layer = nets.Conv2d(24, 32, 3, padding=1, bias=False).to(memory_format=CL)
    x, _, b, up = case((2, 24, 32, 8, 8))
    want = differentiated(functional.conv2d, *(v.double() for v in (x, layer.weight, torch.zeros_like(b), up)))
    x.requires_grad_()
    out = layer(x)
    assert layer.bias is None and torch.equal(out, RAW.conv2d_winograd(x.detach(), layer.weight.detach(), None, False))
    for g, v in zip((out, *torch.autograd.grad(out, [x, layer.weight], up)), want, strict=False):
        close(g, v)


def test_a_gradient_in_another_layout():
    x, w, b, up = case((2, 24, 24, 8, 8))
    for u in (up.contiguous(), up.mean().expand(up.shape)):
        got = differentiated(conv2d, x, w, b, u)
        want = differentiated(functional.conv2d, *(v.double() for v in (x, w, b, u)))
        for g, v in zip(got, want, strict=True):
            close(g, v, 2)


def test_gradients_of_gradients():
    def second(function, x, w, b):
        given = [v.detach().requires_grad_() for v in (x, w, b)]
        grads = torch.autograd.grad(function(*given, padding=1).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given)

    tensors = case((2, 24, 24, 8, 8))[:3]
    for g, v in zip(second(conv2d, *tensors), second(functional.conv2d, *(v.double() for v in tensors)), strict=True):
        close(g, v, 10)


@pytest.mark.parametrize("why", ["contiguous", "float64", "bfloat16", "stride", "padding", "5x5", "thin", "few tiles",
                                 "reference", "autocast", "func", "forward mode"])  # fmt: skip
def test_the_rest_is_torchs(why, monkeypatch):
    x, w, b, _ = case((2, 24, 24, 8, 8))
    options = {"stride": 2 if why == "stride" else 1, "padding": 0 if why == "padding" else 1}
    if why == "contiguous":
        w = w.contiguous()
    if why in ("float64", "bfloat16"):
        x, w, b = (v.to(getattr(torch, why)) for v in (x, w, b))
    if why == "5x5":
        w = torch.randn(24, 24, 5, 5).contiguous(memory_format=CL)
    if why == "thin":
        x, w = x[:, :20].contiguous(memory_format=CL), w[:, :20].contiguous(memory_format=CL)
    if why == "few tiles":
        x = x[:1]
    monkeypatch.setattr(conv, "_RAW", None)  # and so is not touched
    if why == "func":
        got = torch.func.grad(lambda v: conv2d(v, w, b, **options).sum())(x)
        x.requires_grad_()
        want = torch.autograd.grad(functional.conv2d(x, w, b, **options).sum(), x)[0]
    elif why == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            got = torch.autograd.forward_ad.unpack_dual(conv2d(dual, w, b, **options)).tangent
        want = functional.conv2d(torch.ones_like(x), w, None, **options)
    else:
        with (
            torch.autocast("cpu", enabled=why == "autocast"),
            dgf.backend("reference" if why == "reference" else "auto"),
        ):
            got, want = conv2d(x, w, b, **options), functional.conv2d(x, w, b, **options)
    assert torch.equal(got, want)


def test_its_operations_are_counted():
    x, w, b, up = case((2, 24, 32, 8, 8))
    counts = []
    for function in (conv2d, functional.conv2d):
        with FlopCounterMode(display=False) as counter:
            differentiated(function, x, w, b, up)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_ops_refuse_what_does_not_fit():
    x, w, b, up = case((2, 24, 32, 8, 8))
    bad = [
        (x.contiguous(), w, b),
        (x.double(), w, b),
        (x, w[:, :5], b),
        (x, w[:, :, :2], b),
        (x, w, b[:5]),
        (x, w, b.double()),
    ]
    for given in bad:
        with pytest.raises(RuntimeError, match="shapes that fit"):
            RAW.conv2d_winograd(*given, False)
    for grad in (up[:1], up[..., :7], up.contiguous()):
        with pytest.raises(RuntimeError, match="shapes that fit"):
            RAW.conv2d_winograd_weight_gradient(x, grad)
