-- The first schema. Ids are UUIDs as text, times are milliseconds since 1970, sizes are bytes.
-- Rows with a state other than `ready` are work that was begun: seriod finishes or undoes it when it starts.

CREATE TABLE node (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    uid TEXT NOT NULL
) STRICT;

CREATE TABLE vdcs (
    uid            TEXT PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,
    generation     INTEGER NOT NULL,
    create_time_ms INTEGER NOT NULL,
    vcpus          INTEGER NOT NULL,
    memory_bytes   INTEGER NOT NULL,
    storage_bytes  INTEGER NOT NULL
) STRICT;

CREATE TABLE images (
    uid            TEXT PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,
    generation     INTEGER NOT NULL,
    create_time_ms INTEGER NOT NULL,
    state          TEXT NOT NULL,
    size_bytes     INTEGER NOT NULL,
    has_kernel     INTEGER NOT NULL,
    has_initrd     INTEGER NOT NULL,
    cmdline        TEXT NOT NULL,
    blake3         TEXT NOT NULL
) STRICT;

CREATE TABLE vms (
    uid            TEXT PRIMARY KEY,
    vdc            TEXT NOT NULL REFERENCES vdcs (uid),
    name           TEXT NOT NULL,
    generation     INTEGER NOT NULL,
    create_time_ms INTEGER NOT NULL,
    spec           TEXT NOT NULL,
    root_volume    TEXT NOT NULL,
    desired        TEXT NOT NULL,
    run            TEXT NOT NULL,
    start_time_ms  INTEGER,
    end_time_ms    INTEGER,
    end_kind       TEXT,
    end_reason     TEXT,
    restarts       INTEGER NOT NULL,
    UNIQUE (vdc, name)
) STRICT;

CREATE TABLE volumes (
    uid            TEXT PRIMARY KEY,
    vdc            TEXT NOT NULL REFERENCES vdcs (uid),
    name           TEXT NOT NULL,
    generation     INTEGER NOT NULL,
    create_time_ms INTEGER NOT NULL,
    state          TEXT NOT NULL,
    size_bytes     INTEGER NOT NULL,
    source_image   TEXT,
    vm             TEXT,
    UNIQUE (vdc, name)
) STRICT;

CREATE TABLE snapshots (
    volume         TEXT NOT NULL REFERENCES volumes (uid),
    name           TEXT NOT NULL,
    number         INTEGER NOT NULL,
    create_time_ms INTEGER NOT NULL,
    state          TEXT NOT NULL,
    size_bytes     INTEGER NOT NULL,
    PRIMARY KEY (volume, name)
) STRICT;

CREATE TABLE exports (
    id             TEXT PRIMARY KEY,
    volume         TEXT NOT NULL REFERENCES volumes (uid),
    snapshot       TEXT,
    writable       INTEGER NOT NULL,
    state          TEXT NOT NULL,
    create_time_ms INTEGER NOT NULL,
    expire_time_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE events (
    number   INTEGER PRIMARY KEY,
    time_ms  INTEGER NOT NULL,
    resource TEXT NOT NULL,
    kind     TEXT NOT NULL,
    message  TEXT NOT NULL
) STRICT;

-- What a request id was used for, so that a repeated request is not done twice.
CREATE TABLE requests (
    id       TEXT PRIMARY KEY,
    method   TEXT NOT NULL,
    digest   TEXT NOT NULL,
    resource TEXT NOT NULL,
    time_ms  INTEGER NOT NULL
) STRICT;
CREATE INDEX requests_by_time ON requests (time_ms);
