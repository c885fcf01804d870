//! The key-encryption key and where it comes from: a file, the environment, a command.
//!
//! A KEK is 32 random bytes, written in base64. Its id is derived from it and stands beside everything that it wraps, so
//! that a wrong KEK is told from a damaged keyring.

use crate::config::{KeysConfig, ProviderKind};
use crate::crypto::{SecretBytes, derive, hex};
use crate::error::{Context, Error, Kind, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::path::Path;
use zeroize::{Zeroize, Zeroizing};

/// The variable that holds the KEK when the configuration names no other.
pub const DEFAULT_VARIABLE: &str = "COFFER_KEK";

/// The key-encryption key; wiped when dropped, never printed.
pub struct Kek {
    secret: SecretBytes,
    id: String,
}

impl std::fmt::Debug for Kek {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kek").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Kek {
    pub fn new(secret: SecretBytes) -> Self {
        let mut id = [0; 8];
        derive(&*secret, b"", &[b"pg_coffer kek id"], &mut id);
        Self { secret, id: hex(&id) }
    }

    /// Sixteen hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// From where the configuration says.
    pub async fn load(config: &KeysConfig) -> Result<Self> {
        match config.provider {
            ProviderKind::File => {
                let path = config.path.as_deref().ok_or_else(|| Error::usage("[keys] path is missing"))?;
                Self::from_file(path)
            }
            ProviderKind::Env => {
                let name = config.variable.as_deref().unwrap_or(DEFAULT_VARIABLE);
                let text = std::env::var(name).map(Zeroizing::new).map_err(|_| {
                    Error::new(Kind::Key, format!("the environment variable {name} does not hold the KEK"))
                        .code("kek_missing")
                })?;
                Self::from_text(&text).map_err(|e| e.during(format_args!("environment variable {name}")))
            }
            ProviderKind::Command => Self::from_command(&config.command).await,
            ProviderKind::Transit | ProviderKind::AwsKms => {
                Err(Error::usage("[keys] this version knows the providers file, env and command"))
            }
        }
    }

    fn from_file(path: &Path) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let shown = path.display();
        let meta = std::fs::metadata(path).map_err(|e| {
            Error::new(Kind::Key, format!("cannot read the KEK file {shown}"))
                .code("kek_missing")
                .hint("put the KEK there; `coffer init --create-kek` makes one for a new repository")
                .source(e)
        })?;
        if meta.mode() & 0o077 != 0 {
            return Err(Error::new(
                Kind::Key,
                format!("the KEK file {shown} has mode {:o}: others can read it", meta.mode() & 0o7777),
            )
            .code("kek_exposed")
            .hint(format!("chmod 600 {shown}")));
        }
        let text = std::fs::read_to_string(path)
            .map(Zeroizing::new)
            .context(Kind::Key, format_args!("cannot read the KEK file {shown}"))?;
        Self::from_text(&text).map_err(|e| e.during(format_args!("KEK file {shown}")))
    }

    async fn from_command(command: &[String]) -> Result<Self> {
        let (program, args) = command.split_first().ok_or_else(|| Error::usage("[keys] command is empty"))?;
        let out = tokio::process::Command::new(program)
            .args(args)
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .context(Kind::Key, format_args!("cannot run the KEK command {program}"))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            return Err(Error::new(
                Kind::Key,
                format!("the KEK command {program} failed ({}): {}", out.status, said.trim()),
            )
            .code("kek_missing"));
        }
        let mut stdout = out.stdout;
        let kek = std::str::from_utf8(&stdout)
            .map_err(|_| Error::new(Kind::Key, "its output is not text"))
            .and_then(Self::from_text)
            .map_err(|e| e.during(format_args!("KEK command {program}")));
        stdout.zeroize();
        kek
    }

    /// 32 bytes in base64, with white space around them.
    pub fn from_text(text: &str) -> Result<Self> {
        let bad = || {
            Error::new(Kind::Key, "a KEK is 32 bytes in base64 (44 characters)")
                .code("kek_malformed")
                .hint("make one with: openssl rand -base64 32")
        };
        let bytes = STANDARD.decode(text.trim()).map(Zeroizing::new).map_err(|_| bad())?;
        let mut secret = SecretBytes::default();
        if bytes.len() != secret.len() {
            return Err(bad());
        }
        secret.copy_from_slice(&bytes);
        Ok(Self::new(secret))
    }

    /// Makes a KEK and writes it to the file that the configuration names; an existing file is never touched.
    pub fn create_file(config: &KeysConfig) -> Result<Self> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        if config.provider != ProviderKind::File {
            return Err(Error::usage("--create-kek makes a file: it needs [keys] provider = \"file\""));
        }
        let path = config.path.as_deref().ok_or_else(|| Error::usage("[keys] path is missing"))?;
        let shown = path.display();
        let mut secret = SecretBytes::default();
        crate::crypto::random::fill(&mut *secret);
        let text = Zeroizing::new(format!("{}\n", STANDARD.encode(*secret)));
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
                match e.kind() {
                    std::io::ErrorKind::AlreadyExists => {
                        Error::new(Kind::Refused, format!("the KEK file {shown} exists already"))
                            .code("kek_exists")
                            .hint("run `coffer init` without --create-kek to use it")
                    }
                    _ => Error::new(Kind::Key, format!("cannot make the KEK file {shown}")).source(e),
                }
            })?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| match path.parent().filter(|p| !p.as_os_str().is_empty()) {
                Some(dir) => std::fs::File::open(dir)?.sync_all(),
                None => Ok(()),
            })
            .context(Kind::Key, format_args!("cannot write the KEK file {shown}"))?;
        Ok(Self::new(secret))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn config(path: &Path) -> KeysConfig {
        KeysConfig {
            provider: ProviderKind::File,
            path: Some(path.to_owned()),
            variable: None,
            command: Vec::new(),
            keyring: vec!["file:///tmp/k".into()],
        }
    }

    #[tokio::test]
    async fn a_kek_file_is_made_once_private_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        let c = config(&path);
        assert_eq!(Kek::load(&c).await.unwrap_err().kind(), Kind::Key);
        let made = Kek::create_file(&c).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Kek::load(&c).await.unwrap().id(), made.id());
        assert_eq!(Kek::create_file(&c).unwrap_err().kind(), Kind::Refused);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let e = Kek::load(&c).await.unwrap_err();
        assert!(e.kind() == Kind::Key && e.to_string().contains("640"), "{e}");
    }

    #[tokio::test]
    async fn a_command_gives_the_kek_or_its_own_words() {
        let mut c = config(Path::new("/nonexistent"));
        c.provider = ProviderKind::Command;
        c.command = vec!["sh".into(), "-c".into(), "head -c 32 /dev/zero | base64".into()];
        let kek = Kek::load(&c).await.unwrap();
        assert_eq!(kek.secret(), &[0; 32]);
        c.command = vec!["sh".into(), "-c".into(), "echo vault is sealed >&2; exit 3".into()];
        let e = Kek::load(&c).await.unwrap_err();
        assert!(e.kind() == Kind::Key && e.to_string().contains("vault is sealed"), "{e}");
    }

    #[test]
    fn what_is_no_kek_is_refused() {
        for bad in ["", "AAAA", "!!!", &"A".repeat(44), &STANDARD.encode([0u8; 31]), &STANDARD.encode([0u8; 33])] {
            assert_eq!(Kek::from_text(bad).err().map(|e| e.kind()), Some(Kind::Key), "{bad}");
        }
        assert!(Kek::from_text(&format!(" {}\n", STANDARD.encode([0u8; 32]))).is_ok());
    }
}
