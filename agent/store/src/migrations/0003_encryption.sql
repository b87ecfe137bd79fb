-- Vdcs whose volumes are encrypted, and those whose key was destroyed.
ALTER TABLE vdcs ADD COLUMN encryption TEXT NOT NULL DEFAULT 'plain';
