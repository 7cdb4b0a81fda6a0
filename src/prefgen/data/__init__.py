"""Histories, shards, embeddings and the loader that resumes exactly."""
