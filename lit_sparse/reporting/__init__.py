"""Look at adapters where they are stored: tables, figures and pages from files alone, without a backbone."""
