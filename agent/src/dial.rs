//! From a [`Dsn`] to an open, possibly encrypted, stream to one of its servers.
//!
//! The SQL client and the replication client both start here, so `sslmode` means the same to both. Nothing above this
//! file knows whether it talks through a unix socket, TCP or TLS, except for the channel binding that SCRAM wants.

use crate::dsn::{ChannelBinding, Dsn, Host, RootCerts, SslMode};
use crate::error::{Context, Error, Kind, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::Digest;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

/// The provider of every TLS connection of the process; the same crate serves the object stores.
pub fn install_crypto_provider() -> Arc<CryptoProvider> {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // Fails only when another part of the process was first, with a provider that is then as good.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    });
    CryptoProvider::get_default().expect("a provider was installed above").clone()
}

/// An open stream to a server, before the startup message.
pub struct Transport {
    io: Io,
    /// `tls-server-end-point` (RFC 5929), when the stream is TLS and the certificate's hash is defined.
    pub channel_binding: Option<Vec<u8>>,
}

enum Io {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    /// Whether what is sent is encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(self.io, Io::Tls(_))
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        match &mut self.io {
            Io::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Io::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Io::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, b: &[u8]) -> Poll<std::io::Result<usize>> {
        match &mut self.io {
            Io::Unix(s) => Pin::new(s).poll_write(cx, b),
            Io::Tcp(s) => Pin::new(s).poll_write(cx, b),
            Io::Tls(s) => Pin::new(s).poll_write(cx, b),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        match &mut self.io {
            Io::Unix(s) => Pin::new(s).poll_flush(cx),
            Io::Tcp(s) => Pin::new(s).poll_flush(cx),
            Io::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        match &mut self.io {
            Io::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Io::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Io::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

/// How an attempt at a server is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    Plain,
    /// TLS if the server has it.
    TlsIfOffered,
    Tls,
}

/// The attempts that `sslmode` asks for, in order; the second only after the first was refused by the server.
pub fn attempts(mode: SslMode, host: &Host) -> &'static [Security] {
    if host.socket().is_some() {
        return &[Security::Plain];
    }
    match mode {
        SslMode::Disable => &[Security::Plain],
        SslMode::Allow => &[Security::Plain, Security::Tls],
        SslMode::Prefer => &[Security::TlsIfOffered, Security::Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Security::Tls],
    }
}

/// Opens a stream to one host.
pub async fn open(dsn: &Dsn, host: &Host, security: Security) -> Result<Transport> {
    let work = open_unlimited(dsn, host, security);
    match dsn.connect_timeout {
        None => work.await,
        Some(t) => tokio::time::timeout(t, work)
            .await
            .map_err(|_| Error::new(Kind::Unreachable, format!("{host} does not answer within {} s", t.as_secs())))?,
    }
}

async fn open_unlimited(dsn: &Dsn, host: &Host, security: Security) -> Result<Transport> {
    let unreachable = |e: std::io::Error| Error::new(Kind::Unreachable, format!("cannot connect to {host}")).source(e);
    if let Some(path) = host.socket() {
        let s = UnixStream::connect(path).await.map_err(unreachable)?;
        return Ok(Transport { io: Io::Unix(s), channel_binding: None });
    }
    let mut tcp = match host.addr {
        Some(a) => TcpStream::connect((a, host.port)).await,
        None => TcpStream::connect((host.name.as_str(), host.port)).await,
    }
    .map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    keep_alive(&tcp, dsn).map_err(unreachable)?;
    if security == Security::Plain {
        return Ok(Transport { io: Io::Tcp(tcp), channel_binding: None });
    }
    let mut request = bytes::BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    tcp.write_all(&request).await.map_err(unreachable)?;
    let mut answer = [0u8];
    // Exactly one byte: anything sent after it in clear is an attack (CVE-2021-23222) and breaks the handshake.
    tcp.read_exact(&mut answer).await.map_err(unreachable)?;
    match (answer[0], security) {
        (b'S', _) => {}
        (b'N', Security::TlsIfOffered) => return Ok(Transport { io: Io::Tcp(tcp), channel_binding: None }),
        (b'N', _) => {
            return Err(Error::new(Kind::Refused, format!("{host} does not offer TLS, and sslmode demands it"))
                .hint("set ssl = on in the server's configuration, or choose another sslmode"));
        }
        _ => return Err(Error::new(Kind::Unreachable, format!("{host} does not answer as a PostgreSQL server"))),
    }
    let config = tls_config(dsn)?;
    let name = ServerName::try_from(host.name.clone())
        .context(Kind::Usage, format_args!("'{}' is not a name that a certificate can hold", host.name))?;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|e| {
        Error::new(Kind::Refused, format!("TLS with {host} failed")).code("tls").source(e).hint(
            "verify-full checks the host against the certificate's subjectAltName; sslrootcert names the authority",
        )
    })?;
    let channel_binding = match dsn.channel_binding {
        ChannelBinding::Disable => None,
        _ => tls.get_ref().1.peer_certificates().and_then(|c| end_point(c.first()?)),
    };
    Ok(Transport { io: Io::Tls(Box::new(tls)), channel_binding })
}

/// A link that is dead without a word ends the connection.
fn keep_alive(tcp: &TcpStream, dsn: &Dsn) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(tcp);
    if dsn.keepalive.is_on {
        let mut probes = socket2::TcpKeepalive::new();
        if let Some(t) = dsn.keepalive.idle {
            probes = probes.with_time(t);
        }
        if let Some(t) = dsn.keepalive.interval {
            probes = probes.with_interval(t);
        }
        if let Some(n) = dsn.keepalive.count {
            probes = probes.with_retries(n);
        }
        socket.set_tcp_keepalive(&probes)?;
    }
    #[cfg(target_os = "linux")]
    if let Some(t) = dsn.user_timeout() {
        socket.set_tcp_user_timeout(Some(t))?;
    }
    Ok(())
}

fn tls_config(dsn: &Dsn) -> Result<ClientConfig> {
    let provider = install_crypto_provider();
    let verifier = Arc::new(Verifier::new(dsn, &provider)?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context(Kind::Other, "TLS")?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match (&dsn.sslcert, &dsn.sslkey) {
        (Some(cert), Some(key)) => {
            let what = |p: &std::path::Path| format!("cannot read {}", p.display());
            let chain = CertificateDer::pem_file_iter(cert)
                .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
                .context(Kind::Usage, what(cert))?;
            let key = PrivateKeyDer::from_pem_file(key).context(Kind::Usage, what(key))?;
            builder.with_client_auth_cert(chain, key).context(Kind::Usage, "the client certificate")?
        }
        (Some(_), None) => return Err(Error::usage("sslcert without sslkey in the connection string")),
        _ => builder.with_no_client_auth(),
    };
    // A server that speaks "direct TLS" (PostgreSQL 17) insists on it; the others ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

/// `sslmode`'s checks: none, the chain, or the chain and the name.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates of the root file as they stand: a server's own self-signed certificate may be in it.
    pinned: Vec<CertificateDer<'static>>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(dsn: &Dsn, provider: &Arc<CryptoProvider>) -> Result<Self> {
        let algorithms = provider.signature_verification_algorithms;
        let check_name = dsn.sslmode == SslMode::VerifyFull;
        if dsn.sslmode < SslMode::VerifyCa {
            return Ok(Self { chain: None, pinned: Vec::new(), check_name, algorithms });
        }
        let mut store = RootCertStore::empty();
        let mut pinned = Vec::new();
        match &dsn.roots {
            RootCerts::File(f) => {
                pinned = CertificateDer::pem_file_iter(f)
                    .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
                    .context(Kind::Usage, format_args!("cannot read sslrootcert {}", f.display()))?;
                store.add_parsable_certificates(pinned.iter().cloned());
            }
            RootCerts::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
            RootCerts::None => {}
        }
        if store.is_empty() {
            return Err(Error::usage("sslrootcert holds no usable certificate"));
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone())
            .build()
            .context(Kind::Usage, "sslrootcert")?;
        Ok(Self { chain: Some(chain), pinned, check_name, algorithms })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        if self.pinned.iter().any(|p| p == end_entity) {
            if self.check_name {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match chain.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            // webpki checks the chain before the name, so a wrong name means that the chain is right.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The certificate's hash for `tls-server-end-point`: by the hash of its signature algorithm, MD5 and SHA-1 raised to
/// SHA-256 (RFC 5929, section 4.1). `None` where that algorithm has no single hash (Ed25519, PSS).
fn end_point(cert: &[u8]) -> Option<Vec<u8>> {
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA_SHA2: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
    // Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OBJECT IDENTIFIER … }, … }
    let (certificate, _) = der(cert)?;
    let (_, after_tbs) = der(certificate)?;
    let (algorithm, _) = der(after_tbs)?;
    let (oid, _) = der(algorithm)?;
    let (last, arc) = oid.split_last()?;
    match (arc, last) {
        (RSA, 4 | 5 | 11) | (ECDSA_SHA2, 2) => Some(sha2::Sha256::digest(cert).to_vec()),
        (RSA, 12) | (ECDSA_SHA2, 3) => Some(sha2::Sha384::digest(cert).to_vec()),
        (RSA, 13) | (ECDSA_SHA2, 4) => Some(sha2::Sha512::digest(cert).to_vec()),
        _ => None,
    }
}

/// Splits one DER value: its content, and what follows it.
fn der(b: &[u8]) -> Option<(&[u8], &[u8])> {
    let (first, rest) = b.get(1..)?.split_first()?;
    let (len, rest) = if *first < 0x80 {
        (usize::from(*first), rest)
    } else {
        let n = usize::from(first & 0x7f);
        if n == 0 || n > 4 || rest.len() < n {
            return None;
        }
        (rest[..n].iter().fold(0usize, |a, x| a << 8 | usize::from(*x)), &rest[n..])
    };
    (rest.len() >= len).then(|| rest.split_at(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn der_values_are_split_and_cut_ones_refused() {
        assert_eq!(der(&[0x30, 2, 1, 2, 9]), Some((&[1u8, 2][..], &[9u8][..])));
        let mut long = vec![0x30, 0x82, 1, 0];
        long.extend([7; 256]);
        assert_eq!(der(&long).unwrap().0.len(), 256);
        for cut in [&[][..], &[0x30], &[0x30, 2, 1], &[0x30, 0x82, 1], &[0x30, 0x80]] {
            assert_eq!(der(cut), None, "{cut:?}");
        }
    }

    #[test]
    fn the_hash_follows_the_signature_algorithm() {
        let cert = |oid: &[u8]| {
            let mut alg = vec![0x06, oid.len() as u8];
            alg.extend_from_slice(oid);
            let mut body = vec![0x30, 1, 0, 0x30, alg.len() as u8];
            body.extend(alg);
            let mut c = vec![0x30, body.len() as u8];
            c.extend(body);
            c
        };
        let rsa = |n| cert(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, n]);
        assert_eq!(end_point(&rsa(5)).unwrap().len(), 32);
        assert_eq!(end_point(&rsa(12)).unwrap().len(), 48);
        assert_eq!(end_point(&rsa(13)).unwrap().len(), 64);
        assert_eq!(end_point(&cert(&[0x2b, 0x65, 0x70])), None);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_is_told_when_a_link_is_dead() {
        let server = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = server.local_addr().unwrap().port();
        let dsn = Dsn::parse(&format!("host=127.0.0.1 port={port} sslmode=disable user=u keepalives_count=4")).unwrap();
        for dsn in [dsn.clone(), dsn.sending_little()] {
            let t = open(&dsn, &dsn.hosts[0], Security::Plain).await.unwrap();
            let Io::Tcp(tcp) = &t.io else { panic!("not TCP") };
            let s = socket2::SockRef::from(tcp);
            assert!(s.keepalive().unwrap());
            let times = (s.tcp_keepalive_time().unwrap(), s.tcp_keepalive_interval().unwrap());
            assert_eq!(times, (std::time::Duration::from_secs(30), std::time::Duration::from_secs(10)));
            assert_eq!(s.tcp_keepalive_retries().unwrap(), 4);
            assert_eq!(s.tcp_user_timeout().unwrap(), dsn.user_timeout());
        }
    }

    #[test]
    fn sslmode_decides_the_attempts() {
        let tcp = Host { name: "h".into(), addr: None, port: 1 };
        let unix = Host { name: "/run".into(), addr: None, port: 1 };
        assert_eq!(attempts(SslMode::VerifyFull, &unix), [Security::Plain]);
        assert_eq!(attempts(SslMode::Require, &tcp), [Security::Tls]);
        assert_eq!(attempts(SslMode::Allow, &tcp), [Security::Plain, Security::Tls]);
    }
}
