//! API keys: random, given out once, and kept as SHA-256 digests only.
//!
//! A key file has a line `NAME DIGEST` or `NAME DIGEST admin` for each key. A key holds 256 random bits, so a digest
//! without salt or stretching cannot be turned back.

use std::fmt::Write as _;
use std::io;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Line of the key among all.
    pub index: usize,
    /// Whether the caller may read the reports.
    pub admin: bool,
}

/// The keys that open the server.
#[derive(Debug, Default)]
pub struct Keys {
    keys: Vec<([u8; 32], bool)>,
}

impl Keys {
    /// Reads a key file.
    ///
    /// # Errors
    /// The first line that is not of the form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        let key = |(at, line): (usize, &str)| {
            let wrong = || format!("line {}: expected NAME, a SHA-256 digest in hex, and perhaps `admin`", at + 1);
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (digest, admin) = match fields[..] {
                [_, digest] => (digest, false),
                [_, digest, "admin"] => (digest, true),
                _ => return Err(wrong()),
            };
            Ok((from_hex(digest).ok_or_else(wrong)?, admin))
        };
        Ok(Self { keys: lines.map(key).collect::<Result<_, _>>()? })
    }

    /// Whether nobody is let in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Who has this key. Takes as long for a wrong key as for any right one.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<Caller> {
        let digest: [u8; 32] = Sha256::digest(key).into();
        let mut found = None;
        for (index, (known, admin)) in self.keys.iter().enumerate() {
            if bool::from(known.ct_eq(&digest)) {
                found = Some(Caller { index, admin: *admin });
            }
        }
        found
    }
}

/// A new key, and the line of the key file that lets it in.
///
/// # Errors
/// If the system has no random numbers.
pub fn new_key(name: &str, admin: bool) -> io::Result<(String, String)> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let key = format!("tn-{}", hex(&bytes));
    let digest = hex(&Sha256::digest(&key));
    Ok((key, format!("{name} {digest}{}\n", if admin { " admin" } else { "" })))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_opens_what_its_line_is_in_and_no_other_does() {
        let ((alice, first), (root, second)) = (new_key("alice", false).unwrap(), new_key("root", true).unwrap());
        let keys = Keys::parse(&format!("# keys\n{first}\n{second}")).unwrap();
        assert_eq!(keys.find(&alice), Some(Caller { index: 0, admin: false }));
        assert_eq!(keys.find(&root), Some(Caller { index: 1, admin: true }));
        assert_eq!(keys.find("tn-0"), None);
        assert!(!first.contains(&alice[3..]), "the key itself is not in the file");
    }

    #[test]
    fn a_damaged_line_is_named() {
        for text in ["alice", "alice 12", "alice 00 11 22", &format!("alice {}", "é".repeat(32))] {
            assert!(Keys::parse(&format!("\n{text}")).unwrap_err().starts_with("line 2"), "{text}");
        }
    }
}
