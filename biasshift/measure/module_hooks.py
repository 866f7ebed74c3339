"""Forward hooks on modules that are taken off again, also when adding them was interrupted."""

from collections.abc import Callable

from torch import nn

from biasshift.restoration import Restoration

# Where every module has its hooks: dicts by the numbers of the hooks.
HOOKS = sorted(name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_")))


def add_hook(
    restoration: Restoration,
    module: nn.Module,
    hook: Callable,
    *,
    before: bool = False,
    **options: bool,
) -> None:
    """Adds a forward hook until the restoration.

    Args:
        before: a hook before the forward pass.
        options: of PyTorch's function that registers it.
    """
    restoration.undo(take_off, module, hook)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    register(hook, **options)


def take_off(module: nn.Module, hook: Callable) -> None:
    """Removes a hook from a module, wherever it has been registered."""
    dicts = [vars(module)[name] for name in HOOKS if isinstance(vars(module)[name], dict)]
    for number in [n for hooks in dicts for n, value in hooks.items() if value is hook]:
        # The hook itself goes last: an interruption before leaves it to be found again.
        for hooks in sorted(dicts, key=lambda hooks: hooks.get(number) is hook):
            hooks.pop(number, None)
