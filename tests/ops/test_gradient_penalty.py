"""gradient_penalty and r1_penalty: every mode against float64 autograd written here."""

import copy

import pytest
import torch
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.ops import gradient_penalty, r1_penalty
from diffgan_fast.ops.mlp import penalty_op
from tests.ops import oracle

KEY = 11


class Residual(nn.Module):
    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.f = activation()

    def forward(self, x):
        h = self.enter(x)
        return self.leave(self.f(h + self.inner(self.f(h))))[:, 0]


def smooth():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))


def several_outputs():
    return nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 3))


def mixed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.LeakyReLU(0.3), nn.Conv2d(8, 8, 3, 2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 7), nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip


def with_fixed_statistics():
    critic = nets.DCGANCritic(3, 8, width=4).double()
    for _ in range(3):
        critic(torch.randn(6, 3, 8, 8, dtype=torch.float64))
    for p in critic.parameters():
        nn.init.normal_(p, 0.1, 0.3)
    return critic.eval()


POINTS, IMAGES = (6, 2), (5, 3, 8, 8)
CRITICS = {  # name: (constructor, shape of the data, modes that take it)
    "mlp": (lambda: nets.MLPCritic(hidden=16), POINTS, ("double", "closed", "forward", "auto")),
    "deep mlp": (lambda: nets.MLPCritic(hidden=16, layers=6), POINTS, ("double", "closed", "forward", "auto")),
    "dcgan": (lambda: nets.DCGANCritic(3, 8, width=4, norm=None), IMAGES, ("double", "closed", "forward", "auto")),
    "eval batch norm": (with_fixed_statistics, IMAGES, ("double", "closed", "forward", "auto")),
    "mixed": (mixed, IMAGES, ("double", "closed", "forward", "auto")),
    "several outputs": (several_outputs, POINTS, ("double", "closed", "forward", "auto")),
    "residual": (Residual, POINTS, ("double", "forward", "auto")),
    "smooth residual": (lambda: Residual(nn.SiLU), POINTS, ("double", "forward", "auto")),
    "smooth": (smooth, POINTS, ("double", "forward", "auto")),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 1)),
        POINTS,
        ("double", "auto"),
    ),
}
CASES = [(name, mode) for name, (*_, modes) in CRITICS.items() for mode in modes]


def make(name, dtype, device="cpu"):
    torch.manual_seed(3)
    constructor, shape, _ = CRITICS[name]
    critic = constructor().to(device, dtype)
    real, fake = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return critic, real, fake


