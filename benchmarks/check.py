"""Whether a provider computes its case: a comparison with the float64 oracle, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import diffgan_fast as dgf
from benchmarks import oracle
from benchmarks.cases import Call, Case, Provider


@contextmanager
def in_float32() -> Iterator[None]:
    """Convolutions in float32 on CUDA too, where torch takes TF32 if not told otherwise: what is compared with float64.
    Timings leave torch as it is."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _tolerance(provider: Provider, dtype: torch.dtype) -> float:
    if provider.noise == "key":
        return 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    return 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _differs(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    if out.shape != expected.shape:
        return f"shape {list(out.shape)} for {list(expected.shape)}"
    error = ((out.double() - expected).abs() / (1 + expected.abs())).max().item() if out.numel() else 0.0
    return None if error <= tolerance else f"error {error:.3g} over {tolerance:.3g}"  # NaN is over, too


def _moments(difference: torch.Tensor, scale: torch.Tensor, case: Case) -> str | None:
    """None if difference / scale can be normal (or uniform): by mean, variance and share within one sigma."""
    if case.draw == "uniform":
        if difference.min() < 0 or difference.max() > 1:
            return "uniform numbers outside [0, 1]"
        difference = (difference - 0.5) * 12**0.5
    total, n = scale.square().sum(), difference.numel()
    inside = 0.6826894921 if case.draw == "normal" else 3**-0.5
    slack = 0.001 if case.size.dtype == torch.float32 else 0.05  # for the rounding of half types
    checks = {
        "mean": (difference.sum() / total.sqrt(), 6 + slack * n**0.5),
        "variance": (difference.square().sum() / total - 1, 6 * (2 * scale.pow(4).sum()).sqrt() / total + slack),
        "share within one sigma": ((difference.abs() < scale).double().mean() - inside, 3 / n**0.5 + slack),
    }
    bad = [f"{name} off by {float(value):.3g}" for name, (value, most) in checks.items() if not abs(value) <= most]
    return ", ".join(bad) or None


@in_float32()
def verify(case: Case, provider: Provider, call: Call) -> str:
    """ "ok", or what is wrong with the provider's outputs for one call, its memory poisoned with NaN before."""
    if provider.noise == "unchecked":
        return "ok"
    size = case.size
    poison = [torch.full(size.shape, torch.nan, dtype=size.dtype, device=size.device) for _ in range(4)]
    del poison
    with dgf.backend(provider.backend or "auto"):
        outputs = provider.run(*call.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tolerance = _tolerance(provider, size.dtype)
    data = tuple(x.detach().double() for x in call.data)
    if provider.noise == "hidden":
        return _verify_hidden(case, outputs, data, call.t, tolerance)
    if provider.noise == "key":
        draw = oracle.normals if case.draw == "normal" else oracle.uniforms
        n = torch.Size(size.shape).numel()
        z = tuple(draw(n, call.key, stream, size.device).view(size.shape) for stream in range(case.streams))
    else:
        z = ((outputs[-1] if provider.noise == "returned" else data[-1]).detach().double(),)
    if provider.noise == "returned" and (reason := _moments(z[0], torch.ones_like(z[0]), case)):
        return f"RED: noise: {reason}"
    expected = case.expected(data, call.t, z)
    if len(outputs) < len(expected):
        return f"RED: {len(outputs)} outputs for {len(expected)}"
    for i, (out, right) in enumerate(zip(outputs, expected, strict=False)):
        if reason := _differs(out, right, tolerance):
            return f"RED: output {i}: {reason}"
    return "ok"


def _verify_hidden(case: Case, outputs: tuple, data: tuple, t: torch.Tensor, tolerance: float) -> str:
    """The check where z is unknown: an output is affine in it, so it must be normal about its value at z = 0."""
    zero = torch.zeros(case.size.shape, dtype=torch.float64, device=case.size.device)

    def at(*which: int) -> tuple:
        return case.expected(data, t, tuple(zero + (i in which) for i in range(case.streams)))

    spreads = [at(i) for i in range(case.streams)]
    for i, (out, mean) in enumerate(zip(outputs, at(), strict=True)):
        if out.shape != mean.shape:
            return f"RED: output {i}: shape {list(out.shape)} for {list(mean.shape)}"
        scale = torch.stack([s[i] - mean for s in spreads]).square().sum(0).sqrt()
        noisy = scale > 1e-9  # but for rounding, rows without noise have 0
        reason = _differs(out[~noisy], mean[~noisy], tolerance)
        if noisy.any():
            reason = reason or _moments((out.double() - mean)[noisy], scale[noisy], case)
        if reason:
            return f"RED: output {i}: {reason}"
    return "ok"
