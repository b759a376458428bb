"""From a config to a :class:`ModelSpec`: find the family, read the text model, add the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_core.errors import BadInputError
from attn_core.models import draft, unknown, vision
from attn_core.models.defaults import DEFAULTS
from attn_core.models.registry import READERS, WRAPPERS, Reader, type_of_architecture
from attn_core.models.source import load
from attn_core.models.view import TEXT_KEYS, View
from attn_core.spec.model import ModelSpec

REFUSED = {
    "block_configs": "layers with individual heads (NAS models) are not read; describe the groups with AttentionSpec",
}
"""Fields that change attention in any model that has them, and that no group can express."""

READ_BY_SOME = {
    "dual_chunk_attention_config": "its family is read without dual chunk attention; remove the field to run with "
    "plain attention up to the original context length",
}
"""Fields that change attention in any model that has them, refused where the family's reader did not look at them."""


def read_hf_config(config: str | Path | Mapping[str, Any] | Any) -> ModelSpec:
    """The attention of a model, from its ``config.json``, the folder with it, its dict, or a ``PretrainedConfig``.

    Class defaults of transformers stand behind absent fields of known models. An unknown architecture is read from
    common fields with a note in ``ModelSpec.notes``. Raises :class:`BadInputError`, naming the source: not readable,
    not a model config, fields missing, or fields whose meaning for attention is unknown.
    """
    data, where = load(config)
    try:
        return _read(data)
    except BadInputError as e:
        raise BadInputError(f"{where}: {e}") from None


def _read(data: Mapping[str, Any]) -> ModelSpec:
    top = View(data, kind=str(data.get("model_type") or ""))
    names = data.get("architectures") or [top.kind]
    if not isinstance(names, list | tuple):
        raise BadInputError(f"architectures={names!r} must be a list of names")
    top.architecture = str(names[0])
    if not top.architecture and top.get("num_attention_heads") is None and top.sub(*TEXT_KEYS) is None:
        found = ", ".join(sorted(map(str, data))[:8]) or "nothing"
        raise BadInputError(f"no model config: it has neither architectures nor model_type (found: {found})")
    v, reader, known = _family(top)
    for name, why in REFUSED.items():
        if v.get(name):
            raise BadInputError(f"{v.name}: {name} is set: {why}")
    groups = reader(v)
    for name, why in READ_BY_SOME.items():
        if name not in v.used and v.get(name):
            raise BadInputError(f"{v.name}: {name} is set: {why}")
    if draft.is_draft(top.architecture):
        groups = groups if v.kind == "mimo_v2_mtp" else draft.trim(v, groups)
    else:
        groups |= vision.read(v)
    if not known:
        unknown.refuse_unread(v)
    if v.inherited("audio_config"):
        v.note("the audio tower is not read; its attention stays with the engine")
    return ModelSpec(groups=groups, architecture=top.architecture, notes=tuple(top.notes))


def _family(top: View) -> tuple[View, Reader, bool]:
    """The view of the text model with its type and class defaults, the function that reads it, and whether the model's
    code is known.

    Engines pick model code by ``architectures``, so that goes first, then ``model_type``, then the text model's own.
    """
    by_name = type_of_architecture(top.architecture)
    stated = top.kind if top.kind in READERS else None
    v = top
    while (nested := v.sub(*TEXT_KEYS)) is not None:
        v = View(nested, kind=str(nested.get("model_type") or ""), parent=v)
    inner = v.kind if v is not top else ""
    kind = by_name or stated or (inner if inner in READERS else None)
    owners = (inner or top.kind, kind or "")
    v.defaults = next((DEFAULTS[k] for owner in owners for k in (owner, f"{owner}_text") if k in DEFAULTS), {})
    if kind is None:
        return v, unknown.read, False
    v.kind = kind
    wrapped = stated is None and top.kind in WRAPPERS
    known = by_name is not None or wrapped or top.architecture in ("", stated)
    if not known:
        what = "its language model is read as" if stated is None else "read by its model type"
        v.note(f"architecture {top.name} is not known; {what} {kind}")
    return v, READERS[kind], known
