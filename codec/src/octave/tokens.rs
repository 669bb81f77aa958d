//! Numbers as tokens of 8 bits and, above a limit, more bits.

use super::bits::low;

/// How high bits become tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens {
    /// Values below are their own token. A value above, less this and plus 1, has its number of bits as token and
    /// the bits below the highest one behind the block's low bits.
    pub(super) direct: u64,
}

impl Tokens {
    #[inline(always)]
    pub(super) fn of(self, value: u64) -> u8 {
        if value < self.direct {
            return value as u8;
        }
        (self.direct + u64::from((value - self.direct + 1).ilog2())) as u8
    }

    #[inline(always)]
    pub(super) fn extra_bits(self, token: u8) -> u32 {
        u64::from(token).saturating_sub(self.direct) as u32
    }

    #[inline(always)]
    pub(super) fn extra(self, value: u64, bits: u32) -> u64 {
        value.wrapping_sub(self.direct).wrapping_add(1) & low(bits)
    }

    /// The value of any token.
    #[inline(always)]
    pub(super) fn any_value(self, token: u8, extra: u64) -> u64 {
        if u64::from(token) < self.direct {
            u64::from(token)
        } else {
            self.value(self.extra_bits(token), extra)
        }
    }

    /// The value of a token above the direct ones.
    #[inline(always)]
    pub(super) fn value(self, bits: u32, extra: u64) -> u64 {
        self.direct.wrapping_add(1u64.checked_shl(bits).unwrap_or(0) | extra).wrapping_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_tokens() {
        for direct in [24, 40, 192] {
            let tokens = Tokens { direct };
            for value in (0..5000).chain([1 << 40, u64::MAX]) {
                let token = tokens.of(value);
                if value < direct {
                    assert_eq!(u64::from(token), value);
                } else {
                    let bits = tokens.extra_bits(token);
                    assert_eq!(tokens.value(bits, tokens.extra(value, bits)), value);
                }
            }
        }
    }
}
