-- Which work orders there are, by technician, maker and time, for searching only: their sealed rows decide. `technician`
-- is in lower case. `state` is 0 while an order has not ended, 1 completed, 2 cancelled.
CREATE TABLE work_order (
    from_ms BIGINT NOT NULL,
    until_ms BIGINT NOT NULL,
    maker INTEGER NOT NULL,
    state SMALLINT NOT NULL,
    id BYTEA NOT NULL,
    technician TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX work_order_from ON work_order (from_ms, id);
CREATE INDEX work_order_technician ON work_order (technician, from_ms, id);
CREATE INDEX work_order_maker ON work_order (maker, from_ms, id);
CREATE INDEX work_order_unended ON work_order (maker, state, until_ms);
