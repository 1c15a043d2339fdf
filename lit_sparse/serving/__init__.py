"""From stored adapters to models."""
