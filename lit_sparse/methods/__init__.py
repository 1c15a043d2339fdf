"""One paper per file; plain torch, no Trainer."""
