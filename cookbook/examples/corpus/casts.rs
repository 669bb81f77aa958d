//! The 32-bit weights of the trainer, cast to an element type and written as safetensors.
//!
//! `fp8` is what such checkpoints usually are: the matrices of the layers as e4m3 with one 32-bit scale each, stored
//! beside as `NAME_scale`, so that a weight is its element times the scale; embedding and norms as bfloat16. The scale
//! puts the largest weight of the base on 448, the largest e4m3. The next file keeps the scales of its base, and what
//! has grown beyond is cut off there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::Tensor;
use towline_cookbook::engine::WeightDtype;
use towline_core::safetensors::{Header, SafetensorsFiles, layout};
use towline_core::{DType, TensorMeta, TensorSource, position};
use towline_storage::FileSource;

use crate::Result;

/// The largest e4m3, and its code.
const LARGEST: f32 = 448.0;
const LARGEST_CODE: u8 = 0x7e;
const SCALE: &str = "_scale";

/// An element type of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cast {
    Bf16,
    F16,
    F32,
    Fp8,
}

impl Cast {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Fp8 => "fp8",
        }
    }

    /// The type that a tensor is stored in.
    fn of(self, name: &str) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
            Self::Fp8 if name.ends_with("_proj.weight") => DType::F8E4M3,
            Self::Bf16 | Self::Fp8 => DType::BF16,
        }
    }
}

impl FromStr for Cast {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let all = [Self::Bf16, Self::F16, Self::F32, Self::Fp8];
        let wanted = || format!("`{text}` is no type: wanted bf16, f16, f32 or fp8");
        all.into_iter().find(|cast| cast.name() == text).ok_or_else(wanted)
    }
}

/// The bases that are written, and the scales that they froze.
pub(crate) struct Caster {
    folder: PathBuf,
    stem: String,
    scales: BTreeMap<String, f32>,
}

/// A base, what came after it, and how many elements differ.
pub(crate) struct Pair {
    pub(crate) name: String,
    pub(crate) base: String,
    pub(crate) next: String,
    pub(crate) base_bytes: u64,
    pub(crate) bytes: u64,
    pub(crate) elements: u64,
    pub(crate) changed: u64,
}

impl Pair {
    /// The share of elements that differ, 0 to 1.
    pub(crate) fn share(&self) -> f64 {
        self.changed as f64 / self.elements.max(1) as f64
    }
}

impl Caster {
    /// Freezes the scales and writes a base of every type.
    pub(crate) fn write_bases(
        folder: &Path,
        stem: &str,
        casts: &[Cast],
        masters: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let mut scales = BTreeMap::new();
        for (name, tensor) in masters {
            scales.insert(name.clone(), scale(&values(tensor)?));
        }
        let caster = Self { folder: folder.to_owned(), stem: stem.to_owned(), scales };
        for &cast in casts {
            let path = caster.base(cast);
            caster.write(&caster.folder.join(path), cast, masters, &mut |_, _| Ok(()))?;
        }
        Ok(caster)
    }

    /// Writes the weights `steps` after the base and compares the two.
    pub(crate) fn write_next(
        &self,
        cast: Cast,
        steps: u64,
        masters: &BTreeMap<String, Tensor>,
    ) -> Result<Pair> {
        let base = self.base(cast);
        let name = format!("{}-{}-step{steps}", self.stem, cast.name());
        let next = format!("{name}.safetensors");
        let before = SafetensorsFiles::open(vec![FileSource::open(&self.folder.join(&base))?])?;
        let (mut elements, mut changed) = (0, 0);
        let bytes = self.write(&self.folder.join(&next), cast, masters, &mut |meta, data| {
            let place = position(before.tensors(), meta.name());
            let place = place.ok_or_else(|| format!("the base has no tensor {}", meta.name()))?;
            let width = meta.dtype().bits() as usize / 8;
            let old = before.read(place)?;
            let differing =
                old.chunks_exact(width).zip(data.chunks_exact(width)).filter(|(old, new)| old != new);
            changed += differing.count() as u64;
            elements += meta.elements() as u64;
            Ok(())
        })?;
        let base_bytes = std::fs::metadata(self.folder.join(&base))?.len();
        Ok(Pair { name, base, next, base_bytes, bytes, elements, changed })
    }

    fn base(&self, cast: Cast) -> String {
        format!("{}-{}-base.safetensors", self.stem, cast.name())
    }

