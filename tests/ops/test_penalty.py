import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import diffgan_fast as dgf
from diffgan_fast.ops import penalty as module
from tests.ops import oracle
from tests.ops.cases import check_compiles, images, layouts, tolerance

# One element a sample; few; a piece of a sum on the CPU, a GPU and in Triton; one more; several.
SAMPLES = [
    (4, 1),
    (9,),
    (6, 2),
    (5, 7),
    (3, 512),
    (3, 1025),
    (2, 2048),
    (3, 2049),
    (2, 5000),
    (5, 3, 5, 7),
    (2, 8, 4, 4),
]
CENTERS = (0.0, 1.0, 2.5)
FIRST_ZERO = 24428758  # u of this sample is 0 under key 7
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def numpy(x):
    return x.detach().double().cpu().numpy()


def rows(x):
    """A sample a row, float64."""
    return numpy(x).reshape(len(x), -1)


# ---- interpolate ----


@pytest.mark.parametrize("shape", SAMPLES)
@pytest.mark.parametrize("first_sample", [0, 3])
def test_interpolates_by_the_formula(backend, shape, first_sample):
    for dtype in backend.dtypes:
        for real in layouts(images(shape, dtype, backend.device)):
            fake = torch.randn_like(real)
            got = dgf.ops.interpolate(real, fake, 42, first_sample=first_sample)
            u = oracle.uniform(len(real), 42, first_sample)[:, None]
            want = u * rows(real) + (1 - u) * rows(fake)
            assert got.dtype == dtype and got.stride() == real.stride()
            assert np.abs(rows(got) - want).max() <= tolerance(dtype, 8)


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("first_sample", [0, 1, 2**32 * 4 - 9, 2**34 + 2])
def test_the_uniform_numbers_are_exact(backend, key, first_sample):
    for dtype in {torch.float32, torch.float64} & set(backend.dtypes):
        for sample in (1, 3, 4):
            one = torch.ones(83, sample, dtype=dtype, device=backend.device)
            for k in (key, torch.tensor([key], device=backend.device)):
                got = dgf.ops.interpolate(one, torch.zeros_like(one), k, first_sample=first_sample)
                want = oracle.uniform(83, key, first_sample)[:, None]
                assert np.array_equal(numpy(got), np.broadcast_to(want, got.shape))
    u = dgf.random.uniform(83, key, first=first_sample, device=backend.device)
    assert torch.equal(dgf.ops.interpolate(torch.ones_like(u), 0 * u, key, first_sample=first_sample), u)


def test_fake_comes_back_exactly_where_u_is_zero(backend):
    assert oracle.word(FIRST_ZERO, 7) >> 8 == 0
    for dtype in backend.dtypes:
        real, fake = (images((1, 50), dtype, backend.device) for _ in range(2))
        assert torch.equal(dgf.ops.interpolate(real, fake, 7, first_sample=FIRST_ZERO), fake)


def test_layouts_and_views_see_the_same_numbers(backend):
    real, fake = (images((3, 3, 6, 5), torch.float32, backend.device) for _ in range(2))
    want = dgf.ops.interpolate(real, fake, 5)
    last = real.to(memory_format=torch.channels_last)
    got = dgf.ops.interpolate(last, fake, 5)
    assert torch.equal(got, want) and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dgf.ops.interpolate(real, fake.to(memory_format=torch.channels_last), 5), want)
    assert torch.equal(dgf.ops.interpolate(torch.stack((real, real), -1)[..., 0], fake, 5), want)
    flat = images((4 * 36 + 3,), torch.float32, backend.device)
    for offset in range(4):
        x = flat[offset : offset + 4 * 36].view(4, 36)
        assert torch.equal(dgf.ops.interpolate(x, 2 * x, 5), dgf.ops.interpolate(x.clone(), 2 * x, 5))


def test_the_global_batch_does_not_depend_on_its_parts(backend):
    real, fake = (images((700, 3), torch.float32, backend.device) for _ in range(2))
    whole = dgf.ops.interpolate(real, fake, 6)
    cuts = ((0, 1), (1, 5), (5, 700))
    parts = [dgf.ops.interpolate(real[a:b], fake[a:b], 6, first_sample=a) for a, b in cuts]
    assert torch.equal(torch.cat(parts), whole)


def test_one_key_a_sample(backend):
    for shape in ((5, 2), (5, 3, 3, 3), (5, 3000)):
        keys = torch.tensor([3, 0, 2**62 + 9, 1, 3], device=backend.device)
        for real in layouts(images(shape, torch.float32, backend.device)):
            fake = torch.randn_like(real)
            batch = dgf.ops.interpolate(real, fake, keys)
            for n, key in enumerate(keys.tolist()):
                assert torch.equal(batch[n : n + 1], dgf.ops.interpolate(real[n : n + 1], fake[n : n + 1], key))


