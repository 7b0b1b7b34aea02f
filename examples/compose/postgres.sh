#!/bin/sh
# Starts PostgreSQL for docker-compose.yml. At the first start it makes the cluster, and a database
# whose owner has rights over nothing else. The password stands on no command line.
set -eu
data=/var/lib/postgresql/data
bin=/usr/lib/postgresql/15/bin
if [ ! -s "$data/PG_VERSION" ]; then
    "$bin/initdb" --pgdata="$data" --auth=reject --encoding=UTF8 --locale=C.UTF-8 >/dev/null
    printf 'hostssl havengate havengate all scram-sha-256\n' >"$data/pg_hba.conf"
    printf "CREATE ROLE havengate LOGIN PASSWORD '%s';\nCREATE DATABASE havengate OWNER havengate;\n" \
        "$(cat /tls/postgres.password)" | "$bin/postgres" --single -D "$data" postgres >/dev/null
fi
exec "$bin/postgres" -D "$data" -c listen_addresses='*' -c ssl=on -c unix_socket_directories='' \
    -c ssl_cert_file=/tls/postgres.pem -c ssl_key_file=/tls/postgres.key
