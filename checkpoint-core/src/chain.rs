//! The delta chain as a pure state machine.
//!
//! One rule: **a delta is allowed only against the snapshot that the deployment last confirmed, named by content
//! digest; everything else becomes a base.** So a deployment never has to apply a delta to anything but its parent,
//! whatever failed, timed out or was repeated before.

use std::fmt;

use crate::{
    CheckpointType, ContentDigest, DeltaParents, Error, Result, SnapshotId, SnapshotIdentity, SnapshotKind,
    SnapshotRef,
};

/// What is known of the deployment, and what may be saved next.
///
/// ```text
///            attach: same weights, or first type delta
///   Unknown ───────────────────────────────────────────► Confirmed(S)
///     ▲  ▲                                                 │      ▲
///     │  └── reset, attach to something foreign ───────────┤      │ confirmed(T)
///     │                                                    ▼      │
///     └──── failed, timed out, ordered something else ── Ordered(T)
/// ```
#[derive(Debug, Clone)]
pub struct Chain {
    settings: ChainSettings,
    state: State,
    last_export: Option<SnapshotId>,
    /// Deltas saved since the last full snapshot.
    deltas: u32,
    /// Their bytes together, and those of a full snapshot.
    delta_bytes: u64,
    full_bytes: u64,
}

/// What a chain is made with.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ChainSettings {
    /// The type of the first save when nobody asks for one. Default base.
    pub first: CheckpointType,
    /// Whether the model is a LoRA: every save is then the whole adapter. Default false.
    pub lora: bool,
    /// What the exporter can diff against. Default any.
    pub parents: DeltaParents,
    /// After how many deltas in a row a base is saved unless a delta is asked for, so that what a restore has to
    /// read stays bounded. Default 128.
    pub max_deltas: u32,
    /// A base is saved, unless a delta is asked for, when the deltas since the last one have together this many times
    /// the bytes of a plain base: a restore then reads at most so much more. Default 4.
    pub max_delta_share: f64,
}

impl Default for ChainSettings {
    fn default() -> Self {
        Self {
            first: CheckpointType::Base,
            lora: false,
            parents: DeltaParents::Any,
            max_deltas: 128,
            max_delta_share: 4.0,
        }
    }
}

impl ChainSettings {
    /// Sets the type of the first save.
    #[must_use]
    pub fn with_first(mut self, first: CheckpointType) -> Self {
        self.first = first;
        self
    }

    /// Sets whether the model is a LoRA.
    #[must_use]
    pub fn with_lora(mut self, lora: bool) -> Self {
        self.lora = lora;
        self
    }

    /// Sets what the exporter can diff against.
    #[must_use]
    pub fn with_parents(mut self, parents: DeltaParents) -> Self {
        self.parents = parents;
        self
    }

    /// Sets after how many deltas in a row a base is saved.
    #[must_use]
    pub fn with_max_deltas(mut self, max_deltas: u32) -> Self {
        self.max_deltas = max_deltas;
        self
    }

    /// Sets how many times the bytes of a base the deltas since it may have.
    #[must_use]
    pub fn with_max_delta_share(mut self, share: f64) -> Self {
        self.max_delta_share = share;
        self
    }
}

#[derive(Debug, Clone)]
enum State {
    Unknown(Reason),
    Ordered(SnapshotId),
    Confirmed(SnapshotId),
}

/// What to save, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavePlan {
    /// The kind of snapshot.
    pub kind: SnapshotKind,
    /// For a delta: what to diff against.
    pub parent: Option<SnapshotId>,
    /// Why this kind.
    pub reason: Reason,
}

/// Why a save has its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The caller asked for this type.
    Requested,
    /// The deployment confirmed the parent.
    Confirmed,
    /// A LoRA save is always the whole adapter.
    Adapter,
    /// Nothing has been confirmed yet.
    First,
    /// A hot-load was ordered and has not been confirmed.
    InDoubt(SnapshotIdentity),
    /// A hot-load failed or timed out.
    Failed(SnapshotIdentity),
    /// The chain was reset.
    Reset,
    /// The deployment serves something that this trainer cannot diff against.
    Foreign(Option<SnapshotIdentity>),
    /// The trainer can only diff against its last save, which is not what the deployment serves.
    LastExport,
    /// There are this many deltas since the last full snapshot.
    Length(u32),
    /// The deltas since the last full snapshot have this many bytes together.
    Bytes(u64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => write!(f, "requested"),
            Self::Confirmed => write!(f, "the deployment confirmed the parent"),
            Self::Adapter => write!(f, "a LoRA save is the whole adapter"),
            Self::First => write!(f, "the deployment has confirmed nothing yet"),
            Self::InDoubt(identity) => write!(f, "the hot-load of {identity} is not confirmed"),
            Self::Failed(identity) => write!(f, "the hot-load of {identity} failed"),
            Self::Reset => write!(f, "the chain was reset"),
            Self::Foreign(Some(identity)) => {
                write!(f, "the deployment serves {identity}, which cannot be diffed against")
            }
            Self::Foreign(None) => write!(f, "the deployment serves nothing"),
            Self::Length(deltas) => write!(f, "there are {deltas} deltas since the last base"),
            Self::Bytes(bytes) => write!(f, "the deltas since the last base have {bytes} bytes"),
            Self::LastExport => {
                write!(f, "the trainer diffs only against its last save, which is not served")
            }
        }
    }
}

