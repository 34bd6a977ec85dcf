#!/bin/sh
# Opens an envelope with OpenSSL 3 alone. It shows the steps; for trials only: OpenSSL takes keys as arguments, which others can see.
set -eu
directory=${1:-docs/examples}
value() { sed -n "s/^$1=//p" "$directory/vector.properties"; }
octets() { printf '%s' "$1" | sed 's/../\\x&/g' | xargs -0 printf '%b'; }
hex() { od -An -v -tx1 | tr -d ' \n'; }

# The ECDH value. The prefix makes the point a SubjectPublicKeyInfo.
peer=$(mktemp) && trap 'rm -f "$peer"' EXIT
octets "3059301306072A8648CE3D020106082A8648CE3D030107034200$(value ephemeral_public)" | openssl pkey -pubin -inform DER -out "$peer"
z=$(openssl pkeyutl -derive -inkey "$directory/transport-key.pem" -peerkey "$peer" | hex)

# The two keys, by the X9.63 KDF. use: 01 transport KEK, 02 seal key.
own=$(openssl pkey -in "$directory/transport-key.pem" -pubout -outform DER | tail -c 65 | hex)
certificate=$(openssl x509 -in "$directory/transport-certificate.pem" -outform DER | openssl dgst -sha256 -binary | hex)
island=$(value island)
derive() {
    info="$(printf 'meterkms/envelope' | hex)01$(printf '%02x' "$(value algorithm)")$1$(value ephemeral_public)$own$certificate"
    info="$info$(printf '%02x' ${#island})$(printf '%s' "$island" | hex)$(printf '%016x' "$(value not_after_ms)")"
    shared=$(octets "$info" | openssl dgst -sha256 -binary | hex)
    openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt "hexkey:$z" -kdfopt "hexinfo:$shared" -binary X963KDF | hex
}

# The seal, before anything in the manifest is believed.
header=$(value header)
sealed="$(printf '%08x' $((${#header} / 2)))$header$(value manifest)"
seal=$(octets "$sealed" | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$(derive 02)" -binary | hex | tr a-f A-F)
[ "$seal" = "$(value seal)" ] || { echo "the envelope was changed" >&2; exit 1; }

# The keys (RFC 3394).
kek=$(derive 01)
unwrap() { octets "$(value "$1")" | openssl enc -d -id-aes256-wrap -K "$kek" -iv A6A6A6A6A6A6A6A6 | hex | tr a-f A-F; }
echo "GUEK $(unwrap guek_wrapped)"
echo "GAK $(unwrap gak_wrapped)"
