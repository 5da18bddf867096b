import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import diffgan_fast as dgf
from diffgan_fast.ops import noise as module
from tests.ops import oracle
from tests.ops.cases import LEVELS, T, check_compiles, images, layouts, steps_for, tolerance

S = dgf.Schedule.linear(T)
_, ALPHA, ABAR = oracle.linear_schedule(T)


def expected(x0, t, key, first=0, sigma=1.0):
    """x_t in float64 NumPy: x0 [N, ...], t [N, ...] broadcastable."""
    a = ABAR[t]
    z = oracle.normal(x0.size, key, first).reshape(x0.shape)
    return np.sqrt(a) * x0 + np.sqrt(1 - a) * sigma * z, z


@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 2), (11, 1, 8, 8), (6, 4, 1, 1)])
@pytest.mark.parametrize("first_sample", [0, 3])
def test_follows_the_formula(backend, shape, first_sample):
    for dtype in backend.dtypes:
        for x0 in layouts(images(shape, dtype, backend.device)):
            t = steps_for(shape[0], backend.device)
            got, eps = dgf.ops.add_noise(x0, t, S, 42, sigma=0.5, return_noise=True, first_sample=first_sample)
            per = x0[0].numel()
            wide = x0.double().cpu().numpy()
            want, z = expected(wide, t.cpu().numpy().reshape(-1, *[1] * (x0.dim() - 1)), 42, first_sample * per, 0.5)
            assert got.dtype == eps.dtype == dtype and got.stride() == x0.stride()
            assert np.abs(got.double().cpu().numpy() - want).max() <= tolerance(dtype, 8)
            assert np.abs(eps.double().cpu().numpy() - z).max() <= tolerance(dtype, 8)
            without = dgf.ops.add_noise(x0, t, S, 42, sigma=0.5, first_sample=first_sample)
            assert torch.equal(without, got)


def test_clean_data_come_back_bit_for_bit(backend):
    for dtype in backend.dtypes:
        x0 = torch.tensor([[0.0, -0.0, 1e-30, -3.5, 1.0, 0.1]] * 3, dtype=dtype, device=backend.device)
        for t in (0, torch.tensor([0, 5, 0], device=backend.device)):
            got = dgf.ops.add_noise(x0, t, S, 1)
            for n in (0, 2):
                assert torch.equal(got[n], x0[n]) and torch.equal(torch.signbit(got[n]), torch.signbit(x0[n]))


def test_int_and_tensor_steps_agree(backend):
    x0 = images((5, 3, 4, 4), torch.float32, backend.device)
    for t in LEVELS:
        many = torch.full((5,), t, device=backend.device)
        assert torch.equal(dgf.ops.add_noise(x0, t, S, 3), dgf.ops.add_noise(x0, many, S, 3))


def test_a_level_a_channel(backend):
    for x0 in layouts(images((4, 3, 5, 3), torch.float32, backend.device)):
        t = torch.randint(0, T + 1, (4, 3), device=backend.device)
        want, _ = expected(x0.double().cpu().numpy(), t.cpu().numpy()[:, :, None, None], 8)
        assert np.abs(dgf.ops.add_noise(x0, t, S, 8).cpu().numpy() - want).max() < 1e-5


