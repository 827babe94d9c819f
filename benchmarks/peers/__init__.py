"""Other people's engines: environments to run them in and the same model in their formats."""
