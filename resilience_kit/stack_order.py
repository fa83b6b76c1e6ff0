"""Which orders of layers do harm, and why: asked when a function is decorated, and by explain()."""

import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from resilience_kit.errors import StackOrderWarning

_PACKAGE = __name__.removesuffix("stack_order")


class NamedLayer(Protocol):
    """What the rules look at."""

    kind: ClassVar[str]
    name: str


@dataclass(frozen=True, slots=True)
class StackProblem:
    """One thing that is wrong with a stack.

    Attributes:
        code: Which one, as "limiter-outside-retry"; it stays the same over releases.
        message: What is wrong, and what to do.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def find_problems(layers: Sequence[NamedLayer], function: Any) -> list[StackProblem]:
    """What is wrong with layers in this order, outermost first, around this function."""
    return [*_order_problems(layers), *_client_problems(layers, function)]


def warn_of_problems(layers: Sequence[NamedLayer], function: Any) -> None:
    """Warn of what the outermost layer brought in, at the line outside of the kit that put it there."""
    before = find_problems(layers[1:], function)
    for problem in find_problems(layers, function):
        if problem not in before:
            warnings.warn(StackOrderWarning(str(problem), code=problem.code), stacklevel=_frames_of_the_kit() + 1)


def _frames_of_the_kit() -> int:
    """How many callers are the kit's own: a bare decorator, @resilient and a static method have more than others."""
    frame, count = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, count = frame.f_back, count + 1
    return count - 1


def _order_problems(layers: Sequence[NamedLayer]) -> Iterator[StackProblem]:
    for position, layer in enumerate(layers):
        beneath = layers[position + 1 :]
        retried_beneath = any(other.kind == "retry_on_429" for other in beneath)
        if layer.kind == "rate_limited" and retried_beneath:
            yield StackProblem(
                "limiter-outside-retry",
                f"@rate_limited({layer.name!r}) is above @retry_on_429, so retries skip the limit: put it below",
            )
        if layer.kind == "circuit_protected" and retried_beneath:
            yield StackProblem(
                "circuit-outside-retry",
                f"@circuit_protected({layer.name!r}) is above @retry_on_429, so it sees one failure for many and "
                "cannot stop the retries: put it below",
            )
        if layer.kind == "retry_on_429" and retried_beneath:
            yield StackProblem(
                "two-retries", "two @retry_on_429 multiply their attempts: keep one, outside of limit and circuit"
            )
        if layer.kind == "retry_on_429" and any(other.kind == "token_budget" for other in beneath):
            yield StackProblem(
                "budget-inside-retry",
                "@token_budget is below @retry_on_429, so the prompt is counted, and perhaps cut, again for each "
                "attempt: put it above",
            )
        if layer.kind == "rate_limited" and any(
            other.kind == "rate_limited" and other.name == layer.name for other in beneath
        ):
            yield StackProblem(
                "same-limiter-twice",
                f"@rate_limited({layer.name!r}) is there twice, so a call takes two slots of one limit and can wait "
                "for itself: keep one",
            )


def _client_problems(layers: Sequence[NamedLayer], function: Any) -> Iterator[StackProblem]:
    if not layers:
        return
    for client in _openai_clients(function):
        if hasattr(type(client), "resilient_request"):
            yield StackProblem(
                "resilient-client",
                f"{type(client).__name__} has these layers around each of its requests: with the decorators around it "
                "as well, attempts multiply and a call takes two slots. Keep one of the two",
            )
            return
        if client.max_retries > 0:
            yield StackProblem(
                "client-retries",
                f"{type(client).__name__} retries {client.max_retries} times on its own, beneath limit and circuit, "
                "insufficient_quota included: make it with max_retries=0",
            )
            return


def _openai_clients(function: Any) -> Iterator[Any]:
    """The openai clients that a function can be seen to use: its object's, its closure's and its globals'."""
    openai = sys.modules.get("openai")
    if openai is None:
        return
    owner = getattr(function, "__self__", None)
    candidates = [owner, *getattr(owner, "__dict__", {}).values()]
    plain = inspect.unwrap(getattr(function, "__func__", function))
    try:
        seen = inspect.getclosurevars(plain)
    except (TypeError, ValueError):  # a cell that is still empty, or a callable without code
        pass
    else:
        candidates += [*seen.nonlocals.values(), *seen.globals.values()]
    for candidate in candidates:
        if isinstance(candidate, (openai.OpenAI, openai.AsyncOpenAI)):
            yield candidate
