"""The command line: `meshserve`."""

from meshserve.cli.main import main

__all__ = ["main"]
