"""The blocks of one layer: how fast sums of outer products are, against plain matrix products."""

from statistics import median

import torch

from biasshift.fisher import packed

from .harness import interleaved, seconds, summary

TITLE = (
    "Blocks of one layer with as many units as inputs, 4096 samples, against a 2048³ matrix "
    "product (naive operations per second)"
)
SAMPLES, SIZE = 4096, 2048
# The rate over that of the matrix product, counting the naive 2 N m d² operations.
TARGETS = {128: 1.1, 256: 1.3, 512: 1.3}
HEADER: dict = {}  # the target stands in each row


def ratio(inputs: int, device: str, repeats: int) -> dict:
    """Times the kernel between two matrix products, again and again: a busy machine slows both."""
    torch.manual_seed(0)
    a = torch.randn(SAMPLES, inputs, device=device)
    weights = torch.rand(SAMPLES, inputs, device=device)
    left, right = torch.randn(2, SIZE, SIZE, device=device).unbind()

    def blocks() -> packed.Rows:
        rows = packed.zeros(inputs, inputs, a.device)
        packed.add_weighted(rows, a, weights)
        return rows

    runs = {"before": lambda: left @ right, "blocks": blocks, "after": lambda: left @ right}
    times = interleaved(runs, lambda name: seconds(runs[name], device), repeats)
    rates = [
        (2 * SAMPLES * inputs**3 / taken) / (4 * SIZE**3 / (before + after))
        for before, taken, after in zip(*times.values(), strict=True)
    ]
    exact = torch.einsum("n,ni,nj->ij", weights[:, 0].double(), a.double(), a.double())
    error = ((packed.dense(blocks(), slice(0, 1))[0] - exact).norm() / exact.norm()).item()
    method = f"{inputs} inputs, {inputs} units"
    print(
        f"  {method}: {median(rates):.2f} × the matrix product (best {max(rates):.2f}), error "
        f"{error:.0e}",
        flush=True,
    )
    return {
        "method": method,
        **summary(times["blocks"]),
        "gemm_ratio": median(rates),
        "best_gemm_ratio": max(rates),
        "target": TARGETS[inputs],
        "error": error,
    }


def rows(device: str, repeats: int = 9) -> list[dict]:
    """Returns one row per size of the layer."""
    return [ratio(inputs, device, repeats) for inputs in TARGETS]
