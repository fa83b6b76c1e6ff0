"""Count what images cost: by the tiles of 512 pixels that cover them, where their size can be read."""

import base64
import math
import re
from collections.abc import Mapping
from typing import Any

# OpenAI's guide "Images and vision": 85, and 170 for each tile of 512 pixels.
_BASE_TOKENS = 85
_TILE_TOKENS = 170
_TILE = 512
_LONGEST_SIDE = 2_048
_SHORTEST_SIDE = 768
_GPT_4O_MINI_FACTOR = 100 / 3  # 2,833 and 5,667 there

# What a linked image measures cannot be known from the request, so it counts as one of this size, which has 4 tiles.
_USUAL_SIZE = (1_024, 1_024)

# A data URL's header and the beginning of its data: a PNG says its size in its first 24 bytes.
_PNG_URL = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]{32})")
_PNG_START = b"\x89PNG\r\n\x1a\n"


def image_tokens(part: Mapping[str, Any], model: str) -> int:
    """Count a part of a message that holds an image, as chat completions or responses take it.

    A PNG in a data URL counts by its size, any other image, and a file, as one of 1024 x 1024 pixels.

    Example:
        >>> from resilience_kit.image_tokens import image_tokens
        >>> image_tokens({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "gpt-4o")
        765

    Source: platform.openai.com, "Images and vision", "Calculating costs".
    """
    image = part.get("image_url")
    fields = image if isinstance(image, Mapping) else {"url": image}
    tokens = _BASE_TOKENS
    if (part.get("detail") or fields.get("detail")) != "low":
        tokens += _TILE_TOKENS * _tiles(*(_png_size(fields.get("url")) or _USUAL_SIZE))
    return round(tokens * _GPT_4O_MINI_FACTOR) if "4o-mini" in model else tokens


def _tiles(width: int, height: int) -> int:
    """How many tiles cover an image, after it is scaled down to fit 2048 x 2048 and its shorter side to fit 768."""
    scale = min(1.0, _LONGEST_SIDE / max(width, height), _SHORTEST_SIDE / min(width, height))
    # rounded, since 1536 pixels may come out as a little more
    columns, rows = (math.ceil(round(side * scale, 6) / _TILE) for side in (width, height))
    return columns * rows


def _png_size(url: object) -> tuple[int, int] | None:
    found = _PNG_URL.match(url) if isinstance(url, str) else None
    if found is None:
        return None
    start = base64.b64decode(found[1])
    width, height = int.from_bytes(start[16:20]), int.from_bytes(start[20:24])
    return (width, height) if start.startswith(_PNG_START) and width and height else None