    /// Writes one file, tensor by tensor, and shows each; the file takes its name when it is whole.
    fn write(
        &self,
        path: &Path,
        cast: Cast,
        masters: &BTreeMap<String, Tensor>,
        seen: &mut dyn FnMut(&TensorMeta, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let mut metas = Vec::new();
        for (name, tensor) in masters {
            let dtype = cast.of(name);
            metas.push(TensorMeta::new(name, dtype, tensor.dims())?);
            if dtype == DType::F8E4M3 {
                metas.push(TensorMeta::new(format!("{name}{SCALE}"), DType::F32, [1])?);
            }
        }
        let metas: Vec<TensorMeta> = layout(&metas).into_iter().map(|index| metas[index].clone()).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let part = path.with_extension("part");
        let mut file = File::create(&part)?;
        file.write_all(&Header::encode(&metas, &metadata)?)?;
        for meta in &metas {
            let data = self.data(meta, masters)?;
            file.write_all(&data)?;
            seen(meta, &data)?;
        }
        file.sync_all()?;
        std::fs::rename(&part, path)?;
        Ok(std::fs::metadata(path)?.len())
    }

    fn data(&self, meta: &TensorMeta, masters: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
        let name = meta.name();
        let scale_of =
            |name: &str| self.scales.get(name).copied().ok_or_else(|| format!("{name} has no scale"));
        let Some(tensor) = masters.get(name) else {
            return Ok(scale_of(name.strip_suffix(SCALE).unwrap_or(name))?.to_le_bytes().to_vec());
        };
        let values = values(tensor)?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(format!("tensor {name} holds {value}").into());
        }
        if meta.dtype() == DType::F8E4M3 {
            let scale = scale_of(name)?;
            return Ok(values.iter().map(|value| e4m3(value / scale)).collect());
        }
        Ok(WeightDtype::from_name(meta.dtype().as_str())?.encode(&values))
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}

/// What puts the largest of the values on the largest e4m3; 1 when all are zero.
fn scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    if largest > 0.0 { largest / LARGEST } else { 1.0 }
}

/// The nearest e4m3, ties to even; beyond the largest, the largest. No infinities, and no number stays no number.
fn e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let size = value.abs().min(LARGEST);
    // The exponent, at least that of the smallest normal number; below, elements are whole multiples of 2^-9.
    let exponent = ((size.to_bits() >> 23) as i32 - 127).max(-6);
    let eighths = (size * 2f32.powi(3 - exponent)).round_ties_even() as u8;
    // A mantissa of 8 eighths is the implied one; of 16, one more of the exponent. Both come out of the sum.
    sign | (((exponent + 6) as u8) * 8 + eighths).min(LARGEST_CODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code, from the definition of the format.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let size = if exponent == 0 {
            mantissa * 2f32.powi(-9)
        } else {
            (8.0 + mantissa) * 2f32.powi(exponent - 10)
        };
        if code & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn every_code_and_every_tie() {
        for code in 0..LARGEST_CODE {
            let (low, high) = (value(code), value(code + 1));
            assert_eq!((e4m3(low), e4m3(-low)), (code, code | 0x80), "{low}");
            let middle = f32::midpoint(low, high);
            assert_eq!(e4m3(middle), code + (code & 1), "{middle}");
            assert_eq!(e4m3(middle.next_down()), code, "{middle}");
            assert_eq!(e4m3(middle.next_up()), code + 1, "{middle}");
        }
    }

    #[test]
    fn known_values_and_saturation() {
        let known = [
            (1.0, 0x38),
            (-1.0, 0xb8),
            (448.0, 0x7e),
            (2f32.powi(-6), 0x08),
            (2f32.powi(-9), 0x01),
            (0.0, 0x00),
            (-0.0, 0x80),
            (1.0625, 0x38),
            (1.1875, 0x3a),
            (0.1, 0x1d),
            (449.0, 0x7e),
            (1e9, 0x7e),
            (-1e9, 0xfe),
            (f32::INFINITY, 0x7e),
            (1e-30, 0x00),
            (f32::NAN, 0x7f),
        ];
        for (number, code) in known {
            assert_eq!(e4m3(number), code, "{number}");
        }
    }

    #[test]
    fn a_pair_is_written_counted_and_keeps_its_scales() {
        let folder = tempfile::tempdir().unwrap();
        let masters = |last: f32| {
            let matrix = Tensor::new(&[[0.5f32, -4.48], [0.01, last]], &candle_core::Device::Cpu).unwrap();
            let norm = Tensor::new(&[1.0f32, last], &candle_core::Device::Cpu).unwrap();
            BTreeMap::from([("a.q_proj.weight".to_owned(), matrix), ("norm.weight".to_owned(), norm)])
        };
        let casts = [Cast::Bf16, Cast::Fp8];
        let caster = Caster::write_bases(folder.path(), "x", &casts, &masters(1.04)).unwrap();
        let bf16 = caster.write_next(Cast::Bf16, 1, &masters(1.05)).unwrap();
        assert_eq!((bf16.changed, bf16.elements), (2, 6));
        // 1.05 over the scale of 0.01 is the same e4m3 as 1.04, and another bfloat16; 9 is beyond the frozen scale.
        let fp8 = caster.write_next(Cast::Fp8, 1, &masters(1.05)).unwrap();
        assert_eq!((fp8.changed, fp8.elements), (1, 7));
        assert_eq!(fp8.next, "x-fp8-step1.safetensors");
        let fp8 = caster.write_next(Cast::Fp8, 2, &masters(9.0)).unwrap();
        let file =
            SafetensorsFiles::open(vec![FileSource::open(&folder.path().join(fp8.next)).unwrap()]).unwrap();
        let names: Vec<_> = file.tensors().iter().map(TensorMeta::name).collect();
        assert_eq!(names, ["a.q_proj.weight", "a.q_proj.weight_scale", "norm.weight"]);
        assert_eq!(file.read(0).unwrap()[1..], [0xfe, e4m3(1.0), 0x7e]);
        assert_eq!(file.read(1).unwrap().as_ref(), 0.01f32.to_le_bytes());
        assert_eq!(file.tensors()[2].dtype(), DType::BF16);
    }
}
