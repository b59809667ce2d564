"""The language wing: rows, prefix-tree batches, decoders, losses over completions."""
