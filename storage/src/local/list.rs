//! Walking a folder as a stream.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::{StreamExt as _, stream};
use tokio::sync::mpsc::{self, Sender};
use towline_core::{BoxStream, Error, ObjectInfo, ObjectKey, Result};

use super::disk::{Disk, info};
use crate::io::{blocking, io_error};

/// Entries found ahead of the reader.
const AHEAD: usize = 256;

pub(super) fn stream(disk: Arc<Disk>, prefix: Option<ObjectKey>) -> BoxStream<'static, Result<ObjectInfo>> {
    let start = async move {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let walk = blocking(move || walk(&disk, prefix, &sender));
        // The walk runs from the first item on, and its own end closes the channel.
        let walk = tokio::spawn(walk);
        stream::unfold(Some((receiver, walk)), |state| async move {
            let (mut receiver, walk) = state?;
            if let Some(info) = receiver.recv().await {
                return Some((Ok(info), Some((receiver, walk))));
            }
            match walk.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some((Err(error), None)),
                Err(error) => Some((Err(Error::internal("a listing ended early").with_source(error)), None)),
            }
        })
    };
    stream::once(start).flatten().boxed()
}

fn walk(disk: &Disk, prefix: Option<ObjectKey>, found: &Sender<ObjectInfo>) -> Result<()> {
    let fault = |error| io_error(error, format_args!("`{}` could not be listed", disk.root().display()));
    // A store that is gone is not an empty store.
    fs::metadata(disk.root()).map_err(fault)?;
    let start = prefix.as_ref().map_or_else(|| disk.root().to_owned(), |prefix| disk.path(prefix));
    let mut folders: Vec<(PathBuf, Option<ObjectKey>)> = vec![(start, prefix)];
    while let Some((folder, key)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if gone(&error) => continue,
            entries => entries.map_err(fault)?,
        };
        for entry in entries {
            let entry = entry.map_err(fault)?;
            let name = entry.file_name();
            // Names that are no part of a key are none of ours.
            let Some(name) = name.to_str() else { continue };
            let child = key.as_ref().map_or_else(|| ObjectKey::new(name), |key| key.join(name));
            let Ok(child) = child else { continue };
            let data = match entry.metadata() {
                Err(error) if gone(&error) => continue,
                data => data.map_err(fault)?,
            };
            if data.is_dir() {
                folders.push((entry.path(), Some(child)));
            } else if data.is_file() && found.blocking_send(info(child, &data)).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Deleted since it was seen, or a file where a folder is looked for: both hold no objects.
fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
