"""From documents to token shards to batches."""
