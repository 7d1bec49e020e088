"""Sessions: caches that are saved to folders, and loaded from them."""
