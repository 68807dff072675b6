"""Turns the documents of a shard into the rows of its part: tokenization, windows, batches, inference, decoding."""
