"""Where an experiment computes: on the CPU or a GPU of CUDA, and one GPU for each process."""

import pytest
import torch

from biasshift.cli import main
from biasshift.experiments.demo import Demo

UNKNOWN = "mps meta xpu tpu hpu cpu:3 cpu:0 CPU cuda: cuda:x cuda:-1 cuda:01 cuda:0:1 gpu".split()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes PyTorch find so many GPUs, and torchrun's variables say what is given."""

    def found(count: int, **variables: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return found


@pytest.mark.parametrize("device", [*UNKNOWN, "", " ", "cpu\n", "a\nb", "cuda:٣", "cuda:7"])
@pytest.mark.parametrize("command", [["demo", "--smoke"], ["train", "mnist"], ["sweep"]])
def test_other_devices_end_in_one_sentence_before_anything_is_written(
    command, device, gpus, tmp_path, capsys
):
    gpus(2)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--device", device, "--out", str(tmp_path / "runs")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and not list(tmp_path.iterdir())
    expected = "must be a GPU, and PyTorch finds 2" if device == "cuda:7" else repr(device)
    assert err.startswith("biasshift: --device ") and expected in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("count", "device", "expected"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices_that_are_there(count, device, expected, gpus):
    gpus(count)
    assert Demo(device=device).where() == torch.device(expected)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:999999"])
def test_a_gpu_needs_a_gpu(device, gpus):
    gpus(0)
    with pytest.raises(ValueError, match=f"--device {device} must be a GPU, and PyTorch finds 0"):
        Demo(device=device).where()


def test_processes_of_torchrun_have_a_gpu_each(gpus):
    gpus(2, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, LOCAL_RANK=1)
    assert Demo().where() == Demo(device="cuda").where() == torch.device("cuda:1")
    assert Demo(device="cpu").where() == torch.device("cpu")
    with pytest.raises(ValueError, match=r"--device must be cuda under torchrun.* got 'cuda:0'"):
        Demo(device="cuda:0").where()


def test_one_process_a_machine_may_name_its_gpu(gpus):
    gpus(2, WORLD_SIZE=4, LOCAL_WORLD_SIZE=1, LOCAL_RANK=0)
    assert Demo(device="cuda:1").where() == torch.device("cuda:1")


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(2, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4, LOCAL_RANK=3)
    with pytest.raises(ValueError, match=r"each of the 2 GPUs .* this is number 4"):
        Demo().where()
