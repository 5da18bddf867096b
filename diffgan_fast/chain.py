"""The denoising chain x_T -> x_0 as one differentiable function whose memory does not grow with network depth times T.

Plain autograd keeps the activations of all T runs of the network. Here the forward pass keeps states x_t alone, the
noise of a step is made again from its key, and the backward pass builds the graph of one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from diffgan_fast import random
from diffgan_fast.graphs import NotCapturable
from diffgan_fast.ops import support
from diffgan_fast.sampling import Denoiser, Reverse
from diffgan_fast.schedule import Schedule

Recompute = Literal["none", "step"] | int


def denoise_chain(
    model: Denoiser,
    x_T: Tensor,
    schedule: Schedule,
    key: random.Key,
    *,
    recompute: Recompute = "step",
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    parameters: Sequence[Tensor] | None = None,
    grad_steps: int | tuple[int, int] | None = None,
    keep_dtype: torch.dtype | None = None,
    keep_on: torch.device | str | None = None,
    first_sample: int = 0,
    **reverse: Any,
) -> Tensor:
    """x_0 from x_T through every reverse step, differentiable in the parameters, x_T and the conditions.

    The value is bitwise that of `sample` with the same key, where x_T is `sampling.first_noise(shape, key)`. Step t
    draws its noise from `fold_in(key, t)`; dropout and whatever else takes torch's generator is seeded from it.

    Args:
        model: denoiser `model(x, t, **cond)`. The backward pass runs it in the mode (train or eval, layer by layer),
            with the trainable parameters and under the autocast of this call, whatever has changed since.
        x_T: [N, …], where the chain starts.
        schedule: of T steps.
        key: int in [0, 2^63); or an int64 tensor with one, as in a CUDA graph, for models that draw nothing from
            torch's generator.
        recompute: what the backward pass does for a step's activations. "step": every x_t is kept, and each step runs
            once more. An int k: every k-th x_t is kept, and each step runs twice more. "none": plain autograd, which
            keeps all activations.
        cond, uncond: what else the network takes, by name, and what it takes instead for its unconditional prediction.
            The tensors among their values are inputs, which get a gradient if they require one.
        parameters: the trainable tensors that the model works with (and the critic, if one guides). None: the trainable
            parameters of both, as far as they are Modules.
        grad_steps: only the last K steps carry gradients (DRaFT-K, Clark et al. 2024); what stands before them is a
            constant. A pair (low, high): the key draws K from it (AlignProp, Prabhudesai et al. 2023). None: all.
        keep_dtype: states are kept in this type, for example torch.bfloat16. This rounds the states at which gradients
            are taken; x_0 stays as it is.
        keep_on: states are kept on this device, for example "cpu".
        first_sample: number of the first sample in the global batch.
        reverse: how the steps are made: sampler=, steps=, clip_x0=, guidance_scale=, critic=, …; see `Reverse`.

    Returns: x_0, like x_T.
    Gradients: of first order, equal to plain autograd's; they are summed apart and handed over once, and no `.grad` is
    touched on the way. Batch norm's running statistics change in the forward pass alone.
    Raises: ValueError for arguments out of range, and for models whose second run is not like the first
    (DistributedDataParallel, spectral norm in train mode, any under `parametrize.cached()`). RuntimeError in the
    backward pass, if a step depends on a trainable tensor that is no input of the chain, or if an input was changed in
    place in between.
    Source: Chen et al. 2016 (recomputation); method 2 of "Exploring the Combination of Diffusion Models and Generative
    Adversarial Networks", §4.2.
    """
    step = Reverse(schedule=schedule, **reverse)
    support.key_arguments(key, x_T.device, 1, 0)
    every, last = _interval(recompute), _last_steps(grad_steps, step.T, key)
    if every is None and not (keep_dtype is keep_on is None):
        raise ValueError("keep_dtype and keep_on are None with recompute='none', which keeps no states of its own")
    if keep_dtype is not None and not keep_dtype.is_floating_point:
        raise ValueError(f"keep_dtype must be a floating-point type, got {keep_dtype}")
    modules = {name: m for name, m in (("model", model), ("critic", step.critic)) if isinstance(m, nn.Module)}
    _refuse(modules)
    given = dict(cond or {}), dict(uncond or {})
    chain = _Chain(model, step, key, first_sample, given, list(modules.values()), parameters)
    with _fork_rng(x_T, key):
        with torch.no_grad():
            for t in range(step.T, last, -1):
                x_T = chain.step(x_T, t)
        if every is None:
            for t in range(last, 0, -1):
                x_T = chain.step(x_T, t)
            return x_T
        store = _Store(last, every, keep_dtype, None if keep_on is None else torch.device(keep_on))
        return _Recomputed.apply(chain, store, x_T, *chain.passed, *chain.parameters)


def _interval(recompute: Recompute) -> int | None:
    """Every how many steps a state is kept; None for plain autograd."""
    if recompute in ("none", "step"):
        return None if recompute == "none" else 1
    if isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 1:
        raise ValueError(f"recompute must be 'none', 'step' or an int >= 1, got {recompute!r}")
    return recompute


def _last_steps(grad_steps: int | tuple[int, int] | None, T: int, key: random.Key) -> int:
    """How many steps carry gradients."""
    pair = (T, T) if grad_steps is None else grad_steps if isinstance(grad_steps, tuple) else (grad_steps,) * 2
    ints = all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
    if not (ints and len(pair) == 2 and 1 <= pair[0] <= pair[1] <= T):
        raise ValueError(f"grad_steps must be in 1..{T}, or a pair (low, high) of such; got {grad_steps!r}")
    low, high = pair
    if low == high:
        return low
    if isinstance(key, Tensor):
        raise NotCapturable(f"grad_steps must be an int where the key is a tensor, got {grad_steps!r}")
    return low + int(random.randint(high - low + 1, 1, random.fold_in(key, "grad_steps")))


def _refuse(modules: dict[str, nn.Module]) -> None:
    if parametrize._cache_enabled:  # its weights have no graph where a step without one came first
        raise ValueError("parametrize.cached() must not be around a chain: weights would lose their gradients")
    for role, module in modules.items():
        for name, layer in module.named_modules():
            what = f"{role}: {name or 'itself'!r} ({type(layer).__name__})"
            if isinstance(layer, nn.parallel.DistributedDataParallel | nn.DataParallel):
                raise ValueError(f"{what} exchanges gradients in every step; pass the module that it wraps")
            if support.estimates_spectrum(layer):
                raise ValueError(f"{what} changes its weight in every call; put it in eval mode")


def _fork_rng(x: Tensor, key: random.Key) -> AbstractContextManager:
    """torch's generators come back as they were. With a key on the device nothing may draw from them."""
    if isinstance(key, Tensor):
        return _untouched_rng(x)
    return torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])


