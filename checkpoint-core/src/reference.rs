//! References to checkpoints, as callers write them.

use std::fmt;
use std::str::FromStr;

use crate::id::shown;
use crate::{Error, JobId, ModelId, Result, SnapshotIdentity};

/// Where a checkpoint is: a name of this job, a name of another job, or a path that a training service gave out.
///
/// | written | meaning |
/// |---|---|
/// | `step-40`, `step-40-00ab12cd` | a name or identity of the job in work |
/// | `cross_job://other/step-40`, `other:step-40` | a name of job `other` |
/// | `<account>/run-<32 hex>/<name>` | a run-qualified path of a hosted service |
/// | `tinker://<run>/<weights \| sampler_weights \| external_weights>/<name>` | a Tinker path |
///
/// Other schemes (`gs://`, `s3://`), absolute paths, backslashes and `.` or `..` segments are refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointRef {
    /// A name of the job in work.
    Local(SnapshotIdentity),
    /// A name of another job.
    CrossJob {
        /// The job that saved it.
        job: JobId,
        /// Its name or identity there.
        name: SnapshotIdentity,
    },
    /// `<account>/run-<32 hex>/<checkpoint>` of a hosted service.
    Run {
        /// The account.
        account: JobId,
        /// `run-` and 32 hexadecimal digits.
        run: String,
        /// The rest of the path, one or more segments.
        checkpoint: String,
    },
    /// A path of a Tinker service.
    Tinker {
        /// The run id.
        run: String,
        /// `weights`, `sampler_weights` or `external_weights`.
        kind: TinkerKind,
        /// The checkpoint's name.
        name: String,
    },
}

/// The middle segment of a Tinker path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the grammar of tinker:// paths has these three")]
pub enum TinkerKind {
    /// A train state.
    Weights,
    /// Weights for inference.
    SamplerWeights,
    /// An encrypted export.
    ExternalWeights,
}

impl TinkerKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::SamplerWeights => "sampler_weights",
            Self::ExternalWeights => "external_weights",
        }
    }
}

impl FromStr for CheckpointRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::invalid(format!("{} is no checkpoint reference: {why}", shown(text))).with_help(
                "use `<name>`, `<job>:<name>`, `cross_job://<job>/<name>`, `<account>/run-<32 hex>/<name>` or `tinker://<run>/<kind>/<name>`",
            )
        };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if text.len() > 1024 {
            return Err(bad("it has more than 1024 bytes"));
        }
        if text.contains(['\\', '\0']) || text.chars().any(char::is_whitespace) {
            return Err(bad("backslashes, NUL and white space are not allowed"));
        }
        let (scheme, path) = match text.split_once("://") {
            Some((scheme, path)) => (Some(scheme), path),
            None => (None, text),
        };
        let cross_job = |job: &str, name: &str| {
            Ok(Self::CrossJob {
                job: JobId::new(job).map_err(|_| bad("the job is no DNS label"))?,
                name: checkpoint_label(name).ok_or_else(|| bad("the name is no DNS label"))?,
            })
        };
        let segments: Vec<&str> = path.split('/').collect();
        if segments.iter().any(|segment| matches!(*segment, "" | "." | "..")) {
            return Err(bad("absolute paths and empty, `.` or `..` segments are not allowed"));
        }
        match (scheme, segments.as_slice()) {
            (None, [name]) => match name.split_once(':') {
                Some((job, name)) => cross_job(job, name),
                None => {
                    Ok(Self::Local(checkpoint_label(name).ok_or_else(|| bad("the name is no DNS label"))?))
                }
            },
            (None, [account, run, rest @ ..]) if !rest.is_empty() && is_run(run) => Ok(Self::Run {
                account: JobId::new(*account).map_err(|_| bad("the account is no DNS label"))?,
                run: (*run).to_owned(),
                checkpoint: rest.join("/"),
            }),
            (None, _) => Err(bad("a path wants the form `<account>/run-<32 hex>/<name>`")),
            (Some("cross_job"), [job, name]) => cross_job(job, name),
            (Some("cross_job"), _) => Err(bad("cross_job:// wants a job and a name")),
            (Some("tinker"), [run, kind, name]) => Ok(Self::Tinker {
                run: (*run).to_owned(),
                kind: match *kind {
                    "weights" => TinkerKind::Weights,
                    "sampler_weights" => TinkerKind::SamplerWeights,
                    "external_weights" => TinkerKind::ExternalWeights,
                    _ => return Err(bad("the kind is none of weights, sampler_weights, external_weights")),
                },
                name: (*name).to_owned(),
            }),
            (Some("tinker"), _) => Err(bad("tinker:// wants a run, a kind and a name")),
            (Some(_), _) => Err(bad("the scheme is neither cross_job nor tinker")),
        }
    }
}

impl fmt::Display for CheckpointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(name) => write!(f, "{name}"),
            Self::CrossJob { job, name } => write!(f, "cross_job://{job}/{name}"),
            Self::Run { account, run, checkpoint } => write!(f, "{account}/{run}/{checkpoint}"),
            Self::Tinker { run, kind, name } => write!(f, "tinker://{run}/{}/{name}", kind.as_str()),
        }
    }
}

fn checkpoint_label(text: &str) -> Option<SnapshotIdentity> {
    // Names and identities share the alphabet of a DNS label; a model id is checked by that very rule.
    ModelId::new(text).ok().and_then(|label| SnapshotIdentity::new(label.as_str()).ok())
}

fn is_run(text: &str) -> bool {
    text.strip_prefix("run-").is_some_and(|hex| {
        hex.len() == 32 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_forms_round_trip() {
        let run = format!("acme/run-{}/weights/step-4", "0f".repeat(16));
        for text in
            ["step-40", "cross_job://job-a/step-40-00ab12cd", &run, "tinker://r1/sampler_weights/Step_4"]
        {
            assert_eq!(text.parse::<CheckpointRef>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_colon_joins_job_and_name() {
        let short = "job-a:step-40".parse::<CheckpointRef>().unwrap();
        assert_eq!(short, "cross_job://job-a/step-40".parse().unwrap());
    }

    #[test]
    fn everything_else_is_refused_with_a_reason() {
        for (text, why) in [
            ("", "empty"),
            ("Step-4", "no DNS label"),
            ("step_4", "no DNS label"),
            ("/abs/path", "absolute"),
            ("a/../b", "absolute"),
            ("a\\b", "backslashes"),
            ("gs://bucket/x", "scheme"),
            ("cross_job://a", "a job and a name"),
            ("cross_job://A/b", "job is no DNS label"),
            ("A:b", "job is no DNS label"),
            ("a:B", "name is no DNS label"),
            ("a:b:c", "name is no DNS label"),
            ("a:", "name is no DNS label"),
            ("models:b", "job is no DNS label"),
            ("tinker://r/other/x", "kind"),
            ("acme/run-1/x", "run-<32 hex>"),
        ] {
            let error = text.parse::<CheckpointRef>().unwrap_err();
            assert!(error.message().contains(why), "{text}: {error}");
        }
    }
}
