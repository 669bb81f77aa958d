use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, Ordering};

use towline_core::testing::laws::codec::{self as laws, CodecCase};
use towline_core::testing::tiny_weights;
use towline_core::{Codec, CodecId, Error, Framing, Mode, Modes, Result, Unit, UnitMeta};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    NewIds,
    SplitElements,
    WholeTensorsOnly,
    HiddenMode,
    EmptyPromise,
    LosesABit,
    ClearsTheOutput,
    Counts,
    TrustsTheTarget,
    TakesShortFrames,
    PanicsOnLongFrames,
    TrustsLengths,
    UselessChecksum,
    NoChecksum,
    BlindChecksum,
    LazyRevert,
    HalfCompose,
    RemembersUnits,
    ReadsTooFar,
    OtherDigest,
    OtherWhenReading,
    OtherWhenWriting,
    OtherDigestWhenWriting,
    HandsOnOther,
    ForgetsPieces,
}

/// Frame: four bytes of length, four spare bytes, then the bytes or the XOR with the parent.
#[derive(Debug)]
struct Broken(Fault, AtomicU8);

const HEAD: usize = 8;

impl Broken {
    fn is(&self, fault: Fault) -> bool {
        self.0 == fault
    }

    fn framed_as_safetensors(&self) -> bool {
        let kept = matches!(self.0, Fault::BlindChecksum | Fault::WholeTensorsOnly | Fault::ForgetsPieces);
        kept || self.is(Fault::NoChecksum)
    }
}

impl Codec for Broken {
    fn id(&self) -> CodecId {
        let odd = self.is(Fault::NewIds) && self.1.fetch_add(1, Ordering::SeqCst) % 2 == 1;
        CodecId::of(if odd { "other" } else { "broken" })
    }

    fn unit(&self) -> Unit {
        match self.0 {
            Fault::SplitElements => Unit::Block(NonZeroUsize::new(100).unwrap()),
            Fault::WholeTensorsOnly | Fault::RemembersUnits => Unit::Block(NonZeroUsize::new(24).unwrap()),
            _ => Unit::Whole,
        }
    }

    fn modes(&self) -> Modes {
        match self.0 {
            Fault::HiddenMode => Modes::Base,
            _ if self.framed_as_safetensors() => Modes::Delta,
            _ => Modes::Both,
        }
    }

    fn framing(&self) -> Framing {
        if self.framed_as_safetensors() { Framing::Safetensors } else { Framing::Container }
    }

    fn encode(
        &self,
        _: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if self.is(Fault::EmptyPromise) && parent.is_some() {
            return Err(Error::unsupported("no deltas"));
        }
        if self.is(Fault::ClearsTheOutput) {
            out.clear();
        }
        out.extend((current.len() as u32).to_le_bytes());
        let spare = if self.is(Fault::Counts) { self.1.fetch_add(1, Ordering::SeqCst) } else { 0 };
        out.extend([spare; 4]);
        match parent {
            Some(parent) => out.extend(current.iter().zip(parent).map(|(new, old)| new ^ old)),
            None => out.extend(current),
        }
        if self.is(Fault::RemembersUnits) {
            // Each unit is told by the last byte of the one before.
            let last = out.last_mut().unwrap();
            *last ^= self.1.swap(*current.last().unwrap_or(&0), Ordering::SeqCst);
        }
        if self.is(Fault::LosesABit) && current.len() > 10 {
            *out.last_mut().unwrap() &= 0xfe;
        }
        Ok(())
    }

    fn encode_reading(
        &self,
        unit: &UnitMeta<'_>,
        parent: Option<&[u8]>,
        current: &[u8],
        out: &mut Vec<u8>,
        read: &mut dyn FnMut(usize, Option<u128>),
    ) -> Result<()> {
        self.encode(unit, parent, current, out)?;
        let digest = self.is(Fault::OtherDigest).then_some(7);
        read(current.len() + usize::from(self.is(Fault::ReadsTooFar)), digest);
        if self.is(Fault::OtherWhenReading) {
            out.push(0);
        }
        Ok(())
    }

    fn decode_writing(
        &self,
        unit: &UnitMeta<'_>,
        mode: Mode,
        encoded: &[u8],
        target: &mut [u8],
        written: &mut dyn FnMut(&[u8], Option<u128>),
    ) -> Result<()> {
        if self.is(Fault::HandsOnOther) {
            written(target, None);
        }
        self.decode(unit, mode, encoded, target)?;
        if self.is(Fault::OtherWhenWriting) {
            target.iter_mut().for_each(|byte| *byte ^= 1);
        }
        written(target, self.is(Fault::OtherDigestWhenWriting).then_some(7));
        Ok(())
    }

