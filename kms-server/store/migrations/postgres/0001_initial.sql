-- Names that repeat in many rows, as small numbers. Rows are only added.
CREATE TABLE term (
    id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind SMALLINT NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (kind, text)
);

-- One sealed row a meter. The columns after `seal` repeat what the body says, for searching only; 0 means none.
-- Space is left in each page so that a new generation finds room beside the old one and no index changes.
CREATE TABLE meter (
    title BIGINT PRIMARY KEY,
    generation BIGINT NOT NULL CHECK (generation > 0),
    vendor INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    head_end INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    status SMALLINT NOT NULL,
    seal BYTEA NOT NULL CHECK (length(seal) = 18),
    body BYTEA NOT NULL
) WITH (fillfactor = 85);
CREATE INDEX meter_head_end ON meter (head_end, title);
CREATE INDEX meter_batch ON meter (batch, title);

-- The other sealed rows: groups, device types, principals, counter domains, the island.
CREATE TABLE sealed (
    generation BIGINT NOT NULL CHECK (generation > 0),
    kind SMALLINT NOT NULL,
    id BYTEA NOT NULL,
    seal BYTEA NOT NULL CHECK (length(seal) = 18),
    body BYTEA NOT NULL,
    PRIMARY KEY (kind, id)
) WITH (fillfactor = 85);

-- Runs of servers; `number` stands for the writer id in the log and in grants.
CREATE TABLE server (
    number INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    writer BYTEA NOT NULL UNIQUE CHECK (length(writer) = 16),
    name TEXT NOT NULL,
    started_ms BIGINT NOT NULL,
    heartbeat_ms BIGINT NOT NULL
);

CREATE TABLE audit (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sequence BIGINT NOT NULL,
    time_ms BIGINT NOT NULL,
    writer INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    chain BYTEA NOT NULL CHECK (length(chain) = 32),
    record BYTEA NOT NULL,
    UNIQUE (writer, sequence)
);
CREATE INDEX audit_time ON audit (time_ms, id);

-- Requests that were carried out. Request ids are time-ordered (UUID version 7), so they come first in the key.
CREATE TABLE request (
    expires_ms BIGINT NOT NULL,
    principal INTEGER NOT NULL,
    chunk BIGINT NOT NULL,
    request BYTEA NOT NULL CHECK (length(request) = 16),
    digest BYTEA NOT NULL,
    outcome BYTEA NOT NULL,
    PRIMARY KEY (request, principal, chunk)
);
CREATE INDEX request_expires ON request (expires_ms);

CREATE TABLE key_grant (
    issued_ms BIGINT NOT NULL,
    not_after_ms BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    meters BIGINT NOT NULL,
    revoked_ms BIGINT,
    principal INTEGER NOT NULL,
    purpose INTEGER NOT NULL,
    writer INTEGER NOT NULL,
    id BYTEA NOT NULL PRIMARY KEY CHECK (length(id) = 16)
);
CREATE INDEX key_grant_principal ON key_grant (principal, id);

CREATE TABLE fingerprint (
    prefix BIGINT NOT NULL,
    owner BIGINT NOT NULL,
    version BIGINT NOT NULL,
    setup INTEGER NOT NULL,
    owner_kind SMALLINT NOT NULL,
    key_type SMALLINT NOT NULL,
    PRIMARY KEY (prefix, owner_kind, owner, setup, key_type, version)
);

CREATE TABLE shipment (
    generation BIGINT NOT NULL CHECK (generation > 0),
    size BIGINT NOT NULL,
    state SMALLINT NOT NULL,
    received BIGINT NOT NULL,
    next_line BIGINT NOT NULL,
    imported BIGINT NOT NULL,
    refused BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    updated_ms BIGINT NOT NULL,
    upload BYTEA NOT NULL PRIMARY KEY CHECK (length(upload) = 16),
    sha256 BYTEA NOT NULL CHECK (length(sha256) = 32),
    batch TEXT NOT NULL,
    principal TEXT NOT NULL,
    progress BYTEA NOT NULL
);
CREATE INDEX shipment_sha256 ON shipment (sha256);

-- Wrapped keys in hex do not shrink enough to pay for compressing them.
CREATE TABLE shipment_chunk (
    upload BYTEA NOT NULL,
    position BIGINT NOT NULL,
    octets BYTEA NOT NULL,
    PRIMARY KEY (upload, position)
);
ALTER TABLE shipment_chunk ALTER COLUMN octets SET STORAGE EXTERNAL;

CREATE TABLE shipment_refusal (
    upload BYTEA NOT NULL,
    line BIGINT NOT NULL,
    field TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (upload, line)
);

CREATE TABLE pin_failure (
    token TEXT NOT NULL,
    user_type SMALLINT NOT NULL,
    phc TEXT NOT NULL,
    time_ms BIGINT NOT NULL,
    PRIMARY KEY (token, user_type)
);
