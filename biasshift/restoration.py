"""Changes that are undone at the end of a block, by one thread at a time, whatever interrupts it.

Precision flags, random state, the stance of torch.compile and the like belong to the whole process.
Two threads that change them at once would put back what the other has set. So a thread waits for
its turn, and has it in blocks inside of its own, too.

Whatever a block changes, it says how to undo before it changes it. Signals that come while this is
done, such as Ctrl-C, are handled right behind it. Exceptions that debuggers or other threads throw
into it are raised behind it.
"""

import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, Concatenate, Literal, ParamSpec

P = ParamSpec("P")
# How long a block has the turn: all along, only while it changes and undoes things, or not at all.
Turn = Literal["block", "ends", "never"]

PATIENCE = 0.002  # seconds, between two looks whether it is this thread's turn
ATTEMPTS = 3  # to undo a change: an exception from outside spoils one
# Signals whose handlers may raise an exception, of those that this system has.
RAISING = tuple(
    getattr(signal, name)
    for name in "SIGINT SIGTERM SIGHUP SIGALRM SIGVTALRM SIGPROF SIGUSR1 SIGUSR2".split()
    if hasattr(signal, name)
)


class Restoration:
    """A block at whose end changes are undone, the last one first.

    Args:
        change: Gets the restoration. It changes things, and says before each change how to undo it.
        turn: How long other threads have to wait.
    """

    def __init__(self, change: Callable[["Restoration"], object], turn: Turn = "block") -> None:
        self._change, self._kind = change, turn
        self._undo: list[tuple[Callable[..., object], tuple]] = []
        self._handlers: dict[int, Any] = {}  # of signals, by number
        self._thread = threading.get_ident()  # the one that runs the block

    def undo(self, function: Callable[..., object], *args: object) -> None:
        """Notes how to undo a change that is about to be made.

        The call must do no harm where nothing has changed, and when it is repeated.
        """
        self._undo.append((function, args))

    def __enter__(self) -> None:
        try:
            self._thread = threading.get_ident()
            if self._kind != "never":
                _take_turn(self)
            self._change(self)
            self._change = _nothing  # what it refers to may refer to this block
            if self._kind == "ends":
                _leave(self)
            _deliver()
        except BaseException:
            self._close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            try:
                self._close()
            finally:
                self._close()  # what an exception from outside has left
        finally:
            _deliver()

    def __del__(self) -> None:
        # An exception from outside was thrown just as the block was left.
        if getattr(self, "_undo", None) and self._thread == threading.get_ident():
            self._kind = "never"  # whoever collects garbage must not wait
            with suppress(Exception):
                self._close()

    def _close(self) -> None:
        """Undoes what is not undone yet, also what blocks inside of this one have left."""
        failure: BaseException | None = None
        tries = Counter[int]()
        while True:
            try:
                if self._kind == "ends" and self._undo:
                    _take_turn(self)
                for block in _inside(self):
                    try:
                        block._close()
                    except BaseException as error:
                        failure = failure or error
                while self._undo:
                    function, args = self._undo[-1]
                    function(*args)
                    self._undo.pop()
                _leave(self)
                break
            except BaseException as error:
                failure = failure or error
                tries[len(self._undo)] += 1
                if self._undo and tries[len(self._undo)] >= ATTEMPTS:
                    self._undo.pop()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which refers to this frame

    # -- signals -----------------------------------------------------------------------------------

    def take_signals(self) -> None:
        """Handles signals in place of their handlers, which get them when nothing is half done."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in RAISING:
            handler = signal.getsignal(signum)
            if callable(handler) and handler is not _handle:
                self._handlers[signum] = _handlers[signum] = handler
                with suppress(ValueError):  # an interpreter inside of another one
                    signal.signal(signum, _handle)

    def give_signals_back(self) -> None:
        """Gives the signals back to the handlers that they had."""
        for signum, handler in list(self._handlers.items()):
            if signal.getsignal(signum) is _handle:
                signal.signal(signum, handler)
        self._handlers.clear()


def _nothing(block: Restoration) -> None:
    pass


def restoring(
    turn: Turn = "block",
) -> Callable[[Callable[Concatenate[Restoration, P], object]], Callable[P, Restoration]]:
    """Makes a context manager of a function that changes things: a decorator.

    >>> import sys
    >>> @restoring()
    ... def recursion_limit(restoration, limit):
    ...     restoration.undo(sys.setrecursionlimit, sys.getrecursionlimit())
    ...     sys.setrecursionlimit(limit)
    >>> with recursion_limit(5000):
    ...     sys.getrecursionlimit()
    5000

    Args:
        turn: As of `Restoration`.
    """

    def decorated(
        change: Callable[Concatenate[Restoration, P], object],
    ) -> Callable[P, Restoration]:
        @wraps(change)
        def make(*args: P.args, **kwargs: P.kwargs) -> Restoration:
            return Restoration(lambda restoration: change(restoration, *args, **kwargs), turn)

        return make

    return decorated


@restoring()
def alone(restoration: Restoration) -> None:
    """Runs the block while no other thread measures."""


# -- whose turn it is ------------------------------------------------------------------------------

# At most one entry: the outermost block of the thread whose turn it is. A dict, because
# `setdefault` takes it in one step that nothing comes between. References are weak, because a block
# that was forgotten must not block the others.
_turn: dict[str, "weakref.ref[Restoration]"] = {}
_begun: list["weakref.ref[Restoration]"] = []  # all blocks of that thread, the outermost first


def _take_turn(block: Restoration) -> None:
    """Waits until it is this thread's turn, which it may be already."""
    own = weakref.ref(block)
    while True:
        holder = _turn.setdefault("turn", own)
        outermost = holder()
        if outermost is None:
            if _turn.get("turn") is holder:
                _turn.pop("turn", None)
        elif outermost._thread == block._thread:
            break
        else:
            del outermost
            # An event of `threading` stays locked for good where an exception comes into it.
            time.sleep(PATIENCE)
    if holder is own and own not in _begun:
        _begun.clear()
        block.take_signals()
    if own not in _begun:
        _begun.append(own)


