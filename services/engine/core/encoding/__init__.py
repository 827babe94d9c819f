"""Encoders: models that read a whole sequence at once and answer with vectors or scores."""
