"""What tokens cost in US dollars, from genai-prices (extra `cost`)."""

from resilience_kit.errors import ConfigurationError


def check_model(model: str) -> None:
    """Make sure that a model's price is known.

    Raises:
        ConfigurationError: genai-prices is missing, or does not know the model.
    """
    cost_usd(model, prompt_tokens=0, completion_tokens=0)


def cost_usd(model: str, *, prompt_tokens: int, completion_tokens: int) -> float:
    """The price of a call in US dollars.

    Raises:
        ConfigurationError: genai-prices is missing, or does not know the model.
    """
    try:
        from genai_prices import Usage, calc_price
    except ImportError as error:
        raise ConfigurationError("budget_usd needs prices: pip install 'resilience-kit[cost]'") from error
    try:
        price = calc_price(Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens), model)
    except LookupError as error:
        raise ConfigurationError(
            f"no price is known for the model {model!r}: say model= with the name of the model behind the deployment, "
            "or give budget_tokens in place of budget_usd"
        ) from error
    return float(price.total_price)
