"""How a refusal reaches vLLM: a ``ValueError`` in the words of its own selectors, our reasons as data inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attn_core.errors import NoBackendError
from attn_core.spec import Rejection


class SelectionError(NoBackendError, ValueError):
    """No backend, said the way vLLM's own selectors do. ``rejections`` and ``relaxations`` hold it as data."""


def refused(cause: NoBackendError, where: str, asked: Any, *, selected: str | None = None) -> SelectionError:
    """``cause`` for a user of vLLM, who may have ``selected`` a backend by name."""
    headline = (
        f"No valid attention backend found for {where} with {asked!r}."
        if selected is None
        else f"Selected backend {selected} is not valid on {where} with {asked!r}."
    )
    ways = "".join(f"\n  way out: {way}" for way in cause.relaxations)
    text = f"{headline} Reasons: {_shown(reasons(cause.rejections))}{ways}"
    return SelectionError(cause.code, text, cause.rejections, cause.relaxations)


def unknown(feature_reasons: list[str], where: str, asked: Any) -> SelectionError:
    """A refusal before any backend was judged: the configuration asks for what attn-core has no word for."""
    text = f"No valid attention backend found for {where} with {asked!r}. Reasons: {{'ATTN_CORE': {feature_reasons}}}"
    return SelectionError("no_backend", text, (), ())


def reasons(rejections: Iterable[Rejection]) -> dict[str, list[str]]:
    """Backend -> its distinct reasons, each with the roles and groups it holds for."""
    places: dict[str, dict[str, list[str]]] = {}
    for r in rejections:
        text = f"{r.text} ({r.hint})" if r.hint else r.text
        places.setdefault(r.backend, {}).setdefault(text, []).append(f"{r.group} {r.role}".strip())
    return {
        backend: [f"{text} [{', '.join(dict.fromkeys(where))}]" for text, where in texts.items()]
        for backend, texts in places.items()
    }


def _shown(found: Mapping[str, list[str]]) -> str:
    return "{" + ", ".join(f"{name.upper()}: {texts}" for name, texts in found.items()) + "}"
