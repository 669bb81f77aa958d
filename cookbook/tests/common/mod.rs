//! What the tests of both kinds of runs do with a checkpoint.

use towline_cookbook::recipes::{DEADLINE, Trainer};
use towline_core::{AdapterSource, CheckpointRef, Result, TrainingClient as _};
use towline_trainer_client::{Init, PendingExt as _, Resume, Run};

/// What a checkpoint is named for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Use {
    Resume,
    Initialise,
    LoadAsAdapter,
}

impl Use {
    /// Puts `reference` to this use.
    pub(crate) async fn of(self, reference: CheckpointRef, trainer: &Trainer, run: &Run) -> Result<()> {
        match self {
            Self::Resume => run.resolve_resume(&Resume::default().with_from(reference)).await.map(drop),
            Self::Initialise => {
                let init = Resume::default().with_init(Init::weights(reference));
                run.resolve_resume(&init).await.map(drop)
            }
            Self::LoadAsAdapter => {
                trainer.client.load_adapter(&AdapterSource::Checkpoint(reference)).wait(DEADLINE).await
            }
        }
    }
}
