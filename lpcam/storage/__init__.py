"""Results on disk: what they are called by, how they get there whole, and how they are read."""
