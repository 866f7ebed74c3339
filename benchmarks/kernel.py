"""The blocks of one layer: how fast the sums of outer products are built, against the machine's own
matrix product.
"""

from statistics import median

import torch

from biasshift.fisher import packed

from .harness import devices, seconds, write

TITLE = "Blocks of one layer with as many units as inputs, 4096 samples, against a 2048³ matrix product (naive operations per second)"
SAMPLES, SIZE = 4096, 2048
TARGETS = {
    128: 1.1,
    256: 1.3,
    512: 1.3,
}  # rate over that of the matrix product, counting the naive 2 N m d² operations


def ratio(inputs: int, device: str, repeats: int) -> dict:
    """The kernel between two matrix products, again and again: a busy machine slows both."""
    torch.manual_seed(0)
    a, weights = (
        torch.randn(SAMPLES, inputs, device=device),
        torch.rand(SAMPLES, inputs, device=device),
    )
    left, right = torch.randn(2, SIZE, SIZE, device=device).unbind()

    def blocks() -> packed.Rows:
        rows = packed.zeros(inputs, inputs, a.device)
        packed.add_weighted(rows, a, weights)
        return rows

    def product() -> torch.Tensor:
        return left @ right

    rates, times = [], []
    for _ in range(repeats + 1):
        before, taken, after = (
            seconds(product, device),
            seconds(blocks, device),
            seconds(product, device),
        )
        times.append(taken)
        rates.append((2 * SAMPLES * inputs**3 / taken) / (4 * SIZE**3 / (before + after)))
    exact = torch.einsum("n,ni,nj->ij", weights[:, 0].double(), a.double(), a.double())
    error = ((packed.dense(blocks(), slice(0, 1))[0] - exact).norm() / exact.norm()).item()
    row = {
        "method": f"{inputs} inputs, {inputs} units",
        "seconds": median(times[1:]),
        "fastest": min(times[1:]),
        "repeats": repeats,
    }
    print(
        f"  {row['method']}: {median(rates[1:]):.2f} × the matrix product (best "
        f"{max(rates[1:]):.2f}), error {error:.0e}",
        flush=True,
    )
    return {
        **row,
        "gemm_ratio": median(rates[1:]),
        "best_gemm_ratio": max(rates[1:]),
        "target": TARGETS[inputs],
        "error": error,
    }


def main(repeats: int = 9) -> None:
    for device in devices():
        write("kernel", device, TITLE, [ratio(inputs, device, repeats) for inputs in TARGETS])