def test_layouts_see_the_same_noise(backend):
    x0 = images((3, 3, 6, 5), torch.float32, backend.device)
    nchw, nhwc = dgf.ops.add_noise(x0, 9, S, 5), dgf.ops.add_noise(x0.to(memory_format=torch.channels_last), 9, S, 5)
    assert torch.equal(nchw, nhwc) and nhwc.is_contiguous(memory_format=torch.channels_last)
    strided = torch.stack((x0, x0), -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(dgf.ops.add_noise(strided, 9, S, 5), nchw)


def test_views_that_are_not_aligned(backend):
    flat = images((4 * 37 + 3,), torch.float32, backend.device)
    for offset in range(4):
        x0 = flat[offset : offset + 4 * 37].view(4, 37)
        assert torch.equal(dgf.ops.add_noise(x0, 9, S, 5), dgf.ops.add_noise(x0.clone(), 9, S, 5))


def test_the_global_batch_does_not_depend_on_its_parts(backend):
    x0, t = images((7, 3, 3, 3), torch.float32, backend.device), torch.arange(7, device=backend.device)
    whole = dgf.ops.add_noise(x0, t, S, 6)
    parts = [dgf.ops.add_noise(x0[a:b], t[a:b], S, 6, first_sample=a) for a, b in ((0, 1), (1, 5), (5, 7))]
    assert torch.equal(torch.cat(parts), whole)


def test_one_key_a_sample(backend):
    x0, keys = images((5, 3, 3, 3), torch.float32, backend.device), torch.arange(5, device=backend.device)
    batch = dgf.ops.add_noise(x0, 20, S, keys)
    for n in range(5):
        assert torch.equal(batch[n : n + 1], dgf.ops.add_noise(x0[n : n + 1], 20, S, n))


def test_given_noise_is_used_and_gets_gradients():
    x0, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    got = dgf.ops.add_noise(x0, torch.tensor([0, 7, T]), S, 0, noise=eps, sigma=2.0)
    a = torch.tensor(ABAR[[0, 7, T]])[:, None]
    assert torch.allclose(got, a.sqrt() * x0 + 2 * (1 - a).sqrt() * eps, atol=1e-14)
    (grad,) = torch.autograd.grad(got.sum(), eps)
    assert torch.allclose(grad, (2 * (1 - a).sqrt()).expand(3, 4))


def test_pairs_follow_the_formula(backend):
    for dtype in backend.dtypes:
        for x0 in layouts(images((5, 3, 5, 7), dtype, backend.device)):
            t = torch.tensor([1, 2, 7, T - 1, T], device=backend.device)
            before, now = dgf.ops.noise_pair(x0, t, S, 13, first_sample=2)
            i = t.cpu().numpy().reshape(-1, 1, 1, 1)
            z0, z1 = (oracle.normal(x0.numel(), 13, 2 * 105, s).reshape(x0.shape) for s in (0, 1))
            want = np.sqrt(ABAR[i - 1]) * x0.double().cpu().numpy() + np.sqrt(1 - ABAR[i - 1]) * z0
            later = np.sqrt(ALPHA[i]) * want + np.sqrt(1 - ALPHA[i]) * z1
            assert np.abs(before.double().cpu().numpy() - want).max() <= tolerance(dtype, 8)
            assert np.abs(now.double().cpu().numpy() - later).max() <= tolerance(dtype, 8)
            assert torch.equal(before[0], x0[0])  # t = 1: the neighbour is clean


def test_pairs_have_the_joint_law():
    n, t, c = 400_000, 200, 0.7
    before, now = dgf.ops.noise_pair(torch.full((n, 1), c), t, S, 4)
    _, alpha, abar = oracle.linear_schedule(T)
    for x, level in ((before, abar[t - 1]), (now, abar[t])):
        assert abs(float(x.mean()) - np.sqrt(level) * c) < 5 / n**0.5
        assert abs(float(x.var()) - (1 - level)) < 8 / n**0.5
    covariance = float(((before - before.mean()) * (now - now.mean())).mean())
    assert abs(covariance - np.sqrt(alpha[t]) * (1 - abar[t - 1])) < 8 / n**0.5


@pytest.mark.parametrize("t", [1, 60, T])
def test_characteristic_function(t):
    """E exp(i s y) = phi_x(sqrt(abar) s) exp(-sigma^2 (1 - abar) s^2 / 2): Theorem 2 of Diffusion-GAN, for x = ±1."""
    n, sigma, abar = 400_000, 0.5, oracle.linear_schedule(T)[2][t]
    x0 = torch.ones(n, 1)
    x0[::2] = -1
    y = dgf.ops.add_noise(x0, t, S, 21, sigma=sigma).double()
    for s in (0.5, 1.0, 3.0):
        want = np.cos(np.sqrt(abar) * s) * np.exp(-(sigma**2) * (1 - abar) * s**2 / 2)
        assert abs(float(torch.cos(s * y).mean()) - want) < 5 / n**0.5


def test_gradients(backend):
    if torch.float64 not in backend.dtypes:
        x = images((4, 3, 2, 2), torch.float32, backend.device).requires_grad_()
        t = torch.tensor([0, 1, 30, T], device=backend.device)
        (got,) = torch.autograd.grad(dgf.ops.add_noise(x, t, S, 1).sum(), x)
        want = torch.tensor(np.sqrt(ABAR[t.cpu()]), device=backend.device).view(-1, 1, 1, 1).expand(4, 3, 2, 2)
        assert torch.allclose(got.double(), want, atol=1e-6)
        return
    x = images((4, 3, 2, 2), torch.float64, backend.device).requires_grad_()
    t = torch.tensor([1, 2, 30, T], device=backend.device)
    for f in (lambda x: dgf.ops.add_noise(x, t, S, 1, sigma=0.3), lambda x: dgf.ops.noise_pair(x, t, S, 1)):
        assert gradcheck(f, (x,), check_forward_ad=True) and gradgradcheck(f, (x,))


def test_torch_func_sees_the_same_gradients():
    x, t = torch.randn(3, 5), torch.tensor([1, 2, 3])

    def loss(x):
        return dgf.ops.add_noise(x, t, S, 1).square().sum()

    leaf = x.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    assert torch.allclose(tangent, torch.func.grad(loss)(x).sum(), rtol=1e-5)


def test_empty_batches(backend):
    x0 = torch.empty(0, 3, 4, 4, device=backend.device)
    t = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert dgf.ops.add_noise(x0, t, S, 1).shape == x0.shape
    assert dgf.ops.add_noise(x0, 5, S, 1).shape == x0.shape
    assert dgf.ops.noise_pair(x0, t, S, 1)[1].shape == x0.shape


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend, layout):
    if backend.name == "reference":
        pytest.skip("the reference is plain torch, not a registered op")
    raw = torch.ops.diffgan_fast
    suffix = "_triton" if backend.name == "triton" else ""
    x = images((3, 2, 4, 4), torch.float32, backend.device).to(memory_format=layout)
    t = torch.tensor([0, 5, T], device=backend.device)
    rows = S.rows("noise", x, module._noise_rows)
    pair = S.rows("pair", x, module._pair_rows)
    for which in (t, None):
        args = (x, rows, which, 4, 1.0, 3, None, 0, True)
        torch.library.opcheck(getattr(raw, f"add_noise{suffix}").default, args)
        args = (x, pair, None if which is None else which.clamp_min(1), 4, 3, None, 0)
        torch.library.opcheck(getattr(raw, f"noise_pair{suffix}").default, args)


