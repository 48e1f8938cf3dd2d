"""A run in words, charts and one page."""
