"""What goes over the wire, counted in the HTTP client: the same for any service behind it."""

from dataclasses import dataclass

import httpx2


@dataclass(slots=True)
class Traffic:
    """What one client sent and got.

    Attributes:
        requests: All requests.
        retries: Those of them that the SDK sent again on its own.
        refused: Those that were answered with 429.
        tokens: What the answers say that they used.
    """

    requests: int = 0
    retries: int = 0
    refused: int = 0
    tokens: int = 0

    async def count_request(self, request: httpx2.Request) -> None:
        """Count a request; an event hook."""
        self.requests += 1
        self.retries += request.headers["x-stainless-retry-count"] != "0"

    async def count_response(self, response: httpx2.Response) -> None:
        """Count a response; an event hook."""
        self.refused += response.status_code == httpx2.codes.TOO_MANY_REQUESTS
        if response.is_success:
            await response.aread()
            self.tokens += response.json()["usage"]["total_tokens"]