def test_compiles_without_breaks_or_recompiles():
    def f(x, t, key):
        a, b = dgf.ops.noise_pair(x, t, S, key)
        return dgf.ops.add_noise(x, t, S, key) + a - b

    check_compiles(f, images((4, 3, 4, 4), torch.float32), torch.tensor([1, 2, 3, T]))


BAD = [
    (dict(t=-1), "t must be in 0..300, got -1"),
    (dict(t=T + 1), "t must be in 0..300, got 301"),
    (dict(t=True), "t must be an int"),
    (dict(t=torch.tensor([0, 5, T + 1])), r"t must be in 0..300, got values in 0..301"),
    (dict(t=torch.tensor([0, -5, T])), r"t must be in 0..300, got values in -5..300"),
    (dict(t=torch.tensor([1, 2])), r"t must be \[N\] or \[N, C\]"),
    (dict(t=torch.tensor([1.0, 2.0, 3.0])), "t must be an int or int64"),
    (dict(x0=torch.ones(3, 2, dtype=torch.int64)), "x0 must be a float32"),
    (dict(x0=[1.0]), "x0 must be a float32"),
    (dict(x0=torch.tensor(1.0)), "x0 must have a batch dimension"),
    (dict(noise=torch.ones(3, 3)), "noise must match x0"),
    (dict(key=-3), "key must be an int"),
    (dict(key=torch.tensor([1, 2])), "one for each of 3 samples"),
    (dict(key=torch.tensor([1.0])), "key must be int64"),
    (dict(first_sample=-1), "first_sample must be"),
    (dict(first_sample=1, key=torch.tensor([1, 2, 3])), "first_sample must be 0"),
]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_are_named(name, change, message):
    if reason := dgf.backends.unavailable(name):
        pytest.skip(reason)
    args = dict(x0=torch.ones(3, 2), t=torch.tensor([0, 1, T]), schedule=S, key=1) | change
    with dgf.backend(name), pytest.raises(ValueError, match=message):
        dgf.ops.add_noise(**args)


def test_pairs_refuse_clean_data():
    for t in (0, torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="t must be in 1..300"):
            dgf.ops.noise_pair(torch.ones(2, 2), t, S, 1)


@pytest.mark.gpu
def test_rows_out_of_range_are_nan_on_a_gpu(backend):
    if backend.device.type != "cuda":
        pytest.skip("CUDA tensors only")
    t = torch.tensor([-1, 0, T + 1, 2**40], device="cuda")
    got = dgf.ops.add_noise(torch.ones(4, 9, device="cuda"), t, S, 1)
    assert got.isnan().any(1).tolist() == [True, False, True, True]


@pytest.mark.gpu
def test_a_captured_int_key_is_refused():
    x0, graph = torch.ones(4, 9, device="cuda"), torch.cuda.CUDAGraph()
    dgf.ops.add_noise(x0, 3, S, 1)
    with pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(graph):
        dgf.ops.add_noise(x0, 3, S, 1)


@pytest.mark.gpu
def test_replays_follow_a_key_on_the_device():
    x0, key, graph = (
        torch.randn(4, 9, device="cuda"),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        torch.cuda.CUDAGraph(),
    )
    dgf.ops.add_noise(x0, 3, S, key)
    with torch.cuda.graph(graph):
        out = dgf.ops.add_noise(x0, 3, S, dgf.random.fold_in(key, 5))
    for k in (7, 8):
        key.fill_(k)
        graph.replay()
        assert torch.equal(out, dgf.ops.add_noise(x0, 3, S, dgf.random.fold_in(k, 5)))


@pytest.mark.gpu
def test_compiles_on_a_gpu():
    def f(x, t, key):
        return dgf.ops.add_noise(x, t, S, key)

    check_compiles(f, images((4, 3, 4, 4), device="cuda"), torch.tensor([1, 2, 3, T], device="cuda"))
