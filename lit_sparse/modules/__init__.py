"""LightningModules: a backbone, a method, an optimizer and a schedule."""
