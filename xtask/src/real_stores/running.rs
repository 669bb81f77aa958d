//! A whole S3 server for other commands, to be killed and started again.

use std::path::Path;
use std::time::{Duration, Instant};

use super::kinds::{Kind, START};
use super::server::{Launch, Server};
use crate::run::Job;
use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

/// SeaweedFS under way, with an empty bucket.
#[derive(Debug)]
pub(crate) struct SeaweedFs {
    launch: Launch,
    server: Option<Server>,
}

impl SeaweedFs {
    /// Installs it, if it is not there, and starts it with its data in the folder `data`, which is emptied first.
    pub(crate) fn start(context: &Context, data: &Path) -> Result<Self> {
        if !cfg!(unix) {
            return Err(Stop::Skipped("servers are started and killed by the means of Unix".to_owned()));
        }
        if data.exists() {
            std::fs::remove_dir_all(data).map_err(file_error("clear", data))?;
        }
        std::fs::create_dir_all(data).map_err(file_error("create", data))?;
        let launch = Kind::SeaweedFs.launch(context, data)?;
        let server = launch.start(START)?;
        Kind::SeaweedFs.make_bucket(context, &launch).map_err(|stop| stop.context(&launch.said()))?;
        Ok(Self { launch, server: Some(server) })
    }

    /// What was installed.
    pub(crate) fn package() -> &'static str {
        Kind::SeaweedFs.package()
    }

    /// The URL of its bucket.
    pub(crate) fn url() -> String {
        Kind::SeaweedFs.url()
    }

    /// Gives `job` the environment of a client.
    pub(crate) fn client(&self, job: Job) -> Job {
        Kind::SeaweedFs.client(job, self.launch.port, true)
    }

    /// `kill -9`, and a new start on the same data. Returns how long it did not answer.
    pub(crate) fn kill_and_restart(&mut self) -> Result<Duration> {
        let away = Instant::now();
        if let Some(server) = self.server.take() {
            server.kill();
        }
        self.server = Some(self.launch.start(START)?);
        Ok(away.elapsed())
    }

    /// Whether it runs; it then has not ended by itself.
    pub(crate) fn runs(&mut self) -> bool {
        self.server.as_mut().is_some_and(Server::runs)
    }

    /// The end of its log.
    pub(crate) fn said(&self) -> String {
        self.launch.said()
    }
}
