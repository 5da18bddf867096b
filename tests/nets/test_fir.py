import numpy as np
import pytest
import torch
from scipy.signal import upfirdn

from diffgan_fast.nets import fir
from diffgan_fast.nets.fir import fir_blur, fir_down, fir_up

from .helpers import images

TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def filtered(x, up, down, before, after):
    """upfirdn along both axes with `before` and `after` zeros beside the image, where the whole kernel fits."""
    for axis in (2, 3):
        full = upfirdn(up * TAPS, x, up=up, axis=axis)  # a kernel of 4 reaches 3 pixels beyond either end
        length = up * x.shape[axis] + before + after - 3
        full = np.concatenate([full, np.zeros_like(full)], axis)  # room where upfirdn stopped at the last pixel
        x = full.take(range(3 - before, 3 - before + length, down), axis)
    return x


CASES = [(fir_down, 1, 2, 1, 1), (fir_up, 2, 1, 2, 1), (fir_blur, 1, 1, 2, 2)]
NAMES = ["down", "up", "blur"]


@pytest.mark.parametrize("function, up, down, before, after", CASES, ids=NAMES)
@pytest.mark.parametrize("size", [2, 3, 7, 8, 28])
def test_agrees_with_scipy(function, up, down, before, after, size):
    x = images(2, 3, size, dtype=torch.float64)
    expected = filtered(x.numpy(), up, down, before, after)
    for layout in (torch.contiguous_format, torch.channels_last):
        value = function(x.contiguous(memory_format=layout))
        assert value.shape == expected.shape
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-12)


def test_behind_a_transposed_convolution():
    x = images(2, 3, 9, dtype=torch.float64)  # 4 px doubled
    value = fir_blur(x, padding=1, gain=4.0)
    assert value.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(value.numpy(), 4 * filtered(x.numpy(), 1, 1, 1, 1), rtol=0, atol=1e-12)


def test_sizes():
    assert fir_down(images(1, 1, 7)).shape == (1, 1, 3, 3)
    assert fir_up(images(1, 1, 7)).shape == (1, 1, 14, 14)
    assert fir_blur(images(1, 1, 7)).shape == (1, 1, 8, 8)


def test_the_kernel_is_exact_in_every_type():
    exact = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.equal(fir._kernel(dtype, torch.device("cpu"))[0, 0].float(), exact)


@pytest.mark.parametrize("function", [fir_down, fir_up, fir_blur])
def test_gradients_of_every_order(function):
    x = images(2, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x)


def test_first_use_without_gradients_does_not_spoil_training():
    fir._kernel.cache_clear()
    x = images(1, 1, 4)
    with torch.inference_mode():
        fir_down(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(fir_down(x).sum(), x)
    assert gradient.shape == x.shape
