"""attn-core."""
