"""Pictures of what is left of adapters, as matplotlib figures; needs the ``plot`` extra."""
