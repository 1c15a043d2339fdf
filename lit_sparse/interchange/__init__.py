"""Reading what other libraries wrote."""
