//! Positions and new values of the elements that changed, plain or behind zstd-1, as several trainers send them.

use towline_core::{DType, Mode, Result};

use super::general::{pack, put_length, take_frame, unpack};
use super::{Kind, Part, Peer, Scratch, broken};

/// Elements that changed: the gaps between their positions (as 16-bit numbers, or as LEB128), then their new values.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) id: &'static str,
    /// Both streams go through zstd-1.
    pub(super) packed: bool,
}

/// Parts large enough that their borders cost nothing, small enough for two threads to share one tensor.
const PART: usize = 8 << 20;
/// The 16-bit gap that says "this many, and more follows".
const MORE: usize = 0xffff;

impl Peer for Sparse {
    fn id(&self) -> &'static str {
        self.id
    }

    fn has(&self, mode: Mode) -> bool {
        mode == Mode::Delta
    }

    fn variants(&self, _: Mode, _: DType) -> usize {
        2
    }

    fn cut(&self, _: usize) -> usize {
        PART
    }

    fn encode(&self, part: &Part<'_>, scratch: &mut Scratch, out: &mut Vec<u8>) -> Result<()> {
        let (mut gaps, mut values) = (std::mem::take(&mut scratch.plain), std::mem::take(&mut scratch.more));
        gaps.clear();
        values.clear();
        match (part.kind.width(), part.kind.variant) {
            (1, 0) => list::<1>(part, &mut gaps, &mut values, put_short),
            (1, _) => list::<1>(part, &mut gaps, &mut values, put_leb),
            (2, 0) => list::<2>(part, &mut gaps, &mut values, put_short),
            (2, _) => list::<2>(part, &mut gaps, &mut values, put_leb),
            (4, 0) => list::<4>(part, &mut gaps, &mut values, put_short),
            (4, _) => list::<4>(part, &mut gaps, &mut values, put_leb),
            (_, 0) => list::<8>(part, &mut gaps, &mut values, put_short),
            (..) => list::<8>(part, &mut gaps, &mut values, put_leb),
        }
        // The length of each stream when it is plain, which the decoder of a frame needs too.
        let mut done = Ok(());
        for stream in [&gaps, &values] {
            let start = out.len();
            out.extend_from_slice(&[0; 4]);
            put_length(out, start, stream.len());
            if self.packed {
                let start = out.len();
                out.extend_from_slice(&[0; 4]);
                done = done.and(pack(stream, 1, scratch, out).map(|length| put_length(out, start, length)));
            } else {
                out.extend_from_slice(stream);
            }
        }
        (scratch.plain, scratch.more) = (gaps, values);
        done
    }

    fn decode(&self, kind: Kind, encoded: &[u8], scratch: &mut Scratch, target: &mut [u8]) -> Result<()> {
        let mut rest = encoded;
        if !self.packed {
            let (gaps, values) = (take_frame(&mut rest)?, take_frame(&mut rest)?);
            return patch_width(kind, gaps, values, target);
        }
        let (mut gaps, mut values) = (std::mem::take(&mut scratch.plain), std::mem::take(&mut scratch.more));
        for stream in [&mut gaps, &mut values] {
            let short = || broken(self.id, "a stream is cut short");
            let (length, behind) = rest.split_first_chunk().ok_or_else(short)?;
            rest = behind;
            stream.resize(u32::from_le_bytes(*length) as usize, 0);
            unpack(take_frame(&mut rest)?, scratch, stream)?;
        }
        let done = patch_width(kind, &gaps, &values, target);
        (scratch.plain, scratch.more) = (gaps, values);
        done
    }
}

fn put_short(gaps: &mut Vec<u8>, mut gap: usize) {
    while gap >= MORE {
        gaps.extend_from_slice(&[0xff, 0xff]);
        gap -= MORE;
    }
    gaps.extend_from_slice(&u16::try_from(gap).unwrap_or(0).to_le_bytes());
}

fn put_leb(gaps: &mut Vec<u8>, mut gap: usize) {
    while gap >= 0x80 {
        gaps.push(gap.to_le_bytes()[0] | 0x80);
        gap >>= 7;
    }
    gaps.push(gap.to_le_bytes()[0]);
}

