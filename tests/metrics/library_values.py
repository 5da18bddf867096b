"""What the libraries make of fixed features: `python tests/metrics/library_values.py` writes library_values.json.

It needs torch==2.13.0 and, with --no-deps beside it, torch-fidelity==0.4.0, pytorch-fid==0.3.0, torchmetrics==1.9.0
with lightning-utilities, and prdc==0.2; it is no test and runs in none. torchvision, which none of these procedures
uses, is a stand-in. The tests build the same features by `features` and compare with the stored numbers.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix(".json")
SIZES = {"many": (400, 300, 16), "few": (60, 50, 128)}  # real, fake, features; "few" are fewer than features


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, d] and [m, d]; "few" of variances that decay, as those of networks' features do."""
    n, m, d = SIZES[name]
    draw = np.random.RandomState(7).standard_normal
    if name == "many":
        return draw((n, d)), draw((m, d)) * 1.2 + 0.3
    decay = np.arange(1, d + 1) ** -0.5
    return draw((n, d)) * decay, (draw((m, d)) * 1.1 + 0.1) * decay


def stored(name: str) -> dict:
    """What the libraries gave: "library: metric" -> value or values."""
    return json.loads(PATH.read_text())[name]


def _stand_in() -> None:
    from unittest.mock import MagicMock

    parts = ("", ".transforms", ".transforms.functional", ".models", ".models.vgg", ".datasets", ".ops")
    for name in (f"torchvision{part}" for part in parts):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __version__="0.28.0")


def measure(name: str) -> dict:
    import prdc
    import torch
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    real, fake = features(name)
    x, y = torch.from_numpy(real), torch.from_numpy(fake)
    statistics = [(of.mean(0), np.cov(of, rowvar=False)) for of in (real, fake)]
    size = min(SIZES[name][:2]) // 3

    class Features(torch.nn.Module):
        num_features = real.shape[1]

        def forward(self, images):
            return images.flatten(1)

    fid = FrechetInceptionDistance(Features(), input_img_size=(1, 1, real.shape[1])).set_dtype(torch.float64)
    fid.update(x[:, None, None], real=True)
    fid.update(y[:, None, None], real=False)
    stats = [metric_fid.fid_features_to_statistics(of) for of in (y, x)]
    kid = metric_kid.kid_features_to_metric(y, x, kid_subsets=20, kid_subset_size=size, rng_seed=2020, verbose=False)
    isc = metric_isc.isc_features_to_metric(y, splits=3, shuffle=False)
    prc = metric_prc.prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    fewer = min(len(x), len(y))
    found = {
        "torch-fidelity: fid": metric_fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"],
        "pytorch-fid: fid": calculate_frechet_distance(*statistics[0], *statistics[1]),
        "torchmetrics: fid": fid.compute().item(),
        "torch-fidelity: kid, 20 subsets": [kid[f"kernel_inception_distance_{of}"] for of in ("mean", "std")],
        "torchmetrics: kid of the first": poly_mmd(x[:fewer], y[:fewer]).item(),
        "torch-fidelity: is, 3 splits": [isc[f"inception_score_{of}"] for of in ("mean", "std")],
        "torch-fidelity: precision, recall": [prc["precision"], prc["recall"]],
    }
    for k in (3, 5):
        scores = prdc.compute_prdc(real, fake, k)
        found[f"prdc: k = {k}"] = [scores[of] for of in ("precision", "recall", "density", "coverage")]
    return {key: [float(v) for v in value] if isinstance(value, list) else float(value) for key, value in found.items()}


if __name__ == "__main__":
    _stand_in()
    PATH.write_text(json.dumps({name: measure(name) for name in SIZES}, indent=1) + "\n")
