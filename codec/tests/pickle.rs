//! The pickles of arc_v3: what they may hold is read, everything else is refused by name.
#![cfg(all(feature = "zstd", feature = "lz4"))]

mod common;

use common::{Pair, Pickle, envelope, pair, stated_bound};
use towline_codec::ArcV3;
use towline_core::testing::CountingAllocator;
use towline_core::{Codec, DType, Error, ErrorKind, Mode};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Six bf16 elements, of which the second grows by one unit in the last place.
fn tensor() -> Pair {
    let mut pair = pair(DType::BF16, &[2, 3], 100);
    pair.old =
        [0x3f80u16, 0x3f80, 0xbf80, 0, 0x8000, 0x7fc0].iter().flat_map(|bits| bits.to_le_bytes()).collect();
    pair.new.clone_from(&pair.old);
    pair.new[2] ^= 1;
    pair
}

/// The payload of [`tensor`], with entries replaced by the caller: each is a key and the opcodes of its value.
fn payload(replaced: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let text = |text: &str| Pickle::default().text(text).0;
    let int = |number: i64| Pickle::default().int(number).0;
    let checksum = ArcV3.checksum(None, &tensor().new).unwrap().to_string();
    let entries = [
        ("version", int(1)),
        ("strategy", text("mantissa_xor")),
        ("shape", [&b"("[..], &int(2), &int(3), b"t"].concat()),
        ("dtype", text("torch.bfloat16")),
        ("checksum", text(&checksum)),
        ("mantissa_bits", int(7)),
        ("total_bits", int(16)),
        ("transform", text("zigzag")),
        ("mantissa_dtype", text("uint8")),
        ("mantissa_stream", dict(&[("kind", text("raw")), ("dtype", text("uint8")), ("data", bytes(&[2]))])),
        ("exception_positions", list(0, "uint8", &[])),
        ("exception_dtype", text("uint16")),
        ("exception_values", bytes(&[])),
        ("uint_dtype", text("uint16")),
        ("indices", list(1, "uint8", &[1])),
    ];
    let mut pickle = Pickle::new();
    for (key, value) in &entries {
        let value = replaced.iter().find(|(replaced, _)| replaced == key).map_or(value, |(_, value)| value);
        if !value.is_empty() {
            pickle = pickle.text(key).raw(value);
        }
    }
    pickle.end()
}

fn bytes(data: &[u8]) -> Vec<u8> {
    Pickle::default().bytes(data).0
}

fn text(text: &str) -> Vec<u8> {
    Pickle::default().text(text).0
}

fn int(number: i64) -> Vec<u8> {
    Pickle::default().int(number).0
}

fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pickle = Pickle::default().raw(b"}(");
    entries.iter().fold(pickle, |pickle, (key, value)| pickle.text(key).raw(value)).raw(b"u").0
}

fn list(count: i64, dtype: &str, data: &[u8]) -> Vec<u8> {
    dict(&[("count", int(count)), ("dtype", text(dtype)), ("data", bytes(data))])
}

/// Decodes a payload for [`tensor`] within the stated memory.
fn decode(payload: &[u8]) -> Result<Vec<u8>, Error> {
    decode_frame(&envelope("zstd", &zstd::bulk::compress(payload, 1).unwrap()))
}

fn decode_frame(frame: &[u8]) -> Result<Vec<u8>, Error> {
    let pair = tensor();
    let mut target = pair.old.clone();
    let (outcome, peak) =
        CountingAllocator::measure(|| ArcV3.decode(&pair.unit(), Mode::Delta, frame, &mut target));
    assert!(peak.unwrap() <= stated_bound("arc_v3", &pair.meta));
    outcome.map(|()| target)
}

/// Decodes an envelope whose outer pickle is `pickle`.
fn outer(pickle: &[u8]) -> Result<Vec<u8>, Error> {
    decode_frame(&[b"ARC3_ENVELOPE\0", pickle].concat())
}

#[test]
fn the_payload_that_the_others_differ_from_is_good() {
    assert_eq!(decode(&payload(&[])).unwrap(), tensor().new);
}

