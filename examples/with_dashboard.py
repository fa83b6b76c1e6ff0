"""The dashboard (extra `dashboard`): a page beside the program that shows how near each quota is, and what is wrong.

    pip install 'resilience-kit[dashboard]'
    python examples/with_dashboard.py --stay

Without --stay it ends after a second. A program that is an ASGI application itself mounts it instead:
`app.mount("/resilience", create_app())`.
"""

import asyncio
import json
import sys
import urllib.request

from resilience_kit import resilient
from resilience_kit.monitoring.dashboard import create_app, running


@resilient("chat", requests_per_minute=60, period=6, min_interval=0, max_concurrent=8)
async def ask(question: str) -> str:
    """Stand here for the call of your model."""
    await asyncio.sleep(0.2)
    return f"An answer to {question!r}"


async def ask_all(questions: int) -> None:
    """Ask so many questions at once: more than the quota lets through."""
    await asyncio.gather(*(ask(f"Question {number}") for number in range(questions)))


def main() -> None:
    """Serve the page while questions are asked."""
    with running(create_app(title="One program"), port=0) as url:
        print(f"Watch it at {url}", flush=True)
        asyncio.run(ask_all(15))
        while "--stay" in sys.argv:
            asyncio.run(ask_all(15))
        with urllib.request.urlopen(f"{url}api/now") as page:  # noqa: S310 - our own page
            limits = json.load(page)["limits"]
    print("What it showed last:", limits)


if __name__ == "__main__":
    main()
