import math

import pytest
import torch
from scipy import stats

import diffgan_fast as dgf
from diffgan_fast import sampling
from diffgan_fast.graphs import NotCapturable
from diffgan_fast.ops import support
from diffgan_fast.sampling import sample_posterior
from tests import mixture
from tests.engine import tape
from tests.ops import oracle

S = dgf.Schedule.linear_scaled(40)


def exact(mean, std):
    """The best denoiser for N(mean, std^2): eps* = sqrt(1-abar) (x - sqrt(abar) mean) / (abar std^2 + 1 - abar)."""

    def model(x, t):
        a = S.alphas_cumprod[t].to(x.dtype).view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


def law(sd, schedule, *, sampler="ddpm", steps=None, eta=0.0, variance="beta"):
    """Mean and standard deviation of what the best denoiser for N(1, sd^2) samples in steps of finite size.

    Every step is x' = sqrt(b) x0 + sqrt(1 - b - s^2) eps + noise from level a to level b, linear in x.
    """
    T, mean, var = schedule.T, 0.0, 1.0
    kept = [round(i * T / steps) for i in range(steps + 1)] if steps else range(T + 1)
    abar = schedule.alphas_cumprod[list(kept)].tolist()
    for a, b in zip(abar[:0:-1], abar[-2::-1], strict=True):
        posterior = (1 - a / b) * (1 - b) / (1 - a)  # eta = 1
        s2 = posterior if sampler == "ddpm" else eta**2 * posterior
        by_x0, by_eps = a**0.5 * sd**2, (1 - a) ** 0.5  # times (x - sqrt(a)) / (variance of x_t)
        slope = (b**0.5 * by_x0 + (1 - b - s2) ** 0.5 * by_eps) / (a * sd**2 + 1 - a)
        added = 1 - a / b if sampler == "ddpm" and variance == "beta" else s2
        mean = b**0.5 + slope * (mean - a**0.5)
        var = slope**2 * var + (added if b < 1 else 0)  # no noise in the last step
    return mean, var**0.5


SAMPLERS = [
    dict(),
    dict(variance="posterior"),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=0.7),
    dict(sampler="ddim", eta=1.0),
    dict(steps=25),
    dict(sampler="ddim", steps=25),
    dict(sampler="ddim", steps=25, eta=1.0),
]


@pytest.mark.parametrize("prediction", ("eps", "x0", "v"))
@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_gaussian_data_have_the_law_of_their_steps(options, prediction):
    n, sd, schedule = 50_000, 0.2, dgf.Schedule.cosine(40)
    model = mixture.denoiser(mixture.gaussian((1.0,), sd), schedule, prediction)
    x = dgf.sample(model, (n, 1), schedule, 3, prediction=prediction, **options)
    mean, std = law(sd, schedule, **options)
    assert abs(float(x.mean()) - mean) < 4 * std / n**0.5
    assert abs(float(x.std()) - std) < 4 * std / (2 * n) ** 0.5


def check_mixture(p, x, sd, slack=0.0):
    """x comes from p, with modes of standard deviation sd: chi-squared of their weights, their means and spread.

    slack: of the spread, for the few points that deterministic steps leave between modes.
    """
    n, dof = len(x), len(p.weights) - 1
    chi2 = n * ((p.modes(x)[0] - p.weights) ** 2 / p.weights).sum()
    assert float(chi2) < dof + 4 * (2 * dof) ** 0.5
    away = (x - p.means[p.component(x)]) / sd
    assert (away.mean(0).abs() < 4 / n**0.5).all()
    assert ((away**2).mean(0).sqrt() - 1).abs().max() < 4 / (2 * n) ** 0.5 + slack


MANY = [dict(), dict(variance="posterior"), dict(sampler="ddim"), dict(sampler="ddim", eta=1.0)]
FEWER = [dict(steps=100), dict(sampler="ddim", steps=100), dict(sampler="ddim", steps=100, eta=1.0)]


@pytest.mark.parametrize("options", MANY + FEWER, ids=str)
def test_25_gaussians_of_unequal_weights(options):
    schedule = dgf.Schedule.cosine(200)
    p = mixture.gaussians25(0.35, torch.arange(1, 26))
    x = dgf.sample(mixture.denoiser(p, schedule), (3000, 2), schedule, 7, **options)
    deterministic = options.get("sampler") == "ddim" and "eta" not in options
    check_mixture(p, x, law(0.05 * 0.35, schedule, **options)[1], slack=0.1 if deterministic else 0.0)


