"""The least that a program needs: one decorator around the function that asks the model.

pip install resilience-kit
python examples/basics.py
"""

import asyncio
import itertools

from resilience_kit import explain, get_all_resilience_stats, resilient


class TooManyRequestsError(Exception):
    """What your client raises when the service refuses a call; of any SDK's errors the status is what counts."""

    status_code = 429


attempts = itertools.count(1)


@resilient("chat", requests_per_minute=600, tokens_per_minute=150_000, initial_backoff=0.1)
async def ask(question: str) -> str:
    """Stand here for the call of your model: it refuses the third attempt, as a service under load does."""
    if next(attempts) == 3:  # noqa: PLR2004 - any would do
        raise TooManyRequestsError("Rate limit reached.")
    await asyncio.sleep(0.05)
    return f"An answer to {question!r}"


async def main() -> None:
    """Ask five questions at once."""
    answers = await asyncio.gather(*(ask(f"Question {number}") for number in range(1, 6)))
    print(*answers, sep="\n")

    print(f"\n{explain(ask)}\n")  # which layers stand around the function, with each value and where it came from
    print(get_all_resilience_stats()["retries"])


if __name__ == "__main__":
    asyncio.run(main())
