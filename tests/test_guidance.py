"""Critic guidance and classifier-free guidance of the sampler, against closed forms and steps written in float64."""

import pytest
import torch

import diffgan_fast as dgf
from tests import mixture
from tests.ops import oracle

DDPM, POSTERIOR, DDIM = dict(), dict(variance="posterior"), dict(sampler="ddim")
RESPACED = dict(sampler="ddim", steps=20, eta=0.5)


def near(x, want, tolerance):
    torch.testing.assert_close(x.double(), want.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("w", (-1.0, 0.5, 1.0, 2.0))
@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", (DDPM, POSTERIOR, DDIM, RESPACED), ids=str)
def test_between_two_gaussians_guidance_is_exact(options, prediction, w):
    """With equal variances the best logit is linear in x: w of it takes the model's mean w of the way to the data's."""
    S = dgf.Schedule.cosine(50)
    first, second = torch.tensor((-1.0, 0.5)), torch.tensor((0.8, -0.2))
    model, data, reached = (mixture.gaussian(m, 0.3) for m in (first, second, first + w * (second - first)))
    common = dict(schedule=S, key=5, prediction=prediction, **options)
    guided, want = [], []
    dgf.sample(
        mixture.denoiser(model, S, prediction),
        (50, 2),
        critic=mixture.critic(data, model, S),
        logit_scale=w,
        on_step=lambda t, x: guided.append(x),
        **common,
    )
    dgf.sample(mixture.denoiser(reached, S, prediction), (50, 2), on_step=lambda t, x: want.append(x), **common)
    assert len(guided) == options.get("steps", 50) + 1
    near(torch.stack(guided), torch.stack(want), 2e-5)


DATA = mixture.two_gaussians(0.7, (-1.0, 0.0), (1.0, 0.5), 0.25)
WRONG = mixture.two_gaussians(0.25, (-1.2, 0.3), (1.3, 0.3), 0.25)  # what the model samples without guidance


def comes_from(p, x):
    """Are the shares and means of x's modes those of p, within 4 standard errors and 0.005 for the size of steps?"""
    shares, means = p.modes(x)
    return bool(
        ((shares - p.weights).abs() < 4 * (p.weights * (1 - p.weights) / len(x)).sqrt()).all()
        and ((means - p.means).abs() < 4 * (p.variances / p.weights / len(x)).sqrt()[:, None] + 0.005).all()
    )


@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", (POSTERIOR, DDIM), ids=str)
def test_the_best_critic_moves_a_wrong_mixture_onto_the_data(options, prediction):
    S = dgf.Schedule.cosine(100)
    model, critic = mixture.denoiser(WRONG, S, prediction), mixture.critic(DATA, WRONG, S)
    common = dict(shape=(2000, 2), schedule=S, key=11, prediction=prediction, **options)
    alone, guided = dgf.sample(model, **common), dgf.sample(model, critic=critic, **common)
    assert comes_from(WRONG, alone) and not comes_from(DATA, alone)
    assert comes_from(DATA, guided) and not comes_from(WRONG, guided)
    direct = dgf.sample(mixture.denoiser(DATA, S, prediction), **common)  # the same noise: the same samples
    near(guided, direct, 1e-3)
    assert torch.equal(dgf.sample(model, critic=critic, logit_scale=0.0, **common), alone)
    against = dgf.sample(model, critic=critic, logit_scale=-1.0, **common)
    assert not comes_from(DATA, against)
    assert DATA.log_density(against.double()).mean() < DATA.log_density(alone.double()).mean()  # it moves away


def test_the_best_critic_restores_the_weights_of_25_gaussians():
    S = dgf.Schedule.cosine(100)
    data = mixture.gaussians25(0.35, torch.arange(1, 26))
    model = mixture.gaussians25(0.35, torch.arange(25, 0, -1))
    x = dgf.sample(mixture.denoiser(model, S), (2000, 2), S, 3, critic=mixture.critic(data, model, S))
    assert comes_from(data, x) and not comes_from(model, x)


def test_several_logits_are_averaged():
    S = dgf.Schedule.cosine(20)
    model, critic = mixture.denoiser(WRONG, S), mixture.critic(DATA, WRONG, S)

    def two(x, *, t):
        logit = critic(x, t=t)
        return torch.stack((0.5 * logit, 1.5 * logit), 1)

    one, both = (dgf.sample(model, (9, 2), S, 2, critic=c) for c in (critic, two))
    near(both, one, 1e-5)


# Any guidance, against the formulas step by step.
T, BETAS, KEY = 12, (1e-2, 0.3), 21
SCHEDULE = dgf.Schedule.linear(T, *BETAS)
ABAR = oracle.linear_schedule(T, *BETAS)[2].tolist()
UNCONDITIONAL = mixture.two_gaussians()
CLASS, OTHER = mixture.gaussian((1.0, 0.2), 0.3), mixture.gaussian((0.0, 0.0), 1.0)


def conditional(prediction):
    """`model(x, t, of=UNCONDITIONAL)`: the best denoiser for data `of`."""

    def model(x, t, of=UNCONDITIONAL):
        return mixture.denoiser(of, SCHEDULE, prediction)(x, t)

    return model


def by_hand(shape, *, sampler="ddpm", kept=range(T + 1), eta=0.0, variance="beta", clip_x0=False, s=1.0, of=CLASS,
            without=UNCONDITIONAL, w=0.0, logit_from=1, first_sample=0):  # fmt: skip
    """Samples in float64: predictions as eps, noise from the test's own Philox, the critic's gradient as two scores."""

    def noise(name):
        n, first = shape[0] * shape[1], first_sample * shape[1]
        return torch.as_tensor(oracle.normal(n, dgf.random.fold_in(KEY, name), first)).reshape(shape)

    x, kept = noise("x_T"), list(kept)
    for i in range(len(kept) - 1, 0, -1):
        t, a, b = kept[i], ABAR[kept[i]], ABAR[kept[i - 1]]
        eps = (1 - s) * without.eps(x, a) + s * of.eps(x, a)
        if t >= logit_from:
            eps = eps - w * (1 - a) ** 0.5 * (DATA.score(x, a) - WRONG.score(x, a))
        step = dict(sampler=sampler, eta=eta, variance=variance, clip_x0=clip_x0)
        x = oracle.reverse_step(x, eps, a, b, noise(i), **step)
    return x


STEPS = [
    dict(),
    dict(variance="posterior", clip_x0=True),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=0.7, clip_x0=True),
    dict(steps=5),
    dict(sampler="ddim", eta=1.0, steps=5),
]


