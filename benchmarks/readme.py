"""`python -m benchmarks.readme [--check]`: writes the tables of README.md from the saved results; no figure is typed.

Of several machines with a CPU each table shows the one on which it was measured last, and says which.

With --check nothing is written, and the exit code says whether the README agrees with the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: begin (python -m benchmarks.readme) -->", "<!-- results: end -->"
OPS = {  # (benchmark, case) -> what the README calls it
    ("random", "normal"): "random normals",
    ("noise", "add_noise"): "`add_noise`",
    ("noise", "add_noise+noise"): "`add_noise`, noise returned",
    ("noise", "noise_pair"): "`noise_pair`",
    ("step", "ddpm_step"): "`ddpm_step`",
    ("loss", "noise+loss step"): "`add_noise` + `noise_mse`, forward and backward",
}
SHAPE = "1024x3x32x32"
POINTS = {  # case -> what the README calls it
    "plain": "a step of plain diffusion",
    "adversarial": "with a critic (ours: one that reaches the denoiser)",
    "penalty": "with critic and penalty",
    "what the penalty adds": "what the penalty adds",
    "sampling": "10,000 samples, 100 steps",
}


def ops_table(folder: Path) -> list[str]:
    """The main size of every op: milliseconds and ratios, for each number of threads."""
    lines = [
        "| float32 [1024, 3, 32, 32] | threads | ms | against eager | against torch.compile |",
        "|---|---|---|---|---|",
    ]
    for (benchmark, case), title in OPS.items():
        rows = _rows(folder, benchmark)
        picked = [r for r in rows if (r["case"], r["shape"], r["dtype"]) == (case, SHAPE, "float32")]
        for row in sorted((r for r in picked if r["provider"] == "dgf-cpu"), key=lambda r: -r["threads"]):
            ratios = [f"{row[k]:.1f}×" if row.get(k) else "–" for k in ("over_eager", "over_compile")]
            lines.append(f"| {title} | {row['threads']} | {row['ms']:.2f} | {' | '.join(ratios)} |")
    return lines


def training_table(folder: Path) -> list[str]:
    """Method 3.5 at the student preset, item by item."""
    rows = _rows(folder, "training")
    lines = [
        "| method 3.5, student network, batch 128 | threads | images/s | against the reference |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['provider']} | {row['threads']} | {row['images_per_s']:.0f} | {row['over_as_coded']:.2f}× |"
        )
    return lines


def points_table(folder: Path) -> list[str]:
    """GAN-enhanced diffusion of points: the published procedure and ours."""
    rows = _rows(folder, "points")
    lines = [
        "| moons, batch 256, 2 threads | the reference, ms | ours, ms | matrix products alone, ms | ours is faster |",
        "|---|---|---|---|---|",
    ]
    for case, title in POINTS.items():
        ours, peer = (
            next(r for r in rows if (r["case"], r["provider"], r["threads"]) == (case, name, 2))
            for name in ("ours", "reference")
        )
        ratio = f"{peer['ms'] / ours['ms']:.1f}×"
        lines.append(f"| {title} | {peer['ms']:.1f} | {ours['ms']:.1f} | {ours['floor_ms']:.1f} | {ratio} |")
    return lines


def penalty_table(folder: Path) -> list[str]:
    """The gradient penalty by mode."""
    rows = _rows(folder, "penalty")
    lines = [
        "| gradient penalty, value and gradients | provider | ms, 2 threads | against eager | against torch.compile |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["threads"] == 2 and "ms" in row:
            ratios = [f"{row[k]:.1f}×" if row.get(k) else "–" for k in ("over_eager", "over_compile")]
            lines.append(
                f"| {row['case']} [{row['shape']}] | {row['provider']} | {row['ms']:.1f} | {' | '.join(ratios)} |"
            )
    return lines


def chain_tables(folder: Path) -> list[str]:
    """The denoising chain: memory, then time."""
    rows = _rows(folder, "chain")
    memory = ["| a training step of method 2, student network | batch | `recompute` | MiB | expected |",
              "|---|---|---|---|---|"]  # fmt: skip
    time = ["| the same step | batch | `recompute` | s | images/s | plain autograd is 1 |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        about = f"| {row['case']} | {row['shape'].split('x')[0]} | `{row['provider']}` |"
        if "peak_mib" in row:
            memory.append(f"{about} {row['peak_mib']:.4g} | {row['expected_mib']:.4g} |")
        elif "ms" in row:
            ratio = f"{1 / row['over_none']:.2f}×" if "over_none" in row else "–"
            time.append(f"{about} {row['ms'] / 1e3:.2f} | {row['images_per_s']:.2f} | {ratio} |")
    return [*memory, "", *time]


def sampling_table(folder: Path) -> list[str]:
    """Sampling: the reference's loop, diffusers' and ours."""
    rows = _rows(folder, "sampling")
    lines = ["| 64 images, 28 px, 300 steps, student network | threads | images/s | ms a step | network alone, ms |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        speed, times = f"{row['images_per_s']:.2f}", f"{row['ms']:.0f} | {row['floor_ms']:.0f}"
        lines.append(f"| {row['provider']} | {row['threads']} | {speed} | {times} |")
    return lines


def metrics_table(folder: Path) -> list[str]:
    """Metrics: the fastest of the libraries' procedures and ours."""
    rows = _rows(folder, "metrics")
    lines = ["| metric, from features | size | threads | fastest library, s | ours, s | faster | MiB | ours, MiB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for ours in (row for row in rows if row["provider"] == "dgf-metrics" and "ms" in row):
        same = ("case", "shape", "threads")
        peers = [r for r in rows if r is not ours and "ms" in r and all(r[c] == ours[c] for c in same)]
        if not peers:
            continue
        peer = min(peers, key=lambda row: row["ms"])
        times = f"{peer['ms'] / 1e3:.2f} ({peer['provider']}) | {ours['ms'] / 1e3:.2f}"
        memory = f"{peer['peak_mib']:.0f} | {ours['peak_mib']:.0f}"
        ratio = f"{peer['ms'] / ours['ms']:.1f}×"
        lines.append(f"| {ours['case']} | {ours['shape']} | {ours['threads']} | {times} | {ratio} | {memory} |")
    return lines


def conv_table(folder: Path) -> list[str]:
    """Convolutions: torch's, which are oneDNN's, and ours; a row for each, with its three passes."""
    rows = [r for r in _rows(folder, "conv") if "ms" in r and r["threads"] == 2 and ", " in r["case"]]
    found: dict[str, dict[str, str]] = {}
    for ours in (r for r in rows if r["provider"] == "dgf" and "over_eager" in r):
        case, name = ours["case"].split(", ")
        passes = found.setdefault(f"{case}: {ours['shape'].removesuffix(', stride 1')}", {})
        passes[name] = f"{ours['ms'] * ours['over_eager']:.2f} → {ours['ms']:.2f} | {ours['over_eager']:.1f}×"
    names = list(dict.fromkeys(name for passes in found.values() for name in passes))
    header = "".join(f" {name}, torch's → ours, ms | faster |" for name in names)
    lines = [f"| 3×3 convolution, 2 threads |{header}", "|---" * (1 + 2 * len(names)) + "|"]
    lines += [
        f"| {case} | {' | '.join(passes.get(name, '– | –') for name in names)} |" for case, passes in found.items()
    ]
    return lines


def steps_table(folder: Path) -> list[str]:
    """Whole training steps: the reference procedure and ours."""
    rows = _rows(folder, "steps")
    lines = ["| a training step, 2 threads | batch | reference, ms | ours, ms | of it our kernels | networks alone, ms "
             "| ours is faster | reference, MiB | ours, MiB |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    rows = [row for row in rows if "ms" in row]
    for ours in (row for row in rows if row["provider"] in ("ours", "ours-kept")):
        same = [row for row in rows if (row["case"], row["shape"]) == (ours["case"], ours["shape"])]
        reference = next(row for row in same if row["provider"] == "reference")
        share = f"{ours['of_kernels']:.0%}" if "of_kernels" in ours else "–"
        times = f"{reference['ms']:.0f} | {ours['ms']:.0f} | {share} | {ours['floor_ms']:.0f}"
        sizes = " | ".join(f"{row['peak_mib']:.0f}" for row in (reference, ours))
        name = _case(ours | {"case": ours["case"] + ", recompute='none'" * (ours["provider"] == "ours-kept")})
        lines.append(f"| {name} | {times} | {reference['ms'] / ours['ms']:.2f}× | {sizes} |")
    return lines


def ddgan_table(folder: Path) -> list[str]:
    """DDGAN's training iteration and sampling."""
    rows = _rows(folder, "ddgan")
    lines = ["| Denoising Diffusion GAN, 2 threads | batch | arm | ms | images/s | operations say | is faster |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    rows = [row for row in rows if "ms" in row]
    for row in rows:
        first = next(r for r in rows if (r["case"], r["shape"]) == (row["case"], row["shape"]))
        ratios = f"{row['predicted']:.2f}× | {first['ms'] / row['ms']:.2f}×"
        lines.append(f"| {_case(row)} | {row['provider']} | {row['ms']:.0f} | {row['images_per_s']:.1f} | {ratios} |")
    return lines


def instance_noise_table(folder: Path) -> list[str]:
    """The noise of Diffusion-GAN."""
    rows = _rows(folder, "instance_noise")
    lines = [
        "| Diffusion-GAN's noise, float32, 2 threads | the reference, ms | ours, ms | ours is faster |",
        "|---|---|---|---|",
    ]
    rows = [row for row in rows if "ms" in row]
    for ours in (row for row in rows if row["provider"] == "ours" and "over_reference" in row):
        reference = ours["ms"] * ours["over_reference"]
        about = f"{ours['case']} [{ours['shape']}]"
        lines.append(f"| {about} | {reference:.2f} | {ours['ms']:.2f} | {ours['over_reference']:.1f}× |")
    step, noiser = (next(row for row in rows if row["provider"] == name) for name in ("step", "noiser"))
    lines.append(f"| all of it in a DCGAN's training step of {step['ms']:.0f} ms | | {noiser['ms']:.2f} | |")
    return lines


def _saved(folder: Path, benchmark: str) -> dict:
    return json.loads((folder / f"{benchmark}.json").read_text())


def _rows(folder: Path, benchmark: str) -> list[dict]:
    return _saved(folder, benchmark)["rows"]


def _case(row: dict) -> str:
    """Two cells: the case with the images' shape, and the batch."""
    batch, shape = row["shape"].split("x", 1)
    return f"{row['case']} [{shape}] | {batch}"


TABLES: list[tuple[Callable[[Path], list[str]], tuple[str, ...]]] = [  # and the benchmarks that each shows
    (ops_table, ("random", "noise", "step", "loss")),
    (penalty_table, ("penalty",)),
    (points_table, ("points",)),
    (conv_table, ("conv",)),
    (training_table, ("training",)),
    (steps_table, ("steps",)),
    (chain_tables, ("chain",)),
    (sampling_table, ("sampling",)),
    (ddgan_table, ("ddgan",)),
    (instance_noise_table, ("instance_noise",)),
    (metrics_table, ("metrics",)),
]


def section(folders: list[Path]) -> str:
    """What stands between the marks: every table, of the machine where its benchmarks were run last."""
    shown: dict[Path, list[tuple[list[str], list[dict]]]] = {}
    for make, benchmarks in TABLES:
        having = [f for f in folders if all((f / f"{name}.json").exists() for name in benchmarks)]
        if having:
            metas = {f: [_saved(f, name)["meta"] for name in benchmarks] for f in having}
            last = max(having, key=lambda f: min(m["date"] for m in metas[f]))
            shown.setdefault(last, []).append((make(last), metas[last]))
    lines = [BEGIN]
    # machines by what was run on them last
    for folder, tables in sorted(shown.items(), key=lambda item: max(m["date"] for _, ms in item[1] for m in ms))[::-1]:
        metas = [meta for _, of_table in tables for meta in of_table]
        kept = {"torch": None, "date": 10, "git": 9}  # characters
        torch, days, revisions = (", ".join(sorted({m[key][:n] for m in metas})) for key, n in kept.items())
        lines += [f"Measured on {folder.name} with torch {torch} ({days}; revisions {revisions}):"]
        lines += [line for table, _ in tables for line in (*([""] if table else []), *table)] + [""]
    return "\n".join([*lines[:-1], END])


def main(arguments: list[str]) -> int:
    folders = sorted(machine.RESULTS.glob("cpu-*"))
    if not folders:
        print("no results of a CPU: run python -m benchmarks NAME", file=sys.stderr)
        return 1
    text = README.read_text()
    before, rest = text.split(BEGIN)
    fresh = before + section(folders) + rest.split(END)[1]
    if "--check" in arguments:
        return 0 if fresh == text else 1
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