def _inside(block: Restoration) -> Iterator[Restoration]:
    """The blocks that were begun inside of one and not ended, the innermost first."""
    blocks = [reference() for reference in list(_begun)]
    if block in blocks:
        yield from filter(None, reversed(blocks[blocks.index(block) + 1 :]))


def _leave(block: Restoration) -> None:
    """Ends a block, and the turn with the outermost one."""
    own = weakref.ref(block)
    if own in _begun:
        _begun.remove(own)
    holder = _turn.get("turn")
    if holder is not None and holder() is block:
        block.give_signals_back()
        _turn.pop("turn", None)


def _forget_other_threads() -> None:
    """In a forked process there are none, and it is the turn of whoever comes."""
    holder = _turn.get("turn")
    outermost = holder() if holder is not None else None
    if outermost is not None and outermost._thread != threading.get_ident():
        _turn.clear()
        _begun.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


# -- signals that come while things are changed or undone ------------------------------------------

_handlers: dict[int, Any] = {}  # those that signals had before
_waiting: list[int] = []  # signals
_UNDISTURBED = {
    method.__code__ for method in (Restoration.__enter__, Restoration.__exit__, Restoration.__del__)
}


def _handle(signum: int, frame: FrameType | None) -> None:
    """Has the signal wait where the main thread begins or ends a block."""
    above = frame
    while above is not None:
        if above.f_code in _UNDISTURBED:
            _waiting.append(signum)
            return
        above = above.f_back
    _handlers[signum](signum, frame)


def _deliver() -> None:
    """Hands the signals that have waited to their handlers, one of each, as the system does."""
    if _waiting and threading.current_thread() is threading.main_thread():
        signals = list(dict.fromkeys(_waiting))
        _waiting.clear()
        with ExitStack() as stack:  # all of them, whatever one raises
            for signum in reversed(signals):
                stack.callback(_handlers[signum], signum, None)
