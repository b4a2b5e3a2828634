"""Token shards, rows cut from them, the mixture index and the loader that joins them."""
