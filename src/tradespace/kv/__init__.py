"""The KV cache on three independent axes: what stays (`retain`), where it lies (`layout`), how an element is held (`store`)."""

from tradespace.kv.cache import LAYOUTS, RETAIN, STORES, KVCache, LayerView

__all__ = ["LAYOUTS", "RETAIN", "STORES", "KVCache", "LayerView"]
