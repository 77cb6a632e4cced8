-- What pg_dump.sh dumps: about :megabytes MB of rows, and one of each kind of object.
CREATE SCHEMA dumped;
SET search_path = dumped;
CREATE TABLE rows (n bigint PRIMARY KEY, made timestamptz NOT NULL, text text NOT NULL, bytes bytea);
INSERT INTO rows
    SELECT n, 'epoch'::timestamptz + n * interval '1 second', repeat(md5(n::text), 30), sha256(n::text::bytea)
    FROM generate_series(1, :megabytes * 1000) AS n;
CREATE TABLE few (id serial PRIMARY KEY, row bigint REFERENCES rows, tags text[] DEFAULT '{}', CHECK (id > 0));
INSERT INTO few (row, tags) SELECT n, ARRAY['aé漢😀', E'tab\tnewline\n', NULL] FROM generate_series(1, 1000) AS n;
CREATE INDEX ON few (row);
CREATE VIEW sums AS SELECT count(*) AS count, sum(n) AS sum FROM rows;
CREATE TYPE mood AS ENUM ('calm', 'busy');
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
COMMENT ON TABLE few IS 'a comment; with ''quotes''';
SELECT lo_from_bytea(0, decode(repeat('00ff', 100000), 'hex')) \gset
