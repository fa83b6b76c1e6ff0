"""The multi-agent example in a loop, beside a dashboard that shows it: `python -m examples.live`, until Ctrl-C.

The dashboard is in the program that it shows: `create_app()` is an ASGI application, and `running()` serves it from a
thread. A program that is an ASGI application itself mounts it instead: `app.mount("/resilience", create_app())`.
"""

import argparse
import asyncio
import itertools
import secrets
import sys
from collections.abc import Sequence

from examples.multi_agent.comparison import QUESTIONS, run
from examples.multi_agent.service import Quota, Service, simulated_service
from examples.multi_agent.telemetry import Telemetry, open_telemetry
from resilience_kit.monitoring.dashboard import create_app, running
from resilience_kit.monitoring.dashboard.serving import PORT

# Less than the agents could use, so that there is something to see.
_QUOTA = Quota(requests=120, tokens=30_000, period=20.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C, or for so many rounds, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.live", description="Agents to watch in a browser.")
    parser.add_argument("--port", type=int, default=PORT, help="where the dashboard listens; 0 takes a free port")
    parser.add_argument("--rounds", type=int, help="end after asking all questions so often")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many there are in a round")
    options = parser.parse_args(arguments)
    rounds = itertools.count() if options.rounds is None else range(options.rounds)
    token = secrets.token_urlsafe()
    app = create_app(title="Three agents, one quota", controls=True, token=token)
    try:
        with (
            open_telemetry() as telemetry,
            simulated_service(_QUOTA) as service,
            running(app, port=options.port) as url,
        ):
            print(f"Watch it at {url} and log in with {token}\nCtrl-C ends it.", flush=True)
            for _ in rounds:
                asyncio.run(_ask(service, telemetry, QUESTIONS[: options.questions]))
    except OSError as error:
        print(f"error: cannot listen on port {options.port}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # this is how it is ended
        return 0
    return 0


async def _ask(service: Service, telemetry: Telemetry, questions: Sequence[str]) -> None:
    await run(service, telemetry, questions, protected=True)


if __name__ == "__main__":
    sys.exit(main())
