"""Gaussian mixtures, whose noising, best denoiser and best critic are known in closed form: an oracle, all float64.

Nothing of the library is used. `abar` is abar_t, a number or one a sample; 1 is clean data.
"""

import torch


class Mixture:
    """sum_k w_k N(mu_k, s_k^2 I). With x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps it stays one: see `noised`."""

    def __init__(self, weights, means, variances):
        weights, self.means, variances = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, variances))
        self.weights = weights / weights.sum()  # [K]
        self.variances = variances.expand(len(weights))  # [K]; means [K, D]

    def noised(self, abar=1.0):
        """Means [n, K, D] and variances [n, K] of p_t; n is 1 or one a sample."""
        abar = torch.as_tensor(abar, dtype=torch.float64).reshape(-1, 1)
        return abar.sqrt()[..., None] * self.means, abar * self.variances + 1 - abar

    def _posterior(self, x, abar):
        """log p_t(x) [N], p(k | x) [N, K], x - mean_k [N, K, D], variance_k [n, K]."""
        means, var = self.noised(abar)
        away = x[:, None] - means
        log_each = self.weights.log() - (away**2).sum(-1) / (2 * var) - x.shape[1] / 2 * (2 * torch.pi * var).log()
        log_p = log_each.logsumexp(1)
        return log_p, (log_each - log_p[:, None]).exp(), away, var

    def log_density(self, x, abar=1.0):
        return self._posterior(x, abar)[0]

    def component(self, x):
        """The likeliest k of data, [N]."""
        return self._posterior(x.double(), 1.0)[1].argmax(1)

    def modes(self, x):
        """Shares [K] and means [K, D] of the data that are likeliest from each k."""
        one = torch.nn.functional.one_hot(self.component(x), len(self.weights)).double()
        return one.mean(0), one.T @ x.double() / one.sum(0)[:, None]

    def score(self, x, abar=1.0):
        """grad_x log p_t(x) = -sum_k p(k | x) (x - mean_k) / variance_k, [N, D]."""
        _, p, away, var = self._posterior(x, abar)
        return -((p / var)[..., None] * away).sum(1)

    def x0(self, x, abar):
        """E[x_0 | x_t = x] = sum_k p(k | x) (mu_k + sqrt(abar) s_k^2 / variance_k (x - mean_k))."""
        _, p, away, var = self._posterior(x, abar)
        root = torch.as_tensor(abar, dtype=torch.float64).sqrt().reshape(-1, 1)
        return (p[..., None] * (self.means + (root * self.variances / var)[..., None] * away)).sum(1)

    def eps(self, x, abar):
        """E[eps | x_t = x] = -sqrt(1 - abar) score."""
        return -(1 - torch.as_tensor(abar, dtype=torch.float64)).sqrt().reshape(-1, 1) * self.score(x, abar)

    def v(self, x, abar):
        """E[sqrt(abar) eps - sqrt(1 - abar) x_0 | x_t = x]."""
        a = torch.as_tensor(abar, dtype=torch.float64).reshape(-1, 1)
        return a.sqrt() * self.eps(x, abar) - (1 - a).sqrt() * self.x0(x, abar)

    def mean(self, abar=1.0):
        """[D], of p_t at one abar."""
        return self.weights @ self.noised(abar)[0][0]

    def cov(self, abar=1.0):
        """[D, D], of p_t at one abar."""
        means, var = self.noised(abar)
        away = means[0] - self.mean(abar)
        return (self.weights @ var[0]) * torch.eye(away.shape[1], dtype=torch.float64) + away.T * self.weights @ away

    def sample(self, n, seed):
        """[n, D] data."""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=g)
        return self.means[k] + self.variances[k].sqrt()[:, None] * z


def two_gaussians(weight=0.5, first=(-1.0, 0.0), second=(1.0, 0.0), sd=0.3):
    """`weight` of N(first, sd^2) and the rest of N(second, sd^2)."""
    return Mixture((weight, 1 - weight), (first, second), sd**2)


def gaussian(mean, sd):
    return Mixture((1.0,), torch.as_tensor(mean, dtype=torch.float64)[None], sd**2)


def gaussians25(scale=1.0, weights=None):
    """The toy data of 25 Gaussians: a 5 x 5 grid, 2 scale apart, of standard deviation 0.05 scale."""
    axis = torch.arange(-2, 3, dtype=torch.float64) * 2 * scale
    weights = torch.ones(25) if weights is None else weights
    return Mixture(weights, torch.cartesian_prod(axis, axis), (0.05 * scale) ** 2)


def denoiser(p, schedule, prediction="eps"):
    """`model(x, t)`: the best there is for data p."""

    def model(x, t):
        return getattr(p, prediction)(x.double(), schedule.alphas_cumprod[t]).to(x.dtype)

    return model


def generator(p, schedule):
    """`model(x, t, z)`, z [N, 1 + D]: x_0 drawn from p(x_0 | x_t = x) for data p; z_0 picks k, the rest its Gaussian.

    x_0 of x_t and k is N(mu_k + sqrt(abar) s_k^2 / variance_k (x - mean_k), s_k^2 (1 - abar) / variance_k).
    """

    def model(x, t, z):
        abar, z = schedule.alphas_cumprod[t], z.double()
        _, weights, away, var = p._posterior(x.double(), abar)
        k = (torch.special.ndtr(z[:, :1]) > weights.cumsum(1)).sum(1).clamp(max=len(p.weights) - 1)
        each = torch.arange(len(x))
        s2, var = p.variances[k], var.expand(len(x), -1)[each, k]
        mean = p.means[k] + (abar.sqrt() * s2 / var)[:, None] * away[each, k]
        return (mean + (s2 * (1 - abar) / var).sqrt()[:, None] * z[:, 1:]).to(x.dtype)

    return model


def critic(data, model, schedule):
    """`logit(x, t=t)` [N] of the best critic between noised data (high) and a model's noised samples."""

    def logit(x, *, t):
        x, abar = x.double(), schedule.alphas_cumprod[t]
        return data.log_density(x, abar) - model.log_density(x, abar)

    return logit
