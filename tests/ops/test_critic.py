"""A critic's loss, penalty and gradient in one call, against the definitions in float64."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast.adversarial import critic_objective
from diffgan_fast.ops import critic as module
from diffgan_fast.ops import mlp
from tests.test_adversarial import WANT

needs_fused = pytest.mark.skipif(not mlp._EXISTS, reason="the C++ form was not built, or torch shows no BLAS")
KINDS = list(WANT)
KEY = 5


def judged(kind, real, fake):
    """What the docstring of `critic_loss` says, from logits in float64."""
    if kind in ("nonsaturating", "saturating"):
        return -(torch.sigmoid(real).log().mean() + torch.sigmoid(-fake).log().mean())
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    if kind == "lsgan":
        return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2
    return fake.mean() - real.mean()


def by_definition(critic, real, fake, kind, gp_weight, first_sample=0, cond=None, fake_cond=None):
    """The loss, the logits, and the loss's gradient, by a double backward of a float64 copy."""
    critic = copy.deepcopy(critic).double()
    cond = cond or {}
    real, fake = real.double(), fake.double()
    on_real, on_fake = critic(real, **cond), critic(fake, **(fake_cond or cond))
    loss = judged(kind, on_real, on_fake)
    if gp_weight:
        u = dgf.random.uniform(len(real), KEY, first=first_sample).double()[:, None]
        x = (u * real + (1 - u) * fake).requires_grad_()
        (g,) = torch.autograd.grad(critic(x, **cond).sum(), x, create_graph=True)
        squares = g.square().sum(1)
        norms = torch.where(squares > 0, squares.masked_fill(squares == 0, 1).sqrt(), 0)  # no NaN at g = 0
        loss = loss + gp_weight * ((norms - 1) ** 2).mean()
    grads = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
    return loss.detach(), on_real.detach(), on_fake.detach(), grads


def check(critic, real, fake, kind, gp_weight, tolerance, **how):
    loss, on_real, on_fake = critic_objective(critic, real, fake, kind, gp_weight=gp_weight, key=KEY, **how)
    got = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
    want = by_definition(critic, real, fake, kind, gp_weight, **how)
    assert not on_real.requires_grad and not on_fake.requires_grad
    for value, right in zip((loss.detach(), on_real, on_fake), want[:3], strict=True):
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance)
    largest = max(float(g.abs().max()) for g in want[3] if g is not None)
    for value, right in zip(got, want[3], strict=True):
        right = torch.zeros_like(value).double() if right is None else right
        assert float((value.double() - right).abs().max()) <= tolerance * largest
    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gp_weight", [0.0, 10.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_back_end_gives_the_loss_and_gradients_of_the_definition(backend, kind, gp_weight, dtype, tolerance):
    if dtype not in backend.dtypes:
        pytest.skip("no float64 in Triton")
    critic = dgf.nets.MLPCritic(2, 24, 3, slope=0.2).to(backend.device, dtype)
    real, fake = torch.randn(2, 37, 2, dtype=dtype, device=backend.device)
    loss = check(critic, real, fake, kind, gp_weight, tolerance)
    assert (type(loss.grad_fn).__name__ == "_KnownBackward") == (backend.name == "cpu" and mlp._EXISTS)


@needs_fused
@pytest.mark.parametrize("n", [1, 131, 132, 133, 600])  # blocks of 132 rows
@pytest.mark.parametrize("layers, hidden, slope", [(1, 8, 0.0), (2, 128, 0.2), (6, 33, 0.0)])
def test_every_size(n, layers, hidden, slope):
    critic = dgf.nets.MLPCritic(2, hidden, layers, slope=slope)
    real, fake = torch.randn(2, n, 2)
    loss = check(critic, real, fake, "nonsaturating", 10.0, 2e-5, first_sample=7)
    assert type(loss.grad_fn).__name__ == "_KnownBackward"


@needs_fused
@pytest.mark.parametrize("inputs", [("x", "t"), ("x", "x_t", "t"), ("x", "level")])
def test_what_a_critic_is_told_is_no_part_of_the_penalty(inputs):
    critic = dgf.nets.MLPCritic(2, 16, 2, inputs=inputs, T=9).double()
    real, fake, x_t, other = torch.randn(4, 20, 2, dtype=torch.float64)
    cond = {"t": torch.randint(1, 10, (20,)), "x_t": x_t, "level": torch.rand(20, dtype=torch.float64)}
    loss = check(critic, real, fake, "hinge", 3.0, 1e-10, cond=cond)
    assert type(loss.grad_fn).__name__ == "_KnownBackward"
    fake_cond = {"t": 10 - cond["t"], "x_t": other, "level": 1 - cond["level"]}
    check(critic, real, fake, "hinge", 3.0, 1e-10, cond=cond, fake_cond=fake_cond)


@needs_fused
def test_several_logits_a_sample():
    critic = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    real, fake = torch.randn(2, 50, 3, dtype=torch.float64)
    loss = check(critic, real, fake, "lsgan", 2.0, 1e-10)
    assert type(loss.grad_fn).__name__ == "_KnownBackward"


