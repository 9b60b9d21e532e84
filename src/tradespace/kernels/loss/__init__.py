"""Cross entropy of a chunk of logits with its gradient over them. Reference: `train.loss.cross_entropy`, which is what runs on a CPU."""
