"""The public edge and the request path."""
