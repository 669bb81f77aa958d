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
/// The first of each eight bytes, the second of each, and so on.
pub(super) const TURNED: [u8; 64] = {
    let mut places = [0; 64];
    let mut at = 0;
    while at < 64 {
        places[at] = (at % 8 * 8 + at / 8) as u8;
        at += 1;
    }
    places
};
/// A bit for each even number below 16, the lowest first.
pub(super) const EVEN_BITS: [u8; 64] = bits_of(0, 2);
/// A bit for each odd number below 16, the lowest first.
pub(super) const ODD_BITS: [u8; 64] = bits_of(1, 2);
/// A bit for each number of an eight, the lowest first.
pub(super) const EIGHTS_OF_BITS: [[u8; 64]; 8] = {
    let mut eights = [[0; 64]; 8];
    let mut eight = 0;
    while eight < 8 {
        eights[eight] = bits_of(eight * 8, 1);
        eight += 1;
    }
    eights
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

const fn bits_of(first: usize, step: usize) -> [u8; 64] {
    let mut bits = [0; 64];
    let mut bit = 0;
    while bit < 8 {
        bits[first + bit * step] = 1 << bit;
        bit += 1;
    }
    bits
}
