"""SQL over the store: `engine` runs it, `views` and `functions` are its tables, `sandbox` and `limits` limit it."""
