"""Small checks shared by the specs: one wording for bad sizes, names and types."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from attn_core.errors import BadInputError

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (
    "auto",
    "float32",
    "bfloat16",
    "float16",
    "fp8_e4m3",
    "fp8_e4m3fnuz",
    "fp8_e5m2",
    "int8",
    "nvfp4",
)


def nearest(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when something close is known, else nothing."""
    names = list(known)
    starts = [k for k in names if word and k.startswith(str(word))]  # "encoder" means encoder_only, not decoder
    match = starts or difflib.get_close_matches(str(word), names, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def choice(where: str, name: str, value: Any, allowed: Iterable[str]) -> Any:
    allowed = tuple(allowed)
    if value not in allowed:
        raise BadInputError(f"{where}: {name}={value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    return value


def size(where: str, name: str, value: Any, *, optional: bool = False, least: int = 1) -> Any:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise BadInputError(f"{where}: {name}={value!r} must be {what}{' or None' if optional else ''}")
    return value


def flag(where: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadInputError(f"{where}: {name}={value!r} must be True or False")
    return value


def dtype(where: str, value: Any) -> str:
    """A dtype name as the vocabulary spells it; accepts ``torch.bfloat16`` and its string."""
    name = str(value).removeprefix("torch.")
    name = {"half": "float16", "float": "float32"}.get(name, name)
    if name not in DTYPES:
        raise BadInputError(
            f"{where}: dtype={value!r} is not supported; allowed are {', '.join(DTYPES)}{nearest(name, DTYPES)}"
        )
    return name