/// How a hot-load must be ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "order it, or it is there")]
pub enum LoadPlan {
    /// Order it; a delta only onto this.
    Order {
        /// What must be served, for a delta.
        previous: Option<SnapshotId>,
    },
    /// The deployment confirmed this very snapshot: nothing to do.
    AlreadyServed,
}

impl Chain {
    /// A chain that knows nothing of the deployment.
    #[must_use]
    pub fn new(settings: ChainSettings) -> Self {
        Self {
            settings,
            state: State::Unknown(Reason::First),
            last_export: None,
            deltas: 0,
            delta_bytes: 0,
            full_bytes: 0,
        }
    }

    /// Chooses what to save. `None` asks for a delta where one is allowed, else a base.
    ///
    /// # Errors
    /// `ChainMismatch` if a delta was asked for and is not allowed; `Invalid` for a merged base of a model that is
    /// no LoRA.
    pub fn plan_save(&self, requested: Option<CheckpointType>) -> Result<SavePlan> {
        let full = |reason| Ok(SavePlan { kind: SnapshotKind::Base, parent: None, reason });
        match (requested, self.settings.lora) {
            (Some(CheckpointType::MergedBase), true) => {
                Ok(SavePlan { kind: SnapshotKind::MergedBase, parent: None, reason: Reason::Requested })
            }
            (Some(CheckpointType::MergedBase), false) => {
                Err(Error::invalid("a merged base was asked for, but the model has no LoRA adapter")
                    .with_help("ask for a base"))
            }
            (_, true) => Ok(SavePlan { kind: SnapshotKind::Adapter, parent: None, reason: Reason::Adapter }),
            (Some(CheckpointType::Base), false) => full(Reason::Requested),
            (None, false) if self.delta_parent().is_ok() && self.deltas >= self.settings.max_deltas => {
                full(Reason::Length(self.deltas))
            }
            (None, false) if self.delta_parent().is_ok() && self.deltas_are_large() => {
                full(Reason::Bytes(self.delta_bytes))
            }
            (requested, false) => match (self.delta_parent(), requested) {
                (Ok(parent), requested) => Ok(SavePlan {
                    kind: SnapshotKind::Delta,
                    parent: Some(parent.clone()),
                    reason: if requested.is_some() { Reason::Requested } else { Reason::Confirmed },
                }),
                (Err(reason), None) => full(reason),
                (Err(reason), Some(_)) => {
                    Err(Error::chain_mismatch(format!("a delta was asked for, but {reason}"))
                        .with_help("save a base, or let the type be chosen"))
                }
            },
        }
    }

    /// Records that `snapshot` was saved.
    pub fn saved(&mut self, snapshot: &SnapshotRef) {
        self.last_export = Some(snapshot.id.clone());
        self.full_bytes = snapshot.full_bytes;
        (self.deltas, self.delta_bytes) = match snapshot.kind {
            SnapshotKind::Delta => {
                (self.deltas.saturating_add(1), self.delta_bytes.saturating_add(snapshot.stored_bytes))
            }
            SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter | SnapshotKind::State => {
                (0, 0)
            }
        };
    }

    fn deltas_are_large(&self) -> bool {
        self.full_bytes > 0
            && self.delta_bytes as f64 > self.settings.max_delta_share * self.full_bytes as f64
    }

    /// Records that a save failed: what a trainer of [`DeltaParents::LastExported`] would diff against is unknown.
    pub fn save_failed(&mut self) {
        self.last_export = None;
    }

