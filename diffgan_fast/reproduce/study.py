"""What the studies share: what may be asked of them, their data, and how several seeds are printed."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from diffgan_fast.data.registry import is_here


def pictures(data: str | None) -> str:
    """The data set of a study of images: `data`; or if it is None, MNIST where its files lie here, else the digits.

    For this nothing is downloaded.
    """
    if data is not None:
        return data
    return "mnist" if is_here("mnist") else "digits"


def check(seeds: int, **asked: tuple[Sequence[str], Collection[str]]) -> None:
    """ValueError unless there is a seed, and each argument (values, known names) has values, all of them known."""
    for argument, (values, known) in asked.items():
        unknown = [v for v in values if v not in known]
        if unknown or not values:
            raise ValueError(f"{argument} must be of {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")


def spread(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean ± standard deviation, which one value has not. With the sign "+" a positive mean shows its own."""
    text = f"{statistics.mean(values):{sign}.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text
