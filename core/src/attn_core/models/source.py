"""Where a config comes from: a file, a folder, a dict, or an object with ``to_dict``. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_core.errors import BadInputError

_EXPECTED = "give a Hugging Face config.json, the folder that holds it, its dict, or a PretrainedConfig"


def load(config: str | Path | Mapping[str, Any] | Any) -> tuple[dict[str, Any], str]:
    """The config as a plain dict, and a name for it in messages.

    A ``PretrainedConfig`` is recognised by its ``to_dict``, so transformers is not imported. Raises
    :class:`BadInputError` naming the path and what was found there.
    """
    if isinstance(config, str | Path):
        return _read(Path(config)), str(config)
    if isinstance(config, Mapping):
        return dict(config), "config dict"
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict) and not isinstance(config, type):
        return _of_object(config, to_dict())
    raise BadInputError(f"expected a model config, got {type(config).__name__}; {_EXPECTED}")


def _of_object(config: Any, data: Any) -> tuple[dict[str, Any], str]:
    where = type(config).__name__
    if not isinstance(data, Mapping):
        raise BadInputError(f"{where}: to_dict() gave {type(data).__name__} instead of a dict; {_EXPECTED}")
    return dict(data), where


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            path, folder = path / "config.json", path
            if not path.is_file():
                found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
                raise BadInputError(f"{folder}: no config.json in this folder, which holds {found}; {_EXPECTED}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BadInputError(f"{path}: no such file or folder (models are not downloaded); {_EXPECTED}") from None
    except (OSError, ValueError) as e:
        raise BadInputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}; {_EXPECTED}") from None
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        start = f"it starts with {raw[:16]!r}" if raw else "it is empty"
        raise BadInputError(f"{path}: is not JSON ({start}: {e}); {_EXPECTED}") from None
    if not isinstance(data, dict):
        raise BadInputError(f"{path}: holds a JSON {type(data).__name__}, not an object; {_EXPECTED}")
    return data
