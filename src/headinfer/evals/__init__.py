"""Retrieval evaluations: what a model finds in a long text."""
