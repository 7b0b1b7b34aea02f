#!/bin/sh
# Usage: prepare.sh, as root, in the image `havengate`, with the volumes of docker-compose.yml.
# Makes what is missing and leaves the rest: the authority of this installation, a certificate each
# for OpenBao and PostgreSQL, the key that unseals OpenBao, and PostgreSQL's password.
set -eu
umask 077
# Users of the two images, by number: each image knows only its own.
havengate=10001
postgres=10002

if [ ! -s /tls/ca.pem ]; then
    # Its key is thrown away: nobody can have another certificate issued by it.
    work=$(mktemp -d)
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1825 -subj "/CN=Havengate compose" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$work/ca.key" -out "$work/ca.pem" 2>/dev/null
    for name in openbao postgres; do
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" \
            -keyout "/tls/$name.key" -out "$work/$name.csr" 2>/dev/null
        printf 'subjectAltName=DNS:%s\nextendedKeyUsage=serverAuth\n' "$name" >"$work/$name.ext"
        openssl x509 -req -in "$work/$name.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial \
            -days 1824 -extfile "$work/$name.ext" -out "/tls/$name.pem" 2>/dev/null
    done
    mv "$work/ca.pem" /tls/ca.pem
    rm -rf "$work"
fi
[ -s /unseal/key ] || head -c 32 /dev/urandom >/unseal/key
if [ ! -s /credentials/pgpass ]; then
    password=$(openssl rand -hex 24)
    printf '%s' "$password" >/tls/postgres.password
    printf 'postgres:5432:havengate:havengate:%s\n' "$password" >/credentials/pgpass
fi
chown "$havengate:$havengate" /unseal/key /credentials/pgpass
chown "$havengate" /tls/openbao.key
chown "$postgres" /tls/postgres.key /tls/postgres.password
chmod 0755 /tls
chmod 0644 /tls/*.pem
