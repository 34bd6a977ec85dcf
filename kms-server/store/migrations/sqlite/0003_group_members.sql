-- Which meters are in which groups, for searching only: the meters' sealed rows decide.
CREATE TABLE group_member (
    group_number INTEGER NOT NULL,
    meter INTEGER NOT NULL,
    PRIMARY KEY (group_number, meter)
) STRICT, WITHOUT ROWID;
CREATE INDEX group_member_meter ON group_member (meter);
