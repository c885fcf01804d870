//! The credentials file that the AWS tools share: `~/.aws/credentials`, `AWS_SHARED_CREDENTIALS_FILE`, `AWS_PROFILE`.

use crate::error::{Error, Kind, Result};
use std::path::PathBuf;
use zeroize::Zeroizing;

/// Keys of one profile.
pub struct Profile {
    pub access_key_id: String,
    pub secret_access_key: Zeroizing<String>,
    pub session_token: Option<String>,
}

/// The profile that the environment chooses, `default` without a choice. `None` when nothing was chosen and there is no
/// such file or profile; a profile that was chosen must be there.
pub fn load() -> Result<Option<Profile>> {
    let chosen = std::env::var("AWS_PROFILE").ok();
    let file = std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
    let file = file.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".aws/credentials")));
    let text = file.as_ref().and_then(|f| std::fs::read_to_string(f).ok()).map(Zeroizing::new);
    let found = text.as_ref().and_then(|t| parse(t, chosen.as_deref().unwrap_or("default")));
    match (found, chosen, file) {
        (None, Some(name), Some(file)) => Err(Error::new(
            Kind::Usage,
            format!("AWS_PROFILE is '{name}', but {} has no access key under that name", file.display()),
        )),
        (found, _, _) => Ok(found),
    }
}

fn parse(text: &str, name: &str) -> Option<Profile> {
    let (mut inside, mut id, mut secret, mut token) = (false, None, None, None);
    for line in text.lines().map(str::trim).filter(|l| !l.starts_with(['#', ';'])) {
        if let Some(section) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = section.trim() == name;
        } else if let (true, Some((key, value))) = (inside, line.split_once('=')) {
            let value = value.trim().to_owned();
            match key.trim() {
                "aws_access_key_id" => id = Some(value),
                "aws_secret_access_key" => secret = Some(Zeroizing::new(value)),
                "aws_session_token" => token = Some(value),
                _ => {}
            }
        }
    }
    Some(Profile { access_key_id: id?, secret_access_key: secret?, session_token: token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_by_its_name() {
        let text = "# ours\n[default]\naws_access_key_id = A\naws_secret_access_key=B=\n\n[ backup ]\n\
                    aws_access_key_id=C\naws_secret_access_key = D\naws_session_token = E\nregion = x\n[half]\naws_access_key_id = F\n";
        let p = parse(text, "default").unwrap();
        assert_eq!((&*p.access_key_id, &**p.secret_access_key, p.session_token), ("A", "B=", None));
        assert_eq!(parse(text, "backup").unwrap().session_token.as_deref(), Some("E"));
        assert!(parse(text, "half").is_none() && parse(text, "none").is_none());
    }
}
