-- What a scheduler or an operator has ordered: reservations that were committed, drain, fences.

CREATE TABLE reservations (
    token            TEXT PRIMARY KEY,
    key              TEXT NOT NULL UNIQUE,
    resource         TEXT NOT NULL,
    vcpus            INTEGER NOT NULL,
    memory_bytes     INTEGER NOT NULL,
    storage_bytes    INTEGER NOT NULL,
    class            TEXT NOT NULL,
    wish             TEXT NOT NULL,
    numa_node        INTEGER,
    fence_generation INTEGER NOT NULL,
    -- The VM that has taken it.
    vm               TEXT UNIQUE
) STRICT;

-- One row: in force for the whole node.
CREATE TABLE orders (
    id               INTEGER PRIMARY KEY CHECK (id = 1),
    drain_reason     TEXT,
    fence_generation INTEGER NOT NULL
) STRICT;

-- VMs that were ended by a fence and do not start again.
CREATE TABLE fenced (
    vm         TEXT PRIMARY KEY,
    generation INTEGER NOT NULL
) STRICT;
