"""Measurements during the training of Hugging Face's Trainer."""

from typing import Any

from biasshift.integrations.installation import needed
from biasshift.integrations.monitor import Monitor

_transformers: Any = needed("HuggingFaceCallback", "transformers")


class HuggingFaceCallback(Monitor, _transformers.TrainerCallback):
    """Measures a model while the Trainer of ``transformers`` trains it.

    Steps are optimizer steps, and go on from a checkpoint. The Trainer tells callbacks nothing of
    an exception: after one, `remove` takes the hooks off.

    Args:
        probe: As in `biasshift.instrument`, or a function that returns it when training begins. For
            most models it is a dict of arguments, or a list of such dicts. With None, the
            activation moments of the training batches are added up.
        every: Optimizer steps between two measurements.
        model: The name of the submodule that is measured and takes the probe; by default the model.
        to: Receivers of the rows, such as `to_wandb` returns.
        options: Of `biasshift.instrument`.
    """

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self.begin(model, optimizer, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()
