"""Two processes that train one model: every one has the table of the whole probe.

This file is also the program that the processes run.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from trainings import data, loss, network

import biasshift as bs
from biasshift.integrations import share

STEPS = 4
OPTIONS = {"every": 2, "distributed": True}


def shared_probe():
    return share(*data())


def plain(folder):
    dist.init_process_group("gloo")
    model = network()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = share(*data())
    with bs.instrument(parallel, optimizer, (x, y), **OPTIONS) as log:
        for batch in range(STEPS):
            optimizer.zero_grad()
            loss(parallel, x[8 * batch : 8 * batch + 8], y[8 * batch : 8 * batch + 8]).backward()
            optimizer.step()
    dist.barrier()
    return log.table(), model


def accelerated(folder):
    """Two batches a step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with bs.instrument(model, optimizer, shared_probe(), **OPTIONS) as log:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, x, y))
                optimizer.step()
                optimizer.zero_grad()
    return log.table(), accelerator.unwrap_model(model)


def hugging_face(folder):
    from test_hugging_face import LAYERS, examples, train

    from biasshift.integrations import HuggingFaceCallback

    def probe():
        columns = examples()
        values = share(*columns.values())
        return dict(zip(columns, values, strict=True))

    callback = HuggingFaceCallback(probe, layers=LAYERS, **OPTIONS)
    trainer = train(folder, [callback], ddp_backend="gloo")
    return callback.table(), trainer.model


def lightning(folder):
    from test_lightning import fit

    from biasshift.integrations import LightningCallback

    callback = LightningCallback(shared_probe, model="net", **OPTIONS)
    _, module = fit([callback], root=folder, devices=2, strategy="ddp", max_epochs=1)
    return callback.table(), module.net


TRAININGS = {
    "plain": (plain, None),
    "accelerate": (accelerated, "accelerate"),
    "hugging_face": (hugging_face, "transformers"),
    "lightning": (lightning, "lightning"),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TRAININGS if name != "plain"]


@pytest.fixture(params=["plain", *SLOW])
def trained(request, tmp_path):
    """The tables of both processes, and the model as it was and is."""
    _, library = TRAININGS[request.param]
    if library is not None and find_spec(library) is None:
        pytest.skip(f"needs {library}")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, request.param, str(tmp_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(bs.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-4000:]
    tables = [pd.read_pickle(tmp_path / f"{rank}.pickle") for rank in range(2)]
    return request.param, tables, torch.load(tmp_path / "model.pt", weights_only=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_process_has_the_table_of_the_whole_probe(trained):
    name, (first, second), state = trained
    pd.testing.assert_frame_equal(first, second)
    assert sorted(set(first.step)) == [0, 2, 4]
    options = {"damping": 1e-4}
    if name == "hugging_face":
        from test_hugging_face import LAYERS, examples, model

        network_, probe, options = model(), examples(), {"layers": LAYERS, **options}
    else:
        network_, probe = network(), data()[0]
    for step in (0, 4):  # measured by one process, before and after
        if step:
            network_.load_state_dict(state)
        fishers = bs.unit_fisher(network_.eval(), probe, **options)
        for layer, fisher in fishers.items():
            rows = first[(first.layer == layer) & (first.step == step) & (first.unit >= 0)]
            np.testing.assert_allclose(rows.s, fisher.s, rtol=1e-3)
            np.testing.assert_allclose(rows.mean_delta2, fisher.mean_delta2, rtol=1e-4)


def test_a_process_alone_has_all():
    x, y = data()
    assert torch.equal(share(x), x) and share(x, y)[1] is not None and share([1, 2]) == [1, 2]


if __name__ == "__main__":
    training, out = TRAININGS[sys.argv[1]][0], Path(sys.argv[2])
    rank = os.environ["RANK"]
    table, model = training(out)
    table.to_pickle(out / f"{rank}.pickle")
    if rank == "0":
        torch.save(model.state_dict(), out / "model.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
