"""Names of a package that are imported from their modules when they are first used.

What a module needs, an extra or half a second, is needed only then.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package has as its `__getattr__` and its `__dir__`.

    Args:
        package: The package's `__name__`.
        homes: The names that each module holds; a module is written as in a relative import, such as ".alerts".

    Example:
        >>> from resilience_kit.lazy_names import lazy_names
        >>> get, _ = lazy_names("resilience_kit", {".stack": ("explain", "resilient")})
        >>> get("explain")
        <function explain at 0x...>
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name], package), name)
        # Python asks here only for what the module does not have
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return get, names
