"""The web console: its pages, which any browser runs as they are, and the calls that they make."""
