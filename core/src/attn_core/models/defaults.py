"""Class defaults of transformers (5.23), as far as attention depends on them: what absent fields mean.

Written as data so that reading a config needs no transformers; tests compare every row with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Row = Mapping[str, Any]


def _class(
    hidden: int, heads: int, layers: int | None, kv_heads: int | None = None, head_dim: int | None = None, **more: Any
) -> Row:
    row = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **more,
    }
    return MappingProxyType({name: value for name, value in row.items() if value is not None})


# fmt: off
DEFAULTS: Mapping[str, Row] = MappingProxyType({
    "axk1": _class(7168, 64, 61, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
    "axk2": _class(2048, 32, 48, v_head_dim=64, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        index_topk=2048),
    "bamba": _class(4096, 32, 32, 8, mamba_num_heads=128, ssm_state_size=256, conv_kernel=4),
    "bitnet": _class(2560, 20, 30, 5),
    "cohere2": _class(8192, 64, 40, sliding_window=4096, sliding_window_pattern=4),
    "cwm": _class(6144, 48, 64, 8, 128, sliding_window=8192,
        sliding_window_pattern=("full", "sliding", "sliding", "sliding")),
    "deepseek_v2": _class(4096, 32, 32, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
    "deepseek_v3": _class(7168, 128, 61, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
    "deepseek_v32": _class(7168, 128, 61, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, index_topk=2048),
    "dots1": _class(4608, 32, 62, sliding_window=4096, max_window_layers=62),
    "ernie4_5": _class(1024, 16, 18, 2, 128),
    "ernie4_5_moe": _class(2560, 20, 28, 4),
    "exaone4": _class(4096, 32, 32, sliding_window=4096, sliding_window_pattern=4),
    "exaone_moe": _class(4096, 32, 32, sliding_window=4096, sliding_window_pattern=4),
    "falcon_h1": _class(4096, 32, 32, 8, mamba_num_heads=128, ssm_state_size=256, conv_kernel=4, mamba_d_ssm=1024),
    "flint": _class(2048, 32, 49, 4, 128, sliding_window=513),
    "gemma": _class(3072, 16, 28, None, 256),
    "gemma2": _class(2304, 8, 26, 4, 256, sliding_window=4096, attn_logit_softcapping=50.0,
        query_pre_attn_scalar=256, sliding_window_pattern=2),
    "gemma3_text": _class(2304, 8, 26, 4, 256, sliding_window=4096, query_pre_attn_scalar=256,
        sliding_window_pattern=6),
    "gemma3n_text": _class(2048, 8, 35, 2, 256, sliding_window=512, num_kv_shared_layers=15,
        sliding_window_pattern=5),
    "gemma4_text": _class(2304, 8, 30, 4, 256, sliding_window=512, sliding_window_pattern=6),
    "gemma4_unified_text": _class(2304, 8, 30, 4, 256, sliding_window=1024, sliding_window_pattern=6,
        use_bidirectional_attention="vision"),
    "glm": _class(4096, 32, 40, 2, 128),
    "glm4": _class(4096, 32, 40, 2, 128),
    "glm4_moe": _class(4096, 96, 46, 8),
    "glm4_moe_lite": _class(2048, 20, 47, v_head_dim=256, kv_lora_rank=512, qk_nope_head_dim=192,
        qk_rope_head_dim=64),
    "glm4v_moe_text": _class(4096, 96, 46, 8),
    "glm4v_text": _class(4096, 32, 40, 2),
    "glm_moe_dsa": _class(6144, 64, 78, v_head_dim=256, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64,
        index_topk=2048),
    "gpt_bigcode": _class(768, 12, 12, multi_query=True),
    "gpt_oss": _class(2880, 64, 36, 8, 64, sliding_window=128, sliding_window_pattern=2),
    "granite": _class(4096, 32, 32, attention_multiplier=1.0),
    "granite_swa": _class(2560, 20, 24, 4, sliding_window=128, attention_multiplier=1.0,
        sliding_window_pattern=("full", "sliding", "sliding", "sliding")),
    "granitemoe": _class(4096, 32, 32, attention_multiplier=1.0),
    "granitemoe_swa": _class(4096, 32, 32, sliding_window=128, attention_multiplier=1.0,
        sliding_window_pattern=("full", "sliding", "sliding", "sliding")),
    "granitemoehybrid": _class(4096, 32, 32, attention_multiplier=1.0, mamba_num_heads=128, ssm_state_size=256,
        conv_kernel=4),
    "granitemoeshared": _class(4096, 32, 32, attention_multiplier=1.0),
    "helium": _class(2560, 20, 24, None, 128),
    "hy_v3": _class(4096, 64, 80, 8, 128),
    "hy_v4": _class(2816, 32, 34, v_head_dim=256, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64,
        index_topk=2048),
    "internlm3": _class(4096, 32, 48, 2, 128),
    "iquestcoder": _class(5120, 40, 80, 8, 128),
    "kimi_linear": _class(2304, 32, 27, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        linear_conv_kernel_dim=4, linear_num_heads=32, linear_head_dim=128),
    "lfm2": _class(2560, 32, 32, 8),
    "lfm2_moe": _class(2048, 32, 32, 8),
    "llama": _class(4096, 32, 32),
    "llama4_text": _class(5120, 40, 48, 8, 128, attention_chunk_size=8192),
    "mellum": _class(2304, 32, 28, 4, 128, sliding_window=1024, sliding_window_pattern=("full",)),
    "mimo_v2_flash": _class(4096, 64, 48, 4, 192, v_head_dim=128, sliding_window=129),
    "minicpm3": _class(2560, 40, 62, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32),
    "minimax_m2": _class(3072, 48, 62, 8, 128),
    "ministral": _class(4096, 32, 32, 8, sliding_window=4096),
    "ministral3": _class(4096, 32, 34, 8, 128),
    "mistral": _class(4096, 32, 32, 8, sliding_window=4096),
    "mixtral": _class(4096, 32, 32, 8),
    "mllama_text_model": _class(4096, 32, 40, 8, cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38)),
    "mt5": _class(512, 6, 8, None, 64),
    "nemotron_h": _class(4096, 32, None, 8, 128, mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128,
        conv_kernel=4),
    "olmo3": _class(4096, 32, 32, sliding_window=4096, sliding_window_pattern=4),
    "phimoe": _class(4096, 32, 32, 8),
    "qwen2": _class(4096, 32, 32, sliding_window=4096, use_sliding_window=False, max_window_layers=28),
    "qwen2_5_omni_text": _class(3584, 28, 28, 4, sliding_window=32768, use_sliding_window=False,
        max_window_layers=28),
    "qwen2_5_vl_text": _class(8192, 64, 80, 8, sliding_window=4096, use_sliding_window=False, max_window_layers=80),
    "qwen2_moe": _class(2048, 16, 24, sliding_window=4096, use_sliding_window=False, max_window_layers=28),
    "qwen2_vl_text": _class(8192, 64, 80, 8, sliding_window=4096, use_sliding_window=False, max_window_layers=80),
    "qwen3": _class(4096, 32, 32, None, 128, sliding_window=4096, use_sliding_window=False, max_window_layers=28),
    "qwen3_5_moe_text": _class(2048, 16, 40, 2, 256, linear_num_key_heads=16, linear_key_head_dim=128,
        linear_num_value_heads=32, linear_value_head_dim=128, linear_conv_kernel_dim=4),
    "qwen3_5_text": _class(4096, 16, 32, 4, 256, linear_num_key_heads=16, linear_key_head_dim=128,
        linear_num_value_heads=32, linear_value_head_dim=128, linear_conv_kernel_dim=4),
    "qwen3_moe": _class(2048, 32, 24, 4, sliding_window=4096, use_sliding_window=False),
    "qwen3_next": _class(2048, 16, 48, 2, 256, linear_num_key_heads=16, linear_key_head_dim=128,
        linear_num_value_heads=32, linear_value_head_dim=128, linear_conv_kernel_dim=4),
    "qwen3_omni_moe_text": _class(2048, 28, 28, 4),
    "qwen3_vl_text": _class(4096, 32, 32, None, 128),
    "seed_oss": _class(4096, 80, 64, 8, 128),
    "smollm3": _class(2048, 16, 36, 4, use_sliding_window=False),
    "solar_open": _class(4096, 64, 48, 8, 128),
    "starcoder2": _class(3072, 24, 30, 2),
    "t5": _class(512, 8, 6, None, 64),
    "umt5": _class(512, 6, 8, None, 64),
    "vaultgemma": _class(2304, 8, 26, 4, 256, sliding_window=4096, attn_logit_softcapping=50.0,
        query_pre_attn_scalar=256, sliding_window_pattern=2),
    "youtu": _class(2048, 16, 32, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
})
# fmt: on
"""Model type -> the defaults of its config class. Sizes count only in nested configs, see ``view.STATED``."""
