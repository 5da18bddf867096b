"""Inputs and checks that the op tests share."""

import torch

T = 300
LEVELS = (0, 1, 2, 150, T)


def images(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def layouts(x):
    """x contiguous, and channels_last where it is an image batch."""
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)


def steps_for(n, device):
    """n steps that include 0, 1 and T, mixed."""
    return torch.tensor([(0, 1, T, 2, 150, 299)[i % 6] for i in range(n)], device=device)


def tolerance(dtype, magnitude):
    """The largest error of one rounding to dtype of numbers up to `magnitude`, plus that of the float32 noise."""
    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-13}[
        dtype
    ]  # 1 - abar loses digits
    return magnitude * ulp + (0 if dtype == torch.float64 else 5e-6)


def check_compiles(f, *tensors):
    """f(*tensors, key) gives the same under torch.compile, in one graph, compiled at most twice for eight keys."""
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(f, backend=count, fullgraph=True)
    for key in range(3, 11):
        assert torch.equal(compiled(*tensors, key), f(*tensors, key))
    assert len(graphs) <= 2  # the second time with a symbolic key
    torch._dynamo.reset()
