import math

import pytest
import torch

from diffgan_fast.nets.embedding import sinusoidal, time_fraction


def closed_form(t, dim):
    half = dim // 2
    phases = [t * 10000 ** (-k / (half - 1)) for k in range(half)]
    return [math.sin(p) for p in phases] + [math.cos(p) for p in phases]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("dim", [4, 6, 32, 128])
def test_sinusoidal_is_its_closed_form(dim, dtype, tolerance):
    t = torch.tensor([0, 1, 2, 17, 300, 999, 1000])
    expected = torch.tensor([closed_form(n, dim) for n in t.tolist()], dtype=torch.float64)
    value = sinusoidal(t, dim, dtype)
    assert value.dtype == dtype
    assert (value.double() - expected).abs().max() < tolerance


def test_sinusoidal_in_bfloat16_is_the_rounded_float32():
    t = torch.tensor([1, 257, 999])
    assert torch.equal(sinusoidal(t, 16, torch.bfloat16), sinusoidal(t, 16).bfloat16())


@pytest.mark.parametrize("dim", [2, 7, 0])
def test_sinusoidal_names_a_bad_dim(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}"):
        sinusoidal(torch.tensor([1]), dim)


def test_time_fraction_counts_from_zero():
    t = torch.tensor([1, 2, 151, 300])
    expected = [0.0, 1 / 300, 0.5, 299 / 300]
    assert time_fraction(t, 300, torch.float64).tolist() == expected
    assert time_fraction(t, 300).tolist() == pytest.approx(expected, abs=1e-7)
