//! The store that a command works on.

use std::path::PathBuf;
use std::sync::Arc;

use towline_core::{Result, SnapshotStore};
use towline_storage::{StoreOptions, open};

/// Opens `url` with the settings of the environment. Uploads in parts are noted in the folder that
/// `TOWLINE_UPLOAD_JOURNAL` names, or else where this user's programs keep their state, if they can.
pub(crate) fn open_store(url: &str) -> Result<Arc<dyn SnapshotStore>> {
    let mut options = StoreOptions::from_env()?;
    let in_parts = ["s3://", "gs://"].iter().any(|scheme| url.starts_with(scheme));
    if in_parts && options.upload_journal().is_none() {
        // Nobody asked for this folder: where it cannot be, there is no journal.
        let folder = state_folder().filter(|folder| std::fs::create_dir_all(folder).is_ok());
        options = folder.into_iter().fold(options, StoreOptions::with_upload_journal);
    }
    open(url, &options)
}

/// `towline/uploads` in the folder for state of the XDG base directories.
fn state_folder() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("towline/uploads"))
}
