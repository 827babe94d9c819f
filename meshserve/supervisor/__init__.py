"""Runs a whole mesh on one machine: starts, watches, restarts and stops its processes."""
