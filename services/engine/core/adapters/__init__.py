"""Low-rank adapters of a model: their files, and those that an engine has loaded."""
