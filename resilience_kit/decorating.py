"""How a layer is put around a function: the only place that tells sync, async, generators and methods apart.

A layer is written once, as coroutines over `Call.waiting`. Around an async function they are awaited; around a sync
one they run to their end without ever suspending, since a thread's waiting blocks inside them.
"""

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, ParamSpec, Protocol, TypeVar

from resilience_kit.errors import ConfigurationError
from resilience_kit.layers import FAILED, Call, Guard, Layer, Parameters, Run, Stack, name_of
from resilience_kit.registry import mode
from resilience_kit.returned_streams import Stay, held, is_carrier
from resilience_kit.stack_order import warn_of_problems
from resilience_kit.waiting import TaskWaiting, ThreadWaiting

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_MISSING = object()
_NOT_STARTED = object()
_STACKED = "__resilience_stacked__"
_TASK = TaskWaiting()
_THREAD = ThreadWaiting()


class Decorator(Protocol):
    """What a decorator returns when it is called with arguments."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]:
        """Decorate a function, keeping its signature."""
        ...


class _Stream(Stay):
    """A generator that was run to its first item, or that a function returned and nobody has run yet."""

    __slots__ = ("generator", "item", "returned")

    def __init__(self, generator: Any, item: Any, returned: Any = None) -> None:
        super().__init__()
        self.generator = generator
        self.item = item
        self.returned = returned

    def hand_over(self) -> Any:
        if not isinstance(self.generator, GeneratorType):
            return _relay_later(self._start)()
        relay = _relay(self)
        if self.item is _NOT_STARTED:
            # CPython 3.12 to 3.14.2 keep what a generator holds that is closed before it began (gh-142766): begin it
            next(relay)
        return relay

    async def _start(self) -> "_Stream":
        try:
            self.item = await anext(self.generator, _MISSING)
        except BaseException as error:
            self.leave(error)
            raise
        return self


class _StoppedError(Exception):
    """Carries a sync function's StopIteration through coroutines, where it must not be raised (PEP 479)."""

    def __init__(self, stop: StopIteration) -> None:
        super().__init__(stop)
        self.stop = stop


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, because all its waiting blocks."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise ConfigurationError(
        "a sync function was decorated, but something that it was given is async (a fallback, or a callable "
        "argument). Make the function async def, or give it sync callables."
    )


def _run_function(function: Callable[..., Any]) -> Run:
    def run(call: Call) -> Any:
        call.is_sent = True
        try:
            result = function(*call.args, **call.kwargs)
        except StopIteration as stop:
            raise _StoppedError(stop) from stop
        if isinstance(result, CoroutineType):
            result.close()
            raise ConfigurationError(
                f"{name_of(function)} is not async, but returned a coroutine, which would run outside of its "
                "decorators: make it async def and await the call in it"
            )
        return result

    return run


def _run_coroutine_function(function: Callable[..., Any]) -> Run:
    def run(call: Call) -> Any:
        call.is_sent = True
        result = function(*call.args, **call.kwargs)
        return result if isinstance(result, CoroutineType) else _awaited(result)

    return run


async def _awaited(result: Any) -> Any:
    """What a fallback returned, or a plain wrapper around a coroutine function: it need not be awaitable."""
    return await result if inspect.isawaitable(result) else result


def _run_generator_function(function: Callable[..., Any]) -> Run:
    def run(call: Call) -> _Stream:
        call.is_sent = True
        generator = function(*call.args, **call.kwargs)
        if not isinstance(generator, Generator):
            raise _no_generator(function, generator)
        try:
            return _Stream(generator, next(generator))
        except StopIteration as stop:
            return _Stream(generator, _MISSING, stop.value)

    return run


def _run_async_generator_function(function: Callable[..., Any]) -> Run:
    async def run(call: Call) -> _Stream:
        call.is_sent = True
        generator = function(*call.args, **call.kwargs)
        if not isinstance(generator, AsyncGenerator):
            raise _no_generator(function, generator)
        return _Stream(generator, await anext(generator, _MISSING))

    return run


@functools.lru_cache(maxsize=1_024)
def _holder_of(kind: type) -> Callable[[Any], Stay] | None:
    if issubclass(kind, Stay):
        # of a generator function, which was run to its first item
        return _as_it_is
    if issubclass(kind, (GeneratorType, AsyncGeneratorType)):
        return functools.partial(_Stream, item=_NOT_STARTED)
    return held if is_carrier(kind) else None


def _as_it_is(stay: Stay) -> Stay:
    return stay


def _no_generator(function: Callable[..., Any], returned: object) -> ConfigurationError:
    return ConfigurationError(
        f"{name_of(function)} stands for a generator, but returned {type(returned).__name__}: put the decorator "
        "beneath the one that makes something else of it, as @contextmanager does"
    )


def _run_in_thread(stack: Stack, call: Call) -> Any:
    """Do what `Stack.run()` does, without a coroutine as long as nothing waits or fails."""
    try:
        for layer in stack.layers:
            passage: Any = layer.enter(call)
            call.entered.append(run_blocking(passage) if type(passage) is CoroutineType else passage)
        return stack.leave(call, stack.function(call))
    except BaseException as error:
        result = run_blocking(stack.fail(call, error))
        if result is FAILED:
            raise
        return result


def _wrap_function(function: Callable[..., Any], stack: Stack, parameters: Parameters) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if mode.disabled:
            return function(*args, **kwargs)
        try:
            result = _run_in_thread(stack, Call(args, kwargs, parameters, _THREAD))
        except _StoppedError as stopped:
            raise stopped.stop from stopped.stop.__cause__
        return result.hand_over() if isinstance(result, Stay) else result

    return wrapper


