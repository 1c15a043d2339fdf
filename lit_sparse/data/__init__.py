"""LightningDataModules on Hugging Face data sets."""
