"""``python -m benchmarks [--shared] [question …]``: asks all or those, and writes tables.

``--shared`` is for a machine that others use too: one thread, and CPU seconds instead of those of
the clock on the wall.
"""

import importlib
import os
import sys

import torch

from .harness import SHARED, devices, write
from .report import QUESTIONS, table


def main(questions: list[str]) -> None:
    """Answers the questions one after the other, and prints all tables."""
    unknown = [question for question in questions if question not in QUESTIONS]
    if unknown:
        sys.exit(
            f"There is no question {', '.join(unknown)}. Ask {', '.join(QUESTIONS)}, or report, "
            "which only prints the tables."
        )
    for question in questions:
        module = importlib.import_module(f"benchmarks.{question}")
        print(f"{question}: {module.TITLE}", flush=True)
        for device in devices():
            write(question, device, module.TITLE, module.rows(device), **module.HEADER)
    print(table())


if __name__ == "__main__":
    if "--shared" in sys.argv:
        os.environ |= {SHARED: "1", "OMP_NUM_THREADS": "1"}  # the workers' too
        torch.set_num_threads(1)
    asked = [question for question in sys.argv[1:] if question != "--shared"] or list(QUESTIONS)
    main([] if asked == ["report"] else asked)
