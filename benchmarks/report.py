"""What becomes of rows: the best of several processes, ratios, one aligned table, and a CSV and a JSON file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from matplotlib.figure import Figure

CASE = ("benchmark", "case", "shape", "dtype", "device", "threads")
RATIOS = {  # ratio column: the providers whose best it refers to
    "over_eager": ("eager",),
    "over_compile": ("compile", "compile-fallback", "compile-autograd"),
    "over_diffusers": ("diffusers",),
    "over_as_coded": ("as-coded",),
    "over_reference": ("reference",),
    "over_ddpm": ("ddpm",),
    "over_libraries": ("sqrtm", "eigvals", "subset", "prdc"),
}
COLUMNS = (*CASE, "provider", "status", "ms", "p20_ms", "p80_ms", "host_ms", "floor_ms", "ns_per_element",
           "bytes_per_element", "gb_per_s", "ops_per_element", "images_per_s", "macs", "peak_mib", "expected_mib",
           *RATIOS, "predicted", "over_none", "of_copy", "of_step", "of_kernels")  # fmt: skip
STAMPS = ("machine", "torch", "triton", "python", "git", "dirty", "date")
SHOWN = ("case", "shape", "dtype", "threads", "provider", "ms", "p20_ms", "p80_ms", "host_ms", "floor_ms",
         "ns_per_element", "gb_per_s", "images_per_s", "macs", "peak_mib", "expected_mib", *RATIOS,
         "predicted", "over_none", "of_copy", "of_step", "of_kernels", "status")  # fmt: skip


def best(rows: list[dict]) -> list[dict]:
    """Of the rows of several processes, for each provider the one with the least median; red if any was red."""
    found: dict[tuple, dict] = {}
    for row in rows:
        name = tuple(row[c] for c in (*CASE, "provider"))
        held = found.get(name)
        if held is None or held["status"] == "ok" and (row["status"] != "ok" or row["ms"] < held["ms"]):
            found[name] = row
    return list(found.values())


def with_ratios(rows: list[dict]) -> list[dict]:
    """Rows with the times of the peers of the same case over their own (above 1: faster), and GB/s over the copy's."""
    times: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            times.setdefault(tuple(row[c] for c in CASE), {})[row["provider"]] = row
    done = []
    for row in rows:
        peers = times.get(tuple(row[c] for c in CASE), {})
        ratios = {}
        if row["status"] == "ok":
            for column, names in RATIOS.items():
                if base := [peers[name]["ms"] for name in names if name in peers]:
                    ratios[column] = min(base) / row["ms"]
            if "copy" in peers:
                ratios["of_copy"] = row["gb_per_s"] / peers["copy"]["gb_per_s"]
        done.append(row | ratios)
    return done


def red(rows: list[dict]) -> list[dict]:
    """The rows whose provider computed something else."""
    return [row for row in rows if row["status"] != "ok"]


def _cell(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """All rows, one line each, in aligned columns; empty columns are left out."""
    shown = [c for c in SHOWN if any(row.get(c) is not None for row in rows)]
    lines = [shown, *([_cell(row.get(c)) for c in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    left = ("case", "shape", "dtype", "provider", "status")

    def text(line: list[str]) -> str:
        cells = zip(line, widths, shown, strict=True)
        return "  ".join(c.ljust(w) if name in left else c.rjust(w) for c, w, name in cells).rstrip()

    return "\n".join(map(text, lines))


def save(folder: Path, name: str, rows: list[dict], meta: dict) -> list[Path]:
    """Writes folder/<machine>/<name>.csv and .json, and of whole steps a plot, in place of earlier ones."""
    folder = folder / meta["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv", folder / f"{name}.json"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *STAMPS))
        writer.writeheader()
        for row in rows:
            cells = {c: _cell(row.get(c)) for c in COLUMNS} | {c: _cell(meta.get(c)) for c in STAMPS}
            writer.writerow(cells)
    paths[1].write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    return paths + ([plot(rows, folder / f"{name}.png")] if name == "steps" else [])


def plot(rows: list[dict], path: Path) -> Path:
    """Bars of images/s, a panel for each case and shape, every provider over the reference's and below the floor."""
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            panels.setdefault((row["case"], row["shape"], row["threads"]), []).append(row)
    figure = Figure(figsize=(9, 0.5 + 1.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, ((case, shape, threads), found) in zip(axes, panels.items(), strict=True):
        names, speeds = [row["provider"] for row in found], [row["images_per_s"] for row in found]
        ax.barh(names, speeds)
        most = found[0]["images_per_s"] * found[0]["ms"] / found[0]["floor_ms"]
        ax.axvline(most, color="black", linestyle=":", label="networks alone")
        ax.invert_yaxis()
        ax.set_title(f"{case}, {shape}, {threads} threads", fontsize=9, loc="left")
    if len(panels):
        axes[0].legend(fontsize=8)
        axes[-1].set_xlabel("images/s")
    figure.savefig(path, dpi=100)
    return path
