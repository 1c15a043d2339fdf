"""Sharded backbones with replicated adapters, as strategies of the Trainer."""
