//! Store URLs: `file:///directory` and `s3://bucket/prefix?region=…&endpoint=…`.
//!
//! Unknown parameters are refused: a misspelt one would silently be a default.

use super::store::Store;
use crate::error::{Context, Error, Kind, Result};
use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// A request that takes longer is given up; objects larger than a part never go in one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Retries of one request within the client; whoever must not give up retries above it.
const RETRIES: usize = 3;
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether a local directory may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directory {
    MustExist,
    Make,
}

/// The store behind a URL.
pub fn connect(name: &str, url_text: &str, required: bool, directory: Directory) -> Result<Store> {
    let url = Url::parse(url_text).context(Kind::Usage, format_args!("store {name}: its url is not a URL"))?;
    let mut shown = url.clone();
    shown.set_query(None);
    let _ = shown.set_password(None);
    let _ = shown.set_username("");
    let during = |e: Error| e.during(format_args!("store {name} ({shown})"));
    let (inner, root): (Arc<dyn ObjectStore>, Option<PathBuf>) = match url.scheme() {
        "file" => {
            let root = local_root(&url).map_err(during)?;
            (Arc::new(local(&root, directory).map_err(during)?), Some(root))
        }
        "s3" => (s3(&url).map_err(during)?, None),
        scheme @ ("az" | "abfs" | "abfss" | "azure" | "gs" | "gcs") => {
            return Err(during(Error::usage(format!(
                "this version stores to file:// and s3://, not to {scheme}:// (a gateway that speaks S3 works)"
            ))));
        }
        scheme => {
            return Err(during(Error::usage(format!("unknown scheme {scheme}://; use file:// or s3://"))));
        }
    };
    #[cfg(feature = "failpoints")]
    let inner = super::faults::wrap(name, inner)?;
    Ok(Store::new(name, shown.to_string(), required, inner, root))
}

fn local_root(url: &Url) -> Result<PathBuf> {
    if let Some((key, _)) = url.query_pairs().next() {
        return Err(Error::usage(format!("unknown parameter '{key}': file:// takes none")));
    }
    let root = url
        .to_file_path()
        .map_err(|()| Error::usage("a file URL names an absolute directory: file:///var/lib/coffer/store"))?;
    if root.parent().is_none() {
        return Err(Error::usage("the root directory is no place for a store"));
    }
    Ok(root)
}

/// Rooted at `/` with the directory as a prefix, so that a directory that is not there (an unmounted disk) is a store
/// that does not answer, not one that cannot be configured.
fn local(root: &std::path::Path, directory: Directory) -> Result<PrefixStore<LocalFileSystem>> {
    if directory == Directory::Make {
        std::fs::create_dir_all(root)
            .context(Kind::Unreachable, format_args!("cannot make the directory {}", root.display()))?;
    }
    let prefix = object_store::path::Path::from_absolute_path(root)
        .context(Kind::Usage, format_args!("the directory {} is refused", root.display()))?;
    // Without fsync a crash of the machine could lose what was acknowledged.
    Ok(PrefixStore::new(LocalFileSystem::new().with_fsync(true), prefix))
}

/// Credentials from the shared credentials file, when neither the URL nor the environment says where they come from.
fn with_profile(b: AmazonS3Builder, url: &Url) -> Result<AmazonS3Builder> {
    const ELSEWHERE: [&str; 4] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    let given = url.query_pairs().any(|(k, _)| k == "access_key_id");
    if given || ELSEWHERE.iter().any(|v| std::env::var_os(v).is_some()) {
        return Ok(b);
    }
    let Some(p) = super::aws_profile::load()? else { return Ok(b) };
    let b = b.with_access_key_id(p.access_key_id).with_secret_access_key(p.secret_access_key.as_str());
    Ok(match p.session_token {
        Some(t) => b.with_token(t),
        None => b,
    })
}

/// For the trial of a store: the request's body is replaced by these bytes after it was signed, as a fault on the way
/// would do.
#[derive(Clone)]
pub(super) struct Damaged(pub bytes::Bytes);

/// The usual client, which damages what carries a [`Damaged`].
#[derive(Debug)]
struct DamagingConnector;

