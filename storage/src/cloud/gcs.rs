//! Google Cloud Storage.

use std::sync::Arc;

use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use towline_core::Result;

use super::Backend;
use super::settings::{Settings, retries, unbuilt};
use crate::StoreOptions;

/// The setting that holds the server's URL.
const ENDPOINTS: [&str; 1] = ["base_url"];

pub(super) fn open(bucket: &str, options: &StoreOptions) -> Result<Backend> {
    let settings = Settings::<GoogleConfigKey>::of("gs", "google_", options, &ENDPOINTS)?;
    let mut builder = GoogleCloudStorageBuilder::new();
    for (key, value) in settings.builder {
        builder = builder.with_config(key, value);
    }
    let store = builder
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_http_connector(settings.connector)
        .build();
    let store = Arc::new(store.map_err(unbuilt)?);
    Ok(Backend { objects: Arc::clone(&store) as _, uploads: Some(store), endpoints: settings.endpoints })
}