def _wrap_coroutine_function(function: Callable[..., Any], stack: Stack, parameters: Parameters) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if mode.disabled:
            return await function(*args, **kwargs)
        call = Call(args, kwargs, parameters, _TASK)
        # what `Stack.run()` does, without a coroutine of its own
        try:
            for layer in stack.layers:
                passage: Any = layer.enter(call)
                call.entered.append(await passage if type(passage) is CoroutineType else passage)
            result = stack.leave(call, await stack.function(call))
        except BaseException as error:
            result = await stack.fail(call, error)
            if result is FAILED:
                raise
        return result.hand_over() if isinstance(result, Stay) else result

    return wrapper


def _wrap_generator_function(function: Callable[..., Any], stack: Stack, parameters: Parameters) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        if mode.disabled:
            return (yield from function(*args, **kwargs))
        return (yield from _relay(_run_in_thread(stack, Call(args, kwargs, parameters, _THREAD))))

    return wrapper


def _relay(stream: _Stream) -> Generator[Any, Any, Any]:
    generator, item = stream.generator, stream.item
    resume: Callable[[], Any]
    try:
        if item is _NOT_STARTED:
            yield
            item = next(generator)
        while item is not _MISSING:
            stream.observe(item)
            try:
                sent = yield item
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:  # noqa: BLE001 - thrown in by the reader, and handed on as it is
                resume = functools.partial(generator.throw, error)
            else:
                resume = functools.partial(generator.send, sent)
            item = resume()
    except StopIteration as stop:
        stream.leave()
        return stop.value
    except GeneratorExit:
        stream.leave()
        raise
    except BaseException as error:
        stream.leave(error)
        raise
    stream.leave()
    return stream.returned


def _wrap_async_generator_function(
    function: Callable[..., Any], stack: Stack, parameters: Parameters
) -> Callable[..., Any]:
    async def start(*args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs, parameters, _TASK)
        return await (_run_async_generator_function(function)(call) if mode.disabled else stack.run(call))

    return _relay_later(start)


def _relay_later(start: Callable[..., Coroutine[Any, Any, _Stream]]) -> Callable[..., AsyncGenerator[Any, Any]]:
    """An async generator function that hands on what the generator of a stream yields; it has no `yield from`."""

    async def relay(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        stream = await start(*args, **kwargs)
        generator, item = stream.generator, stream.item
        try:
            async with aclosing(generator):
                while item is not _MISSING:
                    stream.observe(item)
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 - thrown in by the reader, and handed on as it is
                        step = generator.athrow(error)
                    else:
                        step = generator.asend(sent)
                    item = await step
        except (StopAsyncIteration, GeneratorExit) as end:
            stream.leave()
            if isinstance(end, GeneratorExit):
                raise
        except BaseException as error:
            stream.leave(error)
            raise
        else:
            stream.leave()

    return relay


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of function is run to its result, or to its first item, and how it is wrapped."""

    run: Callable[[Callable[..., Any]], Run]
    wrap: Callable[[Callable[..., Any], Stack, Parameters], Callable[..., Any]]


_FUNCTION = _Kind(_run_function, _wrap_function)
_COROUTINE_FUNCTION = _Kind(_run_coroutine_function, _wrap_coroutine_function)
_GENERATOR_FUNCTION = _Kind(_run_generator_function, _wrap_generator_function)
_ASYNC_GENERATOR_FUNCTION = _Kind(_run_async_generator_function, _wrap_async_generator_function)


def _kind_of(function: Callable[..., Any]) -> _Kind:
    """Tell the kind of a function. A plain wrapper, as openai 3.57 puts around `create`, is what it wraps."""
    plain = inspect.unwrap(function)
    for candidate in (plain, getattr(type(plain), "__call__", None)):  # noqa: B004 - an object's __call__ may be async
        if inspect.isasyncgenfunction(candidate):
            return _ASYNC_GENERATOR_FUNCTION
        if inspect.iscoroutinefunction(candidate):
            return _COROUTINE_FUNCTION
        if inspect.isgeneratorfunction(candidate):
            return _GENERATOR_FUNCTION
    return _FUNCTION


@dataclass(frozen=True, slots=True)
class _Stacked:
    """What a wrapper of the kit's carries: its layer, and the stack of which it is the outermost."""

    wrapper: Callable[..., Any]
    layer: Layer
    stack: Stack


def guarded(function: Callable[P, R], layer: Guard) -> Callable[P, R]:
    """Put a layer around a function of any kind."""
    wrapper: Callable[P, R] = _decorate(function, layer)
    return wrapper


def _decorate(function: Any, layer: Guard) -> Any:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_decorate(function.__func__, layer))
    kind = _kind_of(function)
    stacked = getattr(function, _STACKED, None)
    # One wrapper runs the whole stack with one Call. A decorator of somebody else's in between, to which
    # functools.wraps copied the attribute, is called like any function.
    if stacked is None or stacked.wrapper is not function:
        beneath = Stack((), kind.run(function), kind.run, _holder_of)
    else:
        beneath = stacked.stack
    stack = beneath.within(layer)
    wrapper = functools.wraps(function)(kind.wrap(function, stack, Parameters.of(function)))
    setattr(wrapper, _STACKED, _Stacked(wrapper, layer, stack))
    warn_of_problems(stacked_layers(wrapper), function)
    return wrapper


def stacked_layers(function: Any) -> list[Layer]:
    """The kit's layers around a function, outermost first, also those beneath other people's decorators."""
    layers: list[Layer] = []
    current = getattr(function, "__func__", function)
    while current is not None:
        stacked = getattr(current, _STACKED, None)
        if stacked is not None and stacked.wrapper is current:
            layers.append(stacked.layer)
        current = getattr(current, "__wrapped__", None)
    return layers
