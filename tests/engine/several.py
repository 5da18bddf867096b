"""What `test_distributed` runs in one process and in several: `python -m tests.engine.several WHAT FOLDER`."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import diffgan_fast as dgf
from diffgan_fast import api, files, nets, report
from diffgan_fast.engine import FlatAdamW, State, batch_norm, distributed, together

STEPS = 20
COMMON = dict(steps=STEPS, batch_size=8, log_every=5, sample_every=0, checkpoint_every=0, progress=False)
# what a user might run; each with tiny networks
RUNS = {
    "ddpm": dict(flip=True, clip_grad=0.5, T=4, width=8, conditional=True, evaluate_every=20, evaluate_n=10),
    # with seed 0 an input of a ReLU lies so near 0 at step 19 that the order of a sum decides whether it passes
    "gan": dict(width=4, critic_width=4, seed=1),
    "method3": dict(preset="brief", critic_width=4, critic_steps=4, T=4, width=8, lr=1e-4),  # with a base of its own
    "method2": dict(critic_width=4, steps=3, recompute=2),
    "discriminator-guidance": dict(critic_width=4, steps=3, fakes=5),
    "gan-enhanced": dict(data="moons", subset=64, T=10, width=16, critic_width=16, ema_every=1, ema_start=0),
}
for _name in ("ddpm", "method3"):  # a base is trained with the preset of its name
    dgf.methods.find(_name).Config.PRESETS["brief"] = dict(steps=3, batch_size=8)
api.GRID = 4


class Net(nn.Module):
    """A denoiser with batch norm, which normalises by the batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, x, t):
        plane = (t.to(x.dtype) / 10).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat((x, plane), 1))


def net():
    """Another one in each process: the main process's counts."""
    torch.manual_seed(5 + distributed.rank())
    return Net()


def train(method, folder, **options):
    return dgf.train(method, out=folder, **{**COMMON, **options})


def train_all(folder: Path, names=tuple(RUNS)):
    base, fed = folder / "ddpm", dict(data_on="host" if distributed.size() > 1 else "device")  # it makes no difference
    given = {"ddpm": fed, "gan": fed, "method2": dict(base=base, critic=folder / "gan")}
    given |= {"discriminator-guidance": dict(base=base)}
    for name in names:
        train(name, folder / name, **RUNS[name], **given.get(name, {}))
    train("ddpm", folder / "half", model=net(), T=4, steps=6, precision="fp16")
    return train("ddpm", folder / "own", model=net(), T=4)


def grouped() -> None:
    """A critic that compares samples in groups of 4, of which each process has 2."""
    critic = nets.DDGANCritic(1, 8, T=4)
    state = State({"critic": critic}, {"critic": FlatAdamW(critic, 1e-4)}, (), dgf.methods.ddpm.Config())
    with together(state, 2):
        pass


def message(call) -> str:
    """The error of a call, as "kind: text"."""
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def misuse(folder: Path) -> dict[str, str]:
    """What each process is told when a run cannot go on."""
    rank = dist.get_rank()

    class Bad(Net):
        calls = 0

        def forward(self, x, t):
            Bad.calls += 1
            return super().forward(x, t) * (float("nan") if rank == 1 and Bad.calls == 6 else 1.0)

    class Ordering(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.sort(0)[0])

    strange = net()
    strange.body[1] = Ordering(8)

    def interrupt(run, row):
        if rank == 1 and row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    return {
        "odd": message(lambda: train("ddpm", folder / "odd", model=net(), batch_size=7)),
        "auto": message(lambda: train("ddpm", folder / "auto", model=net(), batch_size="auto")),
        "seed": message(lambda: train("ddpm", folder / "seed", model=net(), seed=rank)),
        "holds": message(lambda: train("gan", folder / "gan", **RUNS["gan"])),
        "layer": message(lambda: train("ddpm", folder / "layer", model=strange)),
        "nan": message(lambda: train("ddpm", folder / "nan", model=Bad(), log_every=5, checkpoint_every=4)),
        "interrupt": message(
            lambda: train("ddpm", folder / "cut", model=net(), T=4, log_every=1, callbacks=[interrupt])
        ),
    }


def alone(run) -> dict:
    """What the main process does without the others: with a run that they trained together, and before another."""
    kid = run.evaluate(20, metrics=["kid"])["kid"]
    report.write_run(run.path)
    x = torch.zeros(2, 1, 8, 8)
    return {
        "kid": kid,
        "samples": list(run.sample(3).shape),
        "plan": len(dgf.plan("ddpm", model=net(), batch_size=8, T=4).rows),
        "in train mode": list(run.state["denoiser"].train()(x, torch.ones(2, dtype=torch.int64)).shape),
        "layers": [type(layer).__name__ for layer in run.state["denoiser"].body],
    }


