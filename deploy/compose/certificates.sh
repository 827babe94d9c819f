#!/bin/sh
# Makes what compose.tls.yaml mounts: a certificate authority and, signed by it, a certificate for
# each service, in tls/ beside this script or in $TLS_DIR. Names given as arguments are those by
# which callers know the gateway, beside localhost:
#
#   deploy/compose/certificates.sh llm.example.com
#
# Made again, the certificates are new and the authority stays. They hold for a year.
set -eu
umask 022
folder=${TLS_DIR:-$(dirname "$0")/tls}
# What is in it is readable to user 10001 of the containers, so nobody else may look into it.
mkdir -p -m 700 "$folder"
cd "$folder"

sign() { # NAME SUBJECT_ALT_NAMES
  mkdir -p "$1"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" \
    -keyout "$1/tls.key" -out "$1/tls.csr" 2>/dev/null
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$2" > "$1/extensions"
  openssl x509 -req -in "$1/tls.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 \
    -extfile "$1/extensions" -out "$1/tls.crt" 2>/dev/null
  rm "$1/tls.csr" "$1/extensions"
  chmod 644 "$1/tls.key"
  cp ca.crt "$1/ca.crt"
}

if [ ! -f ca.key ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
    -subj "/CN=MeshServe compose" -addext basicConstraints=critical,CA:TRUE \
    -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt 2>/dev/null
fi
names=DNS:gateway,DNS:localhost,IP:127.0.0.1
for name in "$@"; do
  names=$names,DNS:$name
done
sign gateway "$names"
for service in tokenizer engine cache safety; do
  sign "$service" "DNS:$service,DNS:localhost,IP:127.0.0.1"
done
echo "callers trust $(pwd)/ca.crt: meshserve chat --tls-ca FILE"
