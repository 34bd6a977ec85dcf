//! The one-time code with which a device is enrolled (docs/formats.md, *Enrolment codes*).
//!
//! The code proves the device to the server, by a secret of 120 random bits; and the server to the
//! device, by the SHA-256 of the island's root certificate. A person types or pastes it.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA256, digest};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::{ParseError, PrincipalId};

/// The public part of a code: 6 random octets. Only a code with the right one counts as a wrong
/// code for an invitation, so a stranger who knows the name of a handheld cannot end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeId(pub [u8; 6]);

/// The secret of a code: 15 random octets. It is never printed, except within the code.
#[derive(Clone, ZeroizeOnDrop)]
pub struct CodeSecret([u8; 15]);

impl CodeSecret {
    /// The secret of these octets.
    pub const fn new(octets: [u8; 15]) -> Self {
        Self(octets)
    }

    /// The public part and the secret of a new code, of 21 octets of a cryptographic random
    /// generator.
    pub fn split(random: &[u8; 21]) -> (CodeId, Self) {
        let (mut id, mut secret) = ([0; 6], Self([0; 15]));
        let (first, second) = random.split_at(id.len());
        id.copy_from_slice(first);
        secret.0.copy_from_slice(second);
        (CodeId(id), secret)
    }

    /// The secret of a message's field.
    ///
    /// # Errors
    /// Not 15 octets.
    pub fn from_octets(octets: &[u8]) -> Result<Self, ParseError> {
        <[u8; 15]>::try_from(octets)
            .map(Self)
            .map_err(|_| ParseError::new("secret of the code", format!("{} octets instead of 15", octets.len())))
    }

    /// The octets.
    pub const fn octets(&self) -> &[u8; 15] {
        &self.0
    }
}

impl fmt::Debug for CodeSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CodeSecret(..)")
    }
}

/// The digest of a code that the server stores, 32 octets: SHA-256 over a label, the name of the
/// handheld, the public part and the secret. The secret is random, so the digest needs no salt and
/// no slow function.
pub fn code_digest(name: &str, id: CodeId, secret: &CodeSecret) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in [DIGEST_LABEL, name.as_bytes(), &[0], &id.0, &secret.0] {
        context.update(part);
    }
    let mut value = [0; 32];
    value.copy_from_slice(context.finish().as_ref());
    value
}

/// A one-time code.
#[derive(Clone, Debug)]
pub struct EnrolmentCode {
    name: String,
    id: CodeId,
    secret: CodeSecret,
    root: RootDigest,
}

impl EnrolmentCode {
    /// The code for a handheld of this name. `random` are 21 octets of a cryptographic random
    /// generator, `root` is the island's root certificate (DER).
    ///
    /// # Errors
    /// The name is not that of a handheld.
    pub fn new(name: &str, random: &[u8; 21], root: &[u8]) -> Result<Self, ParseError> {
        PrincipalId::check_name(name)?;
        let (id, secret) = CodeSecret::split(random);
        Ok(Self { name: name.to_owned(), id, secret, root: RootDigest::of(root) })
    }

    /// Reads a code as a person typed it: `NAME/` and 64 characters. Case, spaces and hyphens do
    /// not matter; I and L are read as 1, O as 0.
    ///
    /// # Errors
    /// It is no code, or a character is wrong. The text does not repeat the code.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let refuse = |reason: &str| ParseError::new("enrolment code", reason);
        let (name, typed) = text
            .trim()
            .split_once('/')
            .ok_or_else(|| refuse("it is not NAME/CODE, as `kms handheld invite` printed it"))?;
        let name = name.to_ascii_lowercase();
        PrincipalId::check_name(&name)?;
        let payload = decode(typed)
            .ok_or_else(|| refuse("it does not have 64 letters and digits after the `/` (U is not among them)"))?;
        let (content, sum) = payload.split_at(CONTENT);
        if check(&name, content) != sum {
            return Err(refuse("a character is wrong: compare it with what the officer has"));
        }
        let (id, rest) = content.split_at(6);
        let (secret, root) = rest.split_at(15);
        let lengths = || refuse("it has another length");
        Ok(Self {
            name,
            id: CodeId(id.try_into().map_err(|_| lengths())?),
            secret: CodeSecret::from_octets(secret)?,
            root: RootDigest(root.try_into().map_err(|_| lengths())?),
        })
    }

    /// The code in its text form: `NAME/` and 16 groups of four characters.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut payload = Zeroizing::new(Vec::with_capacity(PAYLOAD));
        for part in [&self.id.0[..], &self.secret.0, &self.root.0] {
            payload.extend_from_slice(part);
        }
        let sum = check(&self.name, &payload);
        payload.extend_from_slice(&sum);
        // The whole capacity at once: a string that grows leaves copies of the secret behind.
        let mut text = Zeroizing::new(String::with_capacity(self.name.len() + 1 + 2 * PAYLOAD));
        text.push_str(&self.name);
        let mut before = '/';
        for (at, symbol) in symbols(&payload).enumerate() {
            if at % 4 == 0 {
                text.push(before);
                before = '-';
            }
            text.push(symbol);
        }
        text
    }

    /// The name of the handheld.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The public part.
    pub const fn id(&self) -> CodeId {
        self.id
    }

    /// The secret.
    pub const fn secret(&self) -> &CodeSecret {
        &self.secret
    }

    /// What the server stores of it.
    pub fn digest(&self) -> [u8; 32] {
        code_digest(&self.name, self.id, &self.secret)
    }

    /// Whether this certificate (DER) is the root of the island that the code is from.
    pub fn is_root(&self, certificate: &[u8]) -> bool {
        self.root == RootDigest::of(certificate)
    }
}

