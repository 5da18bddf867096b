import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from diffgan_fast import backend
from diffgan_fast.ops.sinusoids import sinusoids


def formula(x, frequencies):
    """The docstring's, in float64, of phases rounded to float32 as the op has them."""
    phase = (x[:, None] * frequencies).numpy().astype(np.float64)
    return np.concatenate([np.sin(phase), np.cos(phase)], 1)


@pytest.mark.parametrize("half", [1, 7, 8, 64, 67])
@pytest.mark.parametrize("largest", [1.0, 100.0, 9999.0, 1e6])
def test_follows_the_formula(half, largest):
    x = torch.cat([torch.tensor([0.0, -0.0, largest, -largest]), largest * (2 * torch.rand(300) - 1)])
    frequencies = torch.logspace(0, -4, half)
    got = sinusoids(x, frequencies)
    assert got.shape == (304, 2 * half) and got.dtype == torch.float32
    np.testing.assert_allclose(got.double().numpy(), formula(x, frequencies), rtol=0, atol=2e-7)


def test_both_forms_agree_and_every_number_has_its_row():
    x, frequencies = 50 * torch.randn(5000), torch.logspace(0, -4, 64)
    with backend("reference"):
        plain = sinusoids(x, frequencies)
    torch.testing.assert_close(sinusoids(x, frequencies), plain, rtol=0, atol=3e-7)
    assert torch.equal(sinusoids(x, frequencies)[1234:], sinusoids(x[1234:], frequencies))
    assert sinusoids(x[:0], frequencies).shape == (0, 128)
    assert sinusoids(torch.tensor([float("nan"), float("inf")]), frequencies).isnan().all()


def test_gradients_forward_mode_and_compile():
    x, frequencies = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64)
    assert gradcheck(lambda x: sinusoids(x, frequencies), x, check_forward_ad=True)
    leaf = torch.randn(5).requires_grad_()
    sinusoids(leaf, frequencies.float())[:, :3].sum().backward()
    want = (frequencies.float() * (leaf.detach()[:, None] * frequencies.float()).cos()).sum(1)
    torch.testing.assert_close(leaf.grad, want)
    compiled = torch.compile(lambda x: sinusoids(x, frequencies.float()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf.detach()), sinusoids(leaf.detach(), frequencies.float()))
