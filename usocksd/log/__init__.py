"""Records: what they say, how they are written, where they go."""
