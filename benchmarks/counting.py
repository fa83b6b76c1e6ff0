"""The time to count a conversation of 50 messages after one more, beside that to count all 51 of them anew."""

import statistics
import time

from resilience_kit.token_counting import count_tokens, load

_ROUNDS = 200
_BOUND = 0.1

# About 500 characters, and another text for each message of each round: none was counted before.
_TEXT = "Message {message} of {conversation}: " + "The sales of the north grew by 4.2 % in May; what of the south? " * 7


def _seconds(messages: list[dict[str, str]]) -> float:
    started = time.perf_counter()
    count_tokens(messages)
    return time.perf_counter() - started


def main() -> None:
    """Print both times in microseconds, and their ratio."""
    load()
    all_anew, one_more = [], []
    for conversation in range(_ROUNDS):
        texts = [_TEXT.format(message=message, conversation=conversation) for message in range(102)]
        messages = [{"role": "user", "content": text} for text in texts]
        all_anew.append(_seconds(messages[:51]))
        _seconds(messages[51:101])
        one_more.append(_seconds(messages[51:]))
    anew, more = statistics.median(all_anew), statistics.median(one_more)
    print(
        f"counting: 51 messages {anew * 1e6:.0f} µs, one more {more * 1e6:.0f} µs, "
        f"ratio {more / anew:.3f} (at most {_BOUND})"
    )
