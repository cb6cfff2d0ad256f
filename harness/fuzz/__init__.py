"""Generated guests."""
