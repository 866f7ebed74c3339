"""The results, as Markdown tables; `biasshift figure bench` draws them."""

import json

from .harness import RESULTS

QUESTIONS = ("kernel", "mlp", "cnn", "implicit", "overhead", "loop", "updates")


def results() -> list[dict]:
    """What was measured last, question by question, the CPU first."""
    files = [
        RESULTS / f"{question}_{device}.json"
        for question in QUESTIONS
        for device in ("cpu", "cuda")
    ]
    return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def table() -> str:
    """One Markdown table per question, with what it was measured on. Also written to
    ``results/README.md``.
    """
    parts = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks`. Times are medians of interleaved repeats; memory is "
        "the growth of a fresh process.",
        "Shares and ratios are medians over pairs, one measured right after the other: on a busy "
        "machine they hold better than times.",
    ]
    for result in results():
        versions = ", ".join(
            f"{package} {version}" for package, version in result["versions"].items() if version
        )
        machine = f"{result['device']}, {result['gemm_gflops']:.0f} GFLOP/s in a matrix product of float32"
        parts += ["", f"## {result['title']}", "", *_rows(result), ""]
        parts += [
            f"{machine}; {versions}; commit {result['commit']}, {result['date']}; "
            f"`{result['command']}`"
        ]
    text = "\n".join(parts) + "\n"
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    return text


def _rows(result: dict) -> list[str]:
    ours = next(
        (row.get("seconds") for row in result["rows"] if row["method"] == "biasshift"), None
    )
    columns = ["method", "time", *(["against ours"] if ours else []), *_columns(result)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        if "seconds" in row:
            cells = [
                row["method"],
                _time(row["seconds"]),
                *([f"{row['seconds'] / ours:.1f} ×"] if ours else []),
            ]
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
    return (
        f"{row['gemm_ratio']:.2f} ×"
        if column == "over the matrix product"
        else f"≥ {row['target']} ×"
    )


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
