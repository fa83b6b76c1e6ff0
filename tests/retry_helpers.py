"""What the tests of @retry_on_429 call: a service that fails with given errors, in the time of a loop."""

import asyncio


class RefusalError(Exception):
    """What an HTTP client raises for a status of 429."""

    status_code = 429

    def __init__(self, message="refused", **headers):
        super().__init__(message)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """Fails with each of its errors in turn, then answers; notes when it was called, in seconds of the loop."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.times = []

    async def __call__(self):
        self.times.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)
        return "answer"
