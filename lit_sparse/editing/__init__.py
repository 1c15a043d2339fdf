"""Knowledge editing: change a fact that a language model knows, and only that fact."""
