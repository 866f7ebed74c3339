"""Which module feeds which layer, found by following tensors through one forward pass."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from biasshift.measure import layer_types as kinds


@dataclass
class Feeding:
    """Watches one forward pass. Storage addresses identify tensors, through views and in-place changes alike."""

    kinds_of: dict[str, str] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    fed_by: dict[str, str] = field(default_factory=dict)
    writer: dict[int, str] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # an address is reused once its tensor is gone

    def watch(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        """A watcher for `biasshift.measure.hooks.watching`."""
        self.kinds_of[name] = type(module).__name__
        self.fed_by.setdefault(name, self.writer.get(_address(a), ""))
        if kinds.is_covered(module):
            self.units[name], self.inputs[name] = kinds.unit_count(module), kinds.input_count(module)
        self.writer[_address(output)] = name
        self.alive += [a.detach(), output.detach()]

    def finish(self) -> None:
        """Lets go of the activations."""
        self.writer.clear()
        self.alive.clear()


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
