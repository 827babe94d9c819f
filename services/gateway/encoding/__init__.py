"""The path of requests to encoders: embeddings, classes and scores."""
