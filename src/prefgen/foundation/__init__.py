"""Train small base models from captioned shards: the mini foundation, and any other made the same way."""
