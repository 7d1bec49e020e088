"""The streaming loop, the KV of each device, and the plan of a run."""
