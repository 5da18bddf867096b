"""What is particular to Triton; tests/ops holds what all back ends share. Without a GPU the kernels are interpreted."""

from __future__ import annotations

import pytest
import torch

from diffgan_fast import _philox

pytest.importorskip("triton", reason="triton is not installed")
from diffgan_fast.kernels import loss, mlp, noise, penalty, random, step  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BITS, UNIFORM, NORMAL, INTEGERS = range(4)
KEY = 0x0123456789ABCDEF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


def draw(n, kind, first=0, *, key=KEY, key_t=None, stream=0, high=2**32, dtype=None):
    dtype = dtype or (torch.int64 if kind in (BITS, INTEGERS) else torch.float32)
    out = torch.full((n,) if isinstance(n, int) else n, -1, dtype=dtype, device=DEVICE)
    random.random_(out, key, key_t, stream, first, kind, high)
    return out


def table(*rows):
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE)


def net(*widths):
    """Weights and biases of a fully connected network."""
    pairs = list(zip(widths, widths[1:], strict=False))
    return [torch.randn(b, a, device=DEVICE) for a, b in pairs], [torch.randn(b, device=DEVICE) for _, b in pairs]


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    got = random.philox4x32(torch.tensor([counter], device=DEVICE), torch.tensor([key], device=DEVICE))
    assert got.tolist() == [list(words)]


def test_normals_follow_the_double_precision_formula():
    want = _philox.normals(5001, KEY, None, 0, 3, "cpu")
    assert (draw(5001, NORMAL, 3).cpu().double() - want).abs().max() < 5e-6


@pytest.mark.parametrize("first", [0, 1, 2, 3, 2**32 - 2, 2**33 + 6, 2**34 + 1, 2**61 + 7])
@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32 - 1, 2**63 - 1])
def test_first_of_any_residue_and_size_continues_one_stream(first, key):
    want = _philox.words(13, key, None, 5, first, "cpu")
    assert torch.equal(draw(13, BITS, first, key=key, stream=5).cpu(), want)


@pytest.mark.parametrize("high", [1, 10, 2**31 + 1, 2**32])
def test_integers(high):
    want = _philox.integers(9, KEY, None, 0, 0, high, "cpu")
    assert torch.equal(draw(9, INTEGERS, high=high).cpu(), want)


@pytest.mark.parametrize("sample", [1, 3, 4, 6, 1030])
def test_a_sample_with_its_own_key_does_not_depend_on_the_batch(sample):
    keys = torch.tensor([5, 2**62 + 9, 5], device=DEVICE)
    got = draw((3, sample), UNIFORM, key=0, key_t=keys)
    assert torch.equal(got[0], got[2])
    for row, key in zip(got, keys.tolist(), strict=True):
        assert torch.equal(row, draw(sample, UNIFORM, key=key))


