"""The code of the how-to runs, section by section, where its libraries are installed."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "integrations.md"
NEEDS = {
    "Lightning": ["lightning"],
    "Hugging Face": ["transformers", "accelerate"],
    "Loggers": ["lightning", "tensorboard", "wandb", "mlflow"],
    "accelerate": ["accelerate"],
    "Plain DDP": [],
}


def sections():
    """The code of every section, "" for what all begin with."""
    head, *rest = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = {"": head, **dict(zip(rest[::2], rest[1::2], strict=True))}
    return {
        name: "\n".join(re.findall(r"```py\n(.*?)```", text, re.DOTALL))
        for name, text in texts.items()
    }


def test_every_section_is_known():
    assert list(sections()) == ["", *NEEDS]


@pytest.mark.slow
@pytest.mark.parametrize("section", NEEDS)
def test_the_code_of_a_section_runs(section, tmp_path):
    for library in NEEDS[section]:
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
    code = sections()
    lightning = code["Lightning"] if section == "Loggers" else ""
    measured = "log" if section in ("accelerate", "Plain DDP", "Loggers") else "callback"
    check = f"assert len(set({measured}.table().step)) > 2"
    program = tmp_path / "program.py"
    program.write_text("\n".join([code[""], lightning, code[section], check]), encoding="utf-8")
    command = [sys.executable, "-W", "ignore"]
    if section in ("accelerate", "Plain DDP"):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_SILENT": "true",
        "PYTHONPATH": str(PAGE.parents[2]), "ACCELERATE_USE_CPU": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    command += [str(program)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr[-4000:]
