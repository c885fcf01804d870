//! A real S3 server of our own: SeaweedFS on the loopback, its data in a folder that goes when dropped.

use crate::{env_path, free_port, wait_for};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

pub const ACCESS_KEY: &str = "coffertestaccess";
pub const SECRET_KEY: &str = "coffertestsecret";

pub struct S3 {
    pub port: u16,
    dir: PathBuf,
    child: Option<Child>,
    ports: Vec<u16>,
}

impl S3 {
    /// Starts a server and waits until it answers.
    pub fn start() -> Self {
        let dir = std::env::temp_dir().join(format!("coffer-s3-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir_all(dir.join("data")).expect("a folder for the server");
        let config = format!(
            "{{\"identities\":[{{\"name\":\"coffer\",\"credentials\":[{{\"accessKey\":\"{ACCESS_KEY}\",\
             \"secretKey\":\"{SECRET_KEY}\"}}],\"actions\":[\"Admin\",\"Read\",\"Write\",\"List\",\"Tagging\"]}}]}}"
        );
        std::fs::write(dir.join("s3.json"), config).expect("our folder");
        let ports: Vec<u16> = (0..8).map(|_| free_port()).collect();
        let mut this = Self { port: ports[7], dir, child: None, ports };
        this.up();
        this
    }

    /// Starts the process over the same data.
    pub fn up(&mut self) {
        let p = &self.ports;
        let log = std::fs::File::create(self.dir.join("log")).expect("our folder");
        let child = Command::new(env_path("COFFER_WEED"))
            .arg("-logtostderr=true")
            .arg("server")
            .arg(format!("-dir={}", self.dir.join("data").display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=1000", "-master.volumeSizeLimitMB=64"])
            .args([
                "-volume.preStopSeconds=1",
                "-master.telemetry=false",
                "-s3",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
            ])
            .arg(format!("-master.port={}", p[0]))
            .arg(format!("-master.port.grpc={}", p[1]))
            .arg(format!("-volume.port={}", p[2]))
            .arg(format!("-volume.port.grpc={}", p[3]))
            .arg(format!("-filer.port={}", p[4]))
            .arg(format!("-filer.port.grpc={}", p[5]))
            .arg(format!("-s3.port.grpc={}", p[6]))
            .arg(format!("-s3.port={}", p[7]))
            .arg(format!("-s3.config={}", self.dir.join("s3.json").display()))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("weed starts");
        self.child = Some(child);
        let port = self.port;
        wait_for("SeaweedFS to answer", 60, || http_answers(port).then_some(()));
    }

    /// kill -9; the data stays.
    pub fn kill9(&mut self) {
        if let Some(mut c) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
    }

    /// A black hole: the process is stopped, connections hang.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, n: i32) {
        let pid = self.child.as_ref().expect("a running server").id();
        // SAFETY: a plain signal to our own child.
        unsafe { libc::kill(pid as i32, n) };
    }

    /// Creates a bucket through the server's own shell.
    pub fn bucket(&self, name: &str) {
        let mut child = Command::new(env_path("COFFER_WEED"))
            .args(["shell", &format!("-master=127.0.0.1:{}.{}", self.ports[0], self.ports[1])])
            .arg(format!("-filer=127.0.0.1:{}.{}", self.ports[4], self.ports[5]))
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("weed shell starts");
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(format!("s3.bucket.create -name {name}\n").as_bytes())
            .expect("the shell reads");
        let out = child.wait_with_output().expect("the shell ends");
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("created bucket") || said.contains("create bucket"), "bucket {name}: {said}");
    }

    /// A `[[store]]` section for a prefix of a bucket here.
    pub fn store(&self, name: &str, bucket: &str, required: bool) -> String {
        Self::store_at(self.port, name, bucket, required)
    }

    /// The same through another port: a proxy's.
    pub fn store_at(port: u16, name: &str, bucket: &str, required: bool) -> String {
        format!(
            "[[store]]\nname = \"{name}\"\nurl = \"s3://{bucket}/coffer?region=us-east-1&endpoint=http://127.0.0.1:{port}\"\n\
             required = {required}\n"
        )
    }

    /// The environment that gives an agent access.
    pub fn env() -> Vec<(String, String)> {
        vec![("AWS_ACCESS_KEY_ID".into(), ACCESS_KEY.into()), ("AWS_SECRET_ACCESS_KEY".into(), SECRET_KEY.into())]
    }
}

fn http_answers(port: u16) -> bool {
    let Ok(mut s) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let _ = s.set_read_timeout(Some(std::time::Duration::from_secs(2)));
    if s.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n").is_err() {
        return false;
    }
    let mut head = [0; 12];
    s.read_exact(&mut head).is_ok() && head.ends_with(b"403")
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.thaw_if_running();
        self.kill9();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl S3 {
    fn thaw_if_running(&self) {
        if self.child.is_some() {
            self.thaw();
        }
    }
}
