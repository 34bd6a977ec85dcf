-- Who could know keys of which owner, for searching only: the owners' sealed rows decide.
-- party_kind 1: anyone (party 0); 2: a principal (party is a term); 3: whoever knows a key value that several slots
-- share (party is the first 8 octets of its counter domain). owner_kind 0: meter, 1: group, 2: device type, 3: counter
-- domain (its first 8 octets). The index holds all columns, so that counting reads nothing else.
CREATE TABLE exposure (
    party BIGINT NOT NULL,
    owner BIGINT NOT NULL,
    newest_ms BIGINT NOT NULL,
    slots INTEGER NOT NULL,
    open INTEGER NOT NULL,
    party_kind SMALLINT NOT NULL,
    owner_kind SMALLINT NOT NULL,
    PRIMARY KEY (party_kind, party, owner_kind, owner) INCLUDE (slots, open, newest_ms)
);

-- One row: whether the table above names the rows of earlier versions too.
CREATE TABLE exposure_index (
    number INTEGER PRIMARY KEY CHECK (number = 1),
    complete INTEGER NOT NULL
);
INSERT INTO exposure_index (number, complete)
    SELECT 1, CASE WHEN EXISTS (SELECT 1 FROM meter) OR EXISTS (SELECT 1 FROM sealed) THEN 0 ELSE 1 END;

-- Meters of a manufacturer: what their vendor knows is in no row of the table above.
CREATE INDEX meter_vendor ON meter (vendor, title);
