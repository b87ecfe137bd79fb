-- Points of whole VMs: as those of vdcs, with what was saved of the VM (JSON). Names are unique in the VM.
CREATE TABLE vdc_snapshots_new (
    uid            TEXT PRIMARY KEY,
    vdc            TEXT NOT NULL REFERENCES vdcs (uid),
    name           TEXT NOT NULL,
    create_time_ms INTEGER NOT NULL,
    state          TEXT NOT NULL,
    vm             TEXT,
    saved          TEXT
) STRICT;
INSERT INTO vdc_snapshots_new (uid, vdc, name, create_time_ms, state)
    SELECT uid, vdc, name, create_time_ms, state FROM vdc_snapshots;
DROP TABLE vdc_snapshots;
ALTER TABLE vdc_snapshots_new RENAME TO vdc_snapshots;
CREATE UNIQUE INDEX vdc_snapshots_names ON vdc_snapshots (vdc, coalesce(vm, ''), name);

-- The point that a VM's next start goes on from, or NULL.
ALTER TABLE vms ADD COLUMN restore TEXT;
