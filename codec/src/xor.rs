//! XOR of byte strings, eight bytes at a time.

/// `target[i] ^= mask[i]`, as far as the shorter of the two reaches.
pub(crate) fn xor_into(target: &mut [u8], mask: &[u8]) {
    let common = target.len().min(mask.len());
    let (target_words, target_rest) = target[..common].as_chunks_mut::<8>();
    let (mask_words, mask_rest) = mask[..common].as_chunks::<8>();
    for (word, mask) in target_words.iter_mut().zip(mask_words) {
        *word = (u64::from_ne_bytes(*word) ^ u64::from_ne_bytes(*mask)).to_ne_bytes();
    }
    for (byte, mask) in target_rest.iter_mut().zip(mask_rest) {
        *byte ^= mask;
    }
}

#[cfg(any(feature = "lz4", feature = "zstd"))]
/// Replaces the content of `out` by `left ^ right`, which are of one length.
pub(crate) fn xor_to(out: &mut Vec<u8>, left: &[u8], right: &[u8]) {
    out.clear();
    out.extend_from_slice(left);
    xor_into(out, right);
}

#[cfg(all(test, any(feature = "lz4", feature = "zstd")))]
mod tests {
    use super::*;

    #[test]
    fn equals_the_loop_over_bytes() {
        for length in 0..40u8 {
            let left: Vec<u8> = (0..length).map(|byte| byte.wrapping_mul(7)).collect();
            let right: Vec<u8> = (0..length).map(|byte| byte ^ 0x5a).collect();
            let mut out = vec![1; 3];
            xor_to(&mut out, &left, &right);
            let wanted: Vec<u8> = left.iter().zip(&right).map(|(left, right)| left ^ right).collect();
            assert_eq!(out, wanted);
        }
    }
}
