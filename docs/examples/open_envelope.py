#!/usr/bin/env python3
"""Opens an envelope. Needs: pip install cryptography"""
import hashlib, hmac, struct, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

def agree(header, private_key, certificate_der):
    """The transport KEK and the seal key. `header` has the fields of EnvelopeHeader."""
    assert header.algorithm == 1 and header.transport_certificate_sha256 == hashlib.sha256(certificate_der).digest()
    point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    z = private_key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), header.ephemeral_public))
    def derive(use):
        info = (b"meterkms/envelope" + bytes([1, header.algorithm, use]) + header.ephemeral_public + private_key.public_key().public_bytes(*point)
                + header.transport_certificate_sha256 + bytes([len(header.island)]) + header.island.encode() + struct.pack(">q", header.not_after_ms))
        return X963KDF(hashes.SHA256(), 32, hashlib.sha256(info).digest()).derive(z)
    return derive(1), derive(2)

def verify(seal_key, envelope):
    """Before anything in the manifest is believed. `envelope` has the fields of Envelope."""
    sealed = struct.pack(">I", len(envelope.header)) + envelope.header + envelope.manifest
    assert hmac.compare_digest(hmac.digest(seal_key, sealed, "sha256"), envelope.seal), "the envelope was changed"

# --- the worked vector: in your program, header and envelope are the protobuf messages ---
class Vector:
    def __init__(self, path):
        for name, value in (line.strip().split("=") for line in open(path) if not line.startswith("#")):
            setattr(self, name, int(value) if name in ("algorithm", "not_after_ms") else value if name == "island" else bytes.fromhex(value))

directory = sys.argv[1] if len(sys.argv) > 1 else "docs/examples"
vector = Vector(f"{directory}/vector.properties")
key = serialization.load_pem_private_key(open(f"{directory}/transport-key.pem", "rb").read(), None)
certificate = x509.load_pem_x509_certificate(open(f"{directory}/transport-certificate.pem", "rb").read())
transport_kek, seal_key = agree(vector, key, certificate.public_bytes(serialization.Encoding.DER))
verify(seal_key, vector)
print("GUEK", aes_key_unwrap(transport_kek, vector.guek_wrapped).hex().upper())
print("GAK", aes_key_unwrap(transport_kek, vector.gak_wrapped).hex().upper())