def test_samples_do_not_depend_on_their_batch():
    model = exact(0.0, 0.7)
    whole = dgf.sample(model, (9, 2), S, 5)
    parts = [dgf.sample(model, (b - a, 2), S, 5, first_sample=a) for a, b in ((0, 2), (2, 9))]
    assert torch.equal(torch.cat(parts), whole)


def test_the_network_is_told_the_original_step():
    told = []

    def model(x, t):
        told.append(int(t[0]))
        return torch.zeros_like(x)

    dgf.sample(model, (2, 2), S, 5, steps=4)
    assert told == [40, 30, 20, 10]


def test_on_step_sees_every_state():
    seen = []
    x = dgf.sample(exact(0, 1), (2, 2), S, 5, steps=3, on_step=lambda t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == [3, 2, 1, 0] and torch.equal(seen[-1][1], x)


def test_dictionary_of_conditions_reaches_the_network():
    def model(x, t, *, shift):
        return x * 0 + shift

    a, b = (dgf.sample(model, (3, 2), S, 5, cond={"shift": s}) for s in (0.0, 0.1))
    assert not torch.equal(a, b)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured, as on CUDA, by a tape of ops (tests/engine/tape.py). Gives the recorders that were made."""
    made, started, begin = [], [], sampling._begin

    def noting(*args):
        started.append(begin(*args))
        return started[-1]

    def recorder(device):
        made.append(tape.Recorder(lambda: [started[-1]]))
        return made[-1]

    def on():
        monkeypatch.setattr(sampling, "_worthwhile", lambda x, T: True)
        monkeypatch.setattr(sampling, "_begin", noting)
        monkeypatch.setattr(sampling, "Recorder", recorder)
        monkeypatch.setattr(support, "check_range", lambda *args, **named: None)  # as on CUDA
        return made

    return on


@pytest.mark.parametrize(
    "options", [{}, dict(steps=20, sampler="ddim", eta=0.5), dict(guidance_scale=2.0), dict(critic=1, logit_from=9)]
)
def test_captured_steps_are_the_steps(options, graphs):
    model = torch.nn.Linear(3, 3)

    def denoiser(x, t, shift=0.0):
        return model(x) * (t[:, None] / 40) + shift

    if "critic" in options:
        options = options | {"critic": lambda x, t: (x * t[:, None]).sum(1) / 40, "logit_scale": 0.3}
    told = dict(cond={"shift": torch.ones(3)}, uncond={"shift": torch.zeros(3)})
    plain, seen = [], []
    want = dgf.sample(denoiser, (5, 3), S, 7, on_step=lambda t, x: plain.append(x), **told, **options)
    made = graphs()
    got = dgf.sample(denoiser, (5, 3), S, 7, on_step=lambda t, x: seen.append(x), **told, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(seen), torch.stack(plain), rtol=1e-5, atol=1e-6)
    assert [recorder.recorded for recorder in made] == [2 if "critic" in options else 1]


@pytest.mark.parametrize("keys", [torch.tensor(7), torch.tensor([7]), torch.tensor([7, 8, 9, 10, 11])], ids=str)
def test_captured_steps_take_keys_that_are_tensors(keys, graphs):
    model = torch.nn.Linear(3, 3)
    want = dgf.sample(lambda x, t: model(x), (5, 3), S, keys)
    made = graphs()
    got = dgf.sample(lambda x, t: model(x), (5, 3), S, keys)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert [recorder.recorded for recorder in made] == [1]


def test_what_a_graph_would_repeat_ends_recording_and_not_the_walk(graphs):
    want = dgf.sample(lambda x, t: x * 0.5, (5, 3), S, 7)
    graphs()
    calls = []

    def denoiser(x, t):
        calls.append(t)
        if len(calls) == 3:  # after two rehearsals
            raise NotCapturable("key is an int")
        return x * 0.5

    with pytest.warns(UserWarning, match="sampling runs without CUDA graphs: key is an int"):
        assert torch.equal(dgf.sample(denoiser, (5, 3), S, 7), want)


def test_a_model_that_cannot_be_captured_is_run_as_it_is(graphs):
    def denoiser(x, t):
        return x * float(t[0])

    want = dgf.sample(denoiser, (5, 3), S, 7)
    graphs()
    with pytest.warns(UserWarning, match="sampling runs without CUDA graphs: operation not permitted"):
        assert torch.equal(dgf.sample(denoiser, (5, 3), S, 7), want)


@pytest.mark.gpu
def test_samples_on_a_gpu_are_replayed(recwarn):
    """Those of launches one by one, which are the CPU's up to rounding."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))
    want = dgf.sample(lambda x, t: model(x), (50, 3), S, 7)
    model.cuda()
    got = dgf.sample(lambda x, t: model(x), (50, 3), S, 7, device="cuda")
    assert not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sampler must be"):
        dgf.sample(exact(0, 1), (2, 2), S, 5, sampler="heun")
    with pytest.raises(ValueError, match="steps must be"):
        dgf.sample(exact(0, 1), (2, 2), S, 5, steps=41)
    assert math.isfinite(float(dgf.sample(exact(0, 1), (1, 1), S, 5)))


@pytest.mark.parametrize("T", (1, 2, 4, 8))
def test_the_posterior_of_the_true_x0_walks_down_the_forward_process(T):
    """x_{t-1} ~ q(x_{t-1} | x_t, x_0) with x_t ~ q(x_t | x_0) is q(x_{t-1} | x_0), and has the pair's covariance."""
    n, x0, S = 40_000, 0.7, dgf.Schedule.vp(T)
    x = dgf.ops.add_noise(torch.full((n, 1), x0), T, S, 11)
    for t in range(T, 0, -1):
        previous = dgf.ops.posterior_step(torch.full((n, 1), x0), x, t, S, 100 + t)
        abar, before = float(S.alphas_cumprod[t]), float(S.alphas_cumprod[t - 1])
        if t == 1:
            assert (previous == x0).all()
            break
        law = stats.norm(before**0.5 * x0, (1 - before) ** 0.5)
        assert stats.kstest(previous[:, 0].double().numpy(), law.cdf).pvalue > 1e-3
        want = float(S.alphas[t]) ** 0.5 * (1 - before)
        away = (previous.double() - before**0.5 * x0) * (x.double() - abar**0.5 * x0)
        assert abs(float(away.mean()) - want) < 4 * float(away.std()) / n**0.5
        x = previous


@pytest.mark.parametrize("T", (1, 2, 4, 8))
def test_an_exact_generator_draws_the_data_in_few_steps(T):
    """Every step draws x_0 from p(x_0 | x_t), then x_{t-1}: the law of the data, however large the steps."""
    S, p = dgf.Schedule.vp(T), mixture.gaussians25(0.35, torch.arange(1, 26))
    x = sample_posterior(mixture.generator(p, S), (4000, 2), S, 7, z_dim=3)
    check_mixture(p, x, 0.05 * 0.35)


def test_few_steps_draw_their_noise_by_key_and_number():
    S, calls = dgf.Schedule.vp(4), []

    def model(x, t, z):
        calls.append((x, int(t[0]), z))
        return 0.5 * x + z[:, :1]

    def numbers(key, first, shape):
        return torch.tensor(oracle.normal(math.prod(shape), key, first), dtype=torch.float32).view(shape)

    x = sample_posterior(model, (5, 2), S, 3, z_dim=3, first_sample=7)
    assert [t for _, t, _ in calls] == [4, 3, 2, 1]
    fold, wanted = dgf.random.fold_in, numbers(dgf.random.fold_in(3, "x_T"), 14, (5, 2))
    for x_t, t, z in calls:
        torch.testing.assert_close(x_t, wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(z, numbers(fold(fold(3, t), "z"), 21, (5, 3)), rtol=0, atol=2e-5)
        c1, c2, var = (
            float(table[t]) for table in (S.posterior_mean_coef1, S.posterior_mean_coef2, S.posterior_variance)
        )
        wanted = c1 * (0.5 * x_t + z[:, :1]) + c2 * x_t + var**0.5 * numbers(fold(3, t), 14, (5, 2))
    torch.testing.assert_close(x, wanted, rtol=0, atol=2e-5)
    whole = sample_posterior(model, (12, 2), S, 3, z_dim=3)
    assert torch.equal(whole[7:], x)


def test_a_generator_of_x_prev_needs_no_posterior():
    S, seen = dgf.Schedule.vp(3), []
    x = sample_posterior(lambda x, t, z: x + t[:, None], (4, 2), S, 5, z_dim=0, predicts="x_prev",
                         on_step=lambda t, x: seen.append((t, x)))  # fmt: skip
    assert [t for t, _ in seen] == [3, 2, 1, 0]
    torch.testing.assert_close(x, seen[0][1] + 3 + 2 + 1)
