"""What tokens cost in US dollars: by prices of your own, else by those of genai-prices (extra `cost`)."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from resilience_kit.call_tokens import Usage
from resilience_kit.errors import ConfigurationError
from resilience_kit.validating import is_number


@dataclass(frozen=True, slots=True)
class Price:
    """What the tokens of a model cost.

    Attributes:
        input_usd_per_million: US dollars for a million tokens of prompts.
        output_usd_per_million: US dollars for a million tokens of answers.
        cached_input_usd_per_million: US dollars for a million tokens of prompts that the service had in its cache.
            Default: as for all others.

    Raises:
        ConfigurationError: One is not a number, 0 or more.

    Example:
        >>> from resilience_kit.pricing import Price
        >>> Price(2.5, 10, cached_input_usd_per_million=1.25).output_usd_per_million
        10
    """

    input_usd_per_million: float
    output_usd_per_million: float
    cached_input_usd_per_million: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not field.default and not (is_number(value) and value >= 0):
                raise ConfigurationError(
                    f"Price({field.name}={value!r}): expected US dollars for a million tokens, 0 or more"
                )

    def usd(self, usage: Usage) -> float:
        """The price of a call in US dollars.

        Args:
            usage: The tokens that the service says the call used.
        """
        cached_price = self.cached_input_usd_per_million
        if cached_price is None:
            cached_price = self.input_usd_per_million
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        return (
            (usage.prompt_tokens - cached) * self.input_usd_per_million
            + cached * cached_price
            + usage.completion_tokens * self.output_usd_per_million
        ) / 1e6


# Some models cost more from a number of prompt tokens on: the price above so many tokens, the dearest first.
_Prices = tuple[tuple[int, Price], ...]

# Replaced, never changed: a call may be looking into it in another thread.
_own: Mapping[str, Price] = {}

# What genai-prices says of a model takes 0.1 ms to find, so it is found once; () where it does not know the model.
_published: dict[str, _Prices] = {}
_MOST_MODELS = 1_000


def set_prices(prices: Mapping[str, Price]) -> None:
    """Use prices of your own from now on, in place of all that were set before.

    Args:
        prices: By the name that the answers give their model, such as "gpt-4o-2024-08-06", or that `token_budget` is
            given as `model`. They go before those of genai-prices, which count for all other models.

    Raises:
        ConfigurationError: A price is not a `Price`.

    Example:
        >>> from resilience_kit.pricing import Price, set_prices
        >>> set_prices({"our-deployment": Price(input_usd_per_million=2.5, output_usd_per_million=10)})
        >>> set_prices({})
    """
    global _own  # noqa: PLW0603 - the one place where they are kept, replaced as a whole
    for model, price in prices.items():
        if not isinstance(price, Price):
            raise ConfigurationError(f"set_prices({{{model!r}: {price!r}}}): expected Price(...)")
    _own = dict(prices)


@contextmanager
def isolated() -> Iterator[None]:
    """Start without prices of one's own, and put those of before back at the end."""
    before = _own
    set_prices({})
    try:
        yield
    finally:
        set_prices(before)


def is_ready(model: str) -> bool:
    """Whether a model's price is found at once, without importing genai-prices first."""
    return model in _published


def load(model: str) -> _Prices:
    """Find a model's price in genai-prices, which takes 0.1 s to import: call it in a thread."""
    if len(_published) >= _MOST_MODELS:
        _published.clear()
    prices = _published[model] = _find(model)
    return prices


def are_at_hand() -> bool:
    """Whether there are any prices: one's own, or those of genai-prices."""
    return bool(_own) or _library() is not None


def cost_usd(usage: Usage, *models: str) -> float | None:
    """The price of a call in US dollars, by the first of the models whose price is known; None if none is.

    Prices of one's own go before published ones, whichever of the models they are for.
    """
    price = next((_own[model] for model in models if model in _own), None)
    if price is None:
        published = (_price(model, usage.prompt_tokens) for model in models)
        price = next((found for found in published if found is not None), None)
    return None if price is None else price.usd(usage)


def check_model(model: str) -> None:
    """Make sure that a model's price is known.

    Raises:
        ConfigurationError: It is not, or genai-prices is missing.
    """
    if _price(model, 0) is not None:
        return
    if not are_at_hand():
        raise ConfigurationError("budget_usd needs prices: pip install 'resilience-kit[cost]', or pricing.set_prices()")
    extra = "" if _library() else "pip install 'resilience-kit[cost]' for published prices, "
    raise ConfigurationError(
        f"no price is known for the model {model!r}: {extra}say model= with the name of the model behind the "
        "deployment, set its price with pricing.set_prices(), or give budget_tokens in place of budget_usd"
    )


def _price(model: str, prompt_tokens: int) -> Price | None:
    own = _own.get(model)
    if own is not None:
        return own
    prices = _published.get(model)
    if prices is None:
        prices = load(model)
    for above, price in prices:
        if prompt_tokens > above:
            return price
    return None


@functools.cache
def _library() -> Any:
    try:
        import genai_prices
    except ImportError:
        return None
    return genai_prices


def _find(model: str) -> _Prices:
    library = _library()
    # Some models are known of a provider alone, embeddings among them.
    for provider in (None, "azure") if library else ():
        try:
            found = library.calc_price(library.Usage(), model, provider_id=provider).model_price
        except LookupError:
            continue
        prices = (found.input_mtok or 0, found.output_mtok or 0, found.cache_read_mtok)
        starts = {-1, *(tier.start for price in prices for tier in getattr(price, "tiers", ()))}
        return tuple((above, Price(*(_at(price, above) for price in prices))) for above in sorted(starts, reverse=True))
    return ()


def _at(price: Any, above: int) -> Any:
    """What genai-prices says of a kind of token in a prompt with more tokens than `above`; None if nothing."""
    for tier in reversed(getattr(price, "tiers", ())):
        if above >= tier.start:
            return float(tier.price)
    return None if price is None else float(getattr(price, "base", price))