#[test]
fn every_opcode_that_could_run_or_name_something_is_refused_by_name() {
    let refused: [(&str, &[u8]); 31] = [
        ("GLOBAL", b"cos\nsystem\n"),
        ("STACK_GLOBAL", b"\x8c\x02os\x8c\x06system\x93"),
        ("REDUCE", b"\x8c\x01a)R"),
        ("BUILD", b"}}b"),
        ("INST", b"(ios\nsystem\n"),
        ("OBJ", b"(\x8c\x01ao"),
        ("NEWOBJ", b"\x8c\x01a)\x81"),
        ("NEWOBJ_EX", b"\x8c\x01a)}\x92"),
        ("PERSID", b"P1\n"),
        ("BINPERSID", b"\x8c\x01aQ"),
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\x00"),
        ("EXT4", b"\x84\x01\x00\x00\x00"),
        ("NEXT_BUFFER", b"\x97"),
        ("READONLY_BUFFER", b"C\x01a\x98"),
        ("BYTEARRAY8", b"\x96\0\0\0\0\0\0\0\0"),
        ("EMPTY_LIST", b"]"),
        ("APPENDS", b"(e"),
        ("EMPTY_SET", b"\x8f"),
        ("ADDITEMS", b"(\x90"),
        ("FROZENSET", b"(\x91"),
        ("BINFLOAT", b"G\0\0\0\0\0\0\0\0"),
        ("LONG4", b"\x8b\x01\0\0\0\x01"),
        ("INT", b"I1\n"),
        ("STRING", b"S'a'\n"),
        ("UNICODE", b"Va\n"),
        ("DUP", b"K\x012"),
        ("POP", b"K\x010"),
        ("POP_MARK", b"(1"),
        ("NONE", b"N"),
        ("unknown", b"\xff"),
    ];
    for (name, opcodes) in refused {
        for error in [
            outer(&Pickle::new().text("codec").raw(opcodes).end()).unwrap_err(),
            decode(&payload(&[("version", opcodes.to_vec())])).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.message().contains(&format!("opcode {name} (")), "{name}: {error}");
            assert!(error.help().is_some());
        }
    }
}

#[test]
fn every_opcode_that_builds_the_five_types_is_read() {
    let shape = |opcodes: &[u8]| decode(&payload(&[("shape", opcodes.to_vec())]));
    // BININT1, BININT2, BININT, LONG1; TUPLE2 and TUPLE.
    for numbers in
        [&b"K\x02M\x03\x00"[..], b"J\x02\0\0\0\x8a\x01\x03", b"\x8a\x02\x02\0\x8a\x08\x03\0\0\0\0\0\0\0"]
    {
        assert_eq!(shape(&[numbers, b"\x86"].concat()).unwrap(), tensor().new);
        assert_eq!(shape(&[b"(", numbers, b"t"].concat()).unwrap(), tensor().new);
    }
    // The memo in its five forms, with text, bytes, integers and tuples in it.
    assert_eq!(
        shape(b"K\x02K\x03\x86\x94h\x00q\x07h\x07r\x09\0\0\0j\x09\0\0\0\x94h\x00\x8c\x01ah\x00")
            .unwrap_err()
            .kind(),
        ErrorKind::Corrupt
    );
    for (put, get) in
        [(&b"\x94"[..], &b"h\x00"[..]), (b"q\x05", b"h\x05"), (b"r\x05\x01\0\0", b"j\x05\x01\0\0")]
    {
        let twice = Pickle::new().text("extra").raw(b"K\x02K\x03\x86").raw(put).text("again").raw(get);
        let rest = payload(&[]);
        assert_eq!(decode(&[&twice.0, &rest[4..]].concat()).unwrap(), tensor().new);
    }
    // BINUNICODE, BINUNICODE8; SHORT_BINBYTES, BINBYTES8; FRAME; SETITEM.
    let wide = [&b"X\x06\0\0\0"[..], b"uint16"].concat();
    assert!(decode(&payload(&[("uint_dtype", wide)])).is_ok());
    let wider = [&b"\x8d\x06\0\0\0\0\0\0\0"[..], b"uint16"].concat();
    assert!(decode(&payload(&[("uint_dtype", wider)])).is_ok());
    assert!(decode(&payload(&[("exception_values", b"C\x00".to_vec())])).is_ok());
    assert!(decode(&payload(&[("exception_values", b"\x8e\0\0\0\0\0\0\0\0".to_vec())])).is_ok());
    assert!(decode(&payload(&[("shape", b"\x95\x05\0\0\0\0\0\0\0K\x02K\x03\x86".to_vec())])).is_ok());
    let one = b"}\x8c\x04kind\x8c\x03raws\x8c\x05dtype\x8c\x05uint8s\x8c\x04dataC\x01\x02s";
    assert!(decode(&payload(&[("mantissa_stream", one.to_vec())])).is_ok());
}

