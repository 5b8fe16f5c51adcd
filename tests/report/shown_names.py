"""Names of tensors in the reports that tests look at."""

from __future__ import annotations

LONG_NAME = "model.language_model.encoder.layers.11.self_attention.query_key_value_projection.lora_A.default.weight"
NAMES = ("tok_embeddings.weight", "layers.0.attention_norm.weight", "layers.0.feed_forward.w1.weight", LONG_NAME)
