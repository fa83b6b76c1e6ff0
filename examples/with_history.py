"""History (extra `history`): samples of each second in a database, read by this or any other process.

    pip install 'resilience-kit[history]'
    python examples/with_history.py

Any URL of SQLAlchemy does, such as "postgresql+psycopg://user:password@host/name"; a plain path is a file of SQLite and
needs no extra.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from resilience_kit import resilient
from resilience_kit.monitoring import History, Sampler


@resilient("chat", agent="Writer", min_interval=0)
def ask(prompt: str) -> dict[str, Any]:
    """Stand here for the call of your model."""
    return {"model": "gpt-4o", "usage": {"prompt_tokens": 20, "completion_tokens": 80}}


def main() -> None:
    """Ask three times, and read from the database what was measured meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"sqlite:///{Path(folder) / 'history.sqlite3'}"
        with History(place) as history, Sampler([history.add]):  # for as long as your program runs
            for number in range(1, 4):
                ask(f"Question {number}")

        for minute in history.read(time.time() - 3_600, resolution=60):
            print(time.ctime(minute.at), dict(minute.of("agents")["Writer"].counters))


if __name__ == "__main__":
    main()
