import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import diffgan_fast as dgf
from diffgan_fast.ops import loss as module
from tests.ops import oracle
from tests.ops.cases import T, check_compiles, images, layouts

S = dgf.Schedule.linear(T)
ABAR = oracle.linear_schedule(T)[2]


def target(x0, t, key, prediction, first=0):
    z = oracle.normal(x0.size, key, first).reshape(x0.shape)
    a = ABAR[t].reshape(-1, *[1] * (x0.ndim - 1))
    return {"eps": z, "x0": x0, "v": np.sqrt(a) * z - np.sqrt(1 - a) * x0}[prediction]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("weighted", [False, True])
def test_follows_the_formula(backend, prediction, weighted):
    t = torch.tensor([0, 1, 40, 299, T], device=backend.device)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], device=backend.device) if weighted else None
    for dtype in backend.dtypes:
        for out in layouts(images((5, 3, 5, 7), dtype, backend.device)):
            x0 = torch.randn_like(out)
            got = dgf.ops.denoising_loss(out, x0, t, S, 9, prediction=prediction, weight=weight, first_sample=1)
            wide = out.double().cpu().numpy()
            squares = (wide - target(x0.double().cpu().numpy(), t.cpu().numpy(), 9, prediction, 105)) ** 2
            if weighted:
                squares = squares * weight.double().cpu().numpy().reshape(-1, 1, 1, 1)
            assert got.shape == () and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert abs(float(got) - squares.mean()) <= (1e-12 if dtype == torch.float64 else 2e-6) * squares.mean()


def test_pairs_with_add_noise(backend):
    """The noise of the loss is the noise of add_noise under the same key: the exact prediction costs nothing."""
    for dtype in backend.dtypes:
        for x0 in layouts(images((4, 3, 5, 5), dtype, backend.device)):
            _, eps = dgf.ops.add_noise(x0, 7, S, 3, return_noise=True, first_sample=2)
            tolerance = {torch.float32: 1e-12, torch.float64: 1e-28}.get(dtype, 1e-4)
            assert float(dgf.ops.noise_mse(eps, 3, first_sample=2)) <= tolerance


def test_gradient_follows_the_formula(backend):
    for dtype in backend.dtypes:
        for leaf in layouts(images((4, 3, 5, 5), dtype, backend.device)):
            out = leaf.detach().requires_grad_()
            weight = torch.tensor([1.0, 0.0, 2.0, 0.25], device=backend.device)
            (got,) = torch.autograd.grad(3 * dgf.ops.noise_mse(out, 5, weight=weight), out)
            z = oracle.normal(out.numel(), 5).reshape(out.shape)
            w = weight.double().cpu().numpy().reshape(-1, 1, 1, 1)
            want = 6 * w * (leaf.double().cpu().numpy() - z) / out.numel()
            error = np.abs(got.double().cpu().numpy() - want).max() / np.abs(want).max()
            assert got.stride() == leaf.stride() and got.dtype == dtype
            assert error < {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


def test_gradchecks(backend):
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64")
    t, x0 = torch.tensor([0, 1, 40, T], device=backend.device), images((4, 2, 2, 2), torch.float64, backend.device)
    out = images((4, 2, 2, 2), torch.float64, backend.device).requires_grad_()
    weight = torch.rand(4, dtype=torch.float64, device=backend.device)
    for prediction in ("eps", "x0", "v"):
        for w in (None, weight):

            def f(out, prediction=prediction, w=w):
                return dgf.ops.denoising_loss(out, x0, t, S, 5, prediction=prediction, weight=w)

            assert gradcheck(f, (out,)) and gradgradcheck(f, (out,))


def test_sum_does_not_depend_on_threads():
    out = torch.randn(64, 3, 17, 17)
    values = set()
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values.add(float(dgf.ops.noise_mse(out, 5)))
    torch.set_num_threads(before)
    assert len(values) == 1


def test_points_and_keys_a_sample(backend):
    out, keys = images((6, 2), torch.float32, backend.device), torch.arange(6, device=backend.device)
    got = dgf.ops.noise_mse(out, keys)
    z = np.stack([oracle.normal(2, n) for n in range(6)])
    assert abs(float(got) - ((out.double().cpu().numpy() - z) ** 2).mean()) < 1e-5


def test_the_kept_residual_is_the_one_made_again(backend):
    op = {True: module._RESIDUAL_MEAN, False: module._RESIDUAL}
    t = torch.tensor([0, 1, 40, T], device=backend.device)
    for dtype in backend.dtypes:
        for x in layouts(images((4, 3, 5, 7), dtype, backend.device)):
            rows = S.rows("loss v", x, module._v_rows)
            _, kept = op[True].on(x.device.type)(x, x, rows, t, 0, True, 3, None, 21)
            again = op[False].on(x.device.type)(x, x, rows, t, 0, rows.new_ones(()), 3, None, 21)
            assert kept.stride() == x.stride() and torch.equal(kept, again)


def test_opcheck(backend):
    if backend.name == "reference":
        pytest.skip("the reference is plain torch, not a registered op")
    suffix = "_triton" if backend.name == "triton" else ""
    raw = torch.ops.diffgan_fast
    x, y = (images((3, 2, 4, 4), torch.float32, backend.device) for _ in range(2))
    rows, t = S.rows("loss v", x, module._v_rows), torch.tensor([0, 5, T], device=backend.device)
    for other in (y, None):
        for keep in (True, False):
            mean = getattr(raw, f"residual_mean{suffix}").default
            torch.library.opcheck(mean, (x, other, rows, t, 0, keep, 3, None, 0))
        scale = torch.tensor(0.5, device=backend.device)
        torch.library.opcheck(getattr(raw, f"residual{suffix}").default, (x, other, rows, t, 0, scale, 3, None, 0))


def test_compiles_without_breaks_or_recompiles():
    def f(out, x0, t, key):
        return dgf.ops.denoising_loss(out, x0, t, S, key, prediction="v") + dgf.ops.noise_mse(out, key)

    check_compiles(f, torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 2, T]))


