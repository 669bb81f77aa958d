//! Amazon S3 and what speaks like it.

use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use towline_core::Result;

use super::Backend;
use super::settings::{Settings, retries, unbuilt};
use crate::StoreOptions;

/// The settings that hold the server's URL.
const ENDPOINTS: [&str; 3] = ["endpoint", "endpoint_url", "endpoint_url_s3"];

pub(super) fn open(bucket: &str, options: &StoreOptions) -> Result<Backend> {
    let settings = Settings::<AmazonS3ConfigKey>::of("s3", "aws_", options, &ENDPOINTS)?;
    let mut builder = AmazonS3Builder::new().with_unsigned_payload(true);
    if settings.native {
        // Amazon's servers check it on arrival. Others do not all know it.
        builder = builder.with_checksum_algorithm(Checksum::CRC64NVME);
    }
    for (key, value) in settings.builder {
        builder = builder.with_config(key, value);
    }
    let store = builder
        .with_bucket_name(bucket)
        .with_allow_http(true)
        .with_retry(retries())
        .with_http_connector(settings.connector)
        .build();
    let store = Arc::new(store.map_err(unbuilt)?);
    Ok(Backend { objects: Arc::clone(&store) as _, uploads: Some(store), endpoints: settings.endpoints })
}
