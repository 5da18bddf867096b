import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import nets
from diffgan_fast.methods import gan_enhanced
from diffgan_fast.ops import add_noise

S = dgf.Schedule.quadratic(100, 1e-4, 0.2)
SMALL = dict(steps=6, batch_size=16, width=16, critic_width=16, log_every=2, progress=False)


def case():
    torch.manual_seed(0)
    denoiser, critic = nets.MLPDenoiser(hidden=16).double(), nets.MLPCritic(hidden=16).double()
    x0, t = torch.randn(8, 2, dtype=torch.float64), torch.tensor([1, 2, 5, 20, 50, 80, 99, 100])
    return denoiser, critic, x0, t


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])


@pytest.mark.parametrize("snr_weight", [True, False])
def test_losses_follow_the_equations(snr_weight):
    denoiser, critic, x0, t = case()
    critic_loss, denoiser_loss = gan_enhanced.losses(
        denoiser, critic, x0, t, S, 7, adv_weight=0.5, gp_weight=3.0, snr_weight=snr_weight
    )
    x_t, eps = add_noise(x0, t, S, dgf.random.fold_in(7, "noise"), return_noise=True)
    abar = S.alphas_cumprod[t][:, None]
    eps_hat = denoiser(x_t, t)
    x0_hat = (x_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt()

    u = dgf.random.uniform((8, 1), dgf.random.fold_in(7, "between"), dtype=torch.float64)
    x = (u * x0 + (1 - u) * x0_hat).detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    penalty = ((g.norm(dim=1) - 1) ** 2).mean()
    want = -critic(x0).sigmoid().log().mean() - (1 - critic(x0_hat.detach()).sigmoid()).log().mean() + 3 * penalty
    torch.testing.assert_close(critic_loss, want)
    torch.testing.assert_close(gradient(critic_loss, critic), gradient(want + 0 * critic(x0).sum(), critic))

    weight = (abar / (1 - abar)).sqrt().clamp(max=1)[:, 0] if snr_weight else 1
    want = (eps_hat - eps).square().mean() + 0.5 * (weight * -critic(x0_hat).sigmoid().log()).mean()
    got, mse = denoiser_loss()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mse, (eps_hat - eps).square().mean())
    torch.testing.assert_close(gradient(got, denoiser), gradient(want, denoiser))


def test_the_denoisers_loss_sees_the_updated_critic_and_leaves_it_alone():
    denoiser, critic, x0, t = case()
    _, denoiser_loss = gan_enhanced.losses(denoiser, critic, x0, t, S, 7)
    before, _ = denoiser_loss()
    with torch.no_grad():
        critic.main[-1].bias += 1
    after, _ = denoiser_loss()
    assert before != after
    after.backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())


def test_as_coded_the_adversarial_term_has_no_gradient():
    """The published code's critic judges x_t: the denoiser's gradient is that of plain diffusion, bit for bit."""
    denoiser, critic, x0, t = case()
    _, plain = gan_enhanced.losses(denoiser, None, x0, t, S, 7)
    critic_loss, coded = gan_enhanced.losses(denoiser, critic, x0, t, S, 7, variant="as-coded")
    assert torch.equal(gradient(plain()[0], denoiser), gradient(coded()[0], denoiser))
    x_t = add_noise(x0, t, S, dgf.random.fold_in(7, "noise"))
    without = gan_enhanced.losses(denoiser, critic, x0, t, S, 7, variant="as-coded", gp_weight=0)[0]
    want = -critic(x0).sigmoid().log().mean() - (1 - critic(x_t).sigmoid()).log().mean()
    torch.testing.assert_close(without, want)
    assert critic_loss > without
    _, paper = gan_enhanced.losses(denoiser, critic, x0, t, S, 7)
    assert not torch.equal(gradient(plain()[0], denoiser), gradient(paper()[0], denoiser))


def test_judging_x_prev_draws_from_both_posteriors():
    """At t = 1 both posteriors are points: x0 and x0_hat."""
    denoiser, critic, x0, _ = case()
    one = torch.ones(8, dtype=torch.int64)
    judged = [gan_enhanced.losses(denoiser, critic, x0, one, S, 7, judged=what)[0] for what in ("x0", "x_prev")]
    torch.testing.assert_close(*judged)
    many = torch.full((8,), 50)
    judged = [gan_enhanced.losses(denoiser, critic, x0, many, S, 7, judged=what)[0] for what in ("x0", "x_prev")]
    assert judged[0] != judged[1]


