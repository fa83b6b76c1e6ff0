"""A server's refusal as all processes of a fleet learn from it: what was known around it, as news."""

from dataclasses import fields, replace
from typing import Any, cast

from resilience_kit.errors import StoreContentError
from resilience_kit.fleet.membership import News
from resilience_kit.quota_ledger import Sent
from resilience_kit.quota_lessons import Seen
from resilience_kit.server_advice import ServerAdvice
from resilience_kit.validating import is_number

# What of `Seen` is told beside its time, in its order.
_COUNTS = tuple(field.name for field in fields(Seen))[1:]
_MOST = 2**53


def of_all_processes(seen: Seen, sent: Sent) -> Seen:
    """What one process knows of the traffic around a request of its own, with what the store said of all others."""
    requests = max(seen.requests, sent.requests_then - 1)
    tokens = max(seen.tokens_in_window, sent.tokens_then - seen.tokens)

    def of_all(own: int) -> int:
        # of the others only the whole window is known: they are taken to spread alike
        return own * requests // max(1, seen.requests)

    return replace(
        seen,
        requests=requests,
        tokens_in_window=tokens,
        requests_in_fine_and_edge=of_all(seen.requests_in_fine_and_edge),
        requests_in_short=of_all(seen.requests_in_short),
        requests_in_short_and_edge=of_all(seen.requests_in_short_and_edge),
        requests_and_edge=max(seen.requests_and_edge, requests),
        tokens_and_edge=max(seen.tokens_and_edge, tokens),
    )


def as_news(advice: ServerAdvice, seen: Seen, now: float) -> dict[str, Any]:
    """A refusal, for others to read."""
    return {
        "ago": now - seen.sent_at,
        "retry_after": advice.retry_after,
        "exhausted": advice.exhausted,
        "seen": [getattr(seen, name) for name in _COUNTS],
    }


def from_news(news: News, now: float) -> tuple[ServerAdvice, Seen]:
    """What another process was told by the server, and what it had seen.

    Raises:
        StoreContentError: It is not what the kit tells.
    """
    retry_after, exhausted, counts, ago = (news.get(key) for key in ("retry_after", "exhausted", "seen", "ago"))
    is_sound = (
        (retry_after is None or (is_number(retry_after) and retry_after >= 0))
        and exhausted in (None, "requests", "tokens")
        and isinstance(counts, list)
        and len(counts) == len(_COUNTS)
        and all(type(count) is int and 0 <= count < _MOST for count in counts)
        and is_number(ago)
        and ago >= 0
    )
    if not is_sound:
        raise StoreContentError(f"what was told of the limit {news['name']!r} is not from this kit", key=news["name"])
    seen = Seen(now - cast("float", ago), *cast("list[int]", counts))
    return ServerAdvice(retry_after=retry_after, exhausted=exhausted), seen
