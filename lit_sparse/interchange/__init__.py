"""Reading and writing folders that other libraries, and this one, load: adapters, patches, whole models."""
