//! One object of a keyring: a data key and whose it is, wrapped by the KEK (FORMAT.md, "Keyring").
//!
//! In clear stand only the uid, the version, the purpose and the KEK's id, all of them bound to what is sealed.

use super::kek::Kek;
use crate::crypto::{DataKey, KeyId, SecretBytes, derive, random};
use crate::error::{Context, Error, Kind, Result};
use crate::tenant::Tenant;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use coffer_cipher::{Cipher, TAG_BYTES};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

const VERSION: u32 = 1;
const LABEL: &[u8] = b"pg_coffer keyring entry 1";

/// What an entry's key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Seals log, catalog and what belongs to no tenant.
    Repository,
    /// No key is used; the entry holds a source's name.
    Source,
    Tenant,
}

impl Purpose {
    fn byte(self) -> u8 {
        match self {
            Self::Repository => 1,
            Self::Source => 2,
            Self::Tenant => 3,
        }
    }
}

/// What an entry says, once opened.
pub struct Entry {
    pub key: DataKey,
    pub purpose: Purpose,
    pub facts: Facts,
}

/// The sealed part, without the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The keyring that the entry belongs to, by its repository's uid.
    pub repository: Uuid,
    /// The agent's clock when it was made, microseconds since 1970-01-01 UTC.
    pub created_us: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Uuid>,
    /// A source's name in the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Tenant>,
    /// How many uids the tenant's key had before this one: a shredded uid never comes back.
    #[serde(default)]
    pub generation: u32,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    key: String,
    #[serde(flatten)]
    facts: Facts,
}

impl Drop for Sealed {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    v: u32,
    uid: Uuid,
    version: u32,
    purpose: Purpose,
    /// Id of the KEK.
    kek: String,
    salt: String,
    sealed: String,
}

