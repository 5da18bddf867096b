import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast.engine import Batch
from diffgan_fast.methods import diffusion
from tests.ops import oracle

S = dgf.Schedule.linear(300)


def test_losses_follow_the_algorithm():
    x0, t = torch.randn(4, 1, 5, 5), torch.tensor([1, 20, 150, 300])
    eps = torch.tensor(oracle.normal(100, 11), dtype=torch.float32).view(4, 1, 5, 5)
    abar = torch.tensor(oracle.linear_schedule(300)[2])[t].float().view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def model(x, steps):
        assert torch.allclose(x, x_t, atol=1e-5) and torch.equal(steps, t)
        return 0.9 * x

    targets = {"eps": eps, "x0": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}
    for prediction, target in targets.items():
        got = dgf.methods.ddpm.losses(model, x0, t, S, 11, prediction=prediction)
        assert torch.allclose(got, (0.9 * x_t - target).square().mean(), rtol=1e-4)


def test_t_is_uniform_over_1_to_T_and_independent_of_the_batch():
    kind = dgf.methods.find("ddpm")
    method = kind(kind.Config(T=5), (1, 8, 8))
    t = method.draw_t(100_000, 3, 0, torch.device("cpu"))
    counts = torch.bincount(t, minlength=6)
    assert counts[0] == 0 and len(counts) == 6 and (counts[1:] - 20_000).abs().max() < 700
    assert torch.equal(method.draw_t(10, 3, 40, torch.device("cpu")), t[40:50])


def test_the_noise_that_an_output_stands_for():
    x0, t = torch.randn(4, 2, 3, 3), torch.tensor([1, 20, 150, 300])
    x_t, eps = dgf.ops.add_noise(x0, t, S, 3, return_noise=True)
    abar = torch.tensor(oracle.linear_schedule(300)[2])[t].float().view(-1, 1, 1, 1)
    for prediction, out in {"eps": eps, "x0": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}.items():
        assert torch.allclose(diffusion.predicted_noise(out, x_t, t, S, prediction), eps, atol=2e-4)


def test_data_ranges():
    kind = dgf.methods.find("ddpm")
    unit = kind(kind.Config(data_range="unit", clip_x0=False), (1, 8, 8))
    images = torch.tensor([-1.0, 0.0, 1.0])
    assert unit.to_model(images).tolist() == [0, 0.5, 1] and torch.equal(unit.to_data(unit.to_model(images)), images)
    assert unit.to_data(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


def test_evaluation_loss_is_that_of_the_trained_weights_over_fresh_noise():
    class Gain(torch.nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain, self.told = torch.nn.Parameter(torch.tensor(gain)), set()

        def forward(self, x, t):
            self.told |= set(t.tolist())
            abar = method.schedule.alphas_cumprod[t].float().view(-1, 1)
            return self.gain * x / (1 - abar).sqrt()

    kind = dgf.methods.find("ddpm")
    method = kind(kind.Config(T=7, clip_x0=False), (2,))
    for gain in (0.0, 1.0, 0.5):  # data that are all 0: the output is gain · eps
        state = {"denoiser": Gain(gain)}
        loss = method.evaluation_loss(state, torch.zeros(5000, 2), 3)
        assert abs(loss - (1 - gain) ** 2) < 0.02 and state["denoiser"].told == set(range(1, 8))


def test_a_trained_denoiser_reaches_the_best_loss_on_gaussian_data(tmp_path):
    """Data N(0, 0.25): the best loss at t is abar 0.25 / (abar 0.25 + 1 - abar), so its mean over t is known."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.zeros(11))

        def forward(self, x, t):
            return self.gain[t].view(-1, 1, 1, 1) * x

    data = 0.5 * dgf.random.normal((4000, 1, 4, 4), 1).clamp(-2, 2)
    run = dgf.train("ddpm", data, tmp_path, model=Linear(), steps=1500, batch_size=256, lr=1e-2, lr_schedule="cosine",
                    T=10, log_every=100, sample_every=0, checkpoint_every=0, progress=False)  # fmt: skip
    abar = run.method.schedule.alphas_cumprod[1:]
    best = float((abar * 0.25 / (abar * 0.25 + 1 - abar)).mean())
    assert abs(run.history[-1]["loss"] - best) < 0.02
    levels = diffusion.noise_levels(run.method, run.state.sampling_net("denoiser"), Batch(data[:1000]), 5)
    for t, mse in zip(levels["t"], levels["mse"], strict=True):
        a = float(run.method.schedule.alphas_cumprod[t])
        assert abs(mse - a * 0.25 / (a * 0.25 + 1 - a)) < 0.05


def test_steps_of_sampling_are_the_callers_choice(tmp_path):
    run = dgf.train("ddpm", torch.rand(8, 1, 8, 8) * 2 - 1, tmp_path, steps=1, batch_size=4, T=6, width=8,
                    sample_every=0, progress=False)  # fmt: skip
    told, forward = [], run.state.ema["denoiser"].forward
    run.state.ema["denoiser"].forward = lambda x, t: told.append(int(t[0])) or forward(x, t)
    x = run.sample(2)
    assert told == [6, 5, 4, 3, 2, 1] and torch.equal(run.sample(2, steps=6), x)
    told.clear()
    assert not torch.equal(run.sample(2, steps=3), x) and told == [6, 4, 2]
    with pytest.raises(ValueError, match="steps must be an int in 1..6, got 7"):
        run.sample(2, steps=7)