@pytest.mark.parametrize("preset", [None, *gan_enhanced.GANEnhancedConfig.PRESETS])
@pytest.mark.parametrize("variant", ["paper", "as-coded"])
def test_every_preset_trains_and_loads(tmp_path, preset, variant):
    run = dgf.train("gan-enhanced", torch.randn(64, 2), tmp_path / "run", preset=preset, variant=variant, **SMALL)
    assert [row["step"] for row in run.history] == [2, 4, 6]
    assert run.sample(7).shape == (7, 2) and run.sample(7).isfinite().all()
    again = dgf.load(run.path, data=torch.randn(64, 2))
    assert torch.equal(again.sample(5), run.sample(5))
    c = run.method.config
    assert ("critic" in run.state.nets) == (c.adv_weight > 0)
    if preset not in (None, "reaches-prior", "reaches-prior-critic"):
        assert run.method.schedule.prior_mismatch > 0.6  # as published
    else:
        assert run.method.schedule.prior_mismatch < 0.05


def test_presets_are_the_published_configurations():
    make = gan_enhanced.GANEnhancedConfig.make
    layers = {name: make(name).critic_layers for name in gan_enhanced.GANEnhancedConfig.PRESETS}
    assert layers["gradient-penalty"] == 3 and layers["fine-tuned"] == 4 and layers["deep-critic"] == 6
    rates = {name: make(name).critic_lr for name in gan_enhanced.GANEnhancedConfig.PRESETS}
    assert rates["gradient-penalty"] == 3e-4 and rates["fine-tuned"] == rates["quadratic"] == 1.5e-4
    c = make("gradient-penalty")
    assert (c.steps, c.batch_size, c.lr, c.lr_schedule, c.clip_grad, c.gp_weight) == (
        10000,
        256,
        3e-4,
        "cosine",
        0.5,
        10,
    )
    assert (c.ema, c.ema_every, c.ema_start, c.T, c.beta_1, c.beta_T) == (0.995, 10, 100, 100, 1e-4, 0.02)


def test_images_train_with_a_critic_without_norm(tmp_path):
    options = SMALL | dict(steps=2, width=8)
    run = dgf.train("gan-enhanced", torch.rand(32, 1, 8, 8) * 2 - 1, tmp_path / "run", **options)
    assert run.sample(2).shape == (2, 1, 8, 8)


def test_resuming_is_exact(tmp_path):
    data = torch.randn(64, 2)
    whole = dgf.train("gan-enhanced", data, tmp_path / "whole", **SMALL)
    options = SMALL | dict(checkpoint_every=2)

    def stop(run, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dgf.train("gan-enhanced", data, tmp_path / "cut", callbacks=[stop], **options)
    cut = dgf.train("gan-enhanced", data, tmp_path / "cut", resume=True, **options)
    for name in ("denoiser", "critic"):
        for a, b in zip(whole.state[name].parameters(), cut.state[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_data_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data must be points"):
        dgf.train("ddpm", torch.rand(8, 1, 8, 8), tmp_path / "a", network="mlp", progress=False)
    with pytest.raises(ValueError, match="data must be square images"):
        dgf.train("ddpm", torch.rand(8, 2), tmp_path / "b", network="unet", progress=False)


def test_a_critic_with_batch_norm_sees_real_and_fake_apart():
    denoiser, _, x0, t = case()
    critic, seen = (
        torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double(),
        [],
    )
    critic.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    told = type("Told", (torch.nn.Module,), {"forward": lambda self, x, **_: self.net(x)})()
    told.net = critic
    gan_enhanced.losses(denoiser, told, x0, t, S, 7, gp_weight=0)
    assert seen == [8, 8]


def test_a_critic_that_nothing_would_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="critic must not be given with adv_weight=0"):
        dgf.train("gan-enhanced", torch.randn(64, 2), tmp_path / "r", critic=nets.MLPCritic(), adv_weight=0.0, **SMALL)


def test_other_trainable_parameters_cannot_be_resumed(tmp_path):
    def net(frozen):
        model = nets.MLPDenoiser(hidden=8)
        model.layers[1].requires_grad_(not frozen)
        return model

    data, options = torch.randn(64, 2), dict(steps=2, batch_size=16, progress=False)
    dgf.train("ddpm", data, tmp_path / "run", model=net(True), **options)
    with pytest.raises(ValueError, match="other parameters of it were trainable"):
        dgf.train("ddpm", data, tmp_path / "run", model=net(False), resume=True, **options)
