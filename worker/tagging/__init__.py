"""From a shard's documents to the rows of its part: windows, packing, pipeline, decoding."""