#[test]
fn what_is_out_of_form_is_refused() {
    let good = payload(&[]);
    for (why, pickle) in [
        ("PROTO", b"}.".to_vec()),
        ("wanted 1 bytes more", vec![]),
        ("protocol 6", b"\x80\x06}.".to_vec()),
        ("protocol 1", b"\x80\x01}.".to_vec()),
        ("protocol 5", [&good[..2], b"\x80\x05}."].concat()),
        ("behind STOP", [&good[..], b"."].concat()),
        ("one dictionary", b"\x80\x05K\x01.".to_vec()),
        ("one dictionary", b"\x80\x05}}.".to_vec()),
        ("one dictionary", b"\x80\x05}(.".to_vec()),
        ("one dictionary", b"\x80\x05.".to_vec()),
        ("no mark", b"\x80\x05}u.".to_vec()),
        ("no mark", b"\x80\x05t.".to_vec()),
        ("a value is wanted", b"\x80\x05\x85.".to_vec()),
        ("a value is wanted", b"\x80\x05}(K\x01\x86.".to_vec()),
        ("a value is wanted", b"\x80\x05}\x94s.".to_vec()),
        ("a value is wanted", b"\x80\x05\x94.".to_vec()),
        ("a value is wanted", b"\x80\x05}(s.".to_vec()),
        ("no dictionary", b"\x80\x05K\x01(u.".to_vec()),
        ("no dictionary", b"\x80\x05(u.".to_vec()),
        ("no value", b"\x80\x05}(\x8c\x01au.".to_vec()),
        ("key is no text", b"\x80\x05}(K\x01K\x01u.".to_vec()),
        ("stands twice", b"\x80\x05}(\x8c\x01aK\x01\x8c\x01aK\x01u.".to_vec()),
        ("more than integers", b"\x80\x05}\x8c\x01a\x85.".to_vec()),
        ("never put", b"\x80\x05}h\x00.".to_vec()),
        ("from the memo", b"\x80\x05}\x94h\x00.".to_vec()),
        ("from the memo", b"\x80\x05}\x94(\x8c\x01ah\x00u.".to_vec()),
        ("memo entry 4294967295", b"\x80\x05}r\xff\xff\xff\xff.".to_vec()),
        ("integer of 9 bytes", b"\x80\x05}\x8a\x09\0\0\0\0\0\0\0\0\x01.".to_vec()),
        ("not UTF-8", b"\x80\x05}\x8c\x01\xff.".to_vec()),
        ("passes the end", b"\x80\x05\x95\xff\0\0\0\0\0\0\0}.".to_vec()),
    ] {
        for error in [outer(&pickle), decode(&pickle)].map(Result::unwrap_err) {
            assert!(error.message().contains(why), "wanted `{why}`, found {error}");
        }
    }
}

#[test]
fn every_truncation_of_both_pickles_is_refused() {
    let good = payload(&[]);
    for length in 0..good.len() {
        assert!(decode(&good[..length]).is_err(), "{length}");
    }
    let frame = envelope("zstd", &zstd::bulk::compress(&good, 1).unwrap());
    for length in 0..frame.len() {
        assert!(decode_frame(&frame[..length]).is_err(), "{length}");
    }
}

#[test]
fn depth_steps_and_keys_are_bounded() {
    let deep = [b"\x80\x05}".to_vec(), b"(\x8c\x01a}".repeat(1000)].concat();
    assert!(outer(&deep).unwrap_err().message().contains("nested deeper than 8"));
    let long = [b"\x80\x05".to_vec(), b"K\x01".repeat(5000)].concat();
    assert!(outer(&long).unwrap_err().message().contains("more than 4096 opcodes"));
    let keys = (0..100u8).fold(Pickle::new(), |pickle, key| pickle.text(&format!("k{key}")).int(1)).end();
    assert!(outer(&keys).unwrap_err().message().contains("more than 64 keys"));
    // Each level would hold the level below twice, if a dictionary could be fetched.
    let doubling = [b"\x80\x05}\x94".to_vec(), b"}(\x8c\x01ah\x00\x8c\x01bh\x00u\x94".repeat(40)].concat();
    assert!(outer(&doubling).unwrap_err().message().contains("from the memo"));
}

