"""Independent oracles: the documented formulas in NumPy, float64, one element at a time.

Nothing of the library is used.
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
