"""The question vLLM asks: its model config as a ModelSpec, its engine config as options. Needs neither vLLM nor torch.

Objects of vLLM come as they are and are only read, so that one file knows which fields that takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from attn_core.errors import BadInputError
from attn_core.integrations.devices import platform_of
from attn_core.spec import AttentionSpec, Decision, EngineOptions, ModelSpec
from attn_core.spec.check import KV_CACHE_DTYPES

KV_DTYPES: Mapping[str, str] = {"fp8": "fp8_e4m3"}
"""vLLM's spellings that differ from ours."""

OPTIONS = "attn_core"
"""Key of ``additional_config`` under which a user gives :class:`EngineOptions` as a dict."""


@dataclass(frozen=True)
class Question:
    """What one engine asks. Equal questions have equal answers, so answers are kept by it."""

    model: ModelSpec
    options: EngineOptions
    device_type: str

    @property
    def decision(self) -> Decision:
        """Raises :class:`NoBackendError` with every reason."""
        return _decided(self)

    def with_options(self, **changes: Any) -> Question:
        return replace(self, options=replace(self.options, **changes))


@cache
def _decided(question: Question) -> Decision:
    return platform_of(question.device_type).resolve(question.model, **keywords(question.options))


def keywords(options: EngineOptions) -> dict[str, Any]:
    """Options as the keywords of ``resolve`` and ``attention_backend``."""
    return {f.name: getattr(options, f.name) for f in fields(options)}


def question_of(vllm_config: Any, *, free_page_size: bool = False) -> Question:
    """What ``VllmConfig`` asks of attention. Raises :class:`BadInputError` for a model or an option unknown here.

    ``free_page_size``: the block size is ours to choose.
    """
    model, cache_config = vllm_config.model_config, vllm_config.cache_config
    device_type = str(vllm_config.device_config.device_type)
    spec = model_spec(model)
    asked = {
        "page_size": None if free_page_size else cache_config.block_size,
        "kv_cache_dtype": kv_cache_dtype(cache_config.cache_dtype),
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        "max_model_len": model.max_model_len,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "host_lengths": "exact" if device_type == "cpu" else "bounds",
        # Context of a materialised prompt is merged by its LSE.
        "lse": any(isinstance(g, AttentionSpec) and g.kind == "mla" for g in spec.groups.values()),
        **user_options(vllm_config.additional_config),
    }
    return Question(spec, EngineOptions.of(**asked), device_type)


def model_spec(model_config: Any) -> ModelSpec:
    """The model in the dtype it runs in. ``model_config`` is vLLM's, with ``hf_config`` and ``dtype``."""
    return ModelSpec.from_hf_config({**model_config.hf_config.to_dict(), "dtype": str(model_config.dtype)})


def user_options(additional_config: Any) -> dict[str, Any]:
    """``additional_config={"attn_core": {...}}``: options the user sets, such as ``backend`` or ``deny``."""
    given = additional_config.get(OPTIONS, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise BadInputError(f"additional_config[{OPTIONS!r}]={given!r} must be a mapping of EngineOptions")
    return {**given, **({"deny": tuple(given["deny"])} if "deny" in given else {})}


def kv_cache_dtype(name: str | None) -> str:
    """Our name of a cache dtype of vLLM's; ``auto`` is the model's own."""
    ours = KV_DTYPES.get(name or "auto", name or "auto")
    if ours not in KV_CACHE_DTYPES:
        raise BadInputError(
            f"kv_cache_dtype={name!r} of vLLM has no counterpart here; known: "
            f"{', '.join((*KV_DTYPES, *KV_CACHE_DTYPES))}"
        )
    return ours
