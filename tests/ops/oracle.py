"""Independent oracles: the documented formulas in NumPy, float64, one element at a time.

Nothing of the library is used. `reverse_step` is of whole arrays, NumPy's or torch's.
"""

import math

import numpy as np

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(counter, key):
    """Four words from four counter words and two key words, in Python ints (Salmon et al. 2011, §3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(M0 * c[0], 1 << 32)
        hi1, lo1 = divmod(M1 * c[2], 1 << 32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + W0) & MASK, (k[1] + W1) & MASK]
    return c


def word(index, key, stream=0):
    block = index // 4
    return philox((block & MASK, block >> 32, stream, 0), (key & MASK, key >> 32))[index % 4]


def normal(n, key, first=0, stream=0):
    """n normals of a stream, float64 [n]."""
    out, words, at = np.empty(n), None, None
    for i in range(n):
        block, lane = divmod(first + i, 4)
        if block != at:
            words, at = philox((block & MASK, block >> 32, stream, 0), (key & MASK, key >> 32)), block
        w0, w1 = words[lane // 2 * 2], words[lane // 2 * 2 + 1]
        r = math.sqrt(-2 * math.log(((w0 >> 9) + 0.5) * 2.0**-23))
        theta = 2 * math.pi * w1 * 2.0**-32
        out[i] = r * (math.cos(theta) if lane % 2 == 0 else math.sin(theta))
    return out


def uniform(n, key, first=0, stream=0):
    """n uniform numbers of a stream, float64 [n]."""
    return np.array([(word(first + i, key, stream) >> 8) * 2.0**-24 for i in range(n)])


def linear_schedule(T, beta_1=1e-4, beta_T=0.02):
    """(beta, alpha, abar), each float64 [T + 1] with t = 0 clean, by explicit products."""
    beta = np.zeros(T + 1)
    for t in range(1, T + 1):
        beta[t] = beta_1 + (beta_T - beta_1) * ((t - 1) / (T - 1))
    abar = np.ones(T + 1)
    for t in range(1, T + 1):
        abar[t] = abar[t - 1] * (1 - beta[t])
    return beta, 1 - beta, abar


def reverse_step(x, eps, a, b, z, *, sampler="ddpm", eta=0.0, variance="beta", clip_x0=False):
    """x at abar = b from x at abar = a < b, by the noise that is predicted in it and the step's normals z.

    ddpm: Ho et al. 2020, Eqs. 6 and 7; ddim: Song et al. 2021, Eqs. 12 and 16. Nothing is added where b = 1.
    """
    root, rest = a**0.5, (1 - a) ** 0.5
    x0 = (x - rest * eps) / root
    if clip_x0:
        x0 = x0.clip(-1, 1)
        eps = (x - root * x0) / rest
    var = (1 - a / b) * (1 - b) / (1 - a)  # the posterior's
    if sampler == "ddim":
        var = eta**2 * var
        x = b**0.5 * x0 + (1 - b - var) ** 0.5 * eps
    else:
        x = b**0.5 * (1 - a / b) / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        var = 1 - a / b if variance == "beta" and b < 1 else var
    return x + var**0.5 * z
