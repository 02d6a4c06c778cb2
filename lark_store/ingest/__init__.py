"""Text to sample to gradient to sketch to row."""
