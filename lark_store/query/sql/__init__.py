"""SQL over the store: `engine` runs it, `views` and `functions` are what it sees, `sandbox` and `stop` hold it in."""
