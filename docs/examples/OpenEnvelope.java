import java.io.*; import java.nio.ByteBuffer; import java.nio.file.*; import java.security.*; import java.security.cert.*;
import java.security.interfaces.*; import java.security.spec.*; import java.util.*; import javax.crypto.*; import javax.crypto.spec.*;

/** Opens an envelope, with the JDK alone (17 or newer): java OpenEnvelope.java [DIRECTORY] */
public class OpenEnvelope {
    /** The transport KEK (use 1) or the seal key (use 2). The parameters are the fields of EnvelopeHeader, algorithm 1. */
    static byte[] derive(int use, String island, byte[] ephemeral, byte[] certificateSha256, long notAfter, ECPrivateKey own, ECPublicKey ownPublic)
            throws GeneralSecurityException {
        var x = Arrays.copyOfRange(ephemeral, 1, 33); var y = Arrays.copyOfRange(ephemeral, 33, 65);
        var point = new ECPoint(new java.math.BigInteger(1, x), new java.math.BigInteger(1, y));
        var agreement = KeyAgreement.getInstance("ECDH");
        agreement.init(own);
        agreement.doPhase(KeyFactory.getInstance("EC").generatePublic(new ECPublicKeySpec(point, own.getParams())), true);
        byte[] z = agreement.generateSecret(), spki = ownPublic.getEncoded(), name = island.getBytes();
        byte[] grantee = Arrays.copyOfRange(spki, spki.length - 65, spki.length);
        var info = ByteBuffer.allocate(17 + 3 + 65 + 65 + 32 + 1 + name.length + 8).put("meterkms/envelope".getBytes()).put(new byte[] {1, 1, (byte) use})
            .put(ephemeral).put(grantee).put(certificateSha256).put((byte) name.length).put(name).putLong(notAfter).array();
        var sha = MessageDigest.getInstance("SHA-256");
        byte[] shared = sha.digest(info);
        sha.update(z); sha.update(new byte[] {0, 0, 0, 1});            // ANSI X9.63 KDF, one block
        return sha.digest(shared);
    }
    /** Before anything in the manifest is believed. */
    static void verify(byte[] sealKey, byte[] header, byte[] manifest, byte[] seal) throws GeneralSecurityException {
        var mac = Mac.getInstance("HmacSHA256");
        mac.init(new SecretKeySpec(sealKey, "HmacSHA256"));
        mac.update(ByteBuffer.allocate(4).putInt(header.length).array()); mac.update(header);
        if (!MessageDigest.isEqual(mac.doFinal(manifest), seal)) throw new SignatureException("the envelope was changed");
    }
    static byte[] unwrap(byte[] transportKek, byte[] wrapped) throws GeneralSecurityException {
        var cipher = Cipher.getInstance("AESWrap");
        cipher.init(Cipher.UNWRAP_MODE, new SecretKeySpec(transportKek, "AES"));
        return cipher.unwrap(wrapped, "AES", Cipher.SECRET_KEY).getEncoded();
    }
    // --- the worked vector: in your program, these values come out of the protobuf messages ---
    public static void main(String[] args) throws Exception {
        var directory = Path.of(args.length > 0 ? args[0] : "docs/examples"); var vector = new Properties();
        try (var reader = Files.newBufferedReader(directory.resolve("vector.properties"))) { vector.load(reader); }
        var pem = Files.readString(directory.resolve("transport-key.pem")).replaceAll("-----[A-Z ]+-----|\\s", "");
        var own = (ECPrivateKey) KeyFactory.getInstance("EC").generatePrivate(new PKCS8EncodedKeySpec(Base64.getDecoder().decode(pem)));
        var certificate = CertificateFactory.getInstance("X.509").generateCertificate(Files.newInputStream(directory.resolve("transport-certificate.pem")));
        byte[] ephemeral = octets(vector, "ephemeral_public"), digest = MessageDigest.getInstance("SHA-256").digest(certificate.getEncoded());
        if (!Arrays.equals(digest, octets(vector, "transport_certificate_sha256"))) throw new SignatureException("for another transport key");
        String island = vector.getProperty("island"); long notAfter = Long.parseLong(vector.getProperty("not_after_ms"));
        var ownPublic = (ECPublicKey) certificate.getPublicKey();
        verify(derive(2, island, ephemeral, digest, notAfter, own, ownPublic), octets(vector, "header"), octets(vector, "manifest"), octets(vector, "seal"));
        byte[] kek = derive(1, island, ephemeral, digest, notAfter, own, ownPublic);
        for (var name : new String[] {"GUEK", "GAK"}) {
            System.out.println(name + " " + HexFormat.of().withUpperCase().formatHex(unwrap(kek, octets(vector, name.toLowerCase() + "_wrapped"))));
        }
    }
    static byte[] octets(Properties vector, String name) { return HexFormat.of().parseHex(vector.getProperty(name)); }
}
