"""``python -m benchmarks [question …]``: asks all questions or some, and draws the table and the figure from the results."""

import importlib
import sys

from .report import QUESTIONS, draw, table


def main(questions: list[str]) -> None:
    unknown = [question for question in questions if question not in QUESTIONS]
    if unknown:
        sys.exit(f"no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}, and report, which asks none")
    for question in questions:
        module = importlib.import_module(f"benchmarks.{question}")
        print(f"{question}: {module.TITLE}", flush=True)
        module.main()
    print(table())
    draw()


if __name__ == "__main__":
    asked = sys.argv[1:] or list(QUESTIONS)
    main([] if asked == ["report"] else asked)
