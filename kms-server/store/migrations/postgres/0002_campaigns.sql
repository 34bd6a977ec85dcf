-- The meters of a campaign's plan, 8 octets each, in chunks. The sealed row of the campaign has the digest over all of them.
CREATE TABLE campaign_chunk (
    number BIGINT NOT NULL,
    campaign BYTEA NOT NULL CHECK (length(campaign) = 16),
    titles BYTEA NOT NULL,
    PRIMARY KEY (campaign, number)
);
ALTER TABLE campaign_chunk ALTER COLUMN titles SET STORAGE EXTERNAL;

-- What a campaign has to do with a meter: only for the wave under way, and what ended badly before.
-- Space is left in each page so that a new generation finds room beside the old one.
CREATE TABLE task (
    meter BIGINT NOT NULL,
    generation BIGINT NOT NULL CHECK (generation > 0),
    due_ms BIGINT NOT NULL,
    fence BIGINT NOT NULL,
    leased_ms BIGINT NOT NULL,
    ended_ms BIGINT NOT NULL,
    from_version BIGINT NOT NULL,
    wave BIGINT NOT NULL,
    vendor INTEGER NOT NULL,
    head_end INTEGER NOT NULL,
    setup INTEGER NOT NULL,
    attempts BIGINT NOT NULL,
    key_type SMALLINT NOT NULL,
    state SMALLINT NOT NULL,
    probe SMALLINT NOT NULL,
    campaign BYTEA NOT NULL CHECK (length(campaign) = 16),
    mark BYTEA NOT NULL CHECK (length(mark) = 16),
    reason TEXT NOT NULL,
    PRIMARY KEY (campaign, meter)
) WITH (fillfactor = 85);
CREATE INDEX task_due ON task (campaign, head_end, due_ms, state);
CREATE INDEX task_leased ON task (campaign, head_end, leased_ms);
CREATE INDEX task_state ON task (campaign, wave, state, vendor, reason);
