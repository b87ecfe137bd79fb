-- Long operations, snapshots of whole vdcs, clones.

CREATE TABLE operations (
    uid            TEXT PRIMARY KEY,
    kind           TEXT NOT NULL,
    target         TEXT NOT NULL,
    subject        TEXT,
    point          TEXT,
    state          TEXT NOT NULL,
    done_bytes     INTEGER NOT NULL,
    total_bytes    INTEGER NOT NULL,
    error          TEXT NOT NULL,
    create_time_ms INTEGER NOT NULL,
    end_time_ms    INTEGER
) STRICT;

CREATE TABLE vdc_snapshots (
    uid            TEXT PRIMARY KEY,
    vdc            TEXT NOT NULL REFERENCES vdcs (uid),
    name           TEXT NOT NULL,
    create_time_ms INTEGER NOT NULL,
    state          TEXT NOT NULL,
    UNIQUE (vdc, name)
) STRICT;

ALTER TABLE volumes ADD COLUMN source_snapshot TEXT;
-- Something was begun whose end is not known here: the headers are read at the next start.
ALTER TABLE volumes ADD COLUMN unsure INTEGER NOT NULL DEFAULT 0;

ALTER TABLE snapshots ADD COLUMN group_uid TEXT;
ALTER TABLE snapshots ADD COLUMN class TEXT NOT NULL DEFAULT 'crash';
ALTER TABLE snapshots ADD COLUMN reason TEXT NOT NULL DEFAULT '';