/// The leftmost 16 octets of the SHA-256 of a root certificate. To make another certificate with
/// the same ones takes 2¹²⁸ attempts, as to find the private key of the root, which is on P-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RootDigest([u8; 16]);

impl RootDigest {
    fn of(certificate: &[u8]) -> Self {
        let whole = digest(&SHA256, certificate);
        let mut leftmost = [0; 16];
        for (to, from) in leftmost.iter_mut().zip(whole.as_ref()) {
            *to = *from;
        }
        Self(leftmost)
    }
}

/// The check sum: the leftmost 3 octets of SHA-256 over a label, the name and the content. It finds
/// slips of the typist, and is no protection.
fn check(name: &str, content: &[u8]) -> [u8; SUM] {
    let mut context = Context::new(&SHA256);
    for part in [CHECK_LABEL, name.as_bytes(), &[0], content] {
        context.update(part);
    }
    let mut sum = [0; SUM];
    for (to, from) in sum.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    sum
}

/// The symbols of octets, 8 for each 5. A library would leave copies of the secret in memory.
fn symbols(octets: &[u8]) -> impl Iterator<Item = char> {
    octets.chunks(5).flat_map(|five| {
        let group = five.iter().fold(0_u64, |group, octet| group << 8 | u64::from(*octet));
        (0..8).rev().filter_map(move |at| {
            ALPHABET.get(usize::try_from(group >> (5 * at) & 31).ok()?).map(|symbol| char::from(*symbol))
        })
    })
}

/// The octets of typed symbols.
fn decode(typed: &str) -> Option<Zeroizing<[u8; PAYLOAD]>> {
    let mut payload = Zeroizing::new([0; PAYLOAD]);
    let mut values = typed.bytes().filter(|octet| *octet != b'-' && !octet.is_ascii_whitespace()).map(|octet| {
        let symbol = match octet.to_ascii_uppercase() {
            b'I' | b'L' => b'1',
            b'O' => b'0',
            other => other,
        };
        ALPHABET.iter().position(|known| *known == symbol).and_then(|value| u64::try_from(value).ok())
    });
    for five in payload.chunks_mut(5) {
        let mut group = 0;
        for _ in 0..8 {
            group = group << 5 | values.next()??;
        }
        for octet in five.iter_mut().rev() {
            *octet = group.to_le_bytes()[0];
            group >>= 8;
        }
    }
    values.next().is_none().then_some(payload)
}

/// Crockford's alphabet for base 32: without I, L, O, which look like digits, and without U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const DIGEST_LABEL: &[u8] = b"meterkms/enrolment-code";
const CHECK_LABEL: &[u8] = b"meterkms/enrolment-code-check";
/// Public part, secret and root.
const CONTENT: usize = 6 + 15 + 16;
const SUM: usize = 3;
/// 40 octets: 64 symbols.
const PAYLOAD: usize = CONTENT + SUM;

#[cfg(test)]
mod tests {
    use super::*;

    fn code() -> EnrolmentCode {
        let random: [u8; 21] = std::array::from_fn(|at| u8::try_from(at * 11 + 1).unwrap());
        EnrolmentCode::new("h-17", &random, b"the root").unwrap()
    }

    #[test]
    fn a_code_is_read_however_it_is_typed() {
        let code = code();
        let text = code.to_text();
        let (name, symbols) = text.split_once('/').unwrap();
        assert_eq!((name, symbols.len(), symbols.split('-').count()), ("h-17", 79, 16));
        for typed in [
            text.to_string(),
            text.to_lowercase(),
            format!("  {}\n", text.replace('-', " ").replacen("h 17", "h-17", 1)),
            format!("h-17/{}", symbols.replace('-', "").replace('1', "l").replace('0', "o")),
        ] {
            let read = EnrolmentCode::parse(&typed).unwrap();
            assert_eq!((read.name(), read.id(), read.digest()), ("h-17", code.id(), code.digest()), "{typed}");
            assert!(read.is_root(b"the root") && !read.is_root(b"another"));
        }
        assert_eq!(format!("{:?}", code.secret()), "CodeSecret(..)");
    }

    #[test]
    fn each_slip_is_found_and_no_error_repeats_the_code() {
        let text = code().to_text().to_string();
        let start = text.find('/').unwrap() + 1;
        for at in start..text.len() {
            if text.as_bytes()[at] == b'-' {
                continue;
            }
            for symbol in ALPHABET.iter().map(|symbol| char::from(*symbol)) {
                let mut typed = text.clone();
                typed.replace_range(at..=at, &symbol.to_string());
                if typed == text {
                    continue;
                }
                let error = EnrolmentCode::parse(&typed).unwrap_err().to_string();
                assert!(!error.contains(&typed[at.saturating_sub(4)..]), "{error}");
            }
        }
        let symbols = &text[start..];
        for typed in [
            symbols.to_owned(),
            format!("h-18/{symbols}"),
            format!("H_17/{symbols}"),
            text[..text.len() - 1].to_owned(),
            format!("{text}0"),
            text.replacen(&symbols[..1], "U", 1),
            "h-17/".to_owned(),
            String::new(),
        ] {
            assert!(EnrolmentCode::parse(&typed).is_err(), "{typed}");
        }
    }
}
