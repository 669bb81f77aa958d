//! Weights and a codec for the tests.
#![allow(unreachable_pub, reason = "a module of a test has no crate to be seen from")]
#![allow(dead_code, reason = "each test takes what it needs")]

pub mod clocked;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use towline_core::testing::XorCodec;
use towline_core::{
    Codec, CodecId, DType, Error, Framing, JobId, Mode, Modes, ObjectKey, Result, SessionId, SnapshotName,
    SnapshotStore, TensorMeta, Unit, UnitMeta, Weights,
};
use towline_storage::{SnapshotInfo, SnapshotRepo, Wanted};

/// Weights that depend on nothing but `text`: several types, sizes below and above a block of [`XorCodec`], an
/// empty tensor. A third of them is the same for every text.
pub fn weights(text: &str) -> Weights {
    // Tests ask for the same ones again and again.
    static MADE: Mutex<BTreeMap<String, Weights>> = Mutex::new(BTreeMap::new());
    MADE.lock().unwrap().entry(text.to_owned()).or_insert_with(|| make_weights(text)).clone()
}

fn make_weights(text: &str) -> Weights {
    let shapes: [(&str, DType, &[usize]); 9] = [
        ("embed", DType::BF16, &[70, 32]),
        ("empty", DType::F32, &[0, 4]),
        ("layer.0.attn", DType::BF16, &[32, 32]),
        ("layer.0.mlp", DType::F32, &[40, 32]),
        ("layer.1.attn", DType::BF16, &[32, 32]),
        ("layer.1.mlp", DType::F32, &[40, 32]),
        ("norm", DType::F16, &[32]),
        ("packed", DType::F4, &[32, 4]),
        ("scale", DType::F64, &[]),
    ];
    Weights::new(shapes.into_iter().enumerate().map(|(index, (name, dtype, shape))| {
        let meta = TensorMeta::new(name, dtype, shape).unwrap();
        let seed = if index % 3 == 0 { "same" } else { text };
        let data = noise(&format!("{name} {seed}"), meta.byte_len());
        (meta, data)
    }))
    .unwrap()
}

pub fn noise(seed: &str, length: usize) -> Bytes {
    let mut state = seed.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3).rotate_left(7)
    });
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

pub fn shared(text: &str) -> Arc<Weights> {
    Arc::new(weights(text))
}

pub fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

pub fn session(number: u8) -> SessionId {
    SessionId::from_random([0, 0, 0, number])
}

pub fn key(text: &str) -> ObjectKey {
    ObjectKey::new(text).unwrap()
}

/// Files of at most 6000 plain bytes, so that there are several, and pauses that end soon.
pub fn repo(store: Arc<dyn SnapshotStore>) -> SnapshotRepo {
    let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(XorCodec), Arc::new(MaskCodec)];
    SnapshotRepo::new(store, JobId::new("job").unwrap(), codecs)
        .with_shard_bytes(6000)
        .with_deadline(Duration::from_secs(20))
}

pub async fn find(repo: &SnapshotRepo, name: &str) -> SnapshotInfo {
    repo.find(name, Wanted::Any).await.unwrap()
}

/// XOR in the safetensors form: whole tensors, deltas only, with a checksum, as the public formats.
#[derive(Debug)]
pub struct MaskCodec;

impl Codec for MaskCodec {
    fn id(&self) -> CodecId {
        CodecId::of("test-mask")
    }
    fn unit(&self) -> Unit {
        Unit::Whole
    }
    fn modes(&self) -> Modes {
        Modes::Delta
    }
    fn framing(&self) -> Framing {
        Framing::Safetensors
    }
    fn encode(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let parent = unit.parent(parent)?;
        out.push(b'M');
        out.extend(current.iter().zip(parent).map(|(new, old)| new ^ old));
        Ok(())
    }
    fn decode(&self, unit: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        unit.check_mode(mode, self.modes())?;
        match encoded {
            [b'M', mask @ ..] if mask.len() == target.len() => {
                target.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
                Ok(())
            }
            _ => Err(Error::corrupt(format!("wanted {} bytes behind an M", target.len()))),
        }
    }
    fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> {
        Some(
            more.iter()
                .fold(before.unwrap_or(1), |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte))),
        )
    }
}
