"""The work of the commands generate, read and ask: check everything, then load the model, then run."""
