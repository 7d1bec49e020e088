"""Retrieval evaluations: how well a model finds facts in a long text."""
