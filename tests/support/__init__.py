"""What tests of the whole mesh are built from."""
