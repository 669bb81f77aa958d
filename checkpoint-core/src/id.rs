//! Names and ids that are parsed once and cannot be wrong afterwards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The longest snapshot name. With the session suffix it stays within one DNS label of 63 characters.
const MAX_NAME: usize = 54;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Parses `text`.
            ///
            /// # Errors
            /// `Invalid`, with the rule that was broken.
            pub fn new(text: impl Into<String>) -> Result<Self> {
                let text = text.into();
                let check: fn(&str) -> Result<()> = $check;
                check(&text)?;
                Ok(Self(text))
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id! {
    /// What the caller calls a snapshot or state, such as `step-00040`: 1–54 of `a-z 0-9 -`, no hyphen at an end.
    SnapshotName, |text| label("snapshot name", text, MAX_NAME)
}

text_id! {
    /// The durable name of a training job: one DNS label, 1–63 of `a-z 0-9 -`, no hyphen at an end, and not `models`,
    /// where the models lie that were promoted.
    JobId, |text| job(text)
}

text_id! {
    /// The name of a promoted model (`output_model_id`): 1–63 of `a-z 0-9 -`, no hyphen at an end.
    ModelId, |text| label("output model id", text, 63)
}

text_id! {
    /// One client connection: 8 lower-case hexadecimal digits, new after each reconnect. A suffix of snapshot names.
    SessionId, |text| hex("session id", text, 8)
}

text_id! {
    /// One write attempt: 16 lower-case hexadecimal digits from the caller's randomness, never used twice.
    WriteId, |text| hex("write id", text, 16)
}

text_id! {
    /// A codec's id in manifests and on command lines, such as `arc_v2`: 1–32 of `a-z 0-9 _ . -`.
    CodecId, |text| codec_id(text)
}

text_id! {
    /// One hot-load operation, chosen by the caller so that a retry is recognised: 1–64 of `a-z A-Z 0-9 _ . -`.
    OpId, |text| op_id(text)
}

/// `<name>-<session>`: the identity of a sampler snapshot as deployments report it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotIdentity(String);

impl SnapshotIdentity {
    /// The identity of `name` saved in `session`.
    #[must_use]
    pub fn of(name: &SnapshotName, session: &SessionId) -> Self {
        Self(format!("{name}-{session}"))
    }

    /// Parses an identity that a deployment reports. It may be foreign, so the rule is wide: 1–255 characters,
    /// no control characters, no white space, no `/` at an end.
    ///
    /// # Errors
    /// `Invalid`, with the rule that was broken.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let bad = |rule: &str| {
            Err(Error::invalid(format!("{} is no snapshot identity: {rule}", shown(&text)))
                .with_help("use `<name>-<8 hex digits>` as a save returned it"))
        };
        if text.is_empty() || text.len() > 255 {
            return bad("wanted 1 to 255 bytes");
        }
        if text.chars().any(|character| character.is_control() || character.is_whitespace()) {
            return bad("white space and control characters are not allowed");
        }
        Ok(Self(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name and session, if the identity has our form.
    #[must_use]
    pub fn parts(&self) -> Option<(SnapshotName, SessionId)> {
        let (name, session) = self.0.rsplit_once('-')?;
        Some((SnapshotName::new(name).ok()?, SessionId::new(session).ok()?))
    }
}

impl fmt::Display for SnapshotIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SnapshotIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for SnapshotIdentity {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

impl TryFrom<String> for SnapshotIdentity {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::new(text)
    }
}

impl From<SnapshotIdentity> for String {
    fn from(identity: SnapshotIdentity) -> Self {
        identity.0
    }
}

impl SessionId {
    /// A session from 4 bytes of the caller's randomness.
    #[must_use]
    pub fn from_random(bytes: [u8; 4]) -> Self {
        Self(format!("{:08x}", u32::from_be_bytes(bytes)))
    }
}

impl WriteId {
    /// A write id from 8 bytes of the caller's randomness.
    #[must_use]
    pub fn from_random(bytes: [u8; 8]) -> Self {
        Self(format!("{:016x}", u64::from_be_bytes(bytes)))
    }
}

impl CodecId {
    /// An id that is known to be well formed when it is compiled: codecs name themselves with it.
    ///
    /// # Panics
    /// If `text` breaks the rule, which the codec conformance kit finds.
    #[must_use]
    pub fn of(text: &'static str) -> Self {
        match Self::new(text) {
            Ok(id) => id,
            #[expect(clippy::panic, reason = "a constant of the program, checked by the conformance kit")]
            Err(error) => panic!("{error}"),
        }
    }
}

/// The folder of promoted models below the root of a store, beside those of jobs.
pub const MODELS: &str = "models";

fn job(text: &str) -> Result<()> {
    if text == MODELS {
        return Err(Error::invalid(format!("`{MODELS}` is no job id: promoted models lie there"))
            .with_help("choose another name for the job"));
    }
    label("job id", text, 63)
}

fn label(what: &str, text: &str, max: usize) -> Result<()> {
    let bad = |rule: String| {
        Err(Error::invalid(format!("{} is no {what}: {rule}", shown(text)))
            .with_help(format!("use 1 to {max} of a-z, 0-9 and hyphen, with no hyphen at an end")))
    };
    if text.is_empty() {
        return bad("it is empty".into());
    }
    if text.len() > max {
        return bad(format!("it has {} bytes, at most {max} are allowed", text.len()));
    }
    if let Some(found) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return bad(format!("{found:?} is not allowed"));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return bad("it has a hyphen at an end".into());
    }
    Ok(())
}

fn hex(what: &str, text: &str, digits: usize) -> Result<()> {
    if text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} is no {what}: wanted {digits} lower-case hexadecimal digits",
        shown(text)
    )))
}

