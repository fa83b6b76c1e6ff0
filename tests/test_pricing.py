"""What calls cost: by prices of one's own, else by published ones; an unknown price is never zero."""

import sys
from types import SimpleNamespace

import genai_prices
import pytest

from resilience_kit import ConfigurationError, pricing
from resilience_kit.call_tokens import Usage
from resilience_kit.pricing import Price, cost_usd, set_prices


@pytest.fixture
def without_genai_prices(monkeypatch):
    """A process without the extra `cost`."""
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setattr(pricing, "_published", {})
    pricing._library.cache_clear()
    yield
    pricing._library.cache_clear()


# What genai-prices knows


@pytest.mark.parametrize(
    "model", ["gpt-4o", "gpt-4o-2024-08-06", "gpt-4.1-mini", "gpt-35-turbo", "gpt-5.4", "claude-sonnet-4-5"]
)
@pytest.mark.parametrize("usage", [Usage(1_000, 500), Usage(1_000, 500, 400), Usage(300_000, 5), Usage(300_000, 5, 9)])
def test_a_call_costs_what_genai_prices_says(model, usage):
    counted = genai_prices.Usage(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, cache_read_tokens=usage.cached_tokens
    )
    price = float(genai_prices.calc_price(counted, model).total_price)
    assert cost_usd(usage, model) == pytest.approx(price)


@pytest.mark.parametrize(("tokens", "usd_per_million"), [(999, 1), (1_000, 1), (1_001, 2), (2_001, 3)])
def test_a_price_that_rises_with_the_prompt_counts_for_all_of_it(monkeypatch, tokens, usd_per_million):
    tiers = [genai_prices.types.Tier(start=1_000, price=2), genai_prices.types.Tier(start=2_000, price=3)]
    price = genai_prices.types.ModelPrice(input_mtok=genai_prices.types.TieredPrices(base=1, tiers=tiers))
    monkeypatch.setattr(genai_prices, "calc_price", lambda *_, **__: SimpleNamespace(model_price=price))
    monkeypatch.setattr(pricing, "_published", {})
    assert cost_usd(Usage(tokens, 0), "dear") == pytest.approx(tokens * usd_per_million / 1e6)


def test_an_embedding_has_a_price():
    assert cost_usd(Usage(1_000_000, 0), "text-embedding-3-small") == pytest.approx(0.02)


def test_a_model_that_nobody_knows_has_no_price():
    assert cost_usd(Usage(1, 1), "my-deployment") is None


def test_the_first_model_with_a_known_price_counts():
    usage = Usage(1_000, 500)
    assert cost_usd(usage, "my-deployment", "gpt-4o-mini", "gpt-4o") == cost_usd(usage, "gpt-4o-mini")


def test_a_models_price_is_looked_up_once(monkeypatch):
    looked_up = []
    monkeypatch.setattr(pricing, "_published", {})
    monkeypatch.setattr(pricing, "_find", lambda model: looked_up.append(model) or ())
    for _ in range(3):
        cost_usd(Usage(1, 1), "my-deployment")
    assert looked_up == ["my-deployment"]


def test_models_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(pricing, "_published", {})
    monkeypatch.setattr(pricing, "_MOST_MODELS", 10)
    for number in range(25):
        cost_usd(Usage(1, 1), f"my-deployment-{number}")
    assert len(pricing._published) == 5


def test_without_the_extra_no_price_is_known(without_genai_prices):
    assert cost_usd(Usage(1, 1), "gpt-4o") is None


def test_without_the_extra_a_budget_says_what_to_install(without_genai_prices):
    with pytest.raises(ConfigurationError, match=r"pip install 'resilience-kit\[cost\]'"):
        pricing.check_model("gpt-4o")


def test_without_the_extra_a_budget_says_what_to_install_also_where_there_are_prices_of_ones_own(without_genai_prices):
    set_prices({"our-deployment": Price(1, 2)})
    with pytest.raises(ConfigurationError, match=r"pip install 'resilience-kit\[cost\]'"):
        pricing.check_model("gpt-4o")


# Prices of one's own


def test_prices_of_ones_own_go_before_published_ones():
    set_prices({"gpt-4o": Price(1, 2)})
    assert cost_usd(Usage(1_000_000, 1_000_000), "gpt-4o") == 3


def test_a_price_of_ones_own_for_the_second_model_goes_before_a_published_one_for_the_first():
    set_prices({"our-deployment": Price(1, 1)})

    assert cost_usd(Usage(1_000_000, 0), "gpt-4o-2024-08-06", "our-deployment") == 1


def test_prices_of_ones_own_leave_other_models_at_theirs():
    before = cost_usd(Usage(1, 1), "gpt-4o")
    set_prices({"my-deployment": Price(1, 2)})
    assert cost_usd(Usage(1, 1), "gpt-4o") == before


def test_prices_are_replaced_as_a_whole():
    set_prices({"one": Price(1, 2)})
    set_prices({"two": Price(1, 2)})
    assert (cost_usd(Usage(1, 1), "one"), cost_usd(Usage(1, 1), "two")) == (None, pytest.approx(3e-6))


def test_a_table_that_is_changed_afterwards_changes_no_price():
    prices = {"one": Price(1, 2)}
    set_prices(prices)
    prices.clear()
    assert cost_usd(Usage(1, 1), "one") == pytest.approx(3e-6)


def test_prices_of_ones_own_need_no_extra(without_genai_prices):
    set_prices({"gpt-4o": Price(1, 2)})
    assert cost_usd(Usage(1, 1), "gpt-4o") == pytest.approx(3e-6)


def test_a_model_that_a_table_lacks_is_said_to_be_unknown_even_without_the_extra(without_genai_prices):
    set_prices({"gpt-4o": Price(1, 2)})
    with pytest.raises(ConfigurationError, match="no price is known for the model 'gpt-4'"):
        pricing.check_model("gpt-4")


@pytest.mark.parametrize(
    ("price", "usd"),
    [
        (Price(2, 8), 6 * 2 + 4 * 2 + 8),
        (Price(2, 8, cached_input_usd_per_million=1), 6 * 2 + 4 * 1 + 8),
        (Price(2, 8, cached_input_usd_per_million=0), 6 * 2 + 8),
    ],
    ids=["as all others", "cheaper", "free"],
)
def test_cached_tokens_cost_what_the_price_says(price, usd):
    assert price.usd(Usage(10_000_000, 1_000_000, cached_tokens=4_000_000)) == usd


def test_no_more_tokens_are_cached_than_the_prompt_has():
    assert Price(2, 8, 1).usd(Usage(1_000_000, 0, cached_tokens=5_000_000)) == 1


@pytest.mark.parametrize("wrong", [-1, "2.5", None, True, float("nan"), float("inf")])
def test_a_price_that_is_no_amount_is_refused_with_what_was_expected(wrong):
    with pytest.raises(ConfigurationError, match=r"Price\(output_usd_per_million=.*\): expected US dollars"):
        Price(1, wrong)


def test_what_is_no_price_is_refused_with_what_was_expected():
    with pytest.raises(ConfigurationError, match=r"set_prices\({'gpt-4o': 2.5}\): expected Price\(...\)"):
        set_prices({"gpt-4o": 2.5})
