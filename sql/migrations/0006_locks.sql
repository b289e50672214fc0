-- breaking: no
-- The names behind the 64-bit keys of advisory locks: docs/architecture.md#locks.

CREATE TABLE lock_names (
    lock_key  bigint PRIMARY KEY,
    lock_name text   NOT NULL,
    CONSTRAINT name_has_1_to_200_characters CHECK (char_length(lock_name) BETWEEN 1 AND 200)
);

COMMENT ON TABLE lock_names IS 'The name that each advisory lock key belongs to: for lists, and to refuse a second name with the same key.';
