//! `memory`: how much memory a codec takes beyond the checkpoints, on a made-up model of several GiB of which half is one
//! tensor.

use std::ffi::OsString;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use serde_json::{Value, json};
use towline_core::{DType, Error, Result, TensorMeta, Weights};

use crate::args::Args;
use crate::system::{Memory, again};
use crate::{ours, work};

/// The tensors beside the large one.
const SMALL: usize = 64 << 20;
/// Made from one seed.
const CHUNK: usize = 1 << 20;
/// How much of the model changes.
const CHANGED: f64 = 0.01;

pub(crate) fn command(mut args: Args) -> Result<Value> {
    let codec = args.value("--codec")?.unwrap_or_else(|| "octave".to_owned());
    let (threads, gib) = (args.threads()?, args.number("--gib", 4.0f64)?);
    let scratch = args.path("--scratch")?.unwrap_or_else(std::env::temp_dir);
    args.finish()?;
    towline_codec::by_id(&codec)?;
    let encoded = scratch.join(format!("towline-peers-{}.encoded", std::process::id()));
    let mut rows = Vec::new();
    for threads in threads {
        for command in ["memory-encode", "memory-decode"] {
            let mut arguments: Vec<OsString> = vec![command.into(), "--codec".into(), (&codec).into()];
            arguments.extend(["--encoded".into(), (&encoded).into()]);
            for (name, value) in [("--threads", threads.to_string()), ("--gib", gib.to_string())] {
                arguments.extend([name.into(), value.into()]);
            }
            let row = again(&arguments);
            if row.is_err() || command == "memory-decode" {
                // Where a process failed there may be no file.
                let _gone = std::fs::remove_file(&encoded);
            }
            rows.push(row?);
        }
    }
    Ok(json!({"codec": codec, "gib": gib, "rows": rows}))
}

/// What both processes are told.
struct Order {
    codec: std::sync::Arc<dyn towline_core::Codec>,
    threads: usize,
    encoded: PathBuf,
    model: Model,
}

impl Order {
    fn take(mut args: Args) -> Result<Self> {
        let codec = towline_codec::by_id(&args.wanted("--codec")?)?;
        let (threads, gib) = (args.number("--threads", 1usize)?, args.number("--gib", 4.0f64)?);
        let encoded = PathBuf::from(args.wanted("--encoded")?);
        args.finish()?;
        Ok(Self { codec, threads, encoded, model: Model::new(gib)? })
    }

    fn row(&self, direction: &str, seconds: f64, extra_mib: Option<f64>, encoded_bytes: u64) -> Value {
        let raw_bytes: u64 = self.model.metas.iter().map(|meta| meta.byte_len() as u64).sum();
        json!({
            "direction": direction,
            "threads": self.threads,
            "gbps": raw_bytes as f64 / 1e9 / seconds,
            "extra_mib": extra_mib,
            "extra_mib_per_thread": extra_mib.map(|mib| mib / self.threads.max(1) as f64),
            "encoded_bytes": encoded_bytes,
            "raw_bytes": raw_bytes,
        })
    }

    fn unwritten(&self, error: std::io::Error) -> Error {
        Error::unavailable(format!("`{}` could not be written or read", self.encoded.display()))
            .with_source(error)
    }
}

/// `memory-encode`: both checkpoints in memory, one file out.
pub(crate) fn encode(args: Args) -> Result<Value> {
    let order = Order::take(args)?;
    let (parent, current) = (order.model.weights(false)?, order.model.weights(true)?);
    let file = std::fs::File::create(&order.encoded).map_err(|error| order.unwritten(error))?;
    let mut out = BufWriter::new(file);
    let memory = Memory::start();
    memory.reset();
    let started = Instant::now();
    let summary = ours::encode_all(&mut out, order.codec.as_ref(), &current, Some(&parent), order.threads)?;
    out.flush().map_err(|error| order.unwritten(error))?;
    let seconds = started.elapsed().as_secs_f64();
    let mut row = order.row("encode", seconds, memory.peak_mib(), summary.bytes);
    row["changed"] = json!(summary.changed as f64 / summary.elements.max(1) as f64);
    Ok(row)
}

/// `memory-decode`: the parent in memory, changed in place.
pub(crate) fn decode(args: Args) -> Result<Value> {
    let order = Order::take(args)?;
    let metas = &order.model.metas;
    let mut targets =
        (0..metas.len()).map(|index| order.model.tensor(index, false)).collect::<Result<Vec<_>>>()?;
    let encoded = Bytes::from(std::fs::read(&order.encoded).map_err(|error| order.unwritten(error))?);
    let bytes = encoded.len() as u64;
    let memory = Memory::start();
    memory.reset();
    let started = Instant::now();
    ours::decode_all(&encoded, order.codec.as_ref(), metas, &mut targets, order.threads)?;
    let seconds = started.elapsed().as_secs_f64();
    let row = order.row("decode", seconds, memory.peak_mib(), bytes);
    for (index, target) in targets.iter().enumerate() {
        if *target != order.model.tensor(index, true)? {
            return Err(Error::corrupt("the decoded tensors are not those that were encoded"));
        }
    }
    Ok(row)
}

/// A made-up bf16 model: Gaussian weights, and a step after which each weight has moved by one unit in the last place
/// with a chance that halves with each octave of its size, as in real training.
struct Model {
    metas: Vec<TensorMeta>,
    /// Weights to draw from, and the chance of each to change, in 1/65536.
    values: Vec<(u16, u16)>,
}

