"""Compiles the Triton kernels to machine code without a GPU: `python -m tests.kernels.compile_all 90`.

A stand-in for Triton's driver names the GPU, and `core.run` compiles instead of launching: what is compiled is what the
host functions would launch, with the specialisations that Triton would choose for these very arguments. It needs a
process without TRITON_INTERPRET, which is read when a kernel is decorated. Prints one JSON object a kernel.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from diffgan_fast.kernels import core, loss, mlp, noise, penalty, random, step


class Driver:
    def __init__(self, capability: int):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def tool(name: str, *arguments: str) -> str:
    program = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def describe(compiled) -> dict:
    """Bytes of stack and local memory, registers, and how often each width of global access occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    facts = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return facts | {width: len(re.findall(re.escape(width) + r"\b", code)) for width in ("LDG.E.128", "STG.E.128")}


def calls():
    """(label, function): one call of a host function for each kind of kernel that real use would compile."""
    n, channels, side = 16, 32, 16
    t, key, keys = (torch.zeros(k, dtype=torch.int64) for k in (n, 1, n))
    rows = {k: torch.zeros(101, k) for k in (2, 3, 4, 8)}
    each, norms, scale = torch.zeros(n, 8), torch.zeros(n), torch.zeros(())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(n, channels, side, side, dtype=dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        ragged = torch.zeros(5, 7, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        yield f"add_noise {name}", lambda x=x: noise.add_noise(x, rows[2], t, 0, 1.0, 7, None, 0, False)
        yield f"add_noise last {name}", lambda x=last: noise.add_noise(x, rows[2], t, 0, 1.0, 0, key, 0, False)
        yield f"step {name}", lambda x=x: step.step(x, x, None, None, rows[8], None, 3, 1.0, 1.0, False, 7, None, 0)
        for keep in (False, True):
            call = functools.partial(loss.residual_mean, x, x, rows[3], t, 0, keep, 0, key, 0)
            yield f"residual_mean {name} {keep}", call
        yield f"interpolate {name}", lambda x=x: penalty.interpolate(x, x, 7, None, 0)
        yield f"gradient_norm {name}", lambda x=x: penalty.gradient_norm(x, 1.0)
        yield f"gradient_norm_grad {name}", lambda x=x: penalty.gradient_norm_grad(x, norms, scale, 1.0)
        if dtype == torch.bfloat16:
            continue
        yield "interpolate ragged", lambda x=ragged: penalty.interpolate(x, x, 0, keys[:5], 0)
        yield "gradient_norm ragged", lambda x=ragged: penalty.gradient_norm(x, 0.0)
        yield "add_noise shift", lambda x=x: noise.add_noise(x, rows[2], t, 0, 1.0, 7, None, 3, False)
        yield "add_noise ragged", lambda x=ragged: noise.add_noise(x, rows[2], None, 3, 1.0, 0, keys[:5], 0, True)
        yield "noise_pair", lambda x=x: noise.noise_pair(x, rows[4], t, 0, 0, keys, 0)
        yield "step last", lambda x=last: step.step(x, x, x, x, each, None, -1, 2.0, 2.0, True, 7, None, 0)
        yield "residual", lambda x=x: loss.residual(x, None, rows[3], None, 0, torch.ones(()), 7, None, 0)
        yield "normal", lambda x=x: random.random_(x, 7, None, 0, 0, 2, 0)
        yield "integers", lambda: random.random_(keys, 7, None, 0, 0, 3, 10)
        for hidden, depth, inputs in ((256, 3, 2), (256, 1, 200), (33, 2, 5)):
            widths = [inputs, *[hidden] * depth, 1]
            weights = [torch.zeros(b, a) for a, b in zip(widths, widths[1:], strict=False)]
            net = torch.zeros(n, inputs), weights, [torch.zeros(len(w)) for w in weights]
            call = functools.partial(mlp.mlp_penalty, *net, 0.2, inputs, 1.0)
            yield f"mlp_penalty {hidden} {inputs}", call
        yield "fold_in", lambda: random.fold_in(0, keys, 7, None)
        yield "fold_in data", lambda: random.fold_in(7, None, 0, keys)
        yield "philox4x32", lambda: random.philox4x32(torch.zeros(8, 4).long(), torch.zeros(8, 2).long())


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    compiled: list = []
    core.run = lambda kernel, count, *args, **named: compiled.append(kernel.warmup(*args, grid=(count,), **named))
    for label, call in calls():
        compiled.clear()
        call()
        print(json.dumps({"label": label, "sm": capability} | describe(*compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
