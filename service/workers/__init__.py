"""Several server processes on one port, and the supervisor that replaces those that fail."""
