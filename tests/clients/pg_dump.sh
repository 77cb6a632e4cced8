#!/usr/bin/env bash
# pg_dump in three formats, and pg_restore by two workers into another database of the connection.
set -euo pipefail

# What differs from one dump to the next: the key of \restrict, which is given here, and the times in
# the tables of contents, which are not part of what is compared.
options=$(pg_dump --help)
key=()
[[ $options != *--restrict-key* ]] || key=(--restrict-key=clients)
dump=(pg_dump --schema=dumped --blobs)
restored=${STAGE_DATABASE}_$CLIENTS_WAY

if [[ $CLIENTS_WAY == direct ]]; then
    psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --set=megabytes="$CLIENTS_DUMP_MB" \
        --file="${BASH_SOURCE[0]%/*}/pg_dump.sql" >&2
fi

echo "plain"
began=$SECONDS
"${dump[@]}" "${key[@]}" | tee >(wc -c >size) | sha256sum
while [[ ! -s size ]]; do sleep 0.05; done
cat size
echo "note: plain, $(<size) bytes, $((SECONDS - began)) s" >&2
echo "custom"
"${dump[@]}" --format=custom --compress=1 --file=custom
pg_restore "${key[@]}" --file=- custom | sed '/^-- Dumped/d' | sha256sum
echo "directory, two workers"
"${dump[@]}" --format=directory --jobs=2 --compress=1 --file=directory
(cd directory && find . -name '*.dat*' ! -name toc.dat -print0 | sort -z | xargs -0 sha256sum | sed 's/[0-9]*\.dat/N.dat/')
echo "restored by two workers"
pg_restore --jobs=2 --dbname="$restored" --no-owner custom
"${dump[@]}" "${key[@]}" --dbname="$restored" | sha256sum
psql --no-psqlrc --tuples-only --no-align --dbname="$restored" \
    --command='SELECT count(*), sum(n) FROM dumped.rows' --command='SELECT count(*) FROM dumped.few'