impl Entry {
    /// The object's bytes: one line of JSON.
    pub fn seal(&self, kek: &Kek) -> Result<Vec<u8>> {
        let salt: [u8; 32] = random::bytes();
        let sealed = Sealed { key: STANDARD.encode(self.key.secret()), facts: self.facts.clone() };
        let mut text = Zeroizing::new(serde_json::to_vec(&sealed).context(Kind::Other, "cannot encode a key entry")?);
        let wrap = Wrap::new(kek, &salt, self.key.id, self.purpose);
        let tag = wrap
            .cipher
            .seal(wrap.nonce, &wrap.aad, &mut text)
            .map_err(|_| Error::other("a key entry is too long to seal"))?;
        text.extend_from_slice(&tag);
        let file = File {
            v: VERSION,
            uid: self.key.id.uid,
            version: self.key.id.version,
            purpose: self.purpose,
            kek: kek.id().to_owned(),
            salt: STANDARD.encode(salt),
            sealed: STANDARD.encode(&*text),
        };
        let mut bytes = serde_json::to_vec(&file).context(Kind::Other, "cannot encode a key entry")?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Opens an object that lies at the name of `id`.
    pub fn open(bytes: &[u8], id: KeyId, kek: &Kek) -> Result<Self> {
        let damaged = |what: &str| {
            Error::new(Kind::Verification, format!("the keyring's entry for key {id} {what}")).code("corrupt")
        };
        let file: File = serde_json::from_slice(bytes).map_err(|e| damaged("is not readable").source(e))?;
        if file.v != VERSION {
            return Err(damaged(&format!("has version {}; this coffer reads version {VERSION}", file.v)));
        }
        if file.uid != id.uid || file.version != id.version {
            return Err(damaged(&format!("is that of key {} version {}", file.uid, file.version)));
        }
        if file.kek != kek.id() {
            return Err(wrong_kek(&file.kek, kek));
        }
        let salt: [u8; 32] = STANDARD
            .decode(&file.salt)
            .ok()
            .and_then(|s| s.try_into().ok())
            .ok_or_else(|| damaged("has a malformed salt"))?;
        let mut text = Zeroizing::new(STANDARD.decode(&file.sealed).map_err(|_| damaged("is malformed"))?);
        let at = text.len().checked_sub(TAG_BYTES).ok_or_else(|| damaged("is cut short"))?;
        let tag: [u8; TAG_BYTES] = text[at..].try_into().expect("the tag's bytes");
        text.truncate(at);
        let wrap = Wrap::new(kek, &salt, id, file.purpose);
        wrap.cipher.open(wrap.nonce, &wrap.aad, &mut text, &tag).map_err(|_| damaged("does not authenticate"))?;
        let sealed: Sealed =
            serde_json::from_slice(&text).map_err(|_| damaged("holds something this coffer does not understand"))?;
        let raw = Zeroizing::new(STANDARD.decode(&sealed.key).map_err(|_| damaged("holds no key"))?);
        let mut secret = SecretBytes::default();
        if raw.len() != secret.len() {
            return Err(damaged("holds a key of another length"));
        }
        secret.copy_from_slice(&raw);
        Ok(Self { key: DataKey::new(id, secret), purpose: file.purpose, facts: sealed.facts.clone() })
    }

    /// Whether two entries say the same, however they are wrapped.
    pub fn same(&self, other: &Self) -> bool {
        self.purpose == other.purpose && self.facts == other.facts && self.key.secret() == other.key.secret()
    }
}

/// The error for a KEK that is not the one that wrapped.
pub fn wrong_kek(wrapped_by: &str, kek: &Kek) -> Error {
    Error::new(Kind::Key, format!("the keyring is wrapped by KEK {wrapped_by}; the configured KEK is {}", kek.id()))
        .code("wrong_kek")
        .hint("configure the KEK that this keyring was made with ([keys] in the configuration)")
}

/// Key and nonce of one entry: derived under a random salt, so neither ever repeats.
struct Wrap {
    cipher: Cipher,
    nonce: [u8; 12],
    aad: [u8; 21],
}

impl Wrap {
    fn new(kek: &Kek, salt: &[u8; 32], id: KeyId, purpose: Purpose) -> Self {
        let mut aad = [0; 21];
        aad[..16].copy_from_slice(id.uid.as_bytes());
        aad[16..20].copy_from_slice(&id.version.to_le_bytes());
        aad[20] = purpose.byte();
        let mut okm = Zeroizing::new([0; 44]);
        derive(kek.secret(), salt, &[LABEL, &aad], &mut *okm);
        let nonce: [u8; 12] = okm[32..].try_into().expect("twelve bytes");
        Self { cipher: Cipher::new(okm[..32].try_into().expect("32 bytes are a key")), nonce, aad }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kek(n: u8) -> Kek {
        Kek::new(SecretBytes::new([n; 32]))
    }

    fn entry() -> Entry {
        let id = KeyId { uid: Uuid::from_u128(9), version: 1 };
        Entry {
            key: DataKey::new(id, SecretBytes::new([7; 32])),
            purpose: Purpose::Tenant,
            facts: Facts {
                repository: Uuid::from_u128(1),
                created_us: 5,
                source: Some(Uuid::from_u128(2)),
                name: None,
                tenant: Some(Tenant::normal("acme")),
                generation: 0,
            },
        }
    }

    #[test]
    fn an_entry_opens_with_its_kek_and_shows_nothing_without() {
        let e = entry();
        let bytes = e.seal(&kek(1)).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(!text.contains("acme") && !text.contains(&STANDARD.encode([7; 32])));
        let back = Entry::open(&bytes, e.key.id, &kek(1)).unwrap();
        assert!(back.same(&e));
        let wrong = Entry::open(&bytes, e.key.id, &kek(2)).err().unwrap();
        assert!(wrong.kind() == Kind::Key && wrong.to_string().contains(kek(1).id()), "{wrong}");
        let other = KeyId { version: 2, ..e.key.id };
        assert!(Entry::open(&bytes, other, &kek(1)).is_err());
    }

    #[test]
    fn a_changed_byte_is_refused_or_changes_nothing() {
        let e = entry();
        let bytes = e.seal(&kek(1)).unwrap();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut b = bytes.clone();
                b[i] ^= 1 << bit;
                if let Ok(back) = Entry::open(&b, e.key.id, &kek(1)) {
                    // Such as white space in place of the last newline.
                    assert!(back.same(&e), "byte {i} bit {bit}");
                }
            }
        }
    }
}
