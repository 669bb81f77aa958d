//! How to reach a store: settings from the environment and from the caller.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use towline_core::{Error, Result, Secret};

/// The beginnings of the variables that [`StoreOptions::from_env`] reads, and the URL schemes that they are for.
const ENVIRONMENT: [(&str, &str); 3] = [("AWS_", "s3"), ("GOOGLE_", "gs"), ("AZURE_", "az")];
/// The variable that names the folder of the upload journal.
const JOURNAL: &str = "TOWLINE_UPLOAD_JOURNAL";

/// Where a store's server is and who asks: settings by name.
///
/// The names are those of the clouds' own variables without the first word, in lower case: `endpoint`, `region`,
/// `access_key_id`, `secret_access_key`, `session_token` for S3; `base_url`, `service_account`, `bearer_token` for
/// GCS; `storage_account_name`, `storage_account_key`, `storage_endpoint` for Azure. Every setting of the
/// `object_store` crate's builders is taken. Three are Towline's own:
///
/// * `ca_bundle`: a file of PEM certificates that are trusted beside the operating system's (`AWS_CA_BUNDLE`);
/// * `allow_http`: `true` lets plain HTTP go to other machines. To this machine it always may;
/// * `idle_timeout`: the seconds in which something must come from the server, 120 by default.
///
/// TLS is always verified. Values are kept as secrets: `Debug` does not show them.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// By scheme, then by name.
    environment: BTreeMap<&'static str, BTreeMap<String, Secret>>,
    explicit: BTreeMap<String, Secret>,
    upload_journal: Option<PathBuf>,
}

impl StoreOptions {
    /// No settings: nothing of the environment counts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The settings in this process's `AWS_…`, `GOOGLE_…` and `AZURE_…` variables, and the folder in
    /// `TOWLINE_UPLOAD_JOURNAL`. Those that have nothing to do with stores are ignored.
    ///
    /// # Errors
    /// `Invalid` for a variable that is no UTF-8.
    pub fn from_env() -> Result<Self> {
        let mut options = Self::default();
        for (variable, value) in std::env::vars_os() {
            let Some(variable) = variable.to_str() else { continue };
            for (prefix, scheme) in ENVIRONMENT {
                let Some(name) = variable.strip_prefix(prefix) else { continue };
                let value = value.to_str().ok_or_else(|| {
                    Error::invalid(format!("the variable {variable} is no UTF-8")).with_help("set it again")
                })?;
                let of_scheme = options.environment.entry(scheme).or_default();
                of_scheme.insert(name.to_ascii_lowercase(), Secret::new(value));
            }
        }
        options.upload_journal =
            std::env::var_os(JOURNAL).filter(|folder| !folder.is_empty()).map(PathBuf::from);
        Ok(options)
    }

    /// Notes uploads in parts to S3 and GCS in a file in `folder`, which is made if it is missing, until they have ended.
    /// A later process with the same folder and store gives up those that a dead one has begun, when it first uploads in
    /// parts itself; what cannot be given up is tried again at each upload. Without it, only a rule of the bucket does.
    #[must_use]
    pub fn with_upload_journal(mut self, folder: impl Into<PathBuf>) -> Self {
        self.upload_journal = Some(folder.into());
        self
    }

    /// The folder of the upload journal, if there is one.
    #[must_use]
    pub fn upload_journal(&self) -> Option<&Path> {
        self.upload_journal.as_deref()
    }

    /// Sets `name` for every scheme. It goes before the environment.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.explicit.insert(name.into().to_ascii_lowercase(), Secret::new(value));
        self
    }

    /// The settings for `scheme`: name, value, and whether the caller asked for it.
    #[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
    pub(crate) fn settings(&self, scheme: &str) -> Vec<(&str, &str, bool)> {
        let environment = self.environment.get(scheme).into_iter().flatten();
        let environment = environment.filter(|(name, _)| !self.explicit.contains_key(*name));
        let explicit = self.explicit.iter().map(|(name, value)| (name.as_str(), value.reveal(), true));
        environment.map(|(name, value)| (name.as_str(), value.reveal(), false)).chain(explicit).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_not_shown() {
        let options = StoreOptions::new().with("secret_access_key", "hush");
        let shown = format!("{options:?}");
        assert!(shown.contains("secret_access_key") && !shown.contains("hush"), "{shown}");
    }
}
