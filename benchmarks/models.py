"""``python -m benchmarks.models [name …]``: how much of published models is measured by default.

Each model is built with random weights, and goes through `unit_fisher`, `activation_moments`,
`check` and three steps under `instrument`, by default calls but for one kept unit a layer and one
drawn label an example. The table goes to ``results/models.csv``, a row as soon as it is there, and
models that have a row are not measured again. It takes hours of one core; timm and transformers
must be installed, and are no dependency of the project.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import biasshift as bs
from benchmarks.published import models
from biasshift.measure.outputs import chosen_output

RESULTS = Path(__file__).parent / "results" / "models.csv"
STEPS = 3


def units_of(model: nn.Module) -> list[str]:
    """Returns the names of all linear layers, convolutions and projections of attention."""
    kinds = nn.Linear | nn.modules.conv._ConvNd
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    ]
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return names + [f"{name}.{part}_proj" for name in attention for part in "qkv"]


def row(name: str) -> dict[str, Any]:
    """Returns the counts of one model, the largest error of a layer, and what was left out."""
    torch.manual_seed(0)
    model, probe, options = models()[name]()
    model.eval()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fishers = bs.unit_fisher(model, probe, labels="sampled", units=[0], **options)
        moments = bs.activation_moments(model, probe)
        table = bs.check(model, probe, examples=2, **options)
        rows = _three_steps(model, probe, options)
    layers = table[table.units > 0]
    left_out = layers[~layers.covered]
    return {
        "model": name,
        "layers": len(units_of(model)),
        "measured": len(fishers),
        "covered by check": int(layers.covered.sum()),
        "largest error": layers.error.max(),
        "not compared": int((layers.covered & layers.error.isna()).sum()),
        "activation modules": len(moments),
        "instrumented rows": rows,
        "cpu seconds": round(time.process_time() - start, 1),
        "left out": json.dumps(dict(zip(left_out.module, left_out.reason, strict=True))),
    }


def _three_steps(model: nn.Module, probe: Any, options: dict[str, Any]) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    quantities = ("activations", "bias_shift", "fisher")
    options = {"quantities": quantities, "labels": "sampled", "units": [0], **options}
    with bs.instrument(model, optimizer, probe, every=STEPS, **options) as log:
        for _ in range(STEPS):
            optimizer.zero_grad()
            returned = model(**probe) if isinstance(probe, dict) else model(probe)
            chosen_output(returned, options.get("output")).float().square().mean().backward()
            optimizer.step()
    return len(log.table())


def main(names: list[str]) -> None:
    """Adds the rows of the named models, or of all that have none, and prints the table."""
    table = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame({"model": []})
    for name in names or [name for name in models() if name not in set(table.model)]:
        new = row(name)
        table = pd.concat([table[table.model != name], pd.DataFrame([new])], ignore_index=True)
        table.to_csv(RESULTS, index=False)
        print(name, new["measured"], "of", new["layers"], f"{new['largest error']:.0e}", flush=True)
    print(f"{table.measured.sum():.0f} of {table.layers.sum():.0f} layers are measured.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