@needs_fused
def test_extreme_logits_and_dead_critics_stay_finite():
    critic = dgf.nets.MLPCritic(2, 8, 2)
    with torch.no_grad():
        for p in critic.parameters():
            p.zero_()
    real, fake = torch.randn(2, 5, 2)
    loss, _, _ = critic_objective(critic, real, fake, gp_weight=10.0, key=KEY)
    assert abs(float(loss.detach()) - (2 * 0.6931471805599453 + 10)) < 1e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(critic.parameters())))
    for bias in (1e4, -1e4):
        with torch.no_grad():
            critic.main[-1].bias.fill_(bias)
        loss, _, _ = critic_objective(critic, real, fake)
        assert abs(float(loss.detach()) - 1e4) < 1


@needs_fused
def test_the_number_of_threads_does_not_matter():
    critic = dgf.nets.MLPCritic(2, 64, 3)
    real, fake = torch.randn(2, 700, 2)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, _, _ = critic_objective(critic, real, fake, gp_weight=10.0, key=KEY)
            found.append((loss.detach(), *torch.autograd.grad(loss, list(critic.parameters()))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_fused
def test_scaled_losses_and_frozen_weights():
    critic = dgf.nets.MLPCritic(2, 16, 2)
    critic.main[0].weight.requires_grad_(False)
    real, fake = torch.randn(2, 30, 2)
    wanted = [p for p in critic.parameters() if p.requires_grad]
    loss, _, _ = critic_objective(critic, real, fake)
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    for a, b in zip(torch.autograd.grad(1024 * loss, wanted), once, strict=True):
        torch.testing.assert_close(a, 1024 * b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)),
        lambda: nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 1)),
    ],
    ids=["smooth", "widths", "no bias"],
)
def test_other_critics_take_the_plain_form(make):
    critic = make().double()
    loss = check(critic, *torch.randn(2, 12, 2, dtype=torch.float64), "nonsaturating", 10.0, 1e-10)
    assert type(loss.grad_fn).__name__ != "_KnownBackward"


@needs_fused
def test_under_autocast_the_plain_form_runs():
    critic = dgf.nets.MLPCritic(2, 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = critic_objective(critic, *torch.randn(2, 12, 2), gp_weight=1.0, key=KEY)
    assert type(loss.grad_fn).__name__ != "_KnownBackward" and loss.dtype == torch.float32


def test_batch_norm_sees_real_and_fake_samples_apart():
    calls = []
    critic = dgf.nets.DCGANCritic(1, 8, width=4)
    critic.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    critic_objective(critic, *torch.randn(2, 6, 1, 8, 8))
    assert calls == [6, 6]
    plain = dgf.nets.DCGANCritic(1, 8, width=4, norm=None)
    plain.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    critic_objective(plain, *torch.randn(2, 6, 1, 8, 8))
    assert calls[2:] == [12]


def test_bad_input_is_named():
    critic, x = dgf.nets.MLPCritic(2, 8, 2), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"fake must be like real, \[4, 2\]; got \[3, 2\]"):
        critic_objective(critic, x, x[:3])
    with pytest.raises(ValueError, match="key is None; gp_weight=1.0 needs one"):
        critic_objective(critic, x, x, gp_weight=1.0)
    with pytest.raises(ValueError, match="gan_loss must be one of nonsaturating"):
        critic_objective(critic, x, x, "bce")
    with pytest.raises(ValueError, match=r"x is \[4, 3\]"):
        critic_objective(critic, torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="t is None"):
        critic_objective(dgf.nets.MLPCritic(2, 8, 2, inputs=("x", "t"), T=4), x, x)


@needs_fused
def test_the_gradient_is_of_first_order():
    loss, _, _ = critic_objective(critic := dgf.nets.MLPCritic(2, 8, 2), *torch.randn(2, 4, 2))
    with pytest.raises(RuntimeError, match="first order"):
        torch.autograd.grad(loss, list(critic.parameters()), create_graph=True)


@needs_fused
def test_the_raw_op_has_a_schema_a_fake_and_checks():
    weights = [torch.randn(8, 3), torch.randn(8, 8), torch.randn(1, 8)]
    biases = [torch.randn(len(w)) for w in weights]
    real, fake, between = torch.randn(5, 3), torch.randn(5, 3), torch.randn(2, 3)
    op = torch.ops.diffgan_fast.mlp_critic.default
    torch.library.opcheck(op, (real, fake, between, weights, biases, 0.1, 0, 2, 1.0, 10.0),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    for bad in (
        (real, fake[:4], between, weights, biases, 0.1, 0, 2, 1.0, 10.0),
        (real, fake, between[:, :2], weights, biases, 0.1, 0, 2, 1.0, 10.0),
        (real, fake.double(), between, weights, biases, 0.1, 0, 2, 1.0, 10.0),
        (real, fake, between, weights, biases[:2], 0.1, 0, 2, 1.0, 10.0),
        (real, fake, between, weights, biases, 0.1, 4, 2, 1.0, 10.0),
        (real, fake, between, weights, biases, 0.1, 0, 4, 1.0, 10.0),
        (real, fake, between, weights[::-1], biases, 0.1, 0, 2, 1.0, 10.0),
    ):
        with pytest.raises(RuntimeError, match="diffgan_fast"):
            op(*bad)


def test_the_numbers_of_the_losses_are_those_of_the_names():
    assert set(module.LOSSES) == set(KINDS)
