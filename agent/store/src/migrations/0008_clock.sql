-- What the steady clock showed at the last start of seriod: everything that ends after a while goes by it.

CREATE TABLE clock (
    id        INTEGER PRIMARY KEY CHECK (id = 1),
    boot_id   TEXT NOT NULL,
    -- Since that boot of the host.
    boot_ms   INTEGER NOT NULL,
    steady_ms INTEGER NOT NULL
) STRICT;
