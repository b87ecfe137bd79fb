-- What a VM booted from its root disk at its last start (JSON), or NULL.
ALTER TABLE vms ADD COLUMN kernel TEXT;
