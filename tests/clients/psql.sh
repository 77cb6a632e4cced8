#!/usr/bin/env bash
# psql reads psql.sql. Its errors and how it ends are part of what it says.
set -uo pipefail

psql --no-psqlrc --echo-all --file "${BASH_SOURCE[0]%/*}/psql.sql" 2>&1 |
    sed "s|${BASH_SOURCE[0]%/*}/||"
echo "psql ended with ${PIPESTATUS[0]}"
