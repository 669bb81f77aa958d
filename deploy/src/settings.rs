//! What a weight syncer is set to, and how.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use towline_core::{CheckpointType, Deployment};

use crate::WeightSyncer;
use crate::sync::State;

/// What a [`crate::WeightSyncer`] is set to. The defaults are those of the public client.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SyncSettings {
    /// What the deployment is called, for messages. Default none.
    pub deployment_id: Option<String>,
    /// The model that must be served; empty, the default, for any.
    pub base_model: String,
    /// From the order until **all** replicas are ready. Default 600 s.
    pub hotload_timeout: Duration,
    /// The type of the first save when nobody asks for one. Default base.
    pub first_checkpoint_type: CheckpointType,
    /// The codec of deltas, or `auto` for the best one that the deployment applies. Default `arc_v2`.
    pub compression_format: String,
    /// Whether a small request follows each successful sync. Default true.
    pub warmup_after_hotload: bool,
    /// How often a failed warm-up is tried again. Default 10.
    pub warmup_max_retries: u32,
    /// The pause before it is tried again. Default 10 s.
    pub warmup_interval: Duration,
    /// How often the deployment is asked during a hot-load. Default 5 s.
    pub poll_interval: Duration,
    /// Whether cached prompts are dropped with the old weights, where the deployment has such a cache. Default true.
    pub reset_prompt_cache: bool,
    /// The rank of the LoRA adapter; 0, the default, for a full-parameter model. Above 0 every save is the whole
    /// adapter.
    pub lora_rank: u32,
}

impl Default for SyncSettings {
    fn default() -> Self {
        Self {
            deployment_id: None,
            base_model: String::new(),
            hotload_timeout: Duration::from_secs(600),
            first_checkpoint_type: CheckpointType::Base,
            compression_format: "arc_v2".into(),
            warmup_after_hotload: true,
            warmup_max_retries: 10,
            warmup_interval: Duration::from_secs(10),
            poll_interval: Duration::from_secs(5),
            reset_prompt_cache: true,
            lora_rank: 0,
        }
    }
}

impl WeightSyncer {
    /// Sets where snapshots are loaded.
    #[must_use]
    pub fn with_deployment(mut self, deployment: Arc<dyn Deployment>) -> Self {
        self.deployment = Some(deployment);
        self.renewed()
    }

    /// Sets what the deployment is called in messages. Default none.
    #[must_use]
    pub fn with_deployment_id(mut self, id: impl Into<String>) -> Self {
        self.settings.deployment_id = Some(id.into());
        self
    }

    /// Sets the model that must be served. Default empty: any.
    #[must_use]
    pub fn with_base_model(mut self, model: impl Into<String>) -> Self {
        self.settings.base_model = model.into();
        self
    }

    /// Sets how long a hot-load may take, from the order until all replicas are ready. Default 600 s.
    #[must_use]
    pub fn with_hotload_timeout(mut self, timeout: Duration) -> Self {
        self.settings.hotload_timeout = timeout;
        self
    }

    /// Sets the type of the first save. Default base. `Delta` holds only if the deployment's weights can be
    /// restored; else the first save is a base and its receipt says why.
    #[must_use]
    pub fn with_first_checkpoint_type(mut self, first: CheckpointType) -> Self {
        self.settings.first_checkpoint_type = first;
        self.renewed()
    }

    /// Sets the codec of deltas: an id, or `auto` for the best one that the deployment applies. Default `arc_v2`.
    #[must_use]
    pub fn with_compression_format(mut self, format: impl Into<String>) -> Self {
        self.settings.compression_format = format.into();
        self
    }

    /// Sets whether a small request follows each successful sync. Default true.
    #[must_use]
    pub fn with_warmup_after_hotload(mut self, warm_up: bool) -> Self {
        self.settings.warmup_after_hotload = warm_up;
        self
    }

    /// Sets how often a failed warm-up is tried again. Default 10.
    #[must_use]
    pub fn with_warmup_max_retries(mut self, retries: u32) -> Self {
        self.settings.warmup_max_retries = retries;
        self
    }

    /// Sets the pause between warm-ups. Default 10 s.
    #[must_use]
    pub fn with_warmup_interval(mut self, interval: Duration) -> Self {
        self.settings.warmup_interval = interval;
        self
    }

    /// Sets how often the deployment is asked during a hot-load. Default 5 s; for a deployment in this process or
    /// on this machine about 20 ms.
    #[must_use]
    pub fn with_poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = interval;
        self
    }

    /// Sets whether cached prompts are dropped with the old weights. Default true.
    #[must_use]
    pub fn with_reset_prompt_cache(mut self, reset: bool) -> Self {
        self.settings.reset_prompt_cache = reset;
        self
    }

    /// Sets the rank of the LoRA adapter. Default 0: a full-parameter model.
    #[must_use]
    pub fn with_lora_rank(mut self, rank: u32) -> Self {
        self.settings.lora_rank = rank;
        self.renewed()
    }

    /// Settings or deployment changed while it was built: the chain starts anew.
    fn renewed(mut self) -> Self {
        self.state = Mutex::new(State::new(&self.settings, &*self.exporter));
        self
    }
}
