-- A vdc's share and caps (JSON).
ALTER TABLE vdcs ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
