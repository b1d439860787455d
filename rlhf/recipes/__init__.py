"""Algorithms put together from the parts, one a file: an objective, and what prepares its batch."""
