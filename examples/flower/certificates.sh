#!/bin/sh
# Makes what a deployment of two SuperNodes needs: an authority and a certificate for the SuperLink,
# both for TLS, a pair of keys for each SuperNode, by which the SuperLink knows it, and pairs of keys
# of FedKD's server and clients, with which they seal what only they shall read (fedkd-fast keygen).
#   ./certificates.sh FOLDER [HOST] [SUPERNODES]
set -eu
umask 077
folder=${1:?usage: certificates.sh FOLDER [HOST] [SUPERNODES]}
host=${2:-127.0.0.1}
nodes=${3:-2}
fedkd=${FEDKD_FAST:-fedkd-fast}
case $host in
  *[!0-9.]*) name=DNS:$host ;;
  *) name=IP:$host ;;
esac
mkdir -p "$folder"
cd "$folder"

openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -sha256 -days 365 -subj "/CN=fedkd example authority" -out ca.crt \
  -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign

openssl ecparam -name prime256v1 -genkey -noout -out superlink.key
openssl req -new -key superlink.key -subj "/CN=$host" -out superlink.csr
printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' "$name" > superlink.ext
openssl x509 -req -in superlink.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 365 \
  -extfile superlink.ext -out superlink.crt
rm superlink.csr superlink.ext

$fedkd keygen --overwrite server.key > /dev/null # and server.key.pub
node=0
separator='{'
: > clients.json
while [ "$node" -lt "$nodes" ]; do
  rm -f "node-$node" "node-$node.pub"
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "supernode $node" -f "node-$node"
  public=$($fedkd keygen --overwrite "client-$node.key")
  printf '%s"%s": "%s"' "$separator" "$node" "$public" >> clients.json
  separator=', '
  node=$((node + 1))
done
echo '}' >> clients.json
echo "$(pwd): ca.crt for all, superlink.crt and superlink.key for the SuperLink, node-N for SuperNode N,"
echo "  server.key and clients.json for the server app, server.key.pub and client-N.key for client N"