def both(shape, prediction, steps=None, *, library, **options):
    """Samples by the library, and by hand. `library`: options that the library spells otherwise."""
    common = dict(prediction=prediction, steps=steps, **options)
    x = dgf.sample(conditional(prediction), shape, SCHEDULE, KEY, **common, **library)
    kept = {None: range(T + 1), 5: (0, 2, 5, 7, 10, 12)}[steps]
    return x, lambda **changed: by_hand(shape, kept=kept, **options, **changed)


@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_classifier_free_guidance(options, prediction):
    for s in (0.0, 0.4, 3.0):
        scale = dict(cond=dict(of=CLASS), guidance_scale=s)
        x, hand = both((5, 2), prediction, library=scale, **options)
        near(x, hand(s=s), 1e-4)
        x, hand = both((5, 2), prediction, library=scale | dict(uncond=dict(of=OTHER)), first_sample=3, **options)
        near(x, hand(s=s, without=OTHER), 1e-4)


@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_both_kinds_of_guidance(options, prediction):
    """The critic's share is not scaled by s, comes before the clamp, and from t of the original schedule on."""
    critic = mixture.critic(DATA, WRONG, SCHEDULE)
    guides = dict(cond=dict(of=CLASS), guidance_scale=2.0, critic=critic, logit_scale=1.5)
    for logit_from in (1, 7, 8, 13):
        x, hand = both((5, 2), prediction, library=guides, logit_from=logit_from, **options)
        near(x, hand(s=2.0, w=1.5), 1e-4)


