"""Prometheus (extra `prometheus`): all that the kit counts, as metrics that are read when Prometheus asks.

pip install 'resilience-kit[prometheus]'
python examples/with_prometheus.py
"""

import urllib.request

from prometheus_client import start_http_server

from resilience_kit import rate_limited
from resilience_kit.monitoring import export_to_prometheus


@rate_limited("chat", requests_per_minute=600, min_interval=0)
def ask(prompt: str) -> str:
    """Stand here for the call of your model."""
    return "An answer"


def main() -> None:
    """Serve the metrics, ask three times, and look at the page as Prometheus does."""
    stop = export_to_prometheus()
    server, _ = start_http_server(0, "127.0.0.1")  # in a service: a fixed port, which Prometheus is told of

    for number in range(1, 4):
        ask(f"Question {number}")

    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as page:
        for line in page.read().decode().splitlines():
            if line.startswith("resilience_kit_") and "chat" in line and "_bucket" not in line:
                print(line)
    server.shutdown()
    server.server_close()
    stop()


if __name__ == "__main__":
    main()
