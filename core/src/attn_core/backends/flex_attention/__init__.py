from attn_core.backends.flex_attention.rows import backends