# planes of 16 and 64 pixels take the fast path of channels_last (with 8 channels, in wide accesses), 15 does not
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 8, 8, 8), (3, 2, 5, 3)])
@pytest.mark.parametrize("first, keys", [(0, 0), (2, 0), (0, 1), (0, "sample")])
def test_channels_last_is_the_same_in_another_layout(shape, first, keys):
    x = torch.randn(shape, device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    key_t = torch.arange(7, 7 + (shape[0] if keys == "sample" else 1), device=DEVICE) if keys else None
    rows, t = torch.rand(5, 4, device=DEVICE), torch.randint(0, 5, shape[:2], device=DEVICE)
    for level in (t, t[:, 0].contiguous()):
        want = noise.noise_pair(x, rows, level, 0, KEY, key_t, first)
        got = noise.noise_pair(last, rows, level, 0, KEY, key_t, first)
        for a, b in zip(want, got, strict=True):
            assert b.stride() == last.stride()
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_no_noise_is_bit_for_bit(dtype, by_tensor):
    x = torch.tensor([[-0.0, 0.0, 1.5, float("inf")], [-0.0, 2.0, -3.0, 0.25]], dtype=dtype, device=DEVICE)
    t = torch.zeros(2, dtype=torch.int64, device=DEVICE) if by_tensor else None
    got, _ = noise.add_noise(x, table((1.0, 0.0), (0.5, 0.5)), t, 0, 1.0, KEY, None, 0, False)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    assert torch.equal(got.view(bits), x.view(bits))


def test_a_row_out_of_range_is_nan():
    x = torch.ones(4, 6, device=DEVICE)
    rows = table((1.0, 0.0), (0.5, 0.5))
    t = torch.tensor([-1, 0, 2, 2**62], device=DEVICE)
    got, _ = noise.add_noise(x, rows, t, 0, 1.0, KEY, None, 0, False)
    assert got.isnan().all(1).tolist() == [True, False, True, True]
    for row in (2, -2, 2**40):
        assert noise.add_noise(x, rows, None, row, 1.0, KEY, None, 0, False)[0].isnan().all()


def test_residual_mean_is_in_a_fixed_order_and_the_mean_of_the_residual():
    x, y = torch.randn(2, 3, 1030, device=DEVICE).unbind(0)
    rows = table((0.5, 0.3, -1.0), (2.0, -1.0, 0.0), (1.0, 0.2, 0.7))
    one = torch.ones((), device=DEVICE)
    weights = rows[:, :1].double()
    r = loss.residual(x, y, rows, None, -1, one, KEY, None, 1).double() / weights
    total, kept = loss.residual_mean(x, y, rows, None, -1, True, KEY, None, 1)
    assert total.dtype == torch.float32 and total.dim() == 0
    torch.testing.assert_close(total.double(), (weights * r.square()).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.double(), weights * r, rtol=1e-6, atol=0)
    assert total == loss.residual_mean(x, y, rows, None, -1, False, KEY, None, 1)[0]


def test_nan_passes_the_clamp():
    x = torch.zeros(1, 4, device=DEVICE)
    e = torch.tensor([[float("nan"), 9.0, -9.0, 0.5]], device=DEVICE)
    rows = table((0, 0, 0, 0, 0, 1, 1, 0))
    got = step.step(x, e, None, None, rows, None, 0, 1.0, 1.0, True, KEY, None, 0)
    torch.testing.assert_close(got, torch.tensor([[float("nan"), 1, -1, 0.5]], device=DEVICE), equal_nan=True)


def test_empty_tensors():
    x, rows = torch.empty(0, 3, device=DEVICE), table((1.0, 0.0, 0.0))
    assert noise.add_noise(x, rows[:, :2], None, 0, 1.0, KEY, None, 0, True)[1].shape == (0, 3)
    assert loss.residual_mean(x, None, rows, None, 0, False, KEY, None, 0)[0].isnan()  # as torch's mean of nothing
    mean, norms = penalty.gradient_norm(x, 1.0)
    assert mean.isnan() and norms.shape == (0,) and penalty.interpolate(x, x, KEY, None, 0).shape == (0, 3)
    mean, flat = mlp.mlp_penalty(x, *net(3, 8, 8, 1), 0.2, 3, 1.0)
    assert mean.isnan() and flat.shape == (24 + 64 + 8,) and not flat.any()


def test_float64_is_refused_by_name():
    x, rows = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    for call in (
        lambda: noise.add_noise(x, rows, None, 0, 1.0, KEY, None, 0, False),
        lambda: noise.noise_pair(x, rows, None, 0, KEY, None, 0),
        lambda: step.step(x, x, None, None, rows, None, 0, 1.0, 1.0, False, KEY, None, 0),
        lambda: loss.residual(x, None, rows, None, 0, one, KEY, None, 0),
        lambda: loss.residual_mean(x, None, rows, None, 0, False, KEY, None, 0),
        lambda: penalty.interpolate(x, x, KEY, None, 0),
        lambda: penalty.gradient_norm(x, 1.0),
        lambda: penalty.gradient_norm_grad(x, one, one, 1.0),
        lambda: draw(4, NORMAL, dtype=torch.float64),
        lambda: mlp.mlp_penalty(x, *net(4, 8, 1), 0.2, 4, 1.0),
    ):
        with pytest.raises(ValueError, match="torch.float64"):
            call()


def test_layouts_that_differ_or_have_gaps_are_refused():
    x, rows = torch.zeros(2, 3, 4, 4, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="e must match x"):
        step.step(x, last, None, None, rows, None, 0, 1.0, 1.0, False, KEY, None, 0)
    with pytest.raises(ValueError, match="fake must match x"):
        penalty.interpolate(x, last, KEY, None, 0)
    with pytest.raises(ValueError, match="strides"):
        penalty.gradient_norm(x[:, :, ::2], 1.0)
    with pytest.raises(ValueError, match="strides"):
        noise.add_noise(x[:, :, ::2], rows[:, :2].contiguous(), None, 0, 1.0, KEY, None, 0, False)


def test_layers_that_do_not_fit_are_refused():
    x = torch.zeros(2, 3, device=DEVICE)
    for widths, judged in (((4, 8, 1), 3), ((3, 8, 7, 1), 3)):
        with pytest.raises(ValueError, match="the layers do not fit"):
            mlp.mlp_penalty(x, *net(*widths), 0.2, judged, 1.0)
    for v, judged in ((x, 4), (x, 0), (x[:, :2], 2)):
        with pytest.raises(ValueError, match="expected a contiguous"):
            mlp.mlp_penalty(v, *net(3, 8, 1), 0.2, judged, 1.0)


# a program takes 16 rows, and 256 outputs and 16 inputs of a layer at a time
@pytest.mark.parametrize("widths", [(1, 1, 1), (17, 300, 300, 2), (270, 5, 1)])
def test_mlp_penalty_does_not_depend_on_how_tiles_cut_the_layers(widths):
    weights, biases = net(*widths)
    x = torch.randn(19, widths[0], device=DEVICE)
    mean, flat = mlp.mlp_penalty(x, weights, biases, 0.1, widths[0], 0.5)
    x, leaves = x.double().requires_grad_(), [w.double().requires_grad_() for w in weights]
    y = x @ leaves[0].t() + biases[0]
    for w, b in zip(leaves[1:], biases[1:], strict=True):
        y = torch.where(y > 0, y, 0.1 * y) @ w.t() + b
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    want = ((g.square().sum(1).sqrt() - 0.5) ** 2).mean()
    expected = torch.autograd.grad(want, leaves)
    torch.testing.assert_close(mean.double(), want.detach(), rtol=1e-5, atol=0)
    for got, e in zip(flat.split([w.numel() for w in leaves]), expected, strict=True):
        assert (got.view_as(e) - e).abs().max() <= 1e-5 * e.abs().max()
