"""A `with` block that says something of the calls made inside: it sets a context variable, which tasks inherit."""

from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Generic, TypeVar

from resilience_kit.errors import ConfigurationError

T = TypeVar("T")


class ContextBlock(AbstractContextManager[T], Generic[T]):
    """The block. It is no decorator: a coroutine function would only be called inside, and run outside."""

    __slots__ = ("_token", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable = variable
        self._value = value
        self._token: Token[T] | None = None

    def __enter__(self) -> T:
        if self._token is not None:
            # two tasks in one block would end each other's
            raise ConfigurationError("the block is entered already: make one where the calls are, for each `with`")
        self._token = self._variable.set(self._value)
        return self._value

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        token, self._token = self._token, None
        # a generator may be ended in another context, where there is nothing to put back
        with suppress(ValueError):
            if token is not None:
                self._variable.reset(token)