def by_autograd(critic, x, center, **cond):
    """The value and its parameter gradients, from the definition in plain torch."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x, **cond).sum(), x, create_graph=True)
    value = ((g.flatten(1).square().sum(1).sqrt() - center) ** 2).mean()
    return value, torch.autograd.grad(value, list(critic.parameters()), allow_unused=True)


def between(real, fake):
    u = torch.as_tensor(oracle.uniform(len(real), KEY)).to(real).view(-1, *[1] * (real.dim() - 1))
    return u * real + (1 - u) * fake


def agree(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        w = torch.zeros_like(g) if w is None and g is not None else w
        if g is None:
            assert w is None or w.abs().max() == 0
        else:
            assert (g.double() - w.double()).abs().max() <= tolerance * max(float(w.abs().max()), 1e-6)


@pytest.mark.parametrize("name, mode", CASES)
@pytest.mark.parametrize("center", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_mode_gives_the_value_and_the_gradients_of_the_definition(name, mode, center, dtype, tolerance):
    critic, real, fake = make(name, dtype)
    got = gradient_penalty(critic, real, fake, KEY, center=center, mode=mode)
    gradients = torch.autograd.grad(3 * got, list(critic.parameters()), allow_unused=True)
    wide, *data = make(name, torch.float64)
    want, expected = by_autograd(wide, between(*data), center)
    assert abs(float(got) - float(want)) <= tolerance * max(float(want), 1e-3)
    agree(gradients, [None if e is None else 3 * e for e in expected], tolerance)


@pytest.mark.parametrize("mode", ["double", "closed", "forward"])
@pytest.mark.parametrize("kind", ["points", "images"])
def test_critics_with_conditions(mode, kind):
    torch.manual_seed(0)
    t = torch.tensor([1, 4, 9, 10])
    if kind == "points":
        critic, shape = nets.MLPCritic(2, 8, inputs=("x", "x_t", "t"), T=10).double(), (4, 2)
    else:
        critic, shape = (
            nets.DCGANCritic(1, 8, width=4, norm=None, inputs=("x", "x_t", "t"), T=10).double(),
            (4, 1, 8, 8),
        )
    real, fake, x_t = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    got = gradient_penalty(critic, real, fake, KEY, mode=mode, t=t, x_t=x_t)
    want, expected = by_autograd(critic, between(real, fake), 1.0, t=t, x_t=x_t)
    assert abs(float(got) - float(want)) <= 1e-10
    agree(torch.autograd.grad(got, list(critic.parameters()), allow_unused=True), expected, 1e-10)


@pytest.mark.parametrize("mode", ["double", "closed", "forward"])
def test_goldens_of_a_linear_critic(mode):
    """P = (|w| - 1)^2, R1 = |w|^2, dP/dw = 2 (|w| - 1) w / |w|, whatever the data."""
    critic = nn.Sequential(nn.Linear(3, 1)).double()
    w, n = critic[0].weight, float(critic[0].weight.detach().norm())
    real, fake = (torch.randn(7, 3, dtype=torch.float64) for _ in range(2))
    penalty = gradient_penalty(critic, real, fake, KEY, mode=mode)
    torch.testing.assert_close(float(penalty), (n - 1) ** 2)
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], (2 * (n - 1) / n * w).detach())
    r1 = r1_penalty(critic, real, mode=mode)
    torch.testing.assert_close(float(r1), n * n)
    torch.testing.assert_close(torch.autograd.grad(r1, w)[0], 2 * w.detach())


@pytest.mark.parametrize("mode", ["double", "closed", "forward"])
@pytest.mark.parametrize("center, value", [(1.0, 1.0), (0.0, 0.0)])
def test_a_critic_without_gradient(mode, center, value):
    critic = nets.MLPCritic(2, 8)
    for p in critic.parameters():
        nn.init.zeros_(p)
    got = gradient_penalty(critic, torch.randn(5, 2), torch.randn(5, 2), KEY, center=center, mode=mode)
    gradients = torch.autograd.grad(got, list(critic.parameters()), allow_unused=True)
    assert float(got) == value
    assert all(g is None or not g.any() for g in gradients)


def test_double_can_be_differentiated_again_and_the_others_say_that_they_cannot():
    critic, real, fake = make("smooth", torch.float64)
    weight = critic[0].weight

    def penalty(mode):
        return gradient_penalty(critic, real, fake, KEY, mode=mode)

    (g,) = torch.autograd.grad(penalty("double"), weight, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(g.square().sum(), weight)[0]).all()
    critic, real, fake = make("mlp", torch.float64)
    for mode in ("closed", "forward"):
        with pytest.raises(RuntimeError, match=f"mode '{mode}' is of first order"):
            torch.autograd.grad(penalty(mode), critic.main[0].weight, create_graph=True)


def test_gradgradcheck_of_double():
    critic = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    real, fake = (torch.randn(3, 2, dtype=torch.float64) for _ in range(2))
    names = [n for n, _ in critic.named_parameters()]

    def f(*values):
        def call(x):
            return torch.func.functional_call(critic, dict(zip(names, values, strict=True)), (x,))

        return gradient_penalty(call, real, fake, KEY, mode="double")

    inputs = [p.detach().clone().requires_grad_() for p in critic.parameters()]
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_batch_norm_that_measures_the_batch_is_refused():
    critic = nets.DCGANCritic(1, 8, width=4)
    x = torch.randn(4, 1, 8, 8)
    for mode in ("auto", "double", "closed", "forward"):
        with pytest.raises(ValueError, match=r"layer 'main.3' \(BatchNorm2d\) normalises by the batch"):
            gradient_penalty(critic, x, x, KEY, mode=mode)


@pytest.mark.parametrize(
    "layer, mode, message",
    [
        (nn.Tanh(), "closed", r"layer '1' \(Tanh\) is none of Linear, Conv2d"),
        (nn.LayerNorm(4), "forward", r"layer '1' \(LayerNorm\) is not exact"),
        (nn.Dropout(0.5), "forward", r"layer '1' \(Dropout\) draws another mask"),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), "forward", "changes its estimate"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "forward", "changes its estimate"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "closed", r"layer '1' \(ParametrizedLinear\)"),
        (nn.Unflatten(1, (1, 2, 2)), "closed", "Unflatten"),
    ],
)
def test_what_a_mode_cannot_do_is_refused_by_name(layer, mode, message):
    critic = nn.Sequential(nn.Linear(2, 4), layer, nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=message):
        gradient_penalty(critic, torch.randn(3, 2), torch.randn(3, 2), KEY, mode=mode)


class Scaled(nets.MLPCritic):
    """A critic that is no longer main(join(x))."""

    def forward(self, x, **cond):
        return 3 * super().forward(x, **cond).tanh()


class Skipped(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x.square().sum(1, keepdim=True)


def hooked(where):
    critic = nets.MLPCritic(hidden=8)
    where(critic).register_forward_hook(lambda module, args, out: 2 * out)
    return critic


@pytest.mark.parametrize(
    "make_critic",
    [
        lambda: Scaled(hidden=8),
        lambda: Skipped(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)),
        lambda: hooked(lambda critic: critic),
    ],
)
def test_auto_does_not_take_for_piecewise_linear_what_has_a_forward_or_hooks_of_its_own(make_critic):
    torch.manual_seed(0)
    critic = make_critic().double()
    real, fake = (torch.randn(6, 2, dtype=torch.float64) for _ in range(2))
    got = gradient_penalty(critic, real, fake, KEY)
    want, expected = by_autograd(critic, between(real, fake), 1.0)
    torch.testing.assert_close(got, want)
    agree(torch.autograd.grad(got, list(critic.parameters()), allow_unused=True), expected, 1e-10)


def test_many_rows_and_several_blocks_of_them():
    torch.manual_seed(0)
    critic = nets.MLPCritic(hidden=129).double()
    real, fake = (torch.randn(300, 2, dtype=torch.float64) for _ in range(2))
    got = gradient_penalty(critic, real, fake, KEY, mode="closed")
    want, expected = by_autograd(critic, between(real, fake), 1.0)
    torch.testing.assert_close(got, want)
    agree(torch.autograd.grad(got, list(critic.parameters()), allow_unused=True), expected, 1e-10)


@pytest.mark.parametrize("name", ["mlp", "dcgan"])
@pytest.mark.parametrize("mode", ["auto", "double", "forward"])
def test_autocast_does_not_reach_into_it(name, mode):
    critic, real, fake = make(name, torch.float32)
    fake = fake.bfloat16()  # as a generator makes it under autocast
    parameters = list(critic.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient_penalty(critic, real, fake, KEY, mode=mode)
        r1 = r1_penalty(critic, fake, mode=mode)
    want = gradient_penalty(critic, real, fake.float(), KEY, mode=mode)
    assert torch.equal(got, want) and torch.equal(r1, r1_penalty(critic, fake.float(), mode=mode))
    agree(*(torch.autograd.grad(v, parameters, allow_unused=True) for v in (got, want)), 1e-7)


def test_forward_refuses_functional_calls_whose_rule_is_not_exact():
    weight = torch.randn(4, 2, requires_grad=True)
    x = torch.randn(5, 2)
    calls = {
        "native_layer_norm": lambda h: nn.functional.layer_norm(h, (4,)),
        "batch_norm": lambda h: nn.functional.batch_norm(h, None, None, training=True),
        "native_dropout|bernoulli": lambda h: nn.functional.dropout(h, 0.5),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=name):
            gradient_penalty(lambda x, call=call: call(x @ weight.t()).square().sum(1), x, -x, KEY, mode="forward")


def test_what_the_critic_is_told_is_a_constant():
    critic = nets.MLPCritic(2, 8, inputs=("x", "x_t"))
    x, x_t = torch.randn(4, 2), torch.randn(4, 2, requires_grad=True)
    for mode in ("double", "closed", "forward"):
        penalty = gradient_penalty(critic, x, -x, KEY, mode=mode, x_t=x_t)
        assert torch.autograd.grad(penalty, x_t, allow_unused=True)[0] is None
    with pytest.raises(ValueError, match="nn.Sequential takes no bogus"):
        gradient_penalty(several_outputs(), x, -x, KEY, mode="closed", bogus=3)


def test_closed_refuses_a_residual_critic_and_hooks():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="Residual is no nn.Sequential"):
        gradient_penalty(Residual(), x, x, KEY, mode="closed")
    critic = several_outputs()
    critic[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '0' .* has hooks"):
        gradient_penalty(critic, x, x, KEY, mode="closed")


def test_bad_arguments_are_named():
    critic, x = several_outputs(), torch.randn(3, 2)
    cases = [
        (lambda: gradient_penalty(critic, x, x, KEY, mode="fast"), "mode must be one of auto, double"),
        (lambda: gradient_penalty(critic, x, x[:2], KEY), "fake must match real"),
        (lambda: gradient_penalty(critic, x, x, -1), "key must be"),
        (lambda: gradient_penalty(critic, x, x, KEY, center=-1.0), "center must be"),
        (lambda: gradient_penalty(critic, x, x, KEY, center=-1.0, mode="double"), "center must be"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("mode", ["auto", "double", "closed", "forward"])
def test_data_that_a_critic_is_not_made_for_are_named_in_every_mode(mode):
    points, images = torch.randn(3, 3), torch.randn(3, 3, 16, 16)
    for critic, x in ((nets.MLPCritic(2, 8), points), (nets.DCGANCritic(3, 8, width=4, norm=None), images)):
        with pytest.raises(ValueError, match=r"x is \[3, 3.*\]; it must be"):
            gradient_penalty(critic, x, x, KEY, mode=mode)


@pytest.mark.parametrize("mode", ["double", "closed", "auto"])
def test_works_inside_torch_compile(mode):
    critic, real, fake = make("several outputs", torch.float64)

    def loss(real, fake, key):
        return gradient_penalty(critic, real, fake, key, mode=mode)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=mode != "closed")
    for key in (1, 2):
        got, want = compiled(real, fake, key), loss(real, fake, key)
        torch.testing.assert_close(got, want)
        for g, w in zip(*(torch.autograd.grad(v, list(critic.parameters()), allow_unused=True) for v in (got, want)),
                        strict=True):  # fmt: skip
            assert (g is None and (w is None or not w.any())) or torch.allclose(g, w if w is not None else g * 0)


def test_a_compiled_critic_is_unwrapped():
    critic, real, fake = make("mlp", torch.float64)
    got = gradient_penalty(torch.compile(critic, backend="eager"), real, fake, KEY)
    torch.testing.assert_close(got, gradient_penalty(critic, real, fake, KEY))


def test_attention_has_a_double_backward():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave = nn.Linear(4, 1)

        def forward(self, x):
            q = x.view(len(x), 1, 3, 4)
            return self.leave(nn.functional.scaled_dot_product_attention(q, q, q)).mean((1, 2, 3))

    critic, x = Attends(), torch.randn(5, 12)
    penalty = gradient_penalty(critic, x, -x, KEY)
    assert torch.isfinite(torch.autograd.grad(penalty, critic.leave.weight)[0]).all()


@pytest.mark.parametrize("mode", ["double", "closed", "forward"])
def test_ranks_of_one_batch_see_the_same_points(mode):
    critic, real, fake = make("mlp", torch.float64)
    whole = gradient_penalty(critic, real, fake, KEY, mode=mode)
    parts = [gradient_penalty(critic, real[i : i + 3], fake[i : i + 3], KEY, mode=mode, first_sample=i) for i in (0, 3)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_the_backends_agree():
    critic, real, fake = make("mlp", torch.float64)
    with dgf.backend("reference"):
        want = gradient_penalty(critic, real, fake, KEY)
    torch.testing.assert_close(gradient_penalty(critic, real, fake, KEY), want)


class Joined(nn.Module):
    """An MLP that sees `more` beside x, where there is any."""

    def __init__(self, hidden, layers, outputs, more, slope):
        super().__init__()
        widths = [2 + more, *[hidden] * layers, outputs]
        parts = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.LeakyReLU(slope), nn.Linear(a, b))]
        self.main = nn.Sequential(*parts[1:])

    def join(self, x, more):
        return torch.cat((x, more), 1)

    def forward(self, x, more):
        return self.main(self.join(x, more))


@pytest.mark.parametrize(
    "hidden, layers, outputs, more, rows",
    [(16, 1, 1, 0, 5), (33, 3, 3, 20, 37), (256, 1, 3, 0, 16), (256, 3, 1, 3, 17)],
)
@pytest.mark.parametrize("center, slope", [(0.0, 0.0), (0.0, 0.2), (1.0, 0.0), (1.0, 0.2)])
def test_mlp_critics_in_float32_on_every_back_end(backend, hidden, layers, outputs, more, rows, center, slope):
    critic = Joined(hidden, layers, outputs, more, slope)
    real, fake, more = torch.randn(rows, 2), torch.randn(rows, 2), torch.randn(rows, more)
    wide = copy.deepcopy(critic).double()
    want, expected = by_autograd(wide, between(real, fake).double(), center, more=more.double())
    critic, real, fake, more = (v.to(backend.device) for v in (critic, real, fake, more))
    linears = critic.main[::2]
    op = penalty_op(critic.join(real, more), [m.weight for m in linears], [m.bias for m in linears], slope)
    if backend.name == "triton":
        assert op is torch.ops.diffgan_fast.mlp_penalty_triton.default
    got = gradient_penalty(critic, real, fake, KEY, center=center, mode="closed", more=more)
    gradients = torch.autograd.grad(got, list(critic.parameters()), allow_unused=True)
    assert abs(float(got.detach()) - float(want.detach())) <= 1e-5 * float(want.detach())
    agree([g if g is None else g.cpu() for g in gradients], expected, 1e-5)


@pytest.mark.parametrize("center", [1.0, 0.0])
def test_an_mlp_critic_without_gradient_on_every_back_end(backend, center):
    critic = nets.MLPCritic(2, 16).to(backend.device)
    for p in critic.parameters():
        nn.init.zeros_(p)
    x = torch.randn(5, 2, device=backend.device)
    got = gradient_penalty(critic, x, -x, KEY, center=center, mode="closed")
    gradients = torch.autograd.grad(got, list(critic.parameters()), allow_unused=True)
    assert float(got.detach()) == center
    assert all(g is None or not g.any() for g in gradients)
