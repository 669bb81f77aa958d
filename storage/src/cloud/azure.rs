//! Azure Blob Storage.

use std::sync::Arc;

use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use towline_core::Result;

use super::Backend;
use super::settings::{Settings, retries, unbuilt};
use crate::StoreOptions;

/// The settings that hold the server's URL.
const ENDPOINTS: [&str; 2] = ["endpoint", "storage_endpoint"];

pub(super) fn open(container: &str, options: &StoreOptions) -> Result<Backend> {
    let settings = Settings::<AzureConfigKey>::of("az", "azure_", options, &ENDPOINTS)?;
    let mut builder = MicrosoftAzureBuilder::new();
    for (key, value) in settings.builder {
        builder = builder.with_config(key, value);
    }
    let store = builder
        .with_container_name(container)
        .with_allow_http(true)
        .with_retry(retries())
        .with_http_connector(settings.connector)
        .build();
    let store = Arc::new(store.map_err(unbuilt)?);
    Ok(Backend { objects: Arc::clone(&store) as _, uploads: None, endpoints: settings.endpoints })
}
