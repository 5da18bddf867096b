"""Steps captured in graphs, which a tape of ops stands in for (tests/engine/tape.py)."""

import pytest
import torch

import diffgan_fast as dgf
from diffgan_fast import graphs, random
from diffgan_fast.engine import Batch, precision
from diffgan_fast.engine.compiling import compiled
from diffgan_fast.engine.steps import Steps
from diffgan_fast.ops import support
from tests.engine import methods
from tests.engine.tape import Recorder

DRAWS = ["method2, every second state"]  # dropout in the chain


def kept(state):
    """What lasts from step to step."""
    for module in (*state.nets.values(), *state.ema.values()):
        yield from (p.data for p in module.parameters())
        yield from module.buffers()
    for optimizer in state.optimizers.values():
        for values in optimizer.state.values():
            yield from values.values()
    for scaler in state.scalers.values():
        yield from (v for v in (getattr(scaler, n, None) for n in ("_scale", "_growth_tracker")) if v is not None)


def changed(state):
    yield from kept(state)
    for optimizer in state.optimizers.values():
        yield from optimizer.gradients


def run(case, how, count=9, device="cpu", **options):
    """(losses of each step, state, the Steps) of a few steps, each on its own batch.

    how: "plain", "graphs", or "rehearsal": with all that graphs need, but none.
    """
    method, state, batch = methods.start(case, device=device, **options)
    recorder = None
    if how != "plain":
        recorder = graphs.Recorder(batch.x.device) if batch.x.is_cuda else Recorder(lambda: changed(state))
    step, history = Steps(method, state, recorder, 2 if how == "graphs" else count), []
    with compiled(state.nets, method.config.compile, batch.x.device):
        for number in range(count):
            key = random.fold_in(methods.KEY, "step", number)
            torch.manual_seed(random.fold_in(key, "torch", 0))
            x = random.normal(batch.x.shape, random.fold_in(key, "data"), device=device).clamp(-1, 1)
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            with precision.reduced(method.config.precision, x.device):
                losses = step(Batch(x), key)
            history.append({name: float(v.detach()) for name, v in losses.items()})
            state.step += 1
    return history, state, step


@pytest.fixture(autouse=True)
def ranges_unseen(monkeypatch):
    """As on CUDA, where nobody looks whether a t is in range."""
    monkeypatch.setattr(support, "check_range", lambda *args, **named: None)


@pytest.mark.parametrize("options", [dict(lr_schedule="cosine", warmup=3, ema_every=2), dict(precision="fp16")])
@pytest.mark.parametrize("case", [c for c in methods.CASES if c not in DRAWS])
def test_a_replayed_step_is_the_step(case, options):
    """Through all phases, with learning rates, averages, scaled losses and adaptive noise that change."""
    if case == "discriminator-guidance":
        options = {k: v for k, v in options.items() if k == "precision"}  # its critic's rate is constant
    plain, expected, _ = run(case, "rehearsal", **options)
    replayed, state, step = run(case, "graphs", **options)
    assert 1 <= step.recorder.recorded <= 4
    assert replayed == [pytest.approx(row, rel=1e-6) for row in plain]  # losses are logged in float32
    assert state.updates == expected.updates
    for a, b in zip(kept(state), kept(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [c for c in methods.CASES if c not in DRAWS])
def test_keys_and_numbers_on_the_device_are_those_of_the_host(case):
    options = {} if case == "discriminator-guidance" else dict(lr_schedule="exponential", ema_every=2)
    plain, expected, _ = run(case, "plain", 4, **options)
    rehearsed, state, _ = run(case, "rehearsal", 4, **options)
    assert rehearsed == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in plain]
    assert state.updates == expected.updates


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, dict(precision="fp16"), dict(compile=True)])
@pytest.mark.parametrize("case", [c for c in methods.CASES if c not in DRAWS])
def test_replays_on_a_gpu(case, options, monkeypatch):
    """What the tape shows, by CUDA graphs: the losses of steps that are launched one by one."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, expected, _ = run(case, "rehearsal", device="cuda", **options)
    replayed, state, step = run(case, "graphs", device="cuda", **options)
    assert step.recorder is not None
    assert replayed == [pytest.approx(row, rel=2e-2, abs=2e-3) for row in plain]  # sums in another order, nine times
    assert state.updates == expected.updates


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ddpm", "gan"])
def test_a_run_on_a_gpu_is_captured_and_resumed(method, tmp_path, recwarn):
    small = dict(steps=8, batch_size=16, width=8, device="cuda", progress=False, seed=1)
    whole = dgf.train(method, "digits", tmp_path / "whole", **small)
    dgf.train(method, "digits", tmp_path / "parts", **small | {"steps": 4})
    parts = dgf.train(method, "digits", tmp_path / "parts", **small, resume=True)
    without = dgf.train(method, "digits", tmp_path / "without", **small, cuda_graphs=False)
    assert not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    for run in (parts, without):
        for a, b in zip(kept(run.state), kept(whole.state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_after_a_capture_that_failed_all_is_as_before():
    """On its stream, with generators that draw, memory that is freed, and recordings that work."""
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, x, before = graphs.Recorder(device), torch.ones(4, device=device), torch.cuda.current_stream()

    def asks():
        y = torch.nn.functional.dropout(x * 2)
        return float(y[0])

    with recorder.rehearsal():
        asks()
    with pytest.raises(RuntimeError, match="captur"):
        recorder.record(asks)
    assert torch.cuda.current_stream() == before and not torch.cuda.is_current_stream_capturing()
    torch.randn(4, device=device), torch.nn.functional.dropout(x)
    big = torch.empty(2**26, device=device)
    big.record_stream(torch.cuda.Stream())
    held = torch.cuda.memory_allocated()
    del big
    torch.cuda.synchronize()
    torch.empty(1, device=device)  # the allocator looks at what is free now
    assert torch.cuda.memory_allocated() < held
    replay, result = recorder.record(lambda: x * 3)
    replay()
    assert result.tolist() == [3.0] * 4


@pytest.mark.parametrize("case", DRAWS)
def test_what_cannot_be_captured_runs_as_it_is(case):
    with pytest.warns(UserWarning, match="without CUDA graphs: the model draws from torch's generator"):
        history, state, step = run(case, "graphs", 3)
    plain, expected, _ = run(case, "plain", 3)
    assert step.recorder is None and history == plain and state.updates == expected.updates


def test_a_step_that_asks_the_device_runs_as_it_is(monkeypatch):
    kind = type(methods.start("gan")[0])
    step = kind.step

    def asking(self, state, batch, key):
        losses = step(self, state, batch, key)
        float(losses["critic_loss"].detach())
        return losses

    monkeypatch.setattr(kind, "step", asking)
    plain, expected, _ = run("gan", "plain", 4)
    with pytest.warns(UserWarning, match="'gan' run without CUDA graphs: operation not permitted"):
        history, state, step = run("gan", "graphs", 4)
    assert history == [pytest.approx(row, rel=1e-4) for row in plain]
    assert state.updates == expected.updates == {"generator": 4, "critic": 4}


def test_another_batch_size_is_captured_anew():
    method, state, _ = methods.start("gan")
    recorder = Recorder(lambda: changed(state))
    step = Steps(method, state, recorder, 1)
    for n in (8, 8, 4, 4, 4):
        step(Batch(random.normal((n, 1, 8, 8), n).contiguous(memory_format=torch.channels_last)), 5)
        state.step += 1
    assert recorder.recorded == 2 and state.updates["critic"] == 5
