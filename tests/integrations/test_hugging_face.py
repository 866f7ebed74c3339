"""`HuggingFaceCallback` in real trainings by the Trainer of transformers."""

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

import biasshift as bs  # noqa: E402
from biasshift.integrations import HuggingFaceCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
WORDS = 40


def examples(n=32):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, WORDS, (n, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


class Rows(torch.utils.data.Dataset):
    def __init__(self, columns, fail_at=None):
        self.columns, self.fail_at = columns, fail_at

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, i):
        if self.fail_at is not None and i == self.fail_at:
            raise ArithmeticError("the data failed")
        return {name: column[i] for name, column in self.columns.items()}


def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def train(folder, callbacks=(), network=None, resume=None, fail_at=None, **options):
    options = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "seed": 7, "logging_nan_inf_filter": False, **options,
    }  # fmt: skip
    trainer = transformers.Trainer(
        network or model(),
        transformers.TrainingArguments(str(folder), **options),
        train_dataset=Rows(examples(), fail_at),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def norms(trainer):
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def steps(table):
    return sorted(set(table.step))


LAYERS = ["bert.pooler.dense", "classifier"]


def test_a_training_is_measured_and_stays_as_it_is(tmp_path):
    plain = train(tmp_path)
    callback = HuggingFaceCallback(examples(), every=4, layers=LAYERS)
    measured = train(tmp_path, [callback])
    assert losses(measured) == losses(plain) and len(losses(plain)) == 8
    assert norms(measured) == norms(plain)
    for mine, theirs in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    table = callback.table()
    assert steps(table) == [0, 4, 8] and set(table.layer) == set(LAYERS)
    fishers = bs.unit_fisher(measured.model.eval(), examples(), layers=LAYERS, damping=1e-4)
    last = table.query("step == 8 and unit >= 0")
    for name in LAYERS:
        np.testing.assert_allclose(
            last[last.layer == name].coupling, fishers[name].coupling, rtol=1e-3
        )
    assert last.shift_gradient.notna().any()  # of the gradients that the step used
    assert not any(m._forward_hooks for m in measured.model.modules())


def test_gradients_of_several_batches_are_one_step(tmp_path):
    callback = HuggingFaceCallback(examples(), every=1, layers=LAYERS, quantities="bias_shift")
    trainer = train(tmp_path, [callback], gradient_accumulation_steps=4)
    assert trainer.state.global_step == 2 and callback.probe_log.step == 2
    assert steps(callback.table()) == [1, 2]


def test_steps_go_on_from_a_checkpoint(tmp_path):
    options = {"every": 2, "layers": ["classifier"], "quantities": "fisher"}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = HuggingFaceCallback(examples(), **options)
    trainer = train(tmp_path, [whole], **saving)
    resumed = HuggingFaceCallback(examples(), **options)
    again = train(tmp_path, [resumed], resume=str(tmp_path / "checkpoint-4"), **saving)
    assert steps(whole.table()) == [0, 2, 4, 6, 8] and steps(resumed.table()) == [4, 6, 8]
    assert losses(again) == losses(trainer)
    rows = whole.table().query("step >= 4").reset_index(drop=True)
    np.testing.assert_allclose(resumed.table().s, rows.s, rtol=1e-6)


def test_after_an_exception_the_hooks_come_off_on_demand(tmp_path):
    network, callback = model(), HuggingFaceCallback(examples(), every=1, layers=["classifier"])
    with pytest.raises(ArithmeticError, match="the data failed"):
        train(tmp_path, [callback], network, fail_at=13)
    callback.remove()
    assert len(steps(callback.table())) >= 1
    assert not any(m._forward_hooks for m in network.modules())
    assert not callback.probe_log.optimizer._optimizer_step_post_hooks
    callback.remove()
    train(tmp_path, [callback], network)
    assert steps(callback.table()) == list(range(9))


def test_a_submodule_is_measured_by_name(tmp_path):
    probe = torch.randn(30, 8), torch.arange(30) % 3
    callback = HuggingFaceCallback(lambda: probe, every=8, model="classifier")
    train(tmp_path, [callback])
    assert set(callback.table().layer) == {""} or isinstance(model().classifier, nn.Linear)
