-- breaking: no
-- The names behind the keys of advisory locks.

CREATE TABLE lock_names (
    lock_key  bigint PRIMARY KEY,
    lock_name text   NOT NULL
);

COMMENT ON TABLE lock_names IS 'Which name each advisory lock key stands for: so that two names with one key are found out.';
