"""The whole mesh at a glance: what its replicas say of themselves, put together for who watches."""
