"""Configuration files as typed values, every fault at once."""
