"""Checkpoints: safetensors and JSON, written so that a crash leaves the old one whole. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffgan_fast import files
from diffgan_fast.engine.state import State


def save(folder: Path, state: State, extra: dict[str, Any], keep: int) -> None:
    """Writes checkpoints/step-N below a run folder and removes all but the newest `keep`."""
    _write(folder / "checkpoints" / f"step-{state.step}", state, extra)
    for step in steps(folder)[:-keep]:
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")


def save_best(folder: Path, state: State, extra: dict[str, Any]) -> None:
    """Writes checkpoints/best, in place of an earlier one."""
    _write(folder / "checkpoints" / "best", state, extra)


def best(folder: Path) -> dict[str, Any] | None:
    """What `save_best` was given as `extra`, and the step. None if there is none."""
    path = folder / "checkpoints" / "best" / "state.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write(final: Path, state: State, extra: dict[str, Any]) -> None:
    root, part = final.parent, final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights, moments = _tensors(state)
    for name, tensors in (("model", weights), ("optim", moments)):
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part / f"{name}.safetensors")
    trained = {name: optimizer.names for name, optimizer in state.optimizers.items()}
    scalers = {name: scaler.state_dict() for name, scaler in state.scalers.items()}
    facts = {"step": state.step, "updates": state.updates, "trained": trained, "scalers": scalers, **extra}
    files.write(part / "state.json", json.dumps(facts, indent=1) + "\n")
    for file in part.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)
    folder_handle = os.open(root, os.O_RDONLY)
    os.fsync(folder_handle)
    os.close(folder_handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a last one that a killed process left half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(int(p.name.removeprefix("step-")) for p in found if (p / "state.json").exists())


def load(folder: Path, state: State, *, best: bool = False) -> dict[str, Any]:
    """Brings a state to the newest checkpoint of a run folder, or to the best.

    Returns what `save` was given as `extra`, and the step.
    """
    found = steps(folder)
    path = folder / "checkpoints" / ("best" if best else f"step-{found[-1] if found else 0}")
    if not (path / "state.json").exists():
        hint = " of the best step: it was trained without evaluate_every" if best else ""
        raise ValueError(f"{folder} has no checkpoint{hint}")
    facts = json.loads((path / "state.json").read_text())
    for name, optimizer in state.optimizers.items():
        if optimizer.names != facts.get("trained", {}).get(name):
            raise ValueError(f"{path} does not fit network {name!r}: other parameters of it were trainable")
    weights, moments = load_file(path / "model.safetensors"), load_file(path / "optim.safetensors")
    for kind, modules in (("net", state.nets), ("ema", state.ema)):
        for name, module in modules.items():
            prefix = f"{kind}.{name}."
            mine = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(mine)
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit network {name!r}: {error}") from error
    for name, optimizer in state.optimizers.items():
        stored: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            owner, number, field = key.split("/")
            if owner == name:
                stored.setdefault(int(number), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": stored})
        if scale := facts.get("scalers", {}).get(name):
            state.scalers[name].load_state_dict(scale)
    state.step = facts["step"]
    state.updates.update(facts["updates"])
    return facts


def _tensors(state: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights: dict[str, torch.Tensor] = {}
    for kind, modules in (("net", state.nets), ("ema", state.ema)):
        for name, module in modules.items():
            weights |= {f"{kind}.{name}.{k}": v for k, v in module.state_dict().items()}
    moments: dict[str, torch.Tensor] = {}
    for name, optimizer in state.optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            moments |= {f"{name}/{index}/{k}": torch.as_tensor(v) for k, v in values.items()}
    # a tensor shared by two names is stored under both: safetensors refuses aliases
    seen: set[int] = set()
    for key, value in weights.items():
        if value.data_ptr() in seen:
            weights[key] = value.clone()
        seen.add(value.data_ptr())
    return weights, moments
