"""The engine service: continuous batching over a paged KV cache, behind gRPC."""
