"""The nouns: what models ask, devices have, vendors promise and decisions say. Frozen, keyword-only, no torch."""

from attn_core.spec.backend import ACCOMPANYING, ROLES, BackendSpec, Constraint, Requirement, Tier
from attn_core.spec.decision import Choice, Decision, GroupDecision, PluginReport, Rejection
from attn_core.spec.device import Device, PlatformSpec
from attn_core.spec.fields import FIELDS, Field
from attn_core.spec.model import AttentionSpec, LinearSpec, ModelSpec
from attn_core.spec.options import EngineOptions

__all__ = [
    "ACCOMPANYING",
    "FIELDS",
    "ROLES",
    "AttentionSpec",
    "BackendSpec",
    "Choice",
    "Constraint",
    "Decision",
    "Device",
    "EngineOptions",
    "Field",
    "GroupDecision",
    "LinearSpec",
    "ModelSpec",
    "PlatformSpec",
    "PluginReport",
    "Rejection",
    "Requirement",
    "Tier",
]
