"""Version 1 of the block format, read only."""