    fn decode(&self, _: &UnitMeta<'_>, mode: Mode, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        let short = || Error::corrupt("cut short");
        let (head, body) = encoded.split_at_checked(HEAD).ok_or_else(short)?;
        if self.is(Fault::TrustsLengths) {
            // Capped, so that the test does not take the machine's memory.
            let told = u32::from_le_bytes(head[..4].try_into().unwrap()) & 0x3ff_ffff;
            std::hint::black_box(Vec::<u8>::with_capacity(told as usize));
        }
        if self.is(Fault::PanicsOnLongFrames) {
            assert!(body.len() <= target.len(), "a longer frame than the target");
        }
        if body.len() != target.len() && !self.is(Fault::TakesShortFrames) {
            return Err(short());
        }
        for (byte, new) in target.iter_mut().zip(body) {
            match mode {
                Mode::Base if self.is(Fault::TrustsTheTarget) => *byte |= new,
                Mode::Base => *byte = *new,
                Mode::Delta => *byte ^= new,
            }
        }
        Ok(())
    }

    fn checksum(&self, before: Option<u32>, more: &[u8]) -> Option<u32> {
        match self.0 {
            Fault::UselessChecksum | Fault::WholeTensorsOnly | Fault::ForgetsPieces => {
                let before = if self.is(Fault::ForgetsPieces) { 1 } else { before.unwrap_or(1) };
                Some(more.iter().fold(before, |sum, byte| sum.wrapping_mul(31) ^ u32::from(*byte)))
            }
            Fault::BlindChecksum => Some(before.unwrap_or(0) + more.len() as u32),
            _ => None,
        }
    }

    fn revert(&self, unit: &UnitMeta<'_>, encoded: &[u8], target: &mut [u8]) -> Result<()> {
        if self.is(Fault::LazyRevert) { Ok(()) } else { self.decode(unit, Mode::Delta, encoded, target) }
    }

    fn compose(&self, _: &UnitMeta<'_>, first: &[u8], second: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.extend(&first[..HEAD]);
        let both = first[HEAD..].iter().zip(&second[HEAD..]);
        out.extend(both.map(|(one, two)| if self.is(Fault::HalfCompose) { *one } else { one ^ two }));
        Ok(())
    }
}

fn faults(law: &str) -> &'static [Fault] {
    match law {
        "stable_id" => &[Fault::NewIds],
        "units_tile" => &[Fault::SplitElements, Fault::WholeTensorsOnly],
        "modes_are_honest" => &[Fault::HiddenMode, Fault::EmptyPromise],
        "round_trip" => {
            &[Fault::LosesABit, Fault::OtherWhenWriting, Fault::OtherDigestWhenWriting, Fault::HandsOnOther]
        }
        "append_only" => &[Fault::ClearsTheOutput],
        "deterministic" => &[Fault::Counts, Fault::ReadsTooFar, Fault::OtherDigest, Fault::OtherWhenReading],
        "dirty_target" => &[Fault::TrustsTheTarget],
        "truncation_is_an_error" => &[Fault::TakesShortFrames],
        "noise_never_panics" => &[Fault::PanicsOnLongFrames],
        "bounded_allocation" => &[Fault::TrustsLengths],
        "checksum_fits_the_framing" => {
            &[Fault::UselessChecksum, Fault::NoChecksum, Fault::BlindChecksum, Fault::ForgetsPieces]
        }
        "revert_is_right" => &[Fault::LazyRevert],
        "compose_is_right" => &[Fault::HalfCompose],
        "several_units" => &[Fault::RemembersUnits],
        other => panic!("no broken codec for the law `{other}`"),
    }
}

#[test]
fn each_law_of_codecs_catches_its_fault() {
    for (name, law) in laws::ALL {
        laws::check(&Broken(Fault::None, AtomicU8::new(0)), *law).unwrap();
        for &fault in faults(name) {
            let broken = laws::check(&Broken(fault, AtomicU8::new(0)), *law);
            let message = broken.expect_err(&format!("`{name}` did not catch {fault:?}"));
            println!("{name} catches {fault:?}: {}", message.lines().next().unwrap_or(""));
        }
    }
}

#[test]
fn golden_vectors_are_compared() {
    let weights = tiny_weights(1);
    let (meta, current) = weights.get("head.bias").unwrap();
    let codec = Broken(Fault::None, AtomicU8::new(0));
    let case = CodecCase::new(meta.clone(), vec![0; current.len()], current.to_vec(), 0);
    let mut frame = Vec::new();
    codec.encode(&UnitMeta::new(meta, 0..current.len()), Some(&case.parent), current, &mut frame).unwrap();
    laws::golden(&codec, &case, Mode::Delta, &[&frame]).unwrap();
    *frame.last_mut().unwrap() ^= 1;
    assert!(laws::golden(&codec, &case, Mode::Delta, &[&frame]).is_err());
    assert!(laws::golden(&codec, &case, Mode::Delta, &[]).is_err());
}
