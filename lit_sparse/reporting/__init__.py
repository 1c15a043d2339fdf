"""Tables, figures and pages about stored adapters, without a backbone."""
