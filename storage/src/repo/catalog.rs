//! The repo as a catalog of checkpoints: of any job on its store.

use serde_json::{Map, Value};
use towline_core::{
    CheckpointCatalog, CheckpointClass, CheckpointInfo, CheckpointPage, CheckpointRef, Error, ErrorKind,
    JobId, LOOP, ModelId, PromotedModel, Result, SnapshotIdentity, TinkerKind, async_trait,
};

use super::SnapshotRepo;
use super::info::Wanted;
use super::promote::Promote;

#[async_trait]
impl CheckpointCatalog for SnapshotRepo {
    async fn list_page(&self, job: &JobId, cursor: Option<&str>, limit: usize) -> Result<CheckpointPage> {
        let below = match cursor {
            None => u64::MAX,
            Some(text) => text.parse().map_err(|_| {
                Error::invalid(format!("`{}` is no cursor of job {job}", text.escape_debug()))
                    .with_help("give the cursor of the page before, or none for the first page")
            })?,
        };
        let repo = self.of_job(job.clone());
        let mut live = repo.head().await?.live;
        live.retain(|info| info.seq < below);
        live.sort_by_key(|info| std::cmp::Reverse(info.seq));
        let more = live.len() > limit;
        live.truncate(limit);
        let next = live.last().filter(|_| more).map(|info| info.seq.to_string());
        Ok(CheckpointPage { checkpoints: live.iter().map(|info| repo.checkpoint_info(info)).collect(), next })
    }

    async fn resolve_checkpoint(
        &self,
        reference: &CheckpointRef,
        source_job: &JobId,
        class: CheckpointClass,
    ) -> Result<CheckpointInfo> {
        let (job, name) = match reference {
            CheckpointRef::Local(name) => (source_job.clone(), name.as_str()),
            CheckpointRef::CrossJob { job, name } => (job.clone(), name.as_str()),
            CheckpointRef::Run { run, checkpoint, .. } => (JobId::new(run.as_str())?, checkpoint.as_str()),
            CheckpointRef::Tinker { run, kind, name } => {
                fits(*kind, class, reference)?;
                (JobId::new(run.as_str())?, name.as_str())
            }
            _ => return Err(unknown(reference)),
        };
        let repo = self.of_job(job);
        let other = match class {
            CheckpointClass::Sampler => CheckpointClass::State,
            CheckpointClass::State => CheckpointClass::Sampler,
        };
        match repo.find(name, wanted(class)).await {
            Ok(info) => Ok(repo.checkpoint_info(&info)),
            Err(error) if error.kind() == ErrorKind::NotFound => match repo.find(name, wanted(other)).await {
                Ok(info) => Err(Error::invalid(format!(
                    "{} of job {} is a {} ({}): wanted a {class}",
                    info.id,
                    repo.job(),
                    CheckpointClass::of(info.kind),
                    info.kind
                ))
                .with_help(help(class))),
                Err(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn loop_state(&self, state: &CheckpointInfo) -> Result<Map<String, Value>> {
        let name = state.state()?.name;
        let repo = self.of_job(state.job.clone());
        let info = repo.find(state.id.identity.as_str(), Wanted::State).await?;
        match repo.manifest(&info).await?.sections.remove(LOOP) {
            Some(Value::Object(entries)) => Ok(entries),
            Some(_) => Err(Error::corrupt(format!("section `{LOOP}` of state {name} is no object"))
                .with_help("resume from another state")),
            None => Err(Error::not_found(format!("state {name} has no section `{LOOP}`"))
                .with_help("resume from a state that this loop has saved")),
        }
    }

    async fn delete_checkpoint(&self, checkpoint: &CheckpointInfo) -> Result<()> {
        let repo = self.of_job(checkpoint.job.clone());
        let class = CheckpointClass::of(checkpoint.kind);
        match repo.find(checkpoint.id.identity.as_str(), wanted(class)).await {
            Ok(info) => repo.delete(&info).await.map(drop),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn promote_checkpoint(
        &self,
        job: &JobId,
        checkpoint: &SnapshotIdentity,
        output_model_id: &ModelId,
    ) -> Result<PromotedModel> {
        let promote = Promote::new(output_model_id.clone());
        self.of_job(job.clone()).promote(checkpoint.as_str(), &promote).await
    }
}

fn wanted(class: CheckpointClass) -> Wanted {
    match class {
        CheckpointClass::Sampler => Wanted::Sampler,
        CheckpointClass::State => Wanted::State,
    }
}

/// Whether a Tinker path names what is wanted.
fn fits(kind: TinkerKind, class: CheckpointClass, reference: &CheckpointRef) -> Result<()> {
    match (kind, class) {
        (TinkerKind::Weights, CheckpointClass::State)
        | (TinkerKind::SamplerWeights, CheckpointClass::Sampler) => Ok(()),
        (TinkerKind::ExternalWeights, _) => Err(unknown(reference)),
        _ => Err(Error::invalid(format!("{reference} names another class of checkpoint: wanted a {class}"))
            .with_help(help(class))),
    }
}

fn help(class: CheckpointClass) -> &'static str {
    match class {
        CheckpointClass::State => "name what `save_state` has saved: weights for samplers have no optimizer",
        CheckpointClass::Sampler => "name weights for samplers: a train state is only resumed from",
    }
}

fn unknown(reference: &CheckpointRef) -> Error {
    Error::unsupported(format!("{reference} is not in this store"))
        .with_help("ask the service that gave this reference out")
}
