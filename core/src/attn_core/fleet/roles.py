"""Disaggregation: which of a model's roles a rank runs, from the three words that people use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from attn_core.errors import BadInputError
from attn_core.spec import ModelSpec
from attn_core.spec.check import nearest

WORDS: Mapping[str, tuple[str, ...]] = {
    "prefill": ("prefill", "linear_prefill"),
    "decode": ("decode", "linear_decode"),
    "encode": ("encode",),
}


def check(where: str, roles: object) -> frozenset[str] | None:
    """The words of one rank, None for all; raises :class:`BadInputError`."""
    if roles is None:
        return None
    if isinstance(roles, str) or not isinstance(roles, Collection) or not roles:
        raise BadInputError(f"{where}: roles={roles!r} must be a list with some of {', '.join(WORDS)}")
    for word in roles:
        if word not in WORDS:
            raise BadInputError(f"{where}: unknown role {word!r}{nearest(word, WORDS)}; roles are {', '.join(WORDS)}")
    return frozenset(roles)


def asked(words: Sequence[frozenset[str] | None], model: ModelSpec) -> list[frozenset[str] | None]:
    """Each kind's roles of this model; None where that is all of them. ``kv_write`` is wherever the cache is written
    or read; encoders run with prefill unless some ranks are for them. Raises if nobody runs a role of the model.
    """
    every = {r for g in model.groups.values() for r in g.roles}
    encoders = any(w is not None and "encode" in w for w in words)
    out: list[frozenset[str] | None] = []
    for w in words:
        mine = set(w if w is not None else WORDS)
        mine |= {"encode"} if "prefill" in mine and not encoders else set()
        roles = {r for word in mine for r in WORDS[word]}
        roles |= {"kv_write"} if mine & {"prefill", "decode"} else set()
        out.append(None if roles >= every else frozenset(roles & every))
    for role in sorted(every - {"kv_write"}):
        if not any(r is None or role in r for r in out):
            raise BadInputError(f"no rank runs {role}, a role of this model; give it to some ranks")
    return out