/// Lists the elements that differ, 64 bytes at a time and in those by words of 8.
fn list<const N: usize>(
    part: &Part<'_>,
    gaps: &mut Vec<u8>,
    values: &mut Vec<u8>,
    put: impl Fn(&mut Vec<u8>, usize),
) {
    let (new, old) = (part.current, part.parent);
    let mut behind = 0;
    let mut found = |at: usize, value: &[u8]| {
        put(gaps, at - behind);
        values.extend_from_slice(value);
        behind = at + 1;
    };
    let ((new_blocks, new_rest), (old_blocks, old_rest)) = (new.as_chunks::<64>(), old.as_chunks::<64>());
    for (block, (new, old)) in new_blocks.iter().zip(old_blocks).enumerate() {
        if new == old {
            continue;
        }
        for (word, (new, old)) in new.as_chunks::<8>().0.iter().zip(old.as_chunks::<8>().0).enumerate() {
            let mut differs = u64::from_le_bytes(*new) ^ u64::from_le_bytes(*old);
            while differs != 0 {
                let element = differs.trailing_zeros() as usize / 8 / N;
                let start = element * N;
                found((block * 64 + word * 8 + start) / N, new.get(start..start + N).unwrap_or_default());
                // Clears the element: everything up to its last bit.
                let end = 8 * (start + N);
                differs = if end < 64 { differs >> end << end } else { 0 };
            }
        }
    }
    let first = new_blocks.len() * 64 / N;
    let elements = new_rest.as_chunks::<N>().0.iter().zip(old_rest.as_chunks::<N>().0);
    for (index, (new, _)) in elements.enumerate().filter(|(_, (new, old))| new != old) {
        found(first + index, new);
    }
}

fn patch_width(kind: Kind, gaps: &[u8], values: &[u8], target: &mut [u8]) -> Result<()> {
    match (kind.width(), kind.variant) {
        (1, 0) => patch::<1>(gaps, values, target, take_short),
        (1, _) => patch::<1>(gaps, values, target, take_leb),
        (2, 0) => patch::<2>(gaps, values, target, take_short),
        (2, _) => patch::<2>(gaps, values, target, take_leb),
        (4, 0) => patch::<4>(gaps, values, target, take_short),
        (4, _) => patch::<4>(gaps, values, target, take_leb),
        (_, 0) => patch::<8>(gaps, values, target, take_short),
        (..) => patch::<8>(gaps, values, target, take_leb),
    }
}

fn take_short(gaps: &mut &[u8]) -> Option<usize> {
    let mut gap = 0;
    loop {
        let (bytes, rest) = gaps.split_first_chunk()?;
        *gaps = rest;
        let part = usize::from(u16::from_le_bytes(*bytes));
        gap += part;
        if part != MORE {
            return Some(gap);
        }
    }
}

fn take_leb(gaps: &mut &[u8]) -> Option<usize> {
    let (mut gap, mut shift) = (0, 0u32);
    loop {
        let (&byte, rest) = gaps.split_first()?;
        *gaps = rest;
        gap |= usize::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(gap);
        }
        shift += 7;
    }
}

fn patch<const N: usize>(
    gaps: &[u8],
    values: &[u8],
    target: &mut [u8],
    take: impl Fn(&mut &[u8]) -> Option<usize>,
) -> Result<()> {
    let bad = || broken("sparse", "a position lies outside");
    let (mut gaps, mut at) = (gaps, 0usize);
    let target = target.as_chunks_mut::<N>().0;
    for value in values.as_chunks::<N>().0 {
        at += take(&mut gaps).ok_or_else(bad)?;
        *target.get_mut(at).ok_or_else(bad)? = *value;
        at += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gaps on both sides of each border of both forms, and elements on both sides of the blocks.
    #[test]
    fn positions_come_back() {
        let kind = |variant| Kind { dtype: DType::U16, mode: Mode::Delta, variant };
        let old = vec![0u8; 2 * 300_000];
        let mut new = old.clone();
        let places = [0, 1, 31, 32, 159, 160, 161 + 0xfffe, 162 + 0xfffe + 0xffff, 299_998, 299_999];
        for place in places {
            new[2 * place + place % 2] = 9;
        }
        for peer in [Sparse { id: "sparse", packed: false }, Sparse { id: "sparse+zstd-1", packed: true }] {
            for variant in 0..2 {
                let mut out = Vec::new();
                let part = Part { kind: kind(variant), parent: &old, current: &new };
                peer.encode(&part, &mut Scratch::default(), &mut out).unwrap();
                let mut target = old.clone();
                peer.decode(kind(variant), &out, &mut Scratch::default(), &mut target).unwrap();
                assert!(target == new, "variant {variant}");
                if !peer.packed && variant == 0 {
                    // Ten changes, of which one has a gap of two numbers and one of three; two lengths.
                    assert_eq!(out.len(), 8 + 10 * 2 + (10 + 1 + 2) * 2);
                }
                assert!(
                    peer.decode(kind(variant), &out, &mut Scratch::default(), &mut target[..99]).is_err()
                );
            }
        }
    }
}
