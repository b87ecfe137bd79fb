"""Messages and stubs of package serio.v1, generated."""
