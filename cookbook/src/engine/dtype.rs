//! Element types of published weights, and the border between tensors and bytes.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::config::ModelConfig;
use super::error::{EngineError, Result};
use super::model::{expected_tensors, name_some};

/// An element type that weights are published in. The engine computes in 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision: exact.
    F32,
}

impl WeightDtype {
    /// Reads the name that safetensors uses: `BF16`, `F16` or `F32`.
    ///
    /// # Errors
    /// When it is another name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "BF16" => Ok(Self::Bf16),
            "F16" => Ok(Self::F16),
            "F32" => Ok(Self::F32),
            _ => Err(EngineError::new(format!("dtype is {name:?}, wanted BF16, F16 or F32"))),
        }
    }

    /// The name that safetensors uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// Reads the name that `config.json` uses: `bfloat16`, `float16` or `float32`.
    ///
    /// # Errors
    /// When it is another name.
    pub fn from_hf(name: &str) -> Result<Self> {
        match name {
            "bfloat16" => Ok(Self::Bf16),
            "float16" => Ok(Self::F16),
            "float32" => Ok(Self::F32),
            _ => {
                Err(EngineError::new(format!("torch_dtype is {name:?}, wanted bfloat16, float16 or float32")))
            }
        }
    }

    /// The name that `config.json` uses.
    #[must_use]
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The little-endian bytes of the values, each rounded to the nearest (ties to even).
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * self.size());
        match self {
            Self::Bf16 => {
                for &value in values {
                    bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
            }
            Self::F16 => {
                for &value in values {
                    bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes());
                }
            }
            Self::F32 => {
                for &value in values {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// The values of little-endian bytes; exact. Bytes beyond the last whole element are ignored:
    /// callers check the length first.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::Bf16 => {
                let (elements, _) = bytes.as_chunks::<2>();
                elements.iter().map(|&raw| bf16::from_le_bytes(raw).to_f32()).collect()
            }
            Self::F16 => {
                let (elements, _) = bytes.as_chunks::<2>();
                elements.iter().map(|&raw| f16::from_le_bytes(raw).to_f32()).collect()
            }
            Self::F32 => {
                let (elements, _) = bytes.as_chunks::<4>();
                elements.iter().map(|&raw| f32::from_le_bytes(raw)).collect()
            }
        }
    }
}

/// A tensor that was exported: its name, its shape, its little-endian bytes. The element type is
/// the one that was asked for.
pub type NamedBytes = (String, Vec<usize>, Vec<u8>);

/// One named tensor as bytes, borrowed from wherever it was read.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct TensorBytes<'a> {
    /// Its Hugging Face name.
    pub name: &'a str,
    /// Its element type as safetensors spells it; `BF16`, `F16` and `F32` are read.
    pub dtype: &'a str,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its elements, little-endian, row by row.
    pub bytes: &'a [u8],
}

impl<'a> TensorBytes<'a> {
    /// A view of these bytes.
    #[must_use]
    pub fn new(name: &'a str, dtype: &'a str, shape: &'a [usize], bytes: &'a [u8]) -> Self {
        Self { name, dtype, shape, bytes }
    }

    /// A view of one entry of an export in `dtype`.
    #[must_use]
    pub fn of(entry: &'a NamedBytes, dtype: WeightDtype) -> Self {
        Self::new(&entry.0, dtype.name(), &entry.1, &entry.2)
    }
}

/// Builds the 32-bit parameters of a model from published bytes. All or nothing.
///
/// # Errors
/// When a tensor is missing, unexpected, given twice, of the wrong shape, of an element type that
/// is not read, or of the wrong length; the tensor is named.
pub fn params_from_bytes<'a>(
    config: &ModelConfig,
    tensors: impl IntoIterator<Item = TensorBytes<'a>>,
) -> Result<BTreeMap<String, Tensor>> {
    config.validate()?;
    let wanted = expected_tensors(config);
    tensors_from_bytes(&wanted, tensors)?
        .into_iter()
        .zip(wanted)
        .map(|(values, (name, shape))| Ok((name, Tensor::from_vec(values, shape, &Device::Cpu)?)))
        .collect()
}

/// Decodes exactly the wanted tensors, in the order they are wanted.
pub(super) fn tensors_from_bytes<'a>(
    wanted: &[(String, Vec<usize>)],
    tensors: impl IntoIterator<Item = TensorBytes<'a>>,
) -> Result<Vec<Vec<f32>>> {
    let places: BTreeMap<&str, usize> =
        wanted.iter().enumerate().map(|(place, (name, _))| (name.as_str(), place)).collect();
    let mut found: Vec<Option<(WeightDtype, &[u8])>> = vec![None; wanted.len()];
    let mut unexpected = Vec::new();
    for tensor in tensors {
        let Some((place, shape)) =
            places.get(tensor.name).and_then(|&place| wanted.get(place).map(|(_, shape)| (place, shape)))
        else {
            unexpected.push(tensor.name);
            continue;
        };
        if tensor.shape != shape.as_slice() {
            return Err(EngineError::new(format!(
                "tensor {} has shape {:?}, wanted {shape:?}",
                tensor.name, tensor.shape
            )));
        }
        let dtype = WeightDtype::from_name(tensor.dtype)
            .map_err(|error| EngineError::new(format!("tensor {}: {error}", tensor.name)))?;
        let length = shape.iter().product::<usize>() * dtype.size();
        if tensor.bytes.len() != length {
            return Err(EngineError::new(format!(
                "tensor {} has {} bytes, wanted {length}",
                tensor.name,
                tensor.bytes.len()
            )));
        }
        if let Some(slot) = found.get_mut(place)
            && slot.replace((dtype, tensor.bytes)).is_some()
        {
            return Err(EngineError::new(format!("tensor {} is given twice", tensor.name)));
        }
    }
    let missing: Vec<&str> = wanted
        .iter()
        .zip(&found)
        .filter(|(_, slot)| slot.is_none())
        .map(|((name, _), _)| name.as_str())
        .collect();
    if !missing.is_empty() {
        return Err(EngineError::new(format!("missing tensors: {}", name_some(&missing))));
    }
    if !unexpected.is_empty() {
        return Err(EngineError::new(format!("unexpected tensors: {}", name_some(&unexpected))));
    }
    // Only now, with every length checked, is anything of that length allocated.
    Ok(found.into_iter().flatten().map(|(dtype, bytes)| dtype.decode(bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        // 1 + 2^-8 lies half way between two bfloat16 neighbours, so does 1 + 3 * 2^-8.
        let ties = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
        let back = WeightDtype::Bf16.decode(&WeightDtype::Bf16.encode(&ties));
        assert_eq!(back, [1.0, 1.0 + 2f32.powi(-6)]);
        let ties = [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11)];
        let back = WeightDtype::F16.decode(&WeightDtype::F16.encode(&ties));
        assert_eq!(back, [1.0, 1.0 + 2f32.powi(-9)]);
        assert_eq!(WeightDtype::F32.encode(&[1.0]), 1f32.to_le_bytes());
        assert_eq!(WeightDtype::Bf16.encode(&[-2.0]), [0x00, 0xc0]);
    }

    #[test]
    fn names_read_back() {
        for dtype in [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::F32] {
            assert_eq!(WeightDtype::from_name(dtype.name()), Ok(dtype));
            assert_eq!(WeightDtype::from_hf(dtype.hf_name()), Ok(dtype));
        }
        assert!(WeightDtype::from_name("I8").is_err());
    }
}
