"""The only files that know when Lightning calls what."""