def test_gradients_of_interpolate(backend):
    double = torch.float64 in backend.dtypes
    dtype = torch.float64 if double else torch.float32
    real, fake = (images((4, 3), dtype, backend.device).requires_grad_() for _ in range(2))
    u = torch.tensor(oracle.uniform(4, 9, 2), dtype=dtype, device=backend.device)[:, None].expand(real.shape)
    got = torch.autograd.grad(dgf.ops.interpolate(real, fake, 9, first_sample=2).sum(), (real, fake))
    assert torch.equal(got[0], u) and torch.equal(got[1], 1 - u)
    (only,) = torch.autograd.grad(dgf.ops.interpolate(real.detach(), fake, 9, first_sample=2).sum(), fake)
    assert torch.equal(only, 1 - u)
    if double:
        for key in (9, torch.arange(4, device=backend.device)):

            def f(real, fake, key=key):
                return dgf.ops.interpolate(real, fake, key)

            assert gradcheck(f, (real, fake), check_forward_ad=True) and gradgradcheck(f, (real, fake))
            assert gradcheck(lambda x: f(x, fake.detach()), (real,), check_forward_ad=True)  # noqa: B023


# ---- norm_penalty ----


def penalty_of(g, center):
    """P and its gradient in float64, from rows [N, D]."""
    norms = np.sqrt((g**2).sum(1, keepdims=True))
    ratio = 1 - center / norms if center else 1.0
    return ((norms - center) ** 2).mean(), 2 / len(g) * ratio * g


@pytest.mark.parametrize("shape", SAMPLES)
def test_norms_by_the_formula(backend, shape):
    raw = module._GRADIENT_NORM.on(backend.device.type)
    for dtype in backend.dtypes:
        for g in layouts(images(shape, dtype, backend.device)):
            norms = raw(g, 1.0)[1]
            want = np.sqrt((rows(g) ** 2).sum(1))
            assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert np.abs(numpy(norms) / want - 1).max() < (1e-14 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("shape", SAMPLES)
@pytest.mark.parametrize("center", CENTERS)
def test_penalty_and_gradient_by_the_formula(backend, shape, center):
    for dtype in backend.dtypes:
        for leaf in layouts(images(shape, dtype, backend.device)):
            g = leaf.detach().requires_grad_()
            value = dgf.ops.norm_penalty(g, center)
            (got,) = torch.autograd.grad(3 * value, g)
            (same,) = torch.autograd.grad(3 * dgf.ops.norm_penalty(g, center), g, create_graph=True)
            want, gradient = penalty_of(rows(leaf), center)
            assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(dgf.ops.norm_penalty(leaf, center), value)
            assert abs(value.item() / want - 1) < (1e-12 if dtype == torch.float64 else 2e-6)
            for gradient_of_g in (got, same):
                assert gradient_of_g.dtype == dtype and gradient_of_g.stride() == leaf.stride()
                error = np.abs(rows(gradient_of_g) - 3 * gradient).max()
                assert error <= RELATIVE[dtype] * 3 * np.abs(2 / len(leaf) * rows(leaf)).max() * (1 + center)


@pytest.mark.parametrize("center", CENTERS)
def test_gradchecks_of_the_penalty(backend, center):
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64")
    for g in layouts(images((3, 2, 2, 3), torch.float64, backend.device)):
        g.requires_grad_()

        def f(g):
            return dgf.ops.norm_penalty(g, center)

        assert gradcheck(f, (g,), check_forward_ad=True)
        assert gradgradcheck(f, (g,)) and gradgradcheck(lambda g: f(g).square(), (g,))  # noqa: B023


@pytest.mark.parametrize("center", CENTERS)
def test_a_gradient_of_zero_is_no_nan(backend, center):
    for dtype in backend.dtypes:
        g = images((4, 3, 2, 2), dtype, backend.device)
        g[1::2] = 0
        g.requires_grad_()
        (first,) = torch.autograd.grad(dgf.ops.norm_penalty(g, center), g)
        assert first.isfinite().all() and not first[1::2].any()
        value = dgf.ops.norm_penalty(g, center)
        (first,) = torch.autograd.grad(value, g, create_graph=True)
        (second,) = torch.autograd.grad(first[1::2].float().sum(), g)
        assert second.isfinite().all()
        assert (second[1::2] == (0.5 if center == 0 else 0)).all()  # the Hessian of the mean square is 2/N
        zero = torch.zeros_like(g)
        assert dgf.ops.norm_penalty(zero, center).item() == center**2


def test_a_linear_critic(backend):
    """P = (|w| - 1)^2 and dP/dw = 2 (|w| - 1) w / |w|, |w|^2 and 2 w, at whatever points."""
    for dtype in {torch.float32, torch.float64} & set(backend.dtypes):
        real, fake = (images((6, 3, 4, 4), dtype, backend.device) for _ in range(2))
        w = images((3, 4, 4), dtype, backend.device).requires_grad_()
        norm = float(w.detach().double().norm())
        for center in (0.0, 1.0):
            x = dgf.ops.interpolate(real, fake, 3).requires_grad_()
            (g,) = torch.autograd.grad((x * w).sum(), x, create_graph=True)
            value = dgf.ops.norm_penalty(g, center)
            (got,) = torch.autograd.grad(value, w)
            want = 2 * (norm - center) * w.detach() / norm
            assert abs(value.item() / (norm - center) ** 2 - 1) < 2e-6
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 3, 17, 17), (3000, 2), (2, 70001)])
def test_sums_do_not_depend_on_threads(shape):
    g, values = torch.randn(shape), set()
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values.add(float(dgf.ops.norm_penalty(g)))
    torch.set_num_threads(before)
    assert len(values) == 1