def test_what_the_networks_are_told():
    """The critic sees the state and the t that the model sees; without guidance nothing runs twice."""
    seen = {"model": [], "critic": []}

    def model(x, t, of=UNCONDITIONAL):
        seen["model"].append((x, t, of))
        return conditional("eps")(x, t, of)

    def critic(x, *, t):
        seen["critic"].append((x.detach(), t))
        return mixture.critic(DATA, WRONG, SCHEDULE)(x, t=t)

    dgf.sample(model, (4, 2), SCHEDULE, KEY, steps=5, cond=dict(of=CLASS), uncond=dict(of=OTHER))
    assert [int(t[0]) for _, t, _ in seen["model"]] == [12, 10, 7, 5, 2]
    assert all(of is CLASS for *_, of in seen["model"])
    seen["model"].clear()
    options = dict(steps=5, cond=dict(of=CLASS), guidance_scale=2.0)
    dgf.sample(model, (4, 2), SCHEDULE, KEY, critic=critic, logit_from=7, **options)
    for i, t in enumerate((12, 10, 7, 5, 2)):
        calls = seen["model"][2 * i : 2 * i + 2]
        assert {(int(t[0]), of) for _, t, of in calls} == {(t, CLASS), (t, UNCONDITIONAL)}
    assert len(seen["model"]) == 10
    assert [int(t[0]) for _, t in seen["critic"]] == [12, 10, 7]
    for (x, t, _), (y, u) in zip(seen["model"][::2], seen["critic"], strict=False):
        assert torch.equal(x, y) and torch.equal(t, u) and t.dtype == torch.int64 and t.shape == (4,)


@pytest.mark.parametrize("told", ("labels", "few labels", "a vector for all", "labels of one kind"))
def test_one_call_predicts_with_and_without_the_class(told):
    """Only a few samples, told by labels; in the end they are those of two calls."""
    data, calls = (CLASS, OTHER, UNCONDITIONAL), []
    n = 3000 if told == "labels" else 4
    y = torch.arange(n) % 2

    def model(x, t, y=None):
        y = torch.full((len(x),), 2) if y is None else y
        calls.append((len(x), len(t)))
        eps = torch.stack([mixture.denoiser(p, SCHEDULE, "eps")(x, t) for p in data])
        return eps.gather(0, y.long()[None, :, None].expand(1, -1, 2))[0]

    cond, uncond = dict(y=y), dict(y=torch.full((n,), 2))
    if told == "a vector for all":
        cond, uncond = dict(y=y.float()), dict(y=uncond["y"].float())
    if told == "labels of one kind":
        uncond = {}
    x = dgf.sample(model, (n, 2), SCHEDULE, KEY, cond=cond, uncond=uncond, guidance_scale=2.0)
    assert calls == ([(8, 8)] * T if told == "few labels" else [(n, n)] * 2 * T)
    for k, of in enumerate((CLASS, OTHER)):
        near(x[k::2], by_hand((n, 2), s=2.0, of=of)[k::2], 1e-4)


def test_sampling_leaves_no_gradients():
    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x, *, t):
            return self.layer(x)

    net = Critic()
    x = dgf.sample(conditional("eps"), (4, 2), SCHEDULE, KEY, critic=net)
    assert not x.requires_grad and all(p.grad is None for p in net.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="logit_scale"):
        dgf.sample(conditional("eps"), (2, 2), SCHEDULE, KEY, logit_scale=2.0)


def test_a_critic_guides_in_inference_mode_too():
    S, data, model = dgf.Schedule.cosine(5), mixture.gaussian((0.5,), 0.3), mixture.gaussian((-0.5,), 0.3)
    options = dict(critic=mixture.critic(data, model, S))
    expected = dgf.sample(mixture.denoiser(model, S), (5, 1), S, 3, **options)
    with torch.inference_mode():
        assert torch.equal(dgf.sample(mixture.denoiser(model, S), (5, 1), S, 3, **options), expected)


@pytest.mark.parametrize("critic", [lambda x, t: x.sum(), lambda x, t: x[:2, 0], lambda x, t: torch.zeros(len(x))])
def test_a_critic_without_a_logit_for_each_sample_is_refused(critic):
    with pytest.raises(ValueError, match="critic must give logits"):
        dgf.sample(lambda x, t: x, (5, 1), dgf.Schedule.cosine(5), 3, critic=critic)


@pytest.mark.parametrize("name", ["guidance_scale", "logit_scale"])
def test_scales_are_finite(name):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        critic = dict(critic=lambda x, t: x[:, 0])
        dgf.sample(lambda x, t: x, (5, 1), dgf.Schedule.cosine(5), 3, **critic, **{name: float("nan")})
