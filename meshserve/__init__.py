"""MeshServe: the Python client, the command line and the generated stubs."""