def test_a_compiled_training_step_has_the_eager_gradients():
    weight = torch.randn(4, 4, requires_grad=True)

    def loss(x0, t, key):
        return dgf.ops.noise_mse(dgf.ops.add_noise(x0, t, S, key) @ weight, key)

    x0, t = torch.randn(5, 4), torch.tensor([1, 2, 3, 100, T])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for key in (1, 2):
        got, want = (torch.autograd.grad(f(x0, t, key), weight)[0] for f in (compiled, loss))
        assert torch.allclose(got, want, rtol=1e-6)


def test_bad_arguments_are_named():
    x, t = torch.ones(3, 2), torch.tensor([1, 2, 3])
    cases = [
        (lambda: dgf.ops.noise_mse(x.long(), 1), "eps_hat must be"),
        (lambda: dgf.ops.noise_mse(x, 1, weight=torch.ones(2)), "weight must be a tensor"),
        (lambda: dgf.ops.noise_mse(x, 1, weight=2.0), "weight must be a tensor"),
        (lambda: dgf.ops.noise_mse(x, 1, weight=torch.ones(3, requires_grad=True)), "weight must not require"),
        (lambda: dgf.ops.denoising_loss(x, x[:2], t, S, 1), "x0 must match out"),
        (lambda: dgf.ops.denoising_loss(x, x.clone().requires_grad_(), t, S, 1), "x0 must not require"),
        (lambda: dgf.ops.denoising_loss(x, x, t + T, S, 1, prediction="v"), "t must be in 0..300"),
        (lambda: dgf.ops.denoising_loss(x, x, t + T, S, 1), "t must be in 0..300"),
        (lambda: dgf.ops.denoising_loss(x, x, t, S, 1, prediction="no"), "prediction must be one of"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_key_that_changes_before_backward_is_noticed():
    out, key = torch.randn(3, 4, requires_grad=True), torch.tensor([5])
    loss = dgf.ops.noise_mse(out, key)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_made_in_inference_mode_serve_training():
    schedule, x = dgf.Schedule.linear(7), torch.randn(2, 3)
    with torch.inference_mode():
        dgf.ops.add_noise(x, 3, schedule, 1)
        dgf.ops.denoising_loss(x, x, 3, schedule, 1, prediction="v")
    leaf = x.clone().requires_grad_()
    loss = dgf.ops.denoising_loss(dgf.ops.add_noise(leaf, 3, schedule, 1, noise=x), x, 3, schedule, 1, prediction="v")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.square().sum(), leaf)[0]).all()
