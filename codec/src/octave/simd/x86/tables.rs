//! Where bytes go.

/// The number of each byte.
pub(super) const BYTE_NUMBERS: [u8; 64] = multiples_of(1);
/// The numbers of every other byte.
pub(super) const EVEN_BYTES: [u8; 64] = multiples_of(2);

/// The bytes of each eight, the last first.
pub(super) const LAST_FIRST: [u8; 64] = {
    let mut places = multiples_of(1);
    let mut at = 0;
    while at < 64 {
        places[at] ^= 7;
        at += 1;
    }
    places
};
/// Of two times 64 bytes: the first of each eight of one, the fifth of each, both of the other, then the byte behind each
/// of those.
pub(super) const PLANES: [u8; 64] = {
    let mut places = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (eight, column, plane) = (at % 8, at / 8 % 4, at / 32);
        places[at] = (column / 2 * 64 + eight * 8 + column % 2 * 4 + plane) as u8;
        at += 1;
    }
    places
};
/// Eight bytes with one bit each, the lowest first.
pub(super) const UNIT_VECTORS: i64 = 0x8040_2010_0804_0201_u64.cast_signed();

const fn multiples_of(number: u8) -> [u8; 64] {
    let mut multiples = [0; 64];
    let mut at = 0;
    while at < 64 {
        multiples[at] = at as u8 * number;
        at += 1;
    }
    multiples
}
