"""What every test starts from: names, counters and settings of its own, and nothing of the machine's."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from resilience_kit import events
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import isolated

# The same examples in every run: what fails is the change, not the draw.
settings.register_profile("resilience_kit", deadline=None, derandomize=True)
settings.load_profile("resilience_kit")

# pytest-asyncio asks for the main thread's loop, and Python before 3.14 makes one that nobody closes; asyncio.run()
# in a later test would let go of it, and a third test would fail of its ResourceWarning. So there is none.
asyncio.set_event_loop(None)

_ENV_FILE = Path(__file__).parent.parent / "rate-limiting.env"
_VARIABLES = frozenset(re.findall(r"^(?:# )?(\w+)=", _ENV_FILE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(autouse=True)
def fresh_process(tmp_path, monkeypatch):
    """Run the test as in a process that has just started, in an empty folder, with none of the kit's variables."""
    monkeypatch.chdir(tmp_path)
    for variable in os.environ:
        if variable.upper() in _VARIABLES:
            monkeypatch.delenv(variable)
    with isolated():
        yield
    # Its thread reads the statistics by the real clock, in the midst of a later test's virtual time.
    sampler = sys.modules.get("resilience_kit.monitoring.sampler")
    if sampler is not None and sampler._shared is not None:
        sampler._shared.stop()
        sampler._shared = None


@pytest.fixture
def heard():
    """All events of the test so far, in their order."""
    heard = []
    unsubscribe = events.subscribe(heard.append)
    yield heard
    unsubscribe()


@pytest.fixture
def slots_taken():
    """Tell how many slots of a rate limit are taken."""
    return lambda name="default": rate_limits.items()[name].statistics().in_flight


@pytest.fixture
def restless_threads():
    """Let threads take turns as often as they can, so that what is not guarded breaks."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
