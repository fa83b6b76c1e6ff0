"""Forecasts (extra `forecast`): how many tokens per minute an agent will use, learnt from what it used.

    pip install 'resilience-kit[forecast]'
    python examples/with_forecast.py

It needs a day before it says anything, so here three days pass in a second: by a clock that the example turns.
"""

import math
from typing import Any

from resilience_kit import subscribe, token_budget
from resilience_kit.monitoring.forecast import Forecaster

HALF_AN_HOUR, DAY = 1_800, 86_400
time = 0.0


@token_budget("Writer")
def ask(prompt: str, tokens: int) -> dict[str, Any]:
    """Stand here for the call of your model; it says what it used."""
    return {"usage": {"prompt_tokens": tokens // 2, "completion_tokens": tokens - tokens // 2}}


def main() -> None:
    """Use most tokens at noon of each day, and ask what is to come."""
    global time  # noqa: PLW0603 - in your program it is the real one, and you give no clock
    forecaster = Forecaster("chat", interval=HALF_AN_HOUR, horizons=(2 * HALF_AN_HOUR,), clock=lambda: time)
    stop = subscribe(forecaster.listen)
    for slot in range(3 * DAY // HALF_AN_HOUR):
        time = slot * HALF_AN_HOUR + 1.0
        ask("What is new?", tokens=int(1_000_000 * (1.1 - math.cos(math.tau * time / DAY))))
        expected = forecaster.forecast(seconds=2 * HALF_AN_HOUR, agent="Writer")
        if slot % 8 == 0:
            hours = f"day {int(time // DAY) + 1}, {int(time % DAY // 3_600):2} h"
            print(f"{hours}: {expected.expected:,.0f} tokens per minute in an hour" if expected else f"{hours}: -")
    stop()


if __name__ == "__main__":
    main()
