-- Which meters are in which groups, for searching only: the meters' sealed rows decide.
CREATE TABLE group_member (
    group_number BIGINT NOT NULL,
    meter BIGINT NOT NULL,
    PRIMARY KEY (group_number, meter)
);
CREATE INDEX group_member_meter ON group_member (meter);
