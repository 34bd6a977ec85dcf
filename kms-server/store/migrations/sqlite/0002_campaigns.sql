-- The meters of a campaign's plan, 8 octets each, in chunks. The sealed row of the campaign has the digest over all of them.
CREATE TABLE campaign_chunk (
    campaign BLOB NOT NULL CHECK (length(campaign) = 16),
    number INTEGER NOT NULL,
    titles BLOB NOT NULL,
    PRIMARY KEY (campaign, number)
) STRICT;

-- What a campaign has to do with a meter: only for the wave under way, and what ended badly before.
CREATE TABLE task (
    campaign BLOB NOT NULL CHECK (length(campaign) = 16),
    meter INTEGER NOT NULL,
    generation INTEGER NOT NULL CHECK (generation > 0),
    wave INTEGER NOT NULL,
    vendor INTEGER NOT NULL,
    head_end INTEGER NOT NULL,
    setup INTEGER NOT NULL,
    key_type INTEGER NOT NULL,
    from_version INTEGER NOT NULL,
    state INTEGER NOT NULL,
    probe INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    due_ms INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    leased_ms INTEGER NOT NULL,
    ended_ms INTEGER NOT NULL,
    reason TEXT NOT NULL,
    mark BLOB NOT NULL CHECK (length(mark) = 16),
    PRIMARY KEY (campaign, meter)
) STRICT, WITHOUT ROWID;
CREATE INDEX task_due ON task (campaign, head_end, due_ms, state);
CREATE INDEX task_leased ON task (campaign, head_end, leased_ms);
CREATE INDEX task_state ON task (campaign, wave, state, vendor, reason);
