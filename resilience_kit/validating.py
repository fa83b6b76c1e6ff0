"""Arguments of the decorators, checked when a function is decorated: the message says what to write instead."""

import inspect
import sys
from typing import Any, TypeGuard

from resilience_kit.errors import ConfigurationError

# What shows how a decorator's parameters are written; the others take a name.
_EXAMPLES = {"retry_on_429": "max_retries=5", "token_budget": 'agent="MathAgent"'}


def check_callable(decorator: str, function: Any) -> None:
    """Refuse to decorate what is not a function.

    Raises:
        ConfigurationError: It is a class, or cannot be called.
    """
    if inspect.isclass(function):
        raise ConfigurationError(f"@{decorator} was put on the class {function.__name__}: put it on its methods")
    if not callable(function) and not isinstance(function, classmethod):
        example = _EXAMPLES.get(decorator, 'name="chat"')
        raise ConfigurationError(
            f"@{decorator} was given {function!r}, which is neither a function nor a name: put it on a function, "
            f"or write its parameters by name, as in @{decorator}({example})"
        )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number, with which seconds can be computed; True and False are not."""
    # an int may be larger than any float, and fail where it meets one
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_numbers(
    decorator: str, *, at_least: float | None = None, above: float | None = None, whole: bool = False, **arguments: Any
) -> None:
    """Check each argument that was given, that is, that is not None.

    Raises:
        ConfigurationError: One is not a number, not whole, or too small.
    """
    expected = "a whole number" if whole else "a number"
    if at_least is not None:
        expected += f", {at_least:g} or more"
    if above is not None:
        expected += f" above {above:g}"
    for name, value in arguments.items():
        if value is None:
            continue
        if (
            not is_number(value)
            or (whole and value != int(value))
            or (at_least is not None and value < at_least)
            or (above is not None and value <= above)
        ):
            raise ConfigurationError(f"@{decorator}({name}={value!r}): expected {expected}, or None for the setting")


def check_function(decorator: str, **arguments: Any) -> None:
    """Check that each argument that was given can be called.

    Raises:
        ConfigurationError: One cannot.
    """
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise ConfigurationError(f"@{decorator}({name}={value!r}): expected a function, or None")


def check_texts(decorator: str, **arguments: Any) -> None:
    """Check that each argument is text.

    Raises:
        ConfigurationError: One is not, or is empty.
    """
    for name, value in arguments.items():
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"@{decorator}({name}={value!r}): expected text")
