"""`LightningCallback` in real trainings by Lightning."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from trainings import data, loss, network

lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")

import biasshift as bs  # noqa: E402
from biasshift.integrations import LightningCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance|litlogger|GPU|log_every_n)"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|checkpoint|mid-epoch|resum|directory)"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.net, self.losses, self.fail_at = network(), [], fail_at

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        if self.fail_at == index:
            raise ArithmeticError("the training failed")
        value = loss(self, *batch)
        self.losses.append(value.item())
        return value

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(callbacks=(), module=None, root=None, checkpoint=None, trainers=lightning, **options):
    module = module or Classifier()
    loader = DataLoader(TensorDataset(*data()), batch_size=8)  # 8 batches
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = trainers.Trainer(
        accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer, module


def steps(table):
    return sorted(set(table.step))


def test_a_training_is_measured_and_stays_as_it_is(tmp_path):
    _, plain = fit(root=tmp_path)
    callback = LightningCallback(data(), every=4)
    trainer, measured = fit([callback], root=tmp_path)
    assert measured.losses == plain.losses and len(plain.losses) == 8
    assert steps(callback.table()) == [0, 4, 8] and callback.probe_log.step == trainer.global_step
    compact = callback.table(compact=True)
    assert {"net.0", "net.1", "net.2", "net.3"} == set(compact.layer) and "own" in compact
    last = callback.table().query("step == 8")
    fishers = bs.unit_fisher(measured.eval(), data()[0], damping=1e-4)
    for name in ("net.0", "net.3"):
        own = last[(last.layer == name) & (last.unit >= 0)]
        np.testing.assert_allclose(own.coupling, fishers[name].coupling, rtol=1e-4)
    for module in measured.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_gradients_of_several_batches_are_one_step(tmp_path):
    callback = LightningCallback(data(), every=1, quantities="activations")
    trainer, _ = fit([callback], root=tmp_path, accumulate_grad_batches=4)
    assert steps(callback.table()) == [0, 1, 2] and trainer.global_step == 2


def test_steps_go_on_from_a_checkpoint(tmp_path):
    options = {"quantities": ("activations", "bias_shift")}
    whole = LightningCallback(data(), every=4, **options)
    fit([whole], root=tmp_path, max_epochs=2)
    first = LightningCallback(data(), every=4, **options)
    trainer, _ = fit([first], root=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module = Classifier()
    module.net[2].p = 0.2
    second = LightningCallback(data(), every=4, **options)
    fit([second], module, tmp_path, tmp_path / "last.ckpt", max_epochs=2)
    assert steps(second.table()) == [8, 12, 16] and steps(whole.table()) == [0, 4, 8, 12, 16]
    state = whole.table().query("step == 8 and layer == 'net.1'")
    again = second.table().query("step == 8 and layer == 'net.1'")
    np.testing.assert_allclose(again["mean"], state["mean"], rtol=1e-6)  # the same parameters
    without = LightningCallback(data(), every=4, model="net", **options)  # of another state key
    fit([without], Classifier(), tmp_path, tmp_path / "last.ckpt", max_epochs=2)
    assert steps(without.table()) == [8, 12, 16]


def test_an_exception_takes_the_hooks_off(tmp_path):
    callback, module = LightningCallback(data(), every=2), Classifier(fail_at=5)
    with pytest.raises(ArithmeticError, match="the training failed"):
        fit([callback], module, tmp_path)
    assert steps(callback.table()) == [0, 2, 4]
    assert not any(m._forward_hooks for m in module.modules())
    assert not callback.probe_log._is_on


class TwoOptimizers(Classifier):
    """The second optimizer takes a step for two of the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers()[: 1 + index % 2]:
            optimizer.zero_grad()
            self.manual_backward(loss(self, *batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]


def test_one_of_several_optimizers_is_counted(tmp_path):
    callbacks = [LightningCallback(data(), every=2, optimizer=i) for i in (0, 1)]
    trainer, _ = fit(callbacks, TwoOptimizers(), tmp_path)
    assert trainer.global_step == 12
    assert [steps(c.table()) for c in callbacks] == [[0, 2, 4, 6, 8], [0, 2, 4]]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = LightningCallback(data(), every=2, optimizer=1)
    fit([resumed], TwoOptimizers(), tmp_path, tmp_path / "two.ckpt", max_epochs=2)
    assert steps(resumed.table()) == [4, 6, 8]
    unknown = LightningCallback(data(), every=3, optimizer=1)
    with pytest.warns(RuntimeWarning, match="whose steps begin at 0"):
        fit([unknown], TwoOptimizers(), tmp_path, tmp_path / "two.ckpt", max_epochs=2)
    with pytest.raises(ValueError, match="'optimizer' must be less than 1"):
        fit([LightningCallback(data(), optimizer=1)], root=tmp_path)


def test_the_loggers_of_the_trainer_get_the_rows_of_layers(tmp_path):
    csv = pytest.importorskip("lightning.pytorch.loggers").CSVLogger(tmp_path)
    callback = LightningCallback(data(), every=4, loggers=True)
    fit([callback], root=tmp_path, logger=csv)
    import pandas as pd

    table = pd.read_csv(f"{csv.log_dir}/metrics.csv")
    found = table.dropna(subset="biasshift/net.0/cos_gradient").set_index("step")
    own = callback.table()
    own = own[(own.layer == "net.0") & (own.unit == -1)].set_index("step").cos_gradient
    np.testing.assert_allclose(found["biasshift/net.0/cos_gradient"], own)


def test_without_a_probe_the_training_batches_are_measured(tmp_path):
    callback = LightningCallback(None)
    fit([callback], root=tmp_path)
    table = callback.table(compact=True)
    assert set(table.step) == {8} and "ELU" in set(table.kind) and "mean" in table
    with pytest.raises(ValueError, match="'probe' must be there"):
        LightningCallback(None, to=[print])
    with pytest.raises(ValueError, match="'loggers' must be False"):
        LightningCallback(None, loggers=True)


def test_the_other_package_of_lightning(tmp_path):
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

    class Own(other.LightningModule):
        __init__, forward = Classifier.__init__, Classifier.forward
        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    Own.__init__ = lambda self: (other.LightningModule.__init__(self), self.__dict__.update(
        losses=[], fail_at=None), setattr(self, "net", network()), None)[-1]  # fmt: skip
    callback = LightningCallback(data(), every=4)
    fit([callback], Own(), tmp_path, trainers=other)
    assert steps(callback.table()) == [0, 4, 8]


def test_a_table_before_training_is_refused():
    with pytest.raises(RuntimeError, match="begins with training"):
        LightningCallback(data()).table()
