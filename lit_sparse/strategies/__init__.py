"""Strategies of the Trainer that shard the backbone and replicate the adapters."""