def test_a_norm_does_not_depend_on_the_batch(backend):
    raw = module._GRADIENT_NORM.on(backend.device.type)
    for shape in ((7, 3), (3, 2100)):
        g = images(shape, torch.float32, backend.device)
        assert torch.equal(raw(g, 1.0)[1][1:2], raw(g[1:2].clone(), 1.0)[1])


# ---- both ----


def test_empty_batches(backend):
    for shape in ((0, 3, 4, 4), (0,), (3, 0)):
        x = torch.empty(shape, device=backend.device, requires_grad=True)
        out = dgf.ops.interpolate(x, x, 1)
        value = dgf.ops.norm_penalty(x)
        assert out.shape == shape and (value.isnan() if shape[0] == 0 else value == 1)
        (first,) = torch.autograd.grad(value + out.sum(), x)
        assert first.shape == shape


def test_torch_func_sees_the_same_gradients():
    real, fake = torch.randn(3, 5), torch.randn(3, 5)

    def loss(real):
        return dgf.ops.norm_penalty(dgf.ops.interpolate(real, fake, 1))

    leaf = real.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(loss)(real), torch.autograd.grad(loss(leaf), leaf)[0])
    _, tangent = torch.func.jvp(loss, (real,), (torch.ones_like(real),))
    assert torch.allclose(tangent, torch.func.grad(loss)(real).sum(), rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, layout, dtype):
    if backend.name == "reference":
        pytest.skip("the reference is plain torch, not a registered op")
    raw, suffix = torch.ops.diffgan_fast, "_triton" if backend.name == "triton" else ""
    x, y = (images((3, 2, 4, 4), dtype, backend.device).to(memory_format=layout) for _ in range(2))
    for key_t in (None, torch.arange(3, device=backend.device)):
        torch.library.opcheck(getattr(raw, f"interpolate{suffix}").default, (x, y, 3, key_t, 0))
    norm = getattr(raw, f"gradient_norm{suffix}").default
    scale, norms = torch.tensor(0.5, device=backend.device), norm(x, 1.0)[1]
    for center in (0.0, 1.0):
        torch.library.opcheck(norm, (x, center))
        gradient = getattr(raw, f"gradient_norm_grad{suffix}").default
        torch.library.opcheck(gradient, (x, norms, scale, center))


def test_compiles_without_breaks_or_recompiles():
    def f(real, fake, key):
        x = dgf.ops.interpolate(real, fake, key)
        return dgf.ops.norm_penalty(x) + dgf.ops.norm_penalty(x, 0.0)

    check_compiles(f, images((4, 3, 4, 4), torch.float32), images((4, 3, 4, 4), torch.float32))


def test_a_compiled_step_has_the_eager_gradients():
    weight = torch.randn(4, 4, requires_grad=True)

    def loss(real, fake, key):
        return dgf.ops.norm_penalty(dgf.ops.interpolate(real @ weight, fake @ weight, key))

    real, fake = torch.randn(5, 4), torch.randn(5, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for key in (1, 2):
        got, want = (torch.autograd.grad(f(real, fake, key), weight)[0] for f in (compiled, loss))
        assert torch.allclose(got, want, rtol=1e-5)


BAD = [
    (dict(real=torch.ones(3, 2, dtype=torch.int64)), "real must be a float32"),
    (dict(real=[1.0]), "real must be a float32"),
    (dict(real=torch.tensor(1.0)), "real must have a batch dimension"),
    (dict(fake=torch.ones(3, 3)), "fake must match real"),
    (dict(fake=torch.ones(3, 2).double()), "fake must match real"),
    (dict(fake=torch.ones(3, 2, device="meta")), "fake must match real"),
    (dict(key=-3), "key must be an int"),
    (dict(key=torch.tensor([1, 2])), "one for each of 3 samples"),
    (dict(key=torch.tensor([1.0])), "key must be int64"),
    (dict(first_sample=-1), "first_sample must be"),
    (dict(first_sample=1.5), "first_sample must be"),
    (dict(first_sample=1, key=torch.tensor([1, 2, 3])), "first_sample must be 0"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_are_named(change, message):
    args = dict(real=torch.ones(3, 2), fake=torch.zeros(3, 2), key=1) | change
    with pytest.raises(ValueError, match=message):
        dgf.ops.interpolate(**args)


@pytest.mark.parametrize("center", [-1.0, float("nan"), float("inf"), True, "1", None, torch.tensor(1.0)])
def test_bad_centers_are_named(center):
    with pytest.raises(ValueError, match="center must be a finite number >= 0"):
        dgf.ops.norm_penalty(torch.ones(3, 2), center)


def test_bad_gradients_are_named():
    for g, message in ((torch.ones(3, dtype=torch.int64), "g must be a float32"), (torch.tensor(1.0), "g must have")):
        with pytest.raises(ValueError, match=message):
            dgf.ops.norm_penalty(g)
