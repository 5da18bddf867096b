"""What the benchmarks check outputs against: the documented formulas in float64, written apart from the library."""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF
T = 1000  # the schedule of every op benchmark: linear, 1e-4 to 0.02 (diffusers' default)


def words(n: int, key: int, stream: int, device: torch.device) -> torch.Tensor:
    """Words 0 … n - 1 of a Philox4x32-10 stream (Salmon et al. 2011, §3.3) as int64 [n]."""
    block = torch.arange((n + 3) // 4, device=device)
    c = [block & MASK, block >> 32, torch.full_like(block, stream), torch.zeros_like(block)]
    k = [key & MASK, key >> 32]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # modulo 2^64, of which the shifts and masks take both halves
        c = [(q >> 32 & MASK) ^ c[1] ^ k[0], q & MASK, (p >> 32 & MASK) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return torch.stack(c, -1).reshape(-1)[:n]


def normals(n: int, key: int, stream: int, device: torch.device) -> torch.Tensor:
    """Standard normals 0 … n - 1 of a stream by Box-Muller, float64 [n]."""
    w = words((n + 1) // 2 * 2, key, stream, device).reshape(-1, 2)
    r = torch.sqrt(-2 * torch.log(((w[:, 0] >> 9).double() + 0.5) * 2.0**-23))
    theta = w[:, 1].double() * (2 * math.pi * 2.0**-32)
    return torch.stack((r * torch.cos(theta), r * torch.sin(theta)), -1).reshape(-1)[:n]


def uniforms(n: int, key: int, stream: int, device: torch.device) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [n]."""
    return (words(n, key, stream, device) >> 8).double() * 2.0**-24


class Tables:
    """beta, alpha and abar of the linear schedule, float64 [T + 1], t = 0 clean; `at` picks them for a batch."""

    def __init__(self, device: torch.device):
        beta = torch.cat((torch.zeros(1, dtype=torch.float64), torch.linspace(1e-4, 0.02, T, dtype=torch.float64)))
        self.beta = beta.to(device)
        self.alpha = (1 - beta).to(device)
        self.abar = (1 - beta).cumprod(0).to(device)

    def at(self, table: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """table[t], shaped to broadcast against x."""
        return table[t].view(-1, *[1] * (x.dim() - 1))

    def noise(self, x0, t, z):
        """x_t from x_0 (Ho et al. 2020, Eq. 4)."""
        abar = self.at(self.abar, t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * z

    def x0(self, x, e, t):
        """x_0 from x_t and predicted noise (Ho et al. 2020, Eq. 15)."""
        abar = self.at(self.abar, t, x)
        return (x - (1 - abar).sqrt() * e) / abar.sqrt()

    def posterior(self, x, x0, t, z):
        """x_{t-1} ~ q(. | x_t, x_0), no noise at t = 1 (Ho et al. 2020, Eqs. 6-7)."""
        beta, alpha, abar = (self.at(table, t, x) for table in (self.beta, self.alpha, self.abar))
        before = self.at(self.abar, t - 1, x)
        mean = before.sqrt() * beta / (1 - abar) * x0 + alpha.sqrt() * (1 - before) / (1 - abar) * x
        return mean + (beta * (1 - before) / (1 - abar)).sqrt() * z
