"""Runs notebooks and keeps their outputs: `python notebooks/execute.py notebooks/*.ipynb`. Twice
the same, the same bytes.

Widgets have names drawn by chance, and are numbered instead; no timings and no versions are kept;
one thread, so that sums are added in one order on machines with any number of cores.
"""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError

STATE, VIEW = (
    "application/vnd.jupyter.widget-state+json",
    "application/vnd.jupyter.widget-view+json",
)
SECONDS = 120  # for a cell; a whole notebook takes half a minute
TRIES = 3  # a kernel that starts on a busy machine now and then loses a message, and waits for ever


def executed(notebook: nbformat.NotebookNode, folder: str | Path) -> nbformat.NotebookNode:
    """Run top to bottom in a kernel of its own, in a folder; its outputs take the place of older
    ones.
    """
    notebook.metadata.pop("widgets", None)
    for attempt in range(1, TRIES + 1):
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        try:
            client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
            break
        except CellTimeoutError:
            if attempt == TRIES:
                raise
    notebook.metadata.language_info.pop("version", None)
    return renumbered(notebook)


def renumbered(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Widgets named by their order of appearance, in what is shown and then in what that is made
    of; others are dropped.
    """
    shown = [
        output.data[VIEW].model_id
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if VIEW in output.get("data", {})
    ]
    if not shown:
        return notebook
    states, names = notebook.metadata.widgets[STATE]["state"], dict[str, str]()
    while shown:
        name = shown.pop(0)
        if name not in names:
            names[name] = f"{len(names):032x}"
            shown += re.findall(r"IPY_MODEL_(\w+)", json.dumps(states[name], sort_keys=True))
    notebook.metadata.widgets[STATE]["state"] = {name: states[name] for name in names}
    text = re.sub("|".join(names), lambda found: names[found.group()], nbformat.writes(notebook))
    return nbformat.reads(text, as_version=4)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print(path, flush=True)
        nbformat.write(executed(nbformat.read(path, as_version=4), path.parent), path)