impl Model {
    fn new(gib: f64) -> Result<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "a size in bytes, checked below")]
        let total = (gib * f64::from(1 << 30)) as usize;
        if !(4 * CHUNK..1 << 40).contains(&total) {
            return Err(Error::invalid(format!("`--gib` wants 0.004 to 1024, found {gib}")));
        }
        let small = SMALL.min(total / 8) / CHUNK * CHUNK;
        let small = small.max(CHUNK);
        let mut metas = vec![TensorMeta::new("model.embed_tokens.weight", DType::BF16, [total / 2 / 2])?];
        for index in 0..total / 2 / small {
            let name = format!("model.layers.{index:03}.mlp.weight");
            metas.push(TensorMeta::new(name, DType::BF16, [small / 2])?);
        }
        let mut state = 1;
        let drawn: Vec<u16> = (0..1 << 16).map(|_| bf16(0.02 * gaussian(&mut state))).collect();
        let weight = |bits: u16| 2f64.powi(127 - i32::from(bits >> 7 & 0xff));
        let chance = |scale: f64, bits: u16| (scale * weight(bits)).min(0.5);
        // The scale at which the mean chance is what is wanted, by bisection.
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let mean = drawn.iter().map(|&bits| chance(middle, bits)).sum::<f64>() / drawn.len() as f64;
            (low, high) = if mean < CHANGED { (middle, high) } else { (low, middle) };
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most a half of 65536")]
        let values =
            drawn.into_iter().map(|bits| (bits, (65_536.0 * chance(high, bits)).round() as u16)).collect();
        Ok(Self { metas, values })
    }

    fn weights(&self, next: bool) -> Result<Weights> {
        let tensors = self.metas.iter().enumerate();
        let tensors = tensors.map(|(index, meta)| Ok((meta.clone(), self.tensor(index, next)?.into())));
        Weights::new(tensors.collect::<Result<Vec<_>>>()?)
    }

    /// One tensor, before or after the step.
    fn tensor(&self, index: usize, next: bool) -> Result<Vec<u8>> {
        let length = self.metas.get(index).map_or(0, TensorMeta::byte_len);
        let mut data = vec![0; length];
        let chunks: Vec<_> = data.chunks_mut(CHUNK).map(std::sync::Mutex::new).collect();
        work::run(
            2,
            chunks.len(),
            || (),
            |(), number| {
                if let Some(chunk) = chunks.get(number) {
                    self.fill(
                        &mut chunk.lock().map_err(work::poisoned)?,
                        (index << 32 | number) as u64,
                        next,
                    );
                }
                Ok(())
            },
        )?;
        drop(chunks);
        Ok(data)
    }

    /// Four elements from each draw; whether they change is drawn from another stream.
    fn fill(&self, chunk: &mut [u8], seed: u64, next: bool) {
        let (mut weights, mut changes) = (seed << 1, seed << 1 | 1);
        for group in chunk.chunks_mut(8) {
            let mut draw = random(&mut weights);
            let mut change = if next { random(&mut changes) } else { 0 };
            let signs = change.rotate_left(13).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
            for (place, element) in group.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let (value, chance) = self.values.get((draw & 0xffff) as usize).copied().unwrap_or_default();
                let changes = next && change & 0xffff < u64::from(chance);
                let step = if signs >> place & 1 == 0 { 1 } else { u16::MAX };
                *element = value.wrapping_add(if changes { step } else { 0 }).to_le_bytes();
                draw >>= 16;
                change >>= 16;
            }
        }
    }
}

/// SplitMix64.
pub(crate) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Nearly Gaussian, with deviation 1: the sum of 12 uniform numbers.
fn gaussian(state: &mut u64) -> f64 {
    (0..12).map(|_| (random(state) >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0
}

fn bf16(value: f64) -> u16 {
    half::bf16::from_f64(value).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_as_it_is_described() {
        let model = Model::new(0.03125).unwrap();
        assert_eq!(model.metas[0].byte_len(), 16 << 20);
        assert_eq!(model.metas.iter().map(TensorMeta::byte_len).sum::<usize>(), 32 << 20);
        let (old, new) = (model.weights(false).unwrap(), model.weights(true).unwrap());
        assert_eq!(old, model.weights(false).unwrap());
        let floor = crate::floor::of_pair(&old, &new).unwrap();
        let share = floor.changed as f64 / floor.elements as f64;
        assert!((0.009..0.011).contains(&share), "{share}");
        // Two tensors are not the same numbers, and every step is one unit.
        assert_ne!(old.iter().next().unwrap().1[..64], old.iter().nth(1).unwrap().1[..64]);
        for ((_, old), (_, new)) in old.iter().zip(new.iter()) {
            let bits =
                |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect::<Vec<_>>();
            let steps: Vec<u16> =
                bits(new).iter().zip(bits(old)).map(|(new, old)| new.wrapping_sub(old)).collect();
            let ups = steps.iter().filter(|step| **step == 1).count();
            let downs = steps.iter().filter(|step| **step == u16::MAX).count();
            assert_eq!(ups + downs + steps.iter().filter(|step| **step == 0).count(), steps.len());
            assert!(ups.abs_diff(downs) * 10 < ups + downs, "{ups} up, {downs} down");
        }
        assert!(Model::new(0.0).is_err());
    }
}
