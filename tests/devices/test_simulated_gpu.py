"""Runs the tests of `on_the_gpu.py` in a process of their own: they register a device for good."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_this_process_has_no_simulated_gpu():
    """With one, `nn.DataParallel` takes it for the machine's, in any test that comes later."""
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_measurements_and_steps_on_a_simulated_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_the_gpu.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
