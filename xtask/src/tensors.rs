//! Compares two safetensors files tensor by tensor: the order of a header and its padding do not matter.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::stop::{Result, Stop, file_error};

/// dtype, shape and bytes of one tensor.
#[derive(Debug, PartialEq, Eq)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// What differs first, or nothing when both files hold the same tensors.
pub(crate) fn difference(got: &Path, want: &Path) -> Result<Option<String>> {
    let read = |path: &Path| {
        let bytes = std::fs::read(path).map_err(file_error("read", path))?;
        parse(&bytes).ok_or_else(|| Stop::failed(format!("`{}` is no safetensors file", path.display())))
    };
    Ok(first_difference(&read(got)?, &read(want)?))
}

fn first_difference(got: &BTreeMap<String, Tensor>, want: &BTreeMap<String, Tensor>) -> Option<String> {
    if let Some(name) = got.keys().find(|name| !want.contains_key(*name)) {
        return Some(format!("{name}: not wanted"));
    }
    want.iter().find_map(|(name, tensor)| match got.get(name) {
        None => Some(format!("{name}: missing")),
        Some(other) if other.dtype != tensor.dtype => {
            Some(format!("{name}: dtype {}, wanted {}", other.dtype, tensor.dtype))
        }
        Some(other) if other.shape != tensor.shape => {
            Some(format!("{name}: shape {:?}, wanted {:?}", other.shape, tensor.shape))
        }
        Some(other) if other.data != tensor.data => Some(format!("{name}: bytes differ")),
        Some(_) => None,
    })
}

fn parse(bytes: &[u8]) -> Option<BTreeMap<String, Tensor>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let header: Value = serde_json::from_slice(rest.get(..length)?).ok()?;
    let body = rest.get(length..)?;
    header
        .as_object()?
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, entry)| Some((name.clone(), tensor(entry, body)?)))
        .collect()
}

fn tensor(entry: &Value, body: &[u8]) -> Option<Tensor> {
    let numbers =
        |key: &str| entry.get(key)?.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>();
    let offsets = numbers("data_offsets")?;
    let at = |index: usize| usize::try_from(*offsets.get(index)?).ok();
    Some(Tensor {
        dtype: entry.get("dtype")?.as_str()?.to_owned(),
        shape: numbers("shape")?,
        data: body.get(at(0)?..at(1)?)?.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn order_does_not_matter_and_bytes_do() {
        let one = file(
            r#"{"__metadata__":{"x":"y"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
            &[1, 2, 3],
        );
        let two = file(
            r#"{"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
            &[2, 3, 1],
        );
        let mut broken = two.clone();
        let last = broken.len() - 1;
        broken[last] = 9;
        let (one, two, broken) = (parse(&one).unwrap(), parse(&two).unwrap(), parse(&broken).unwrap());
        assert_eq!(first_difference(&one, &two), None);
        assert_eq!(first_difference(&one, &broken).as_deref(), Some("a: bytes differ"));
    }

    #[test]
    fn noise_is_no_file() {
        assert!(parse(&[0xff; 20]).is_none());
        assert!(parse(&file(r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#, &[1])).is_none());
    }
}
