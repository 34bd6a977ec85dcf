-- Names that repeat in many rows, as small numbers. Rows are only added.
CREATE TABLE term (
    id INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (kind, text)
) STRICT;

-- One sealed row a meter. The columns after `seal` repeat what the body says, for searching only; 0 means none.
-- The body comes last, so that a search does not walk over it.
CREATE TABLE meter (
    title INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL CHECK (generation > 0),
    seal BLOB NOT NULL CHECK (length(seal) = 18),
    vendor INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    status INTEGER NOT NULL,
    head_end INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX meter_head_end ON meter (head_end, title);
CREATE INDEX meter_batch ON meter (batch, title);

-- The other sealed rows: groups, device types, principals, counter domains, the island.
CREATE TABLE sealed (
    kind INTEGER NOT NULL,
    id BLOB NOT NULL,
    generation INTEGER NOT NULL CHECK (generation > 0),
    seal BLOB NOT NULL CHECK (length(seal) = 18),
    body BLOB NOT NULL,
    PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;

-- Runs of servers; `number` stands for the writer id in the log and in grants.
CREATE TABLE server (
    number INTEGER PRIMARY KEY,
    writer BLOB NOT NULL UNIQUE CHECK (length(writer) = 16),
    name TEXT NOT NULL,
    started_ms INTEGER NOT NULL,
    heartbeat_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    writer INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    time_ms INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    chain BLOB NOT NULL CHECK (length(chain) = 32),
    record BLOB NOT NULL,
    UNIQUE (writer, sequence)
) STRICT;
CREATE INDEX audit_time ON audit (time_ms, id);

-- Requests that were carried out. Request ids are time-ordered (UUID version 7), so they come first in the key.
CREATE TABLE request (
    request BLOB NOT NULL CHECK (length(request) = 16),
    principal INTEGER NOT NULL,
    chunk INTEGER NOT NULL,
    digest BLOB NOT NULL,
    outcome BLOB NOT NULL,
    expires_ms INTEGER NOT NULL,
    PRIMARY KEY (request, principal, chunk)
) STRICT, WITHOUT ROWID;
CREATE INDEX request_expires ON request (expires_ms);

CREATE TABLE key_grant (
    id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    principal INTEGER NOT NULL,
    purpose INTEGER NOT NULL,
    issued_ms INTEGER NOT NULL,
    not_after_ms INTEGER NOT NULL,
    writer INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    meters INTEGER NOT NULL,
    revoked_ms INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX key_grant_principal ON key_grant (principal, id);

CREATE TABLE fingerprint (
    prefix INTEGER NOT NULL,
    owner_kind INTEGER NOT NULL,
    owner INTEGER NOT NULL,
    setup INTEGER NOT NULL,
    key_type INTEGER NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (prefix, owner_kind, owner, setup, key_type, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE shipment (
    upload BLOB NOT NULL PRIMARY KEY CHECK (length(upload) = 16),
    generation INTEGER NOT NULL CHECK (generation > 0),
    sha256 BLOB NOT NULL CHECK (length(sha256) = 32),
    size INTEGER NOT NULL,
    batch TEXT NOT NULL,
    principal TEXT NOT NULL,
    state INTEGER NOT NULL,
    received INTEGER NOT NULL,
    next_line INTEGER NOT NULL,
    imported INTEGER NOT NULL,
    refused INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    progress BLOB NOT NULL
) STRICT;
CREATE INDEX shipment_sha256 ON shipment (sha256);

CREATE TABLE shipment_chunk (
    upload BLOB NOT NULL,
    position INTEGER NOT NULL,
    octets BLOB NOT NULL,
    PRIMARY KEY (upload, position)
) STRICT;

CREATE TABLE shipment_refusal (
    upload BLOB NOT NULL,
    line INTEGER NOT NULL,
    field TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (upload, line)
) STRICT, WITHOUT ROWID;

CREATE TABLE pin_failure (
    token TEXT NOT NULL,
    user_type INTEGER NOT NULL,
    phc TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    PRIMARY KEY (token, user_type)
) STRICT, WITHOUT ROWID;
