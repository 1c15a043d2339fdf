"""Several stored adapters added up to one."""
