//! Your own codec: run-length coding of what changed, from the trainer through the store to the server's bytes.
//!
//! cargo run -p towline-cookbook --example own_codec

use std::num::NonZeroUsize;
use std::sync::Arc;

use towline_core::{
    Codec, CodecId, Error, JobId, Mode, Modes, Result, SessionId, SnapshotKind, SnapshotName, TensorMeta,
    Unit, UnitMeta, Weights,
};
use towline_storage::{Publish, SnapshotRepo, Wanted};

/// `(bytes that are equal: u32, bytes that follow: u32, those bytes)` until the unit is full.
#[derive(Debug)]
struct Runs;

impl Codec for Runs {
    fn id(&self) -> CodecId {
        CodecId::of("runs")
    }

    fn unit(&self) -> Unit {
        Unit::Block(NonZeroUsize::MIN.saturating_add((24 << 15) - 1))
    }

    fn modes(&self) -> Modes {
        Modes::Delta
    }

    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let parent = unit.parent(parent)?;
        let mut at = 0;
        while at < current.len() {
            let equal = current[at..].iter().zip(&parent[at..]).take_while(|(new, old)| new == old).count();
            let start = at + equal;
            let other =
                current[start..].iter().zip(&parent[start..]).take_while(|(new, old)| new != old).count();
            for number in [equal, other] {
                out.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
            }
            out.extend_from_slice(&current[start..start + other]);
            at = start + other;
        }
        Ok(())
    }

    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        let bad = || Error::corrupt("the runs do not fill the unit");
        let (mut rest, mut at) = (encoded, 0usize);
        while at < target.len() {
            let (head, behind) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
            let [a, b, c, d, e, f, g, h] = *head;
            let (equal, other) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            let (bytes, behind) = behind.split_at_checked(other as usize).ok_or_else(bad)?;
            let start = at.checked_add(equal as usize).ok_or_else(bad)?;
            target.get_mut(start..start + bytes.len()).ok_or_else(bad)?.copy_from_slice(bytes);
            (rest, at) = (behind, start + bytes.len());
        }
        if rest.is_empty() && at == target.len() { Ok(()) } else { Err(bad()) }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let codec: Arc<dyn Codec> = Arc::new(Runs);
    let store = Arc::new(towline_storage::Memory::new());
    let repo = SnapshotRepo::new(store, JobId::new("own-codec")?, vec![Arc::clone(&codec)]);
    let writer = repo.writer(SessionId::new("00c0dec0")?).await?;

    let weights = |step: u8| -> Result<Arc<Weights>> {
        let data: Vec<u8> = (0..100_000u32).map(|at| if at % 97 == 0 { step } else { at as u8 }).collect();
        Ok(Arc::new(Weights::new([(TensorMeta::new("w", "BF16".parse()?, [50_000])?, data.into())])?))
    };
    let (old, new) = (weights(1)?, weights(2)?);
    writer
        .publish(Publish::new(SnapshotName::new("base")?, SnapshotKind::Base, Arc::clone(&old) as _))
        .await?;
    let base = repo.find("base", Wanted::Sampler).await?;
    let delta = Publish::new(SnapshotName::new("delta")?, SnapshotKind::Delta, Arc::clone(&new) as _);
    let saved = writer.publish(delta.with_parent(base, old).with_codec(codec)).await?;
    println!("a delta of {} bytes for {} bytes of weights", saved.stored_bytes, saved.full_bytes);

    let restored = repo.restore(&repo.find("delta", Wanted::Sampler).await?).await?;
    assert_eq!(restored.content_digest(), new.content_digest());
    println!("restored bit for bit; now prove it with `towline_core::codec_conformance!(runs, Runs);`");
    Ok(())
}
