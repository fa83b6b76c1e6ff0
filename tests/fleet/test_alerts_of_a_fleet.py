"""Alerts on a fleet, with a real store: what happens in another process is told in this one."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import resilience_kit
from resilience_kit import ResilienceSettings, configure
from resilience_kit.monitoring import Alerts, FleetSamples, Rule, Sampler, fleet_alerts

# A process whose circuit is open, until it is told to end.
PROGRAM = """
import sys
from resilience_kit import circuit_protected
from resilience_kit.monitoring import FleetSamples, Sampler


@circuit_protected("chat", failure_threshold=1, recovery_timeout=600)
def ask():
    raise ConnectionError


with Sampler([FleetSamples().add], process="other"):
    try:
        ask()
    except ConnectionError:
        print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(store_url, prefix):
    environment = {
        **os.environ,
        "RESILIENCE_STORE": store_url,
        "RESILIENCE_STORE_PREFIX": prefix,
        "PYTHONPATH": str(Path(resilience_kit.__file__).parents[1]),
    }
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "open\n"
        yield
        process.stdin.close()


def test_a_circuit_that_is_open_in_one_process_is_told_in_another(store_url, prefix, monkeypatch):
    monkeypatch.setattr(fleet_alerts, "_STRETCH", 1.0)
    monkeypatch.setattr(fleet_alerts, "_PATIENCE", 1.0)
    configure(ResilienceSettings(resilience_store=store_url, resilience_store_prefix=prefix))
    told = []
    alerts = Alerts([Rule(name="open", measure="circuit_open_seconds", above=1)], deliver=[told.append])
    fleet = FleetSamples()
    with other_process(store_url, prefix), Sampler([fleet.add]) as sampler:
        sampler.add_sink(fleet_alerts.FleetAlerts(alerts, fleet).take)
        assert any(told or time.sleep(0.05) for _ in range(600))
    fleet.close()

    assert [(alert.rule, alert.name, alert.state) for alert in told[:1]] == [("open", "chat", "firing")]
