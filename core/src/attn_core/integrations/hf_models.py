"""Decisions for transformers models: one per model, made at ``attach`` or at the first forward, never per call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.integrations.hf_call import LATER
from attn_core.integrations.hf_encoder import EncoderGroup
from attn_core.platform import Platform, get_platform, installed_plugins
from attn_core.runtime import AttentionBackend, BoundGroup
from attn_core.spec import AttentionSpec, ModelSpec

RUNNERS: Mapping[str, Callable[[BoundGroup], Callable[..., Tensor]]] = {"encoder_only": EncoderGroup}
"""attn_type -> what runs a group's layers: ``run(caller, q, k, v, mask)``. A type that is not here is refused."""


@dataclass(frozen=True)
class Layer:
    """What a layer of a model calls."""

    group: BoundGroup
    run: Callable[..., Tensor]


class Bound:
    """A model bound in one dtype on one device."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self.layers = {name: Layer(g, RUNNERS[g.spec.attn_type](g)) for name, g in backend.groups.items()}

    def layer(self, module: nn.Module) -> Layer:
        """The layer's group, by the index that the module states. Raises :class:`AttnCoreError` when it must and does
        not."""
        if len(self.layers) == 1:
            return next(iter(self.layers.values()))
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise AttnCoreError(
                f"{type(module).__name__} does not say which layer it is, and layers of this model differ "
                f"({', '.join(self.layers)}); {LATER}"
            )
        return self.layers[self.backend.group_of(index).name]


class Owner:
    """One model's engine options, and its kernels for each dtype and device it has run in (``model.to``, autocast)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._bound: dict[tuple[torch.dtype, torch.device], Bound] = {}

    def bound(self, config: Any, dtype: torch.dtype, device: torch.device) -> Bound:
        """Decided and bound at the first call for a dtype and device, remembered for all others."""
        key = (dtype, device)
        if key not in self._bound:
            self._bound[key] = Bound(_bind(config, dtype, device, self.options))
        return self._bound[key]


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


def _bind(config: Any, dtype: torch.dtype, device: torch.device, options: Mapping[str, Any]) -> AttentionBackend:
    spec = ModelSpec.from_hf_config({**config.to_dict(), "dtype": str(dtype)})
    for name, group in spec.groups.items():
        kind = group.attn_type if isinstance(group, AttentionSpec) else f"linear ({group.kind})"
        if kind not in RUNNERS:
            raise AttnCoreError(f"{spec.architecture}: group {name!r} is {kind} attention, which is {LATER}")
    platform, index = _platform_of(device)
    return platform.attention_backend(spec, device=index, **options)


def _platform_of(device: torch.device) -> tuple[Platform, int]:
    """The platform that drives a torch device, and the device's place among its devices."""
    platform = get_platform()
    if platform.spec.torch_device != device.type:
        plugins = installed_plugins()
        specs, found = plugins.platforms(), dict.fromkeys(d.platform for d in plugins.probe())
        name = next((n for n in found if n in specs and specs[n].torch_device == device.type), None)
        if name is None:
            raise BadInputError(f"the model lies on {device}, which no plugin reports; found: {', '.join(found)}")
        platform = get_platform(name)
    there = [d.index for d in platform.devices]
    if (device.index or 0) not in there:
        raise BadInputError(f"the model lies on {device}; {platform.name} has devices {there}")
    return platform, there.index(device.index or 0)
