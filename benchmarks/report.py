"""The results, as a Markdown table and a figure."""

import json
from pathlib import Path

from .harness import RESULTS

QUESTIONS = ("kernel", "mlp", "cnn", "implicit", "overhead", "loop", "updates")
COMPARED = ("mlp", "cnn")  # those in the figure: time and memory of every method


def results() -> list[dict]:
    """What was measured last, question by question, the CPU first."""
    files = [RESULTS / f"{question}_{device}.json" for question in QUESTIONS for device in ("cpu", "cuda")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def table() -> str:
    """One Markdown table per question, with what it was measured on. Also written to ``results/README.md``."""
    parts = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks`. Times are medians of interleaved repeats; memory is the growth of a fresh process.",
    ]
    for result in results():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if version)
        machine = f"{result['device']}, {result['gemm_gflops']:.0f} GFLOP/s in a matrix product of float32"
        parts += ["", f"## {result['title']}", "", *_rows(result), ""]
        parts += [f"{machine}; {versions}; commit {result['commit']}, {result['date']}; `{result['command']}`"]
    text = "\n".join(parts) + "\n"
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    return text


def _rows(result: dict) -> list[str]:
    ours = next((row.get("seconds") for row in result["rows"] if row["method"] == "biasshift"), None)
    columns = ["method", "time", *(["against ours"] if ours else []), *_columns(result)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        if "seconds" in row:
            cells = [row["method"], _time(row["seconds"]), *([f"{row['seconds'] / ours:.1f} ×"] if ours else [])]
            cells += [_cell(row, column) for column in _columns(result)]
        else:
            cells = [row["method"], row["skipped"], *[""] * (len(columns) - 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _columns(result: dict) -> list[str]:
    if result["question"] == "kernel":
        return ["over the matrix product", "wanted", "error"]
    if result["question"] == "overhead":
        return ["share of a step"]
    if result["question"] == "loop":
        return ["more than by hand"]
    if result["question"] == "updates":
        return ["steps of SGD", "error"]
    return ["extra memory", "error"]


def _cell(row: dict, column: str) -> str:
    if column == "extra memory":
        return "" if row.get("bytes") is None else f"{row['bytes'] / 2**20:.0f} MiB"
    if column == "error":
        return f"{row['error']:.0e}"
    if column in ("share of a step", "more than by hand"):
        return f"{row['share']:+.1%}"
    if column == "steps of SGD":
        return f"{row['steps_of_sgd']:.1f} ×"
    return f"{row['gemm_ratio']:.2f} ×" if column == "over the matrix product" else f"≥ {row['target']} ×"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def draw() -> Path | None:
    """Time against memory for every method, both on log scales: down and left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [result for result in results() if result["question"] in COMPARED]
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), squeeze=False, layout="constrained")
    for ax, result in zip(axes[0], shown, strict=True):
        for number, row in enumerate(result["rows"]):
            if row.get("seconds") and row.get("bytes"):
                ours = row["method"] == "biasshift"
                x, y = row["seconds"], row["bytes"] / 2**20
                ax.plot(x, y, "o", color="#c0392b" if ours else "#555555", markersize=8 if ours else 6)
                ax.annotate(
                    row["method"],
                    (x, y),
                    xytext=(6, 5 if number % 2 else -12),
                    textcoords="offset points",
                    fontsize=9,
                    weight="bold" if ours else "normal",
                )
        ax.set(xscale="log", yscale="log", xlabel="time / s", ylabel="extra memory / MiB")
        ax.margins(0.25)
        ax.set_title(result["title"].split(",")[0], fontsize=10)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3, which="both")
    path = RESULTS / "benchmarks.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
