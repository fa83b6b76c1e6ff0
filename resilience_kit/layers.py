"""What a layer is, and what it is given: a call with its arguments, and a way to wait.

A `Guard` is entered before a call and left after it: what it holds lasts until the result is there or, for a
generator, until the stream is read, closed, broken or dropped. A `Repeater` is a guard that may run what is beneath it
again when it has failed; a generator counts as run when its first item is out. A `Stack` takes calls through them.
"""

import functools
import inspect
import time
from asyncio import _get_running_loop
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import CoroutineType
from typing import Any, ClassVar, Protocol

from resilience_kit.errors import ResilienceError
from resilience_kit.registry import Value, mode
from resilience_kit.returned_streams import Stay
from resilience_kit.waiting import Waiting

_MISSING = object()
# In place of the result of a call that has none.
FAILED = object()


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

    __slots__ = ("_clock", "args", "entered", "is_sent", "kwargs", "parameters", "waiting")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Parameters, waiting: Waiting) -> None:
        self.args = args
        self.kwargs = kwargs
        self.parameters = parameters
        self.waiting = waiting
        # its stays in the layers that it has gone through by now, the outermost first
        self.entered: list[Passage] = []
        # whether the function has been called since somebody last said that it was not
        self.is_sent = False
        self._clock: Callable[[], float] | None = None

    def now(self) -> float:
        """As `waiting.now()`, in half the time from the second look on: a call stays in one event loop."""
        clock = self._clock
        if clock is None:
            # documented, and unlike get_running_loop() it does not raise; a system call in CPython 3.11
            loop = _get_running_loop()
            clock = self._clock = time.monotonic if loop is None else loop.time
        return clock() + mode.seconds_skipped

    @property
    def passages(self) -> "list[Passage]":
        """Its stays in guards: those in repeaters say nothing of whether it may be sent."""
        return [passage for passage in self.entered if not isinstance(passage, Attempts)]

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


Attempt = Callable[[Call], Coroutine[Any, Any, Any]]


class Attempts(Passage):
    """One call's stay in a repeater: nothing, unless the first attempt fails."""

    __slots__ = ()

    def leave(self, result: Any, error: BaseException | None, /) -> None:
        """End the stay."""
        return

    def repeat(self, call: Call, error: BaseException, attempt: "Attempt", /) -> Coroutine[Any, Any, Any] | None:
        """What runs the call again after its first attempt failed, to the result that counts; None if nothing does."""
        return None


class Repeater(Guard, Protocol):
    """A guard that may run a call more than once."""

    def enter(self, call: Call, /) -> Attempts:
        """Let the call in to its first attempt."""
        ...


# Runs a call of a sync function; of an async one, it returns a coroutine that does.
Run = Callable[[Call], Any]


class Stack:
    """The layers around a function, the outermost first, and how a call goes down through them and comes back up.

    Args:
        layers: Are entered in this order, and left in the other.
        function: The function as the layers run it.
        run_substitute: Makes the same of a function that is called in place of it.
        holder_of: What makes a stay of the results of a type that are still to be read; None for any other type.
    """

    __slots__ = ("_holder_of", "_run_substitute", "function", "layers")

    def __init__(
        self,
        layers: tuple[Guard, ...],
        function: Run,
        run_substitute: Callable[[Callable[..., Any]], Run],
        holder_of: Callable[[type], Callable[[Any], Stay] | None],
    ) -> None:
        self.layers = layers
        self.function = function
        self._run_substitute = run_substitute
        self._holder_of = holder_of

    def within(self, layer: Guard) -> "Stack":
        """The same with one more layer around it."""
        return Stack((layer, *self.layers), self.function, self._run_substitute, self._holder_of)

    async def run(self, call: Call) -> Any:
        """Take a call through the layers that are still before it, and back up from there."""
        depth = len(call.entered)
        try:
            for layer in self.layers[depth:]:
                passage: Any = layer.enter(call)
                call.entered.append(await passage if type(passage) is CoroutineType else passage)
            result = self.function(call)
            return self.leave(call, await result if isinstance(result, CoroutineType) else result, depth)
        except BaseException as error:
            result = await self.fail(call, error, depth)
            if result is FAILED:
                raise
            return result

    def leave(self, call: Call, result: Any, depth: int = 0) -> Any:
        """Leave the layers down to a depth with a result, the innermost first; a stream takes their passages along."""
        entered = call.entered
        hold = self._holder_of(type(result))
        if hold is not None:
            stay = hold(result)
            while len(entered) > depth:
                stay.add(entered.pop())
            return stay
        while len(entered) > depth:
            entered.pop().leave(result, None)
        return result

    async def fail(self, call: Call, error: BaseException, depth: int = 0) -> Any:
        """Leave them with an error until one makes a result of it: FAILED if none does, and the error stays."""
        return await self._fail_from(min(len(call.entered), len(self.layers) - 1), call, error, depth)

    async def _fail_from(self, position: int, call: Call, error: BaseException, depth: int) -> Any:
        if position < depth:
            return FAILED
        try:
            result = await self._rescued(call, position, error)
            if result is not FAILED:
                return self.leave(call, result, depth)
        except BaseException as other:
            result = await self._fail_from(position - 1, call, other, depth)
            if result is FAILED:
                raise
            return result
        return await self._fail_from(position - 1, call, error, depth)

    async def _rescued(self, call: Call, position: int, error: BaseException) -> Any:
        """What one layer makes of an error from beneath it, or of its own refusal; FAILED if it is nothing."""
        if position < len(call.entered):
            passage = call.entered[position]
            try:
                if isinstance(passage, Attempts):
                    repeated = passage.repeat(call, error, self.run)
                    if repeated is not None:
                        return await repeated
                passage.leave(None, error)
            finally:
                call.entered.pop()
        if isinstance(error, ResilienceError):
            substitute = self.layers[position].substitute(error)
            if substitute is not None:
                result = self._run_substitute(substitute)(call)
                return await result if isinstance(result, CoroutineType) else result
        return FAILED


def name_of(function: Any) -> str:
    """A function's name for people: its module and qualified name."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or '?'}.{name}"