fn codec_id(text: &str) -> Result<()> {
    let good = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-');
    if (1..=32).contains(&text.len()) && text.bytes().all(good) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} is no codec id: wanted 1 to 32 of a-z, 0-9, `_`, `.` and `-`",
        shown(text)
    )))
}

fn op_id(text: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if (1..=64).contains(&text.len()) && text.bytes().all(good) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} is no operation id: wanted 1 to 64 letters, digits, `_`, `.` and `-`",
        shown(text)
    )))
}

/// Untrusted text for a message: quoted, escaped and cut.
pub(crate) fn shown(text: &str) -> String {
    let mut cut: String = text.chars().take(80).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("`{}`", cut.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for good in ["a", "step-00040", "0", &"a".repeat(54)] {
            assert_eq!(SnapshotName::new(good).unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", "empty"),
            ("-a", "hyphen at an end"),
            ("a-", "hyphen at an end"),
            ("Step", "'S' is not allowed"),
            ("a.b", "'.' is not allowed"),
            ("a/b", "'/' is not allowed"),
            ("é", "'é' is not allowed"),
            (&"a".repeat(55), "55 bytes"),
        ] {
            let error = SnapshotName::new(bad).unwrap_err();
            assert!(error.message().contains(why), "{error}");
            assert!(error.help().is_some());
        }
        assert!(ModelId::new("a".repeat(63)).is_ok());
        assert!(ModelId::new("a".repeat(64)).is_err());
    }

    #[test]
    fn identities_join_name_and_session() {
        let identity =
            SnapshotIdentity::of(&SnapshotName::new("step-1").unwrap(), &SessionId::new("00ab12cd").unwrap());
        assert_eq!(identity.as_str(), "step-1-00ab12cd");
        assert_eq!(identity.parts().unwrap().0.as_str(), "step-1");
        assert!(SnapshotIdentity::new("foreign/model@7").unwrap().parts().is_none());
        assert!(SnapshotIdentity::new("a b").is_err());
    }

    #[test]
    fn json_refuses_what_the_parser_refuses() {
        assert!(serde_json::from_str::<SessionId>("\"00AB12CD\"").is_err());
        assert!(serde_json::from_str::<SessionId>("\"00ab12cd\"").is_ok());
    }
}
