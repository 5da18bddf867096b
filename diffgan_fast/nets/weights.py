"""Public weights: plain state dicts, read from files."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

SHOWN = 6  # keys of each kind in a message


def load_weights(
    network: Network, path: str | PathLike[str], *, rename: Callable[[str], str | None] | None = None
) -> Network:
    """Loads a state dict from a file into a network: whole, or not at all.

    The prefix "module." that DataParallel puts before every key is taken off. A batch norm's count of batches may be
    missing, as torch before 0.4.1 did not keep one.

    Args:
        network: filled in place; it keeps its device and dtype.
        path: a .safetensors file, or a .pt or .pth file of `torch.save(network.state_dict(), path)`. No code in it is
            run.
        rename: gives for each key of the file (after "module.") the network's key, or None to leave the tensor out. For
            example `{"conv.weight": "main.0.weight"}.get`, or `lambda key: f"main.{key}"`.

    Returns:
        The network.

    Raises:
        ValueError: there is no such file, it holds anything but tensors by name, or these do not fit: what is missing,
            unexpected or of another shape is named, and the network is as it was.
    """
    path = Path(path)
    found = _renamed(_read(path), rename)
    own = network.state_dict()
    problems = {
        "missing": [k for k in own if k not in found and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in found if k not in own],
        "of another shape": [
            f"{k} {list(v.shape)}, not {list(own[k].shape)}"
            for k, v in found.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_shortened(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"path {path} does not fit {type(network).__name__}: {told}")
    network.load_state_dict(found)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path {path} must end in .safetensors, .pt or .pth")
    if not path.is_file():
        raise ValueError(f"path {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise ValueError(f"path {path} is damaged, or holds more than tensors by name") from error
    if not isinstance(weights, dict):
        raise ValueError(f"path {path} holds a {type(weights).__name__}; it must hold tensors by name")
    others = [
        f"{k!r} ({type(v).__name__})" for k, v in weights.items() if not (isinstance(k, str) and isinstance(v, Tensor))
    ]
    if others:
        raise ValueError(f"path {path} must hold tensors by name alone; it also holds {_shortened(others)}")
    return weights


def _renamed(weights: dict[str, Tensor], rename: Callable[[str], str | None] | None) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        new = rename(key) if rename else key
        if new in found:
            raise ValueError(f"rename gives {new!r} to two tensors, the second of them {key!r}")
        if new is not None:
            found[new] = value
    return found


def _shortened(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
