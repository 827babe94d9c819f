"""Which models and adapters the engines have in memory, and what operators want them to have."""
