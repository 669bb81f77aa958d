//! How to reach a store: settings from the environment and from the caller.

use std::collections::BTreeMap;

use towline_core::{Error, Result, Secret};

/// The beginnings of the variables that [`StoreOptions::from_env`] reads, and the URL schemes that they are for.
const ENVIRONMENT: [(&str, &str); 3] = [("AWS_", "s3"), ("GOOGLE_", "gs"), ("AZURE_", "az")];

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
}

impl StoreOptions {
    /// No settings: nothing of the environment counts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The settings in this process's `AWS_…`, `GOOGLE_…` and `AZURE_…` variables. Those that have nothing to do with
    /// stores are ignored.
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
        Ok(options)
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
