"""The results, as Markdown tables; `biasshift figure bench` draws them."""

import json

from .harness import PRODUCT, RESULTS

QUESTIONS = ("kernel", "mlp", "cnn", "whole", "implicit", "overhead", "loop", "updates")
PRODUCT_OPERATIONS = 2 * PRODUCT**3
COLUMNS = {  # behind method and time; of all other questions memory and error
    "kernel": ["over the matrix product", "wanted", "error"],
    "whole": ["products of 2048³", "over its floor", "extra memory", "error"],
    "overhead": ["share of a step"],
    "loop": ["more than by hand"],
    "updates": ["steps of SGD", "error"],
}
CELLS = {
    "extra memory": lambda row: (
        "" if row.get("bytes") is None else f"{row['bytes'] / 2**20:.0f} MiB"
    ),
    "error": lambda row: f"{row['error']:.0e}",
    "products of 2048³": lambda row: f"{row['products']:.2f}",
    "over its floor": lambda row: (
        f"{row['products'] / (row['operations'] / PRODUCT_OPERATIONS):.1f} ×"
        if row.get("operations")
        else ""
    ),
    "share of a step": lambda row: f"{row['share']:+.1%}",
    "more than by hand": lambda row: f"{row['share']:+.1%}",
    "steps of SGD": lambda row: f"{row['steps_of_sgd']:.1f} ×",
    "over the matrix product": lambda row: f"{row['gemm_ratio']:.2f} ×",
    "wanted": lambda row: f"≥ {row['target']} ×",
}


def results() -> list[dict]:
    """Returns what was measured last, question by question, the CPU first."""
    files = [
        RESULTS / f"{question}_{device}.json"
        for question in QUESTIONS
        for device in ("cpu", "cuda")
    ]
    return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def table() -> str:
    """Returns one Markdown table per question, with what it was measured on.

    Also writes them to ``results/README.md``.
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
        parts += [
            "",
            f"## {result['title']}",
            "",
            *_rows(result),
            "",
            f"{result['device']}, {result['gemm_gflops']:.0f} GFLOP/s in a matrix product of "
            f"float32; {versions}; commit {result['commit']}, {result['date']}; "
            f"`{result['command']}`",
        ]
    text = "\n".join(parts) + "\n"
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    return text


def _rows(result: dict) -> list[str]:
    more = COLUMNS.get(result["question"], ["extra memory", "error"])
    by_method = {row["method"]: row.get("seconds") for row in result["rows"]}
    ours = by_method.get("biasshift")
    columns = ["method", "time", *(["against ours"] if ours else []), *more]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        if "seconds" in row:
            ratio = [f"{row['seconds'] / ours:.1f} ×"] if ours else []
            values = (CELLS[name](row) for name in more)
            cells = [row["method"], _time(row["seconds"]), *ratio, *values]
        else:
            cells = [row["method"], row["skipped"], *[""] * (len(columns) - 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