@contextmanager
def _untouched_rng(x: Tensor) -> Iterator[None]:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # the generator cannot be asked; rehearsals have been
        yield
        return
    generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
    before = generator.get_state().numpy().tobytes()
    yield
    if before != generator.get_state().numpy().tobytes():
        raise NotCapturable(
            "the model draws from torch's generator (dropout), which a key that is a tensor cannot seed for each step"
        )


class _Chain:
    """A chain's steps as they were called: with the same keys, modes and trainable parameters whenever one runs."""

    def __init__(
        self,
        model: Denoiser,
        reverse: Reverse,
        key: random.Key,
        first_sample: int,
        given: tuple[dict[str, Any], dict[str, Any]],
        modules: list[nn.Module],
        parameters: Sequence[Tensor] | None,
    ):
        self.model, self.reverse, self.key, self.first_sample, self.given = model, reverse, key, first_sample, given
        self.modes = [(layer, layer.training) for m in modules for layer in m.modules()]
        own = [p for m in modules for p in m.parameters()]
        # frozen ones too, so that torch notices if one is changed in place before the backward pass
        listed = own if parameters is None else [*parameters, *(p for p in own if not p.requires_grad)]
        self.parameters = list(dict.fromkeys(listed))
        self.trains = [(p, p.requires_grad) for p in dict.fromkeys((*own, *self.parameters)) if p.is_leaf]

    @property
    def passed(self) -> list[Tensor]:
        """The tensors among the conditions."""
        return [v for given in self.given for v in given.values() if isinstance(v, Tensor)]

    def step(self, x: Tensor, t: int, passed: Sequence[Tensor] | None = None) -> Tensor:
        """x_{t-1}, with `passed` for the tensors among the conditions."""
        rest = iter(self.passed if passed is None else passed)
        cond, uncond = (
            {name: next(rest) if isinstance(v, Tensor) else v for name, v in given.items()} for given in self.given
        )
        key = random.fold_in(self.key, t)
        if isinstance(key, int):
            random.seed_torch(random.fold_in(key, "torch"), x.device)
        return self.reverse.step(self.model, x, t, key, cond=cond, uncond=uncond, first_sample=self.first_sample)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Modules as they were in the first run; what a run changes in their buffers is undone at the end.

        Hooks of the parameters, and `.grad` where one retains it, are for their whole gradient: no step meets them.
        """
        modes = [(layer, layer.training) for layer, _ in self.modes]
        trains = [(p, p.requires_grad) for p, _ in self.trains]
        buffers = [(b, b.clone()) for layer, training in self.modes if training for b in layer.buffers(recurse=False)]
        hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in self.parameters if p._backward_hooks]
        retained = [(p, p.grad) for p in self.parameters if p.retains_grad]
        try:
            _set(self.modes, self.trains)
            for registered, _ in hooks:
                registered.clear()
            yield
        finally:
            _set(modes, trains)
            for registered, all_ in hooks:
                registered.update(all_)
            for p, grad in retained:
                p.grad = grad
            for buffer, before in buffers:
                buffer.data.copy_(before)  # .data: graphs of other runs, which saved the buffer, stay valid


def _set(modes: list[tuple[nn.Module, bool]], trains: list[tuple[Tensor, bool]]) -> None:
    for layer, training in modes:
        layer.training = training
    for p, requires_grad in trains:
        p.requires_grad_(requires_grad)


@dataclass(frozen=True)
class _Store:
    """Which states are kept, x_first, x_{first - every}, …, and how."""

    first: int
    every: int
    dtype: torch.dtype | None
    device: torch.device | None

    def keeps(self, t: int) -> bool:
        return (self.first - t) % self.every == 0

    def room(self, x: Tensor) -> Tensor:
        """Where the states go, [how many, *x.shape].

        One block: as tensors of their own, made between the network's activations and outliving them, they would leave
        gaps that the C library's allocator cannot use again (measured: 12 MiB a step instead of 0.4).
        """
        return torch.empty_strided(
            (-(-self.first // self.every), *x.shape),
            (x.numel(), *torch.empty_like(x).stride()),  # in x's memory format
            dtype=self.dtype or x.dtype,
            device=self.device or x.device,
            # so that the host need not wait: the stream keeps the copies there and back in order
            pin_memory=x.is_cuda and self.device is not None and self.device.type == "cpu",
        )

    def get(self, kept: Tensor, like: Tensor) -> Tensor:
        return kept.to(device=like.device, dtype=like.dtype, non_blocking=True)


class _Recomputed(torch.autograd.Function):
    """The last `store.first` steps. Inputs that may get gradients: the state, the conditions, the parameters."""

    @staticmethod
    def forward(ctx, chain: _Chain, store: _Store, x: Tensor, *inputs: Tensor) -> Tensor:
        kind = x.device.type
        ctx.chain, ctx.store = chain, store
        ctx.autocast = dict(
            device_type=kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,  # casts of parameters made here have no graph: nobody must find them later
        )
        states = store.room(x)
        with torch.autocast(**ctx.autocast):
            for t in range(store.first, 0, -1):
                if store.keeps(t):
                    states[(store.first - t) // store.every].copy_(x, non_blocking=True)
                x = chain.step(x, t)
        ctx.save_for_backward(*inputs, states)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        chain, store = ctx.chain, ctx.store
        need_x, *needs = ctx.needs_input_grad[2:]
        states = ctx.saved_tensors[-1]  # unpacked once: here torch notices inputs that were changed in place
        # conditions go in as copies, so that a step's graph ends there; parameters are those that the model uses
        passed = [v.detach().requires_grad_(need) for v, need in zip(chain.passed, needs, strict=False)]
        sums = _Sums([v for v, need in zip((*passed, *chain.parameters), needs, strict=True) if need])
        with _fork_rng(grad, chain.key), torch.autocast(**ctx.autocast), chain.again():
            for i in reversed(range(len(states))):
                high = store.first - i * store.every
                low = max(high - store.every, 0)
                xs = [store.get(states[i], grad)]
                for t in range(high, low + 1, -1):  # once_differentiable: without a graph
                    xs.append(chain.step(xs[-1], t, passed))
                for t in range(low + 1, high + 1):
                    x = xs.pop().detach().requires_grad_()
                    with torch.enable_grad():
                        out = chain.step(x, t, passed)
                    grad = sums.add(out, x, grad)
                    del out  # its graph goes before the next one comes
        found = iter(sums.results())
        return None, None, grad if need_x else None, *(next(found) if need else None for need in needs)


class _Sums:
    """Gradients of the chain's inputs, summed over its steps in buffers of their own."""

    def __init__(self, inputs: list[Tensor]):
        self.inputs = inputs
        self.sums = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in inputs]
        self.found = [False] * len(inputs)

    def add(self, out: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        """Adds what a step out of x passes on, and returns the gradient of x."""
        wanted = [x, *self.inputs]
        _check_leaves(out, wanted)
        grad, *grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
        used = [i for i, g in enumerate(grads) if g is not None]
        for i in used:
            self.found[i] = True
        if used:
            torch._foreach_add_([self.sums[i] for i in used], [grads[i] for i in used])
        return grad

    def results(self) -> list[Tensor | None]:
        """The sums, in the inputs' types; None for an input that no step depends on."""
        return [s.to(v.dtype) if f else None for s, v, f in zip(self.sums, self.inputs, self.found, strict=True)]


def _check_leaves(out: Tensor, wanted: Sequence[Tensor]) -> None:
    """RuntimeError if `out` depends on a trainable tensor that is not among `wanted`: its gradient would be lost."""
    known, ends = {id(v) for v in wanted}, {(v.grad_fn, v.output_nr) for v in wanted if v.grad_fn is not None}
    seen, open_ = set(), [(out.grad_fn, out.output_nr)]
    while open_:
        node, number = open_.pop()
        if node is None or node in seen or (node, number) in ends:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"a step of the chain depends on a trainable tensor of shape {list(leaf.shape)} that is no input of "
                "the chain: name it in parameters=, or pass it in cond="
            )
        open_.extend(node.next_functions)
