"""Data that the wheel carries."""
