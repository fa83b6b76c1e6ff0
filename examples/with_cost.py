"""Money (extra `cost`): what calls cost, and a budget that refuses the call that would exceed it.

pip install 'resilience-kit[cost]'
python examples/with_cost.py
"""

from typing import Any

from resilience_kit import Price, TokenBudgetExceededError, get_all_resilience_stats, set_prices, token_budget

# The extra knows the prices of published models; those of your own you tell it.
set_prices({"our-model": Price(input_usd_per_million=2, output_usd_per_million=8)})


@token_budget("Writer", budget_usd=0.02, per="day", model="gpt-4o")
def write(*, prompt: str, max_tokens: int = 700) -> dict[str, Any]:
    """Stand here for the call of your model: what its answer says that it used is what is paid for."""
    return {"model": "gpt-4o-2024-08-06", "usage": {"prompt_tokens": 800, "completion_tokens": max_tokens}}


@token_budget("Drafter", budget_usd=1.0, model="our-model")
def draft(*, prompt: str, max_tokens: int = 100) -> dict[str, Any]:
    """Stand here for the call of a model of your own."""
    return {"model": "our-model", "usage": {"prompt_tokens": 1_000, "completion_tokens": max_tokens}}


def main() -> None:
    """Write until the day's budget is used up."""
    draft(prompt="Draft a title.")
    try:
        for number in range(1, 11):
            write(prompt=f"Write chapter {number}.")
            print(f"Chapter {number} is written.")
    except TokenBudgetExceededError as error:
        print(error)
    for name, agent in get_all_resilience_stats()["agents"].items():
        print(f"{name}: {agent['calls']} calls, {agent['usd']:.4f} USD")


if __name__ == "__main__":
    main()
