"""Decisions for transformers models: one per model, made at ``attach`` or at the first forward, never per call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attn_core.errors import AttnCoreError, BadInputError, NoBackendError
from attn_core.integrations.devices import platform_of
from attn_core.integrations.hf_call import LATER
from attn_core.integrations.hf_groups import Runner
from attn_core.platform import Platform
from attn_core.resolve import resolve
from attn_core.runtime import AttentionBackend, BoundGroup
from attn_core.spec import AttentionSpec, EngineOptions, ModelSpec
from attn_core.spec.model import Group

SCALES_Q_BEFORE = frozenset({"opt", "whisper"})
"""Model types whose layers multiply q by 1/sqrt(head_dim) themselves and then ask for a scale of 1. Source: the
``scaling=1.0`` in ``WhisperAttention.forward`` and ``OPTAttention.forward``."""


@dataclass(frozen=True)
class Layer:
    """What a layer of a model calls."""

    group: BoundGroup
    run: Runner


class Bound:
    """A model bound in one dtype on one device."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self.layers = {name: Layer(g, Runner(g)) for name, g in backend.groups.items()}

    def layer(self, module: nn.Module, causal: bool) -> Layer:
        """The group of a layer's attention, by whether it is causal and what the module says of itself: part of a
        decoder or not, and its index.

        Raises :class:`BadInputError` when the model has no such group, :class:`AttnCoreError` when the module does not
        say enough.
        """
        fits = {n: x for n, x in self.layers.items() if x.group.spec.causal == causal}
        if not fits:
            have = ", ".join(sorted({x.group.spec.attn_type for x in self.layers.values()}))
            name, kind = type(module).__name__, "causal" if causal else "bidirectional"
            raise BadInputError(f"{name}: the layer is {kind}, the decision was made for {have} attention; {LATER}")
        if not causal and len({x.group.spec.attn_type for x in fits.values()}) > 1:
            own = "cross" if getattr(module, "is_decoder", False) else "encoder_only"
            fits = {n: x for n, x in fits.items() if x.group.spec.attn_type == own}
        if len(fits) == 1:
            return next(iter(fits.values()))
        index = getattr(module, "layer_idx", None)
        found = [x for x in fits.values() if index in x.group.spec.layers]
        if len(found) != 1:
            raise AttnCoreError(
                f"{type(module).__name__} says that it is layer {index}, which does not tell its group from the others "
                f"({', '.join(fits)}); {LATER}"
            )
        return found[0]


class Owner:
    """One model's engine options, and its kernels for each dtype and device it has run in (``model.to``, autocast)."""

    def __init__(self, options: Mapping[str, Any], architecture: str | None = None) -> None:
        self.options = options
        self.architecture = architecture
        """The model's class, which tells what its config may not: an encoder of T5 alone, say."""
        self._bound: dict[tuple[torch.dtype, torch.device], Bound] = {}
        self._layers: weakref.WeakKeyDictionary[nn.Module, dict[Any, Layer]] = weakref.WeakKeyDictionary()

    def bound(self, config: Any, dtype: torch.dtype, device: torch.device) -> Bound:
        """Decided and bound at the first call for a dtype and device, remembered for all others."""
        key = (dtype, device)
        if key not in self._bound:
            self._bound[key] = Bound(_bind(spec_of(config, dtype, self.architecture), device, self.options))
        return self._bound[key]

    def layer(self, module: nn.Module, dtype: torch.dtype, device: torch.device, is_causal: bool | None) -> Layer:
        """What ``module`` calls; found once. ``is_causal`` of the call has precedence over the module's own."""
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        known = self._layers.setdefault(module, {})
        key = (dtype, device, causal)
        if key not in known:
            known[key] = self.bound(module.config, dtype, device).layer(module, causal)
        return known[key]


_owners: weakref.WeakKeyDictionary[nn.Module, Owner] = weakref.WeakKeyDictionary()
_by_config: dict[int, tuple[weakref.ref[Any], Owner]] = {}
"""id of a config -> its owner, for models nobody attached. Layers of a model share one config object, and configs
cannot be hashed; an entry goes when its config does."""


def own(model: nn.Module, owner: Owner) -> None:
    """``owner`` decides for every layer of ``model`` from now on."""
    for module in model.modules():
        _owners[module] = owner


def owner_of(module: nn.Module) -> Owner:
    """Whoever decides for this layer: its model's owner, else one for all layers with the same config object."""
    owner = _owners.get(module)
    if owner is None:
        config, key = module.config, id(module.config)
        known = _by_config.get(key)
        if known is None or known[0]() is not config:
            known = _by_config[key] = weakref.ref(config, lambda _: _by_config.pop(key, None)), Owner({})
        owner = _owners[module] = known[1]
    return owner


def spec_of(config: Any, dtype: torch.dtype, architecture: str | None = None) -> ModelSpec:
    """What transformers asks of attention for a model: its groups, as the layers call for them.

    Latent attention (MLA) arrives expanded, as one key and value per query head; and some models scale q themselves.
    ``architecture`` counts where the config names none.
    """
    data = {**config.to_dict(), "dtype": str(dtype)}
    if architecture is not None and not data.get("architectures"):
        data["architectures"] = [architecture]
    spec = ModelSpec.from_hf_config(data)
    changes: dict[str, Any] = {"scale": 1.0} if config.model_type in SCALES_Q_BEFORE else {}
    return replace(spec, groups={name: _as_called(g, changes) for name, g in spec.groups.items()})


def _as_called(g: Group, changes: Mapping[str, Any]) -> Group:
    if not isinstance(g, AttentionSpec):
        return g
    if g.kind == "mla":
        g = replace(g, kind="mha", num_kv_heads=g.num_heads, latent_dim=None, rope_dim=None, nope_dim=None)
    return replace(g, **changes)


def _bind(spec: ModelSpec, device: torch.device, options: Mapping[str, Any]) -> AttentionBackend:
    platform, index = _platform_of(device)
    if "page_size" not in options and any(g.cached for g in spec.groups.values()):
        options = {**options, "page_size": _page_size(platform, index, spec, options)}
    return platform.attention_backend(spec, device=index, **options)


def _page_size(platform: Platform, index: int, spec: ModelSpec, options: Mapping[str, Any]) -> int | None:
    """1, which needs no copy of transformers' keys (:mod:`hf_keys`), where that changes no choice of a kernel; else
    None."""

    def chosen(**more: Any) -> dict[tuple[str, str], str]:
        engine = EngineOptions.of(**options, **more)
        made = resolve(platform.devices[index], spec, engine, platform.catalog, platform.installed)
        return {(n, role): c.backend for n, g in made.groups.items() for role, c in g.choices.items()}

    try:
        return 1 if chosen() == chosen(page_size=1) else None
    except NoBackendError:
        return None  # binding then says whether it is possible at all


def _platform_of(device: torch.device) -> tuple[Platform, int]:
    """The platform that drives a torch device, and the device's place among its devices."""
    platform = platform_of(device.type)
    there = [d.index for d in platform.devices]
    if (device.index or 0) not in there:
        raise BadInputError(f"the model lies on {device}; {platform.name} has devices {there}")
    return platform, there.index(device.index or 0)
