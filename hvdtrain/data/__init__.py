"""Token shards on disk, the order in which they are read, and the batches made of them."""
