//! The codes of literal lengths and match lengths, and their default distributions (RFC 8878, section 3.1.1.3.2).

/// The shortest match.
pub(super) const MIN_MATCH: u32 = 3;

/// A code, and the bits of the length that follow it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Length {
    pub(super) code: u8,
    /// Their number.
    pub(super) extra: u8,
    pub(super) low: u16,
}

/// The code of a literal length.
#[inline]
pub(super) fn literal_code(length: u32) -> Length {
    static SHORT: [Length; 64] = short();
    SHORT.get(length as usize).copied().unwrap_or_else(|| long(length, 19))
}

/// The code of a match length less [`MIN_MATCH`].
#[inline]
pub(super) fn match_code(length: u32) -> Length {
    static SHORT: [Length; 128] = short();
    SHORT.get(length as usize).copied().unwrap_or_else(|| long(length, 36))
}

const fn long(length: u32, from: u32) -> Length {
    let bits = length.ilog2();
    let [low, high, ..] = (length ^ 1 << bits).to_le_bytes();
    Length {
        code: (from + bits).to_le_bytes()[0],
        extra: bits.to_le_bytes()[0],
        low: u16::from_le_bytes([low, high]),
    }
}

/// The codes of the first lengths, `N` of them: 64 for literals, 128 for matches.
const fn short<const N: usize>() -> [Length; N] {
    let mut table = [Length { code: 0, extra: 0, low: 0 }; N];
    let (mut at, mut code) = (0, 0u8);
    while at < N {
        let extra = if N == 64 { literal_extra(code) } else { match_extra(code) };
        let mut low = 0;
        while low < 1 << extra {
            table[at] = Length { code, extra, low };
            at += 1;
            low += 1;
        }
        code += 1;
    }
    table
}

/// What each code stands for: the lowest length, and the number of extra bits. `lowest` is that of the first code.
pub(super) const fn lengths<const N: usize>(lowest: u32) -> [(u32, u32); N] {
    let mut table = [(0, 0); N];
    let (mut at, mut code, mut length) = (0, 0u8, lowest);
    while at < N {
        // Literals have 36 codes, matches 53.
        let extra = if N == 36 { literal_extra(code) } else { match_extra(code) };
        table[at] = (length, extra as u32);
        length += 1 << extra;
        at += 1;
        code += 1;
    }
    table
}

const fn literal_extra(code: u8) -> u8 {
    match code {
        0..16 => 0,
        16..20 => 1,
        20 | 21 => 2,
        22 | 23 => 3,
        24 => 4,
        _ => code - 19,
    }
}

const fn match_extra(code: u8) -> u8 {
    match code {
        0..32 => 0,
        32..36 => 1,
        36 | 37 => 2,
        38 | 39 => 3,
        40 | 41 => 4,
        42 => 5,
        _ => code - 36,
    }
}

/// The default distribution of literal lengths, in 64ths. −1 is less than one.
pub(super) const LITERAL_DEFAULT: [i16; 36] = [
    4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1,
    -1, -1,
];

/// The default distribution of match lengths, in 64ths.
pub(super) const MATCH_DEFAULT: [i16; 53] = [
    1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_the_code_that_stands_for_it() {
        let check = |lengths: &[(u32, u32)], lowest: u32, code: fn(u32) -> Length| {
            for length in 0..(128 << 10) - lowest {
                let found = code(length);
                let (first, extra) = lengths[usize::from(found.code)];
                assert_eq!(u32::from(found.extra), extra);
                assert_eq!(first + u32::from(found.low), length + lowest, "{length}");
            }
        };
        check(&lengths::<36>(0), 0, literal_code);
        check(&lengths::<53>(MIN_MATCH), MIN_MATCH, match_code);
    }
}
