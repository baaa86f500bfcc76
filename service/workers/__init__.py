"""Several server processes on one port, under a supervisor that replaces those that fail."""
