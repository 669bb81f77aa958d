//! Objects whose writer says aloud which of them the store acknowledged: for killing the server in the middle.

use std::collections::BTreeMap;
use std::io::{Lines, StdinLock, Write as _};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use towline_core::{ErrorKind, ObjectKey, PutMode, Result, SnapshotStore};

use crate::bigger::block;

/// Every eighth object goes up in parts.
const IN_PARTS: u64 = 8;

/// Writes `count` objects one after the other. Behind each it prints `ok I`, or `failed I` with the cause.
pub(crate) async fn write(store: Arc<dyn SnapshotStore>, count: u64, seed: u64) -> Result<bool, String> {
    for number in 0..count {
        let line = match write_one(&*store, number, seed).await {
            Ok(()) => format!("ok {number}"),
            Err(error) => {
                // The server may be away; not all that is left should fail for that alone.
                tokio::time::sleep(Duration::from_secs(3)).await;
                format!("failed {number} {}", error.report().replace('\n', " "))
            }
        };
        println!("{line}");
        std::io::stdout().flush().map_err(|error| format!("cannot print: {error}"))?;
    }
    Ok(true)
}

/// Reads the lines that [`write`] printed. What was acknowledged must be there, and what was not must be whole or
/// absent.
pub(crate) async fn check(
    store: Arc<dyn SnapshotStore>,
    seed: u64,
    lines: Lines<StdinLock<'static>>,
) -> Result<bool, String> {
    let mut counts = BTreeMap::<&str, u64>::new();
    let mut broken = Vec::new();
    for line in lines {
        let line = line.map_err(|error| format!("cannot read the lines: {error}"))?;
        let mut words = line.split(' ');
        let acknowledged = match words.next() {
            Some("ok") => true,
            Some("failed") => false,
            _ => return Err(format!("`{line}` is no line of --write")),
        };
        let number = words.next().and_then(|text| text.parse().ok());
        let number: u64 = number.ok_or_else(|| format!("`{line}` is no line of --write"))?;
        let found = store.get(&key(number, seed).map_err(|error| error.report())?, None).await;
        let verdict = match (acknowledged, found) {
            (true, Ok(found)) if found == body(number, seed) => "acknowledged and there",
            (false, Ok(found)) if found == body(number, seed) => "not acknowledged, yet there",
            (false, Err(error)) if error.kind() == ErrorKind::NotFound => "not acknowledged, not there",
            (acknowledged, found) => {
                let found =
                    found.map_or_else(|error| error.report(), |found| format!("{} others", found.len()));
                let wanted = body(number, seed).len();
                broken.push(format!(
                    "object {number} (acknowledged: {acknowledged}): wanted {wanted} bytes, found {found}"
                ));
                "broken"
            }
        };
        *counts.entry(verdict).or_default() += 1;
    }
    println!("{}", serde_json::json!({"ok": broken.is_empty(), "counts": counts, "broken": broken}));
    Ok(broken.is_empty())
}

async fn write_one(store: &dyn SnapshotStore, number: u64, seed: u64) -> Result<()> {
    let (key, body) = (key(number, seed)?, body(number, seed));
    if number % IN_PARTS < IN_PARTS - 1 {
        return store.put(&key, body, PutMode::Overwrite).await.map(drop);
    }
    let mut writer = store.writer(&key).await?;
    writer.write(body).await?;
    writer.finish().await.map(drop)
}

fn key(number: u64, seed: u64) -> Result<ObjectKey> {
    ObjectKey::new(format!("store-laws-acks-{seed}/{number:06}"))
}

fn body(number: u64, seed: u64) -> Bytes {
    let length = match number % IN_PARTS {
        7 => (9 << 20) + 1,
        small => 1 + (number * 7919 + small * 40_009) % 300_000,
    };
    block(seed ^ number.rotate_left(32), usize::try_from(length).unwrap_or(1))
}
