"""What wraps a built model from outside, in a visible order: model = recompute(lora(shard(model), rank=16), every=k)."""
