import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from diffgan_fast.ops import mlp as module
from diffgan_fast.ops.mlp import mlp

SHAPES = [((2, 16, 16, 16, 1), False), ((6, 33, 33, 3), True), ((5, 8, 2), False), ((4, 8, 8, 8, 8, 2), True)]
needs_fused = pytest.mark.skipif(not module._EXISTS, reason="the C++ form was not built, or torch shows no BLAS")


def parameters(widths, dtype=torch.float64):
    weights = [torch.randn(b, a, dtype=dtype) / a**0.5 for a, b in zip(widths, widths[1:], strict=False)]
    return weights, [torch.randn(b, dtype=dtype) for b in widths[1:]]


def in_numpy(x, weights, biases, slope, skip):
    """The docstring's formula."""
    x, weights, biases = x.double().numpy(), *([v.double().numpy() for v in vs] for vs in (weights, biases))
    z = x @ weights[0].T + biases[0]
    for i in range(1, len(weights)):
        new = np.where(z > 0, z, slope * z) @ weights[i].T + biases[i]
        z = z + new if skip and i < len(weights) - 1 else new
    return z


@pytest.mark.parametrize("widths, skip", SHAPES)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_follows_the_formula(widths, skip, n, dtype, tolerance):
    weights, biases = parameters(widths, dtype)
    x = torch.randn(n, widths[0], dtype=dtype)
    want = in_numpy(x, weights, biases, 0.2, skip)
    for leaf in (x, x.clone().requires_grad_()):  # the second goes through the autograd.Function
        got = mlp(leaf, weights, biases, slope=0.2, skip=skip)
        assert got.shape == want.shape and got.dtype == dtype
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=tolerance, atol=tolerance)


@needs_fused
@pytest.mark.parametrize("widths, skip", SHAPES)
def test_the_fused_gradients_are_those_of_plain_torch(widths, skip):
    weights, biases = parameters(widths)
    leaves = [v.requires_grad_() for v in (torch.randn(130, widths[0], dtype=torch.float64), *weights, *biases)]
    n = len(weights)
    outs = [f(leaves[0], leaves[1 : n + 1], leaves[n + 1 :]) for f in (
        lambda *a: mlp(*a, slope=0.1, skip=skip), lambda *a: module._plain(*a, 0.1, skip))]  # fmt: skip
    assert type(outs[0].grad_fn).__name__ == "_MLPBackward"
    weight = torch.randn_like(outs[0])
    got, want = (torch.autograd.grad(out, leaves, weight) for out in outs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@needs_fused
@pytest.mark.parametrize(
    "widths, skip", [((2, 256, 256, 1), False), ((100, 128, 128, 2), False), ((40, 72, 72, 72, 17), True)]
)
@pytest.mark.parametrize("n", [0, 1, 5, 133, 1100])  # 1100: more than a gradient adds up at a time
def test_gradients_in_float32_are_those_of_plain_torch_in_float64(widths, skip, n):
    weights, biases = parameters(widths, torch.float32)
    leaves = [v.requires_grad_() for v in (torch.randn(n, widths[0]), *weights, *biases)]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    k = len(weights)
    out = mlp(leaves[0], leaves[1 : k + 1], leaves[k + 1 :], slope=0.2, skip=skip)
    want = module._plain(wide[0], wide[1 : k + 1], wide[k + 1 :], 0.2, skip)
    assert type(out.grad_fn).__name__ == "_MLPBackward"
    weight = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(want, wide, weight.double()), strict=True)
    for got, expected in pairs:
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * max(scale, 1e-3))


def test_gradchecks():
    weights, biases = parameters((3, 5, 5, 2))
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    inputs = [x, *(v.requires_grad_() for v in (*weights, *biases))]

    def f(x, *p):
        return mlp(x, p[:3], p[3:], slope=0.3, skip=True)

    assert gradcheck(f, inputs) and gradgradcheck(f, inputs)


def test_only_what_is_wanted_gets_a_gradient():
    weights, biases = parameters((3, 8, 8, 1))
    x = torch.randn(70, 3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(mlp(x, weights, biases).sum(), x)
    want = torch.autograd.grad(module._plain(x, weights, biases, 0.0, False).sum(), x)[0]
    torch.testing.assert_close(grad, want)
    biases[0].requires_grad_()
    mlp(x.detach(), weights, biases).sum().backward()
    assert biases[0].grad is not None and all(w.grad is None for w in weights)


@needs_fused
def test_results_do_not_depend_on_threads():
    weights, biases = parameters((4, 32, 32, 32, 2), torch.float32)
    leaves = [v.requires_grad_() for v in (*weights, *biases)]
    x, found = torch.randn(300, 4), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = mlp(x, leaves[:4], leaves[4:])
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_torch_func_forward_mode_and_compile_take_the_plain_form():
    weights, biases = parameters((3, 8, 8, 1))
    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def f(x):
        return mlp(x, weights, biases)

    g = torch.func.grad(lambda x: f(x).sum())(x)
    _, along = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(along[:, 0], (g * v).sum(1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, along)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))


def test_networks_that_the_fused_form_does_not_take_run_too():
    x = torch.randn(6, 3, dtype=torch.float64)
    weights, biases = parameters((3, 8, 4, 1))  # hidden layers of two widths
    assert not module.fused(x, weights, biases, 0.0)
    np.testing.assert_allclose(mlp(x, weights, biases).numpy(), in_numpy(x, weights, biases, 0, False), rtol=1e-12)
    weights, biases = parameters((3, 8, 8, 1))
    assert not module.fused(x, weights, biases, -0.5)  # whose f(z) does not tell the sign of z
    got = mlp(x, weights, biases, slope=-0.5)
    np.testing.assert_allclose(got.numpy(), in_numpy(x, weights, biases, -0.5, False), rtol=1e-12)
    half = [[v.bfloat16() for v in vs] for vs in parameters((3, 8, 8, 1))]
    assert mlp(x.bfloat16(), *half).dtype == torch.bfloat16