#[test]
fn a_long_claim_allocates_nothing() {
    let claims: [&[u8]; 6] = [
        b"X\xff\xff\xff\xff",
        b"B\xff\xff\xff\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8e\0\0\0\0\x01\0\0\0",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    ];
    for claim in claims {
        let pickle = [b"\x80\x05}(", claim, b"abc"].concat();
        let frame = [b"ARC3_ENVELOPE\0", &pickle[..]].concat();
        let pair = tensor();
        let mut target = pair.old.clone();
        let (outcome, peak) =
            CountingAllocator::measure(|| ArcV3.decode(&pair.unit(), Mode::Delta, &frame, &mut target));
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(peak.unwrap() < 4096, "{peak:?} bytes for {claim:?}");
    }
}

#[test]
fn a_payload_that_disagrees_with_its_tensor_or_itself_is_refused() {
    let book = |codes: &[u8], count: i64, positions: Vec<u8>, values: &[u8]| {
        dict(&[
            ("kind", text("codebook3")),
            ("count", int(count)),
            ("codebook", bytes(&[2, 0, 1, 3, 4, 5, 6])),
            ("codes", bytes(codes)),
            ("exception_positions", positions),
            ("exception_values", bytes(values)),
        ])
    };
    let raw = |dtype: &str, data: &[u8]| {
        dict(&[("kind", text("raw")), ("dtype", text(dtype)), ("data", bytes(data))])
    };
    let row = |rows: i64, width: i64, data: &[u8]| {
        dict(&[
            ("kind", text("row")),
            ("n_rows", int(rows)),
            ("row_width", int(width)),
            ("count_dtype", text("uint8")),
            ("data", bytes(data)),
        ])
    };
    // First, what is good in another form.
    for good in [
        ("mantissa_stream", book(&[0], 1, list(0, "uint8", &[]), &[])),
        ("mantissa_stream", book(&[7], 1, list(1, "uint8", &[0]), &[2])),
        ("indices", row(2, 3, &[1, 0, 1, 1])),
        ("indices", row(2, 3, &[1, 0, 8, 1, 0, 0, 0, 0, 0, 0, 0])),
        ("indices", list(1, "uint64", &[1, 0, 0, 0, 0, 0, 0, 0])),
    ] {
        assert_eq!(decode(&payload(std::slice::from_ref(&good))).unwrap(), tensor().new, "{good:?}");
    }
    let exception = [
        ("exception_positions", list(1, "uint8", &[0])),
        ("exception_values", bytes(&0x3f81u16.to_le_bytes())),
        ("mantissa_stream", raw("uint8", &[0])),
    ];
    assert_eq!(decode(&payload(&exception)).unwrap(), tensor().new);

    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("`version` is missing", "version", vec![]),
        ("version 2", "version", int(2)),
        ("no length", "version", int(-1)),
        ("wanted an integer, found text", "version", text("1")),
        ("strategy `all`", "strategy", text("all")),
        ("wanted shape [2, 3]", "shape", b"K\x06\x85".to_vec()),
        ("wanted shape [2, 3]", "shape", b"K\x03K\x02\x86".to_vec()),
        ("wanted shape [2, 3]", "shape", b")".to_vec()),
        ("wanted torch.bfloat16", "dtype", text("torch.float16")),
        ("wanted checksum", "checksum", text("1")),
        ("wanted text, found bytes", "checksum", bytes(b"1")),
        ("with 8 in", "mantissa_bits", int(8)),
        ("found 32 with", "total_bits", int(32)),
        ("in uint32", "uint_dtype", text("uint32")),
        ("transform `add`", "transform", text("add")),
        ("no unsigned integer", "exception_dtype", text("int16")),
        ("stored as uint16", "mantissa_stream", raw("uint16", &[2, 0])),
        ("only 0 mantissas", "mantissa_stream", raw("uint8", &[])),
        ("1 mantissas belong", "mantissa_stream", raw("uint8", &[2, 0])),
        ("too many bits", "mantissa_stream", raw("uint8", &[255])),
        ("too many bits", "mantissa_stream", raw("uint8", &[1])),
        ("stream `huffman`", "mantissa_stream", dict(&[("kind", text("huffman"))])),
        ("wanted a dictionary", "mantissa_stream", text("raw")),
        ("are not 1 codes", "mantissa_stream", book(&[0, 0], 1, list(0, "uint8", &[]), &[])),
        ("disagree", "mantissa_stream", book(&[7], 1, list(0, "uint8", &[]), &[])),
        ("disagree", "mantissa_stream", book(&[0], 1, list(1, "uint8", &[0]), &[2])),
        ("exceptions have 2", "mantissa_stream", book(&[7], 1, list(1, "uint8", &[0]), &[2, 2])),
        ("below 1", "mantissa_stream", book(&[7], 1, list(1, "uint8", &[1]), &[2])),
        (
            "are not 9223372036854775807 codes",
            "mantissa_stream",
            book(&[0], i64::MAX, list(0, "uint8", &[]), &[]),
        ),
        ("kind `tree`", "indices", dict(&[("kind", text("tree"))])),
        ("below 6", "indices", list(1, "uint8", &[6])),
        ("below 6", "indices", list(2, "uint8", &[1, 0])),
        (
            "below 6",
            "indices",
            list(2, "uint64", &[1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]),
        ),
        ("an index list of 2 has 1", "indices", list(2, "uint8", &[1])),
        ("whole numbers of 2", "indices", list(1, "uint16", &[1, 0, 0])),
        ("found 3 of 2", "indices", row(3, 2, &[0, 0, 0])),
        ("counts of 2 rows", "indices", row(2, 3, &[1])),
        ("cut short", "indices", row(2, 3, &[1, 0])),
        ("cut short", "indices", row(2, 3, &[1, 0, 2, 1])),
        ("columns of 3 bytes", "indices", row(2, 3, &[1, 0, 3, 1, 0, 0])),
        ("behind the last row", "indices", row(2, 3, &[1, 0, 1, 1, 0])),
        ("below 3", "indices", row(2, 3, &[1, 0, 1, 3])),
        ("1 exceptions have 0", "exception_positions", list(1, "uint8", &[0])),
        ("0 exceptions have 1", "exception_values", bytes(&[1, 0])),
    ];
    for (why, key, value) in cases {
        let error = decode(&payload(&[(key, value)])).unwrap_err();
        assert!(error.message().contains(why), "{key}: wanted `{why}`, found {error}");
    }
    // An exception beyond the changed elements, and one with more bits than an element.
    let late = [("exception_positions", list(1, "uint8", &[1])), ("exception_values", bytes(&[1, 0]))];
    assert!(decode(&payload(&late)).unwrap_err().message().contains("below 1"));
    let wide = [
        ("exception_positions", list(1, "uint8", &[0])),
        ("exception_dtype", text("uint32")),
        ("exception_values", bytes(&[0, 0, 1, 0])),
    ];
    assert!(decode(&payload(&wide)).unwrap_err().message().contains("too many bits"));
    // A type that is no unsigned integer.
    let odd = [("mantissa_dtype", text("float8")), ("mantissa_stream", raw("float8", &[2]))];
    assert!(decode(&payload(&odd)).unwrap_err().message().contains("no unsigned integer"));
    // A width of codebook values that the format does not have.
    let wide =
        [("mantissa_dtype", text("uint16")), ("mantissa_stream", book(&[0], 1, list(0, "uint8", &[]), &[]))];
    assert!(decode(&payload(&wide)).unwrap_err().message().contains("codebook holds uint8"));
}

#[test]
fn envelopes_of_other_codecs_and_element_types_are_refused() {
    let error = decode_frame(&envelope("lzma", b"x")).unwrap_err();
    assert!(error.message().contains("codec `lzma`"), "{error}");
    let pair = pair(DType::I32, &[2, 3], 3);
    let frame = envelope("zstd", &zstd::bulk::compress(&payload(&[]), 1).unwrap());
    let error = pair.decode(&ArcV3, Mode::Delta, &frame).unwrap_err();
    assert!(error.message().contains("no float layout"), "{error}");
}

#[test]
fn a_bz2_payload_is_read_and_its_damage_refused() {
    use std::io::Write;
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    encoder.write_all(&payload(&[])).unwrap();
    let data = encoder.finish().unwrap();
    assert_eq!(decode_frame(&envelope("bz2", &data)).unwrap(), tensor().new);
    for length in 0..data.len() {
        assert_eq!(decode_frame(&envelope("bz2", &data[..length])).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    assert!(decode_frame(&envelope("bz2", &[&data[..], &data].concat())).is_err());
    assert!(decode_frame(&envelope("bz2", &[&data[..], &[0]].concat())).is_err());
}
