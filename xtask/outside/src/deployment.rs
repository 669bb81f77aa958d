//! One process that serves weights out of a shared catalogue.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use towline_core::bytes::Bytes;
use towline_core::{
    Capabilities, Codec, Deployment, DeploymentStatus, Error, HotLoad, Mode, OpId, ReplicaStatus, Result,
    SnapshotId, SnapshotIdentity, Weights, async_trait, pipeline,
};

use crate::codec::Changes;

/// What was published: whole weights, or the frames of each tensor.
#[derive(Debug, Clone)]
pub enum Published {
    Base(Weights),
    Delta(Vec<Vec<Bytes>>),
}

/// Loads what was published in its catalogue, and serves it.
#[derive(Debug, Default)]
pub struct Server {
    pub catalogue: Arc<Mutex<HashMap<SnapshotIdentity, Published>>>,
    pub serving: Mutex<Option<(SnapshotId, Weights)>>,
    done: Mutex<HashSet<OpId>>,
}

#[async_trait]
impl Deployment for Server {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(vec![Changes.id()])
    }

    async fn status(&self) -> Result<DeploymentStatus> {
        let mut replica = ReplicaStatus::new("server");
        replica.ready = true;
        if let Some((id, _)) = &*self.serving.lock().unwrap() {
            (replica.identity, replica.digest) = (Some(id.identity.clone()), Some(id.digest));
        }
        Ok(DeploymentStatus::new(vec![replica]))
    }

    async fn hot_load(&self, order: &HotLoad) -> Result<()> {
        self.capabilities().check(&order.snapshot)?;
        let (id, mut serving) = (&order.snapshot.id, self.serving.lock().unwrap());
        if !self.done.lock().unwrap().insert(order.op.clone()) {
            return Ok(());
        }
        let published = self.catalogue.lock().unwrap().get(&id.identity).cloned();
        let weights = match (published, &*serving) {
            (None, _) => return Err(Error::not_found(format!("{id} was never published"))),
            (Some(Published::Base(weights)), _) => weights,
            (Some(Published::Delta(frames)), Some((old, weights)))
                if order.previous.as_ref() == Some(old) =>
            {
                let tensors = weights.iter().zip(&frames).map(|((meta, data), frames)| {
                    let (mut data, one) = (data.to_vec(), NonZeroUsize::MIN);
                    pipeline::decode(&Changes, meta, Mode::Delta, frames, Changes.unit(), &mut data, one)?;
                    Ok((meta.clone(), Bytes::from(data)))
                });
                Weights::new(tensors.collect::<Result<Vec<_>>>()?)?
            }
            (Some(_), _) => return Err(Error::chain_mismatch(format!("{id} is a delta on something else"))),
        };
        if weights.content_digest() != id.digest {
            return Err(Error::corrupt(format!("{id} is damaged")));
        }
        *serving = Some((id.clone(), weights));
        Ok(())
    }

    async fn warm_up(&self) -> Result<()> {
        Ok(())
    }
}
