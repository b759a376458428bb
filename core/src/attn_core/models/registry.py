"""The families as data: which model types each reads, and with which function."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from attn_core.models import alibi, dense, encoder, gemma, gpt_oss, hybrid, llama4, mimo_v2, mllama, seq2seq
from attn_core.models.view import View
from attn_core.spec.model import Group

Reader = Callable[[View], dict[str, Group]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Model types that share one set of rules."""

    types: str
    """Model types of the text model, separated by spaces."""
    read: Reader


FAMILIES = (
    Family(
        read=dense.read,
        types="apertus arcee biogpt bitnet codegen cohere cohere2 cwm dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe "
        "flex_olmo glm glm4 glm4_moe glm4v_text glm4v_moe_text gpt2 gpt_bigcode gpt_neox gptj granite granitemoe "
        "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 lfm2 "
        "lfm2_moe llama mellum mimo minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 "
        "olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text "
        "qwen2_5_omni_text qwen3 qwen3_moe qwen3_vl_text qwen3_vl_moe_text qwen3_omni_moe_text seed_oss smollm3 "
        "solar_open stablelm starcoder2 vaultgemma",
    ),
    Family(
        read=dense.read,  # with kv_lora_rank: mla.attention
        types="deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe_lite glm_moe_dsa axk1 axk2 minicpm3 youtu",
    ),
    Family(read=gpt_oss.read, types="gpt_oss granite_swa granitemoe_swa flint hy_v4 iquestq1"),
    Family(read=gemma.read, types="gemma gemma2"),
    Family(read=gemma.read_prefix, types="paligemma"),
    Family(read=gemma.read_gemma3, types="gemma3 gemma3_text"),
    Family(read=gemma.read_gemma3n, types="gemma3n gemma3n_text"),
    Family(read=gemma.read_gemma4, types="gemma4 gemma4_text gemma4_unified gemma4_unified_text"),
    Family(read=mimo_v2.read, types="mimo_v2_flash mimo_v2"),
    Family(read=mimo_v2.read_mtp, types="mimo_v2_mtp"),
    Family(read=hybrid.read_interval, types="qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text"),
    Family(read=hybrid.read_kimi, types="kimi_linear"),
    Family(read=hybrid.read_nemotron, types="nemotron_h"),
    Family(read=hybrid.read_mamba, types="bamba granitemoehybrid falcon_h1"),
    Family(read=llama4.read, types="llama4 llama4_text"),
    Family(read=mllama.read, types="mllama mllama_text_model"),
    Family(read=alibi.read, types="bloom mpt falcon baichuan"),
    Family(
        read=encoder.read,
        types="bert bert-generation camembert data2vec-text distilbert electra ernie eurobert gte jina_embeddings_v3 "
        "megatron-bert nomic_bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl",
    ),
    Family(read=encoder.read_biased, types="mpnet"),
    Family(read=encoder.read_modernbert, types="modernbert"),
    Family(read=encoder.read_modernbert_decoder, types="modernbert-decoder"),
    Family(read=seq2seq.read_t5, types="t5 mt5 umt5"),
    Family(read=seq2seq.read_bart, types="whisper bart blenderbot m2m_100 marian mbart pegasus plbart"),
)

READERS: dict[str, Reader] = {kind: family.read for family in FAMILIES for kind in family.types.split()}

WRAPPERS = (
    "aya_vision", "cohere2_vision", "glm4v", "glm4v_moe", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "mistral3", "qwen2_5_omni", "qwen2_audio", "qwen3_omni_moe",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava", "voxtral",
)  # fmt: skip
"""Multimodal models around an unchanged text model, by whose own type they are read."""

_SQUASHED = {re.sub(r"[_-]", "", kind): kind for kind in READERS}
_AFTER = re.compile(r"$|for|model|lmhead|mtp|nextn|encoder|decoder|text|bidirectional")


def type_of_architecture(name: str) -> str | None:
    """The model type that an architecture name starts with: ``Qwen3MoeForCausalLM`` -> ``qwen3_moe``; None if unknown.

    The longest match wins, and what follows must be a usual ending, so ``LlamaFooForCausalLM`` is not Llama.
    """
    squashed = re.sub(r"[^a-z0-9]", "", name.lower())
    fits = [s for s in _SQUASHED if squashed.startswith(s) and _AFTER.match(squashed, len(s))]
    return _SQUASHED[max(fits, key=len)] if fits else None
