//! Element types, with lengths in bits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $bits:literal, $float:literal;)*) => {
        /// The type of a tensor's elements, named as in a safetensors header.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum DType {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl DType {
            /// Every element type.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in a safetensors header.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The length of one element in bits. F4 and F6 elements are packed without gaps.
            #[must_use]
            pub fn bits(self) -> u32 {
                match self { $(Self::$variant => $bits),* }
            }

            /// Whether the elements are floating-point numbers.
            #[must_use]
            pub fn is_float(self) -> bool {
                match self { $(Self::$variant => $float),* }
            }

            /// The type for a name, or `None`.
            #[must_use]
            fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool = "BOOL", 8, false;
    /// 8-bit unsigned.
    U8 = "U8", 8, false;
    /// 8-bit signed.
    I8 = "I8", 8, false;
    /// 16-bit unsigned.
    U16 = "U16", 16, false;
    /// 16-bit signed.
    I16 = "I16", 16, false;
    /// 32-bit unsigned.
    U32 = "U32", 32, false;
    /// 32-bit signed.
    I32 = "I32", 32, false;
    /// 64-bit unsigned.
    U64 = "U64", 64, false;
    /// 64-bit signed.
    I64 = "I64", 64, false;
    /// 4-bit float, two to a byte.
    F4 = "F4", 4, true;
    /// 6-bit float, 2 exponent and 3 mantissa bits.
    F6E2M3 = "F6_E2M3", 6, true;
    /// 6-bit float, 3 exponent and 2 mantissa bits.
    F6E3M2 = "F6_E3M2", 6, true;
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2 = "F8_E5M2", 8, true;
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities.
    F8E4M3 = "F8_E4M3", 8, true;
    /// 8-bit power of two (block scales).
    F8E8M0 = "F8_E8M0", 8, true;
    /// 8-bit float e4m3 with one NaN and no negative zero (AMD).
    F8E4M3FNUZ = "F8_E4M3FNUZ", 8, true;
    /// 8-bit float e5m2 with one NaN and no negative zero (AMD).
    F8E5M2FNUZ = "F8_E5M2FNUZ", 8, true;
    /// IEEE half.
    F16 = "F16", 16, true;
    /// bfloat16.
    BF16 = "BF16", 16, true;
    /// IEEE single.
    F32 = "F32", 32, true;
    /// Two singles.
    C64 = "C64", 64, true;
    /// IEEE double.
    F64 = "F64", 64, true;
}

impl DType {
    /// The bytes of a tensor of this type and `shape`.
    ///
    /// # Errors
    /// `Invalid` if the length overflows or is not a whole number of bytes.
    pub fn byte_len(self, shape: &[usize]) -> Result<usize> {
        let bits = shape
            .iter()
            .try_fold(1usize, |product, &dimension| product.checked_mul(dimension))
            .and_then(|elements| elements.checked_mul(self.bits() as usize));
        match bits {
            None => Err(Error::invalid(format!("the length of {self} {shape:?} overflows"))),
            Some(bits) if bits % 8 != 0 => Err(Error::invalid(format!(
                "{self} {shape:?} has {bits} bits: wanted a whole number of bytes"
            ))
            .with_help("pad the last dimension")),
            Some(bits) => Ok(bits / 8),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::from_name(text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|dtype| dtype.as_str()).collect();
            Error::invalid(format!("`{text}` is no element type: wanted one of {}", known.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_in_bits() {
        assert_eq!(DType::F4.byte_len(&[3, 4]).unwrap(), 6);
        assert_eq!(DType::F6E2M3.byte_len(&[4]).unwrap(), 3);
        assert_eq!(DType::BF16.byte_len(&[]).unwrap(), 2);
        assert_eq!(DType::F64.byte_len(&[0, usize::MAX]).unwrap(), 0);
        assert!(DType::F4.byte_len(&[3]).is_err());
        assert!(DType::F32.byte_len(&[usize::MAX, 2]).is_err());
    }

    #[test]
    fn names_round_trip_and_agree_with_the_safetensors_crate() {
        for &dtype in DType::ALL {
            assert_eq!(dtype.as_str().parse::<DType>().unwrap(), dtype);
            let theirs: safetensors::Dtype = serde_json::from_str(&format!("\"{dtype}\"")).unwrap();
            assert_eq!(theirs.bitsize(), dtype.bits() as usize);
        }
    }
}
