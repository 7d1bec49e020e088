"""Attention kernels, and the exact merge of partial results."""
