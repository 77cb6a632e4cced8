#!/usr/bin/env bash
# pgbench in every protocol that it speaks, and with a connection for each transaction.
set -euo pipefail

counts() { grep -E '^number of (transactions actually processed|failed transactions)'; }

pgbench --initialize --scale=1 --quiet 2>/dev/null
for protocol in simple extended prepared; do
    echo "$protocol"
    pgbench --no-vacuum --client=4 --jobs=2 --transactions=200 --protocol="$protocol" 2>/dev/null | counts
    echo "$protocol, a connection for each transaction"
    pgbench --no-vacuum --connect --client=4 --jobs=2 --transactions=20 --protocol="$protocol" 2>/dev/null | counts
done
echo "select only"
pgbench --no-vacuum --select-only --client=8 --jobs=2 --transactions=500 --protocol=prepared 2>/dev/null | counts
psql --no-psqlrc --tuples-only --no-align --command \
    "SELECT count(*), sum(delta) = (SELECT sum(abalance) FROM pgbench_accounts),
            sum(delta) = (SELECT sum(tbalance) FROM pgbench_tellers) FROM pgbench_history"
pgbench --initialize --init-steps=d --quiet 2>/dev/null
