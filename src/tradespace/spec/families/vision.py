"""Parameters of vision towers, which no plan runs: they only stand beside the decoder's total."""

from __future__ import annotations

from tradespace.spec.families.reader import MAX_LAYERS, ConfigReader


def siglip_parameters(config: ConfigReader, text_D: int) -> int:
    """SigLIP encoder (arXiv:2303.15343) without pooling head, and Gemma 3's projector: a norm and a matrix to the text's width."""
    D, F = config.integer("hidden_size", default=768), config.integer("intermediate_size", default=3072)
    L = config.integer("num_hidden_layers", default=12, high=MAX_LAYERS)
    config.integer("num_attention_heads", default=12)
    image, patch, channels = config.integer("image_size", default=224), config.integer("patch_size", default=16), config.integer("num_channels", default=3)
    for key in ("hidden_act", "layer_norm_eps", "vision_use_head", "model_type", "torch_dtype", "dtype"):
        config.raw(key)
    embeddings = D * channels * patch**2 + D + (image // patch) ** 2 * D
    layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D  # q k v out, two of the feed-forward, two norms
    projector = D * text_D + D
    return embeddings + L * layer + 2 * D + projector
