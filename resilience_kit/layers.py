"""What a layer is, and what it is given: a call with its arguments, and a way to wait.

There are two shapes of layer. A `Guard` is entered before a call and left after it: what it holds lasts until the
result is there or, for a generator, until the stream is read, closed, broken or dropped. A `Repeater` runs the call
as often as it sees fit; a generator counts as run when its first item is out.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from resilience_kit.registry import Value
from resilience_kit.waiting import Waiting

T = TypeVar("T")

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Parameters:
    """Where a function takes its arguments, worked out once when it is decorated."""

    names: frozenset[str] = frozenset()
    positions: dict[str, int] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    takes_any_keyword: bool = True

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Parameters":
        """Read a function's signature; one that cannot be read takes everything by keyword."""
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return cls()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, parameter in signature.parameters.items() if parameter.kind in positional]
        return cls(
            names=frozenset(signature.parameters),
            positions={name: position for position, name in enumerate(names)},
            defaults={
                name: parameter.default
                for name, parameter in signature.parameters.items()
                if parameter.default is not inspect.Parameter.empty
            },
            takes_any_keyword=any(
                parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()
            ),
        )

    def accepts(self, name: str) -> bool:
        """Whether the function can be given an argument of this name."""
        return name in self.names or self.takes_any_keyword


class Call:
    """One call of a decorated function: its arguments, and how it waits."""

    __slots__ = ("args", "is_sent", "kwargs", "parameters", "passages", "waiting")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Parameters, waiting: Waiting) -> None:
        self.args = args
        self.kwargs = kwargs
        self.parameters = parameters
        self.waiting = waiting
        # of the guards that it has gone through by now, the outermost first
        self.passages: tuple[Passage, ...] = ()
        # whether the function has been called since somebody last said that it was not
        self.is_sent = False

    def recheck(self) -> None:
        """Ask the guards further out, after a wait, whether the call may still be sent."""
        for passage in self.passages:
            passage.recheck()

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its parameter's name, however it was passed."""
        value = self.kwargs.get(name, _MISSING)
        if value is not _MISSING:
            return value
        position = self.parameters.positions.get(name)
        if position is not None and position < len(self.args):
            return self.args[position]
        return self.parameters.defaults.get(name, default)

    def replace(self, name: str, value: Any) -> None:
        """Pass something else for a parameter."""
        position = self.parameters.positions.get(name)
        if name not in self.kwargs and position is not None and position < len(self.args):
            self.args = (*self.args[:position], value, *self.args[position + 1 :])
        else:
            self.kwargs = {**self.kwargs, name: value}


class Passage(Protocol):
    """One call's stay in a guard. Nothing in it waits, so that cancellation always gets through."""

    __slots__ = ()

    def recheck(self) -> None:
        """Asked again after a layer below has made the call wait; may raise to stop it."""
        return

    def opened(self, response: Any, /) -> None:
        """See a response that is to be read later, while its headers are new."""
        return

    def observe(self, item: Any, /) -> None:
        """See an item of a stream go by."""
        return

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        """End the stay, exactly once. A stream that its reader closes or drops has ended without an error."""


class Layer(Protocol):
    """What explain() needs to know of any layer."""

    kind: ClassVar[str]
    name: str

    def describe(self) -> dict[str, Value]:
        """The effective parameters, and where each came from."""
        ...


class Guard(Layer, Protocol):
    """A layer that is entered before a call and left after it."""

    def enter(self, call: Call, /) -> Passage | Coroutine[Any, Any, Passage]:
        """Let the call in, perhaps with other arguments; raise to refuse it.

        Where the call has to wait, this is a coroutine that waits: what nobody waits for costs no coroutine.
        """
        ...

    def substitute(self, refusal: Exception, /) -> Callable[..., Any] | None:
        """What to call in place of a call that was refused, by this guard or by one beneath, if anything."""
        return None


class Repeater(Layer, Protocol):
    """A layer that runs a call as often as it sees fit."""

    async def run(self, call: Call, attempt: Callable[[Call], Awaitable[T]], /) -> T:
        """Run the attempts, and return the result of the one that counts."""
        ...


def name_of(function: Any) -> str:
    """A function's name for people: its module and qualified name."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or '?'}.{name}"
