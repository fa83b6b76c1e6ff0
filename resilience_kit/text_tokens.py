"""Count the tokens of one text: exactly where a vocabulary is at hand, else by an estimate on the high side."""

import re

from resilience_kit.vocabularies import encoding_for

# Text is encoded in pieces, because tiktoken's time for one word grows faster than the word. To cut in front of a
# space that follows a word changes no token; only where there is none is the cut arbitrary.
PIECES = re.compile(r".{1,20000}(?:\Z|(?<=\S)(?= ))|.{1,20000}", re.DOTALL)

# What is at least one token each, when it must be estimated: a word of up to four letters, two digits, one mark.
_ESTIMATED = re.compile(r"[A-Z]?[a-z]{1,4}|[A-Z]{1,2}|[0-9]{1,2}|[!-~]|\s{2,64}|[\x00-\x1f\x7f]")

# Exact counts by model, and by a text's hash and length in place of the text: nothing of a prompt is kept. Python
# computes a str's hash once, with a secret of the process, and keeps it in the str, so that to ask again costs 0.1 µs;
# a digest of hashlib's takes ten times as long for a message. That two texts of 10,000 share hash and length has odds
# below one in 10^11, and would cost one wrong count.
_counts: dict[tuple[str, int, int], int] = {}
_MOST_COUNTS = 10_000
_hash = str.__hash__  # not hash(): a subclass may have a hash of its own


def count_text(text: str, model: str) -> int:
    """Count a text's tokens; the same text is counted once."""
    key = (model, _hash(text), len(text))
    count = _counts.get(key)
    if count is not None:
        return count
    encoding = encoding_for(model)
    if encoding is None:
        # not kept: a download that goes on may still bring the vocabulary
        return estimate_text(text)
    count = sum(len(encoding.encode_ordinary(piece[0])) for piece in PIECES.finditer(text))
    if len(_counts) >= _MOST_COUNTS:
        # All at once: each step is atomic, so that no lock is needed, and it happens once in 10,000 new texts.
        _counts.clear()
    _counts[key] = count
    return count


def estimate_text(text: str) -> int:
    """Estimate tokens on the high side: about 1.5 times too many for English and code, 2 to 3 times for Chinese."""
    # in pieces, because a search lets no other thread run, and so no event loop, before its end
    return sum(_estimate_piece(piece[0]) for piece in PIECES.finditer(text))


def _estimate_piece(text: str) -> int:
    beyond_ascii = len(text.encode("utf-8", "surrogatepass")) - len(text.encode("ascii", "ignore"))
    return len(_ESTIMATED.findall(text)) + -(-beyond_ascii * 3 // 4)