def shared(run, n: int) -> dict:
    """What all processes do with a run, and how much of it each: samples drawn, files written."""
    drawn, written = [], []
    sample, write = type(run.method).sample, files.write

    def noting(self, state, n, key, **options):
        drawn.append(n)
        return sample(self, state, n, key, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.method), "sample", noting)
        patch.setattr(files, "write", lambda path, content: (written.append(Path(path).name), write(path, content))[1])
        some = run.sample(n, seed=3, first=2, batch=2, together=True)
        mine = sum(drawn)
        one = run.sample(1, seed=3, together=True)
        scores = run.evaluate(n + 15, together=True)
        assert run.evaluated(n + 15, together=True) == scores  # what is kept
    return {"some": some.tolist(), "one": one.tolist(), "drawn": mine, "scores": scores, "written": written}


def apart(run) -> dict[str, str]:
    """What each process is told where they were not called alike, or one fails; and then they go on."""
    rank, sample = dist.get_rank(), type(run.method).sample

    def failing(self, state, n, key, **options):
        if rank == 1:
            raise OSError("a fault of process 1")
        return sample(self, state, n, key, **options)

    found = {"unlike": message(lambda: run.sample(2, seed=rank, together=True))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.method), "sample", failing)
        found |= {
            "one fails": message(lambda: run.sample(4, together=True)),
            "one fails while it measures": message(lambda: run.evaluate(20, together=True)),
        }
        patch.setattr(type(run.method), "sample", lambda *a, **k: torch.full((a[2], 1, 8, 8), float("nan")))
        found["not finite"] = message(lambda: run.evaluate(20, together=True))
    if rank == 1:
        found["alone"] = message(lambda: run.sample(3))
    return found


LAYERS = {
    "usual": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None, eps=0.1),
    "plain": lambda: nn.BatchNorm2d(3, affine=False),
    "memoryless": lambda: nn.BatchNorm2d(3, track_running_stats=False),
}


def through(layer: nn.Module, part: slice) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of a layer after two batches of 8 samples, of which this process has a part."""
    generator = torch.Generator().manual_seed(3)
    shape = (8, 3) if isinstance(layer, nn.BatchNorm1d) else (8, 3, 4, 4)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    found: dict[str, torch.Tensor] = {}
    for batch in range(2):
        x = 5 + torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x[part].clone().requires_grad_()
        y = layer.double()(x)
        gradients = torch.autograd.grad((y.sin() * weight[part]).sum() * (8 / len(x)), (x, *layer.parameters()))
        found |= {f"y{batch}": y.detach(), f"x{batch}": gradients[0]}
        found |= {f"p{batch}{i}": g for i, g in enumerate(gradients[1:])}
    return found | dict(layer.named_buffers())


def layers(rank: int, size: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, make in LAYERS.items():
        layer = make()
        batch_norm.share(layer)
        told = through(layer, slice(rank * 8 // size, (rank + 1) * 8 // size))
        found |= {f"{name}.{k}": v for k, v in told.items()}
    return found


def second_order() -> str:
    layer = nn.BatchNorm1d(3)
    batch_norm.share(layer)
    x = torch.randn(4, 3, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return message(lambda: g.sum().backward())


def die(folder: Path) -> None:
    """A run to step 12 whose process 1 is killed after step 8, once: torchrun then starts all anew."""

    def end(run, row):
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and row["step"] == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    options = dict(steps=12, log_every=1, checkpoint_every=5, keep=1, resume=True)
    train("ddpm", folder, width=8, T=4, callbacks=[end], **options)


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if what == "die":
        return die(folder)
    rank, size = int(os.environ["TEST_RANK"]), int(os.environ["TEST_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    if what == "all":
        run = train_all(folder)
        found = {**misuse(folder), "second order": second_order(), **apart(run)}
        found |= {name: shared(dgf.load(folder / name), 5) for name in ("ddpm", "gan-enhanced")}
        found["rows"] = dgf.compare(["gan"], out=folder / "compare", n=20, **COMMON, **RUNS["gan"])
        save_file(layers(rank, size), folder / f"layers-{rank}.safetensors")
        if rank == 0:
            found |= alone(run)
    else:
        train_all(folder, ("ddpm", "gan", "discriminator-guidance"))
        found = {"groups": message(grouped), "ddpm": shared(dgf.load(folder / "ddpm"), 6)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
