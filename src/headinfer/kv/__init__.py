"""Where the KV cache is stored, and how it moves between host, device and disk."""
