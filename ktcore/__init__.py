"""ktcore."""