impl HttpConnector for DamagingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(DamagingService(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct DamagingService(HttpClient);

#[async_trait::async_trait]
impl HttpService for DamagingService {
    async fn call(&self, mut request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        if let Some(Damaged(bytes)) = request.extensions().get::<Damaged>().cloned() {
            *request.body_mut() = bytes.into();
        }
        self.0.execute(request).await
    }
}

fn s3(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let bucket = url
        .host_str()
        .filter(|h| !h.is_empty())
        .ok_or_else(|| Error::usage("an S3 URL names a bucket: s3://bucket/prefix?region=eu-central-1"))?;
    let mut b = with_profile(AmazonS3Builder::from_env(), url)?
        .with_bucket_name(bucket)
        // The environment must not switch this off: numbers are won by it.
        .with_conditional_put(object_store::aws::S3ConditionalPut::ETagMatch)
        // A locked bucket refuses puts without one, and a corrupt upload must not be acknowledged.
        .with_checksum_algorithm(Checksum::SHA256)
        .with_retry(RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(3),
                base: 2.0,
            },
            max_retries: RETRIES,
            retry_timeout: RETRY_TIMEOUT,
        });
    let mut allow_http = false;
    for (key, value) in url.query_pairs() {
        let value = value.into_owned();
        b = match key.as_ref() {
            "region" => b.with_region(value),
            "endpoint" => {
                let e = Url::parse(&value).context(Kind::Usage, "endpoint is not a URL")?;
                match e.scheme() {
                    "http" => allow_http = true,
                    "https" => {}
                    s => return Err(Error::usage(format!("endpoint is {s}://; use https:// or http://"))),
                }
                b.with_endpoint(value.trim_end_matches('/'))
            }
            "access_key_id" => b.with_access_key_id(value),
            "secret_access_key" => b.with_secret_access_key(value),
            "session_token" => b.with_token(value),
            "virtual_hosted_style" => match value.as_str() {
                "true" => b.with_virtual_hosted_style_request(true),
                "false" => b.with_virtual_hosted_style_request(false),
                _ => return Err(Error::usage("virtual_hosted_style is true or false")),
            },
            other => {
                return Err(Error::usage(format!(
                    "unknown parameter '{other}'; s3:// takes region, endpoint, access_key_id, secret_access_key, \
                     session_token, virtual_hosted_style"
                )));
            }
        };
    }
    b = b.with_http_connector(DamagingConnector).with_client_options(
        ClientOptions::new()
            .with_timeout(REQUEST_TIMEOUT)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_allow_http(allow_http),
    );
    let store = b.build().context(Kind::Usage, "the store's settings are refused")?;
    let prefix = url.path().trim_matches('/');
    Ok(match prefix {
        "" => Arc::new(store),
        p => {
            let p = object_store::path::Path::from_url_path(p).context(Kind::Usage, "the prefix is refused")?;
            Arc::new(PrefixStore::new(store, p))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        let e = connect("x", url, true, Directory::MustExist).expect_err(url);
        assert_eq!(e.kind(), Kind::Usage, "{e}");
        e.to_string()
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(refused("s3://b/p?regoin=x").contains("unknown parameter 'regoin'"));
        assert!(refused("file:///tmp?fsync=false").contains("fsync"));
        assert!(refused("az://container/p").contains("this version"));
        assert!(refused("gs://bucket").contains("this version"));
        assert!(refused("ftp://x/y").contains("unknown scheme"));
        refused("file://host/dir");
        refused("file:///");
        refused("s3:///prefix?region=x");
        refused("s3://b?endpoint=ftp://x");
        refused("s3://b?virtual_hosted_style=maybe");
        refused("not a url");
    }

    #[test]
    fn secrets_are_not_shown() {
        let s =
            connect("x", "s3://b/p?region=r&access_key_id=AK&secret_access_key=hunter2", true, Directory::MustExist)
                .unwrap();
        assert_eq!(s.shown(), "s3://b/p");
        assert!(!format!("{s:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn a_missing_directory_is_a_store_that_does_not_answer() {
        let s = connect("x", "file:///nonexistent/coffer", true, Directory::MustExist).unwrap();
        assert_eq!(s.get("a").await.unwrap_err().kind(), Kind::Unreachable);
        assert_eq!(s.list("a").await.unwrap_err().kind(), Kind::Unreachable);
        assert_eq!(s.put("a", "x".into()).await.unwrap_err().kind(), Kind::Unreachable);
        assert!(!std::path::Path::new("/nonexistent").exists());
    }
}