    /// Checks that `snapshot` may be loaded now. Call [`Chain::ordered`] just before the order goes out.
    ///
    /// # Errors
    /// `ChainMismatch` for a delta whose parent is not what the deployment confirmed; `Invalid` for a train state.
    pub fn plan_load(&self, snapshot: &SnapshotRef) -> Result<LoadPlan> {
        match (snapshot.kind, &self.state) {
            (SnapshotKind::State, _) => {
                Err(Error::invalid(format!("{} is a train state, which cannot be served", snapshot.id))
                    .with_help("save a sampler checkpoint"))
            }
            (SnapshotKind::Base | SnapshotKind::MergedBase | SnapshotKind::Adapter, _) => {
                Ok(LoadPlan::Order { previous: None })
            }
            (SnapshotKind::Delta, State::Confirmed(served)) if *served == snapshot.id => {
                Ok(LoadPlan::AlreadyServed)
            }
            (SnapshotKind::Delta, State::Confirmed(served))
                if snapshot.parent.as_ref().is_some_and(|parent| parent.digest == served.digest) =>
            {
                Ok(LoadPlan::Order { previous: Some(served.clone()) })
            }
            (SnapshotKind::Delta, state) => {
                let parent = match &snapshot.parent {
                    Some(parent) => parent.to_string(),
                    None => "nothing".into(),
                };
                let found = match state {
                    State::Confirmed(served) => format!("the deployment serves {served}"),
                    State::Ordered(target) => Reason::InDoubt(target.identity.clone()).to_string(),
                    State::Unknown(reason) => reason.to_string(),
                };
                Err(Error::chain_mismatch(format!("{} is a delta on {parent}, but {found}", snapshot.id))
                    .with_help("save a base and hot-load that"))
            }
        }
    }

    /// Records that an order for `snapshot` is about to go out: from now on what is served is in doubt.
    pub fn ordered(&mut self, snapshot: &SnapshotId) {
        self.state = State::Ordered(snapshot.clone());
    }

    /// Records that every replica serves `snapshot`. A late word about anything but the last order is ignored,
    /// and the answer tells whether it counted. Pass on only what was seen after the order went out: of a snapshot
    /// that is ordered for the second time, an older sight is no proof.
    pub fn confirmed(&mut self, snapshot: &SnapshotId) -> bool {
        let ours = matches!(&self.state, State::Ordered(target) if target == snapshot);
        if ours {
            self.state = State::Confirmed(snapshot.clone());
        }
        ours
    }

    /// Records that the last order failed, timed out or was answered by something not understood. The deployment
    /// may serve the old weights or the new ones: the next save is a base.
    pub fn failed(&mut self, snapshot: &SnapshotId) {
        self.state = State::Unknown(Reason::Failed(snapshot.identity.clone()));
    }

    /// Forgets everything: the next save is a base.
    pub fn reset(&mut self) {
        self.state = State::Unknown(Reason::Reset);
        self.last_export = None;
    }

    /// Takes up a deployment that serves `found`. The chain goes on only if those are the weights that the trainer
    /// restored (`restored`), or if the first save may be a delta and the exporter can diff against them (`held`).
    /// A deployment that cannot tell a digest counts as foreign.
    pub fn attach(
        &mut self,
        found: Option<(SnapshotIdentity, Option<ContentDigest>)>,
        restored: Option<&ContentDigest>,
        held: bool,
    ) {
        self.state = match found {
            Some((identity, Some(digest)))
                if restored == Some(&digest) || (held && self.settings.first == CheckpointType::Delta) =>
            {
                State::Confirmed(SnapshotId { identity, digest })
            }
            Some((identity, _)) => State::Unknown(Reason::Foreign(Some(identity))),
            None => State::Unknown(Reason::Foreign(None)),
        };
    }

    /// What the deployment last confirmed, if nothing has happened since.
    #[must_use]
    pub fn confirmed_snapshot(&self) -> Option<&SnapshotId> {
        match &self.state {
            State::Confirmed(snapshot) => Some(snapshot),
            State::Unknown(_) | State::Ordered(_) => None,
        }
    }

    fn delta_parent(&self) -> Result<&SnapshotId, Reason> {
        match &self.state {
            State::Unknown(reason) => Err(reason.clone()),
            State::Ordered(target) => Err(Reason::InDoubt(target.identity.clone())),
            State::Confirmed(served) => match self.settings.parents {
                DeltaParents::LastExported if self.last_export.as_ref() != Some(served) => {
                    Err(Reason::LastExport)
                }
                DeltaParents::LastExported | DeltaParents::Any => Ok(served),
            },
        }
    }
}
