//! Whether a store keeps its word, and how a job on it fares.

use std::time::Duration;

use bytes::Bytes;
use towline_core::{Error, ErrorKind, ObjectKey, PutMode, Result, Version, WriteId};

use super::SnapshotRepo;
use super::collect::Prune;
use super::retain::{Retention, SKEW};
use super::verify::Depth;
use crate::random::{now_ms, random};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// Whether it is as it should be.
    pub good: bool,
    /// What was found.
    pub found: String,
    /// What to do, if something is to be done.
    pub help: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, good: true, found: found.into(), help: None }
    }

    fn bad(what: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { what, good: false, found: found.into(), help: Some(help.into()) }
    }

    fn failed(what: &'static str, error: &Error) -> Self {
        Self { what, good: false, found: error.report(), help: error.help().map(str::to_owned) }
    }
}

impl SnapshotRepo {
    /// Looks at the store (may it be written, do its conditions hold, does its clock agree with this machine's) and at
    /// the job (is everything there that should be, is there something to prune). Writes and deletes small objects below
    /// the job. What fails is a finding, not an error.
    pub async fn doctor(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        match self.conditions().await {
            Ok(more) => findings.extend(more),
            Err(error) => findings.push(Finding::failed("writing", &error)),
        }
        findings.push(match self.store_now().await {
            Err(error) => Finding::failed("clock", &error),
            Ok(store) => {
                let apart = Duration::from_millis(store.abs_diff(now_ms()));
                let found = format!("{:.1} s apart from the store's", apart.as_secs_f64());
                if apart <= SKEW {
                    Finding::good("clock", found)
                } else {
                    Finding::bad("clock", found, "set the clock of this machine, or of the store")
                }
            }
        });
        match self.list().await {
            Err(error) => findings.push(Finding::failed("head", &error)),
            Ok(live) => {
                findings.push(Finding::good("head", format!("{} snapshots and states", live.len())));
                for info in &live {
                    if let Err(error) = self.verify_to(info, Depth::Quick).await {
                        findings.push(Finding::failed("files", &error));
                    }
                }
                if !live.is_empty() {
                    findings.extend(self.to_prune().await);
                }
            }
        }
        findings.push(Finding::good(
            "uploads",
            "parts that a killed process left cannot be listed from here; the upload journal gives them up when the \
             same machine uploads again, and a rule of the bucket that aborts incomplete uploads after a week those of \
             machines that are gone",
        ));
        findings
    }

    /// Whether conditional writes are what the commit rests on.
    async fn conditions(&self) -> Result<Vec<Finding>> {
        let id = WriteId::from_random(random().to_be_bytes());
        let key = ObjectKey::new(format!("{}/doctor-{id}", self.job))?;
        let body = |text: &'static str| Bytes::from_static(text.as_bytes());
        let first = self.ops.put(&key, body("first"), PutMode::Create).await?;
        let again = self.ops.put(&key, body("again"), PutMode::Create).await;
        let second = self.ops.put(&key, body("second"), PutMode::Update(first.clone())).await;
        let stale = self.ops.put(&key, body("stale"), PutMode::Update(first)).await;
        let read = self.ops.get(&key, None).await;
        self.ops.delete(&key).await?;
        let help =
            "use a store whose conditional writes are atomic: two trainers could both commit on this one";
        let refused = |what, outcome: Result<Version>, kind| match outcome {
            Err(error) if error.kind() == kind => Finding::good(what, "refused, as it should be"),
            Err(error) => Finding::bad(what, error.report(), help),
            Ok(_) => Finding::bad(what, "accepted", help),
        };
        let mut findings = vec![
            refused("create of what exists", again, ErrorKind::AlreadyExists),
            refused("update of an old version", stale, ErrorKind::Conflict),
        ];
        findings.push(match (second, read) {
            (Ok(_), Ok(bytes)) if bytes == body("second") => Finding::good("writing", "read back as written"),
            (Ok(_), Ok(bytes)) => Finding::bad("writing", format!("read back {bytes:?}"), help),
            (Err(error), _) | (_, Err(error)) => Finding::failed("writing", &error),
        });
        Ok(findings)
    }

    async fn to_prune(&self) -> Option<Finding> {
        let pruned = match self.prune(&Prune::new(Retention::new()).with_dry_run(true)).await {
            Ok(pruned) => pruned,
            Err(error) => return Some(Finding::failed("pruning", &error)),
        };
        let bytes: u64 = pruned.orphans.iter().map(|orphan| orphan.bytes).sum();
        let found = format!(
            "{} expired, {} expired and kept, {} to delete, {} folders of no snapshot with {bytes} bytes",
            pruned.given_up.len(),
            pruned.expired_kept().count(),
            pruned.deleted.len(),
            pruned.orphans.len()
        );
        let much = pruned.given_up.len() + pruned.deleted.len() + pruned.orphans.len() > 0;
        Some(if much {
            Finding::bad("pruning", found, "run `prune`")
        } else {
            Finding::good("pruning", found)
        })
    }
}
