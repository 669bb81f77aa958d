//! S3, GCS and Azure: from a URL and options to a back end of the `object_store` crate.

mod http;
mod settings;

#[cfg(feature = "azure")]
mod azure;
#[cfg(feature = "gcs")]
mod gcs;
#[cfg(feature = "s3")]
mod s3;

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::multipart::MultipartStore;
use object_store::prefix::PrefixStore;
use towline_core::{Error, ObjectKey, Result};

use crate::{ObjectAdapter, StoreOptions};

/// The schemes that this build opens, for messages.
pub(crate) const SCHEMES: &[&str] = &[
    #[cfg(feature = "s3")]
    "s3",
    #[cfg(feature = "gcs")]
    "gs",
    #[cfg(feature = "azure")]
    "az",
];

/// A bucket.
struct Backend {
    objects: Arc<dyn ObjectStore>,
    /// Where uploads in parts have numbers by which they can be given up.
    uploads: Option<Arc<dyn MultipartStore>>,
    /// The server's URLs, if it is not the cloud's own.
    endpoints: String,
}

/// The store at `scheme://bucket/prefix`; nothing if this build does not have the scheme.
pub(crate) fn open(scheme: &str, rest: &str, options: &StoreOptions) -> Option<Result<ObjectAdapter>> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    match scheme {
        #[cfg(feature = "s3")]
        "s3" => Some(at(scheme, bucket, prefix, options, s3::open)),
        #[cfg(feature = "gcs")]
        "gs" => Some(at(scheme, bucket, prefix, options, gcs::open)),
        #[cfg(feature = "azure")]
        "az" => Some(at(scheme, bucket, prefix, options, azure::open)),
        _ => None,
    }
}

fn at(
    scheme: &str,
    bucket: &str,
    prefix: &str,
    options: &StoreOptions,
    open: impl FnOnce(&str, &StoreOptions) -> Result<Backend>,
) -> Result<ObjectAdapter> {
    if bucket.is_empty() || bucket.contains(['@', ':', '?', '#']) {
        return Err(Error::invalid(format!("`{}` names no bucket", bucket.escape_debug()))
            .with_help(format!("write `{scheme}://bucket/prefix`, and credentials into the environment")));
    }
    let prefix = prefix.trim_end_matches('/');
    let place = format!("{scheme}://{bucket}");
    let backend = open(bucket, options).map_err(|error| error.context(&place))?;
    let adapter = if prefix.is_empty() {
        ObjectAdapter::new(backend.objects)
    } else {
        let prefix = ObjectKey::new(prefix)?;
        ObjectAdapter::new(Arc::new(PrefixStore::new(backend.objects, prefix.as_str())))
    };
    Ok(match (backend.uploads, options.upload_journal()) {
        (Some(uploads), Some(folder)) => {
            let place = format!("{place} {}", backend.endpoints);
            adapter.with_upload_journal(uploads, prefix, place, folder)
        }
        _ => adapter,
    })
}

#[cfg(all(test, feature = "s3", feature = "gcs", feature = "azure"))]
mod tests {
    use towline_core::ErrorKind;

    use super::*;

    fn s3() -> StoreOptions {
        StoreOptions::new().with("access_key_id", "id").with("secret_access_key", "hush")
    }

    #[test]
    fn what_opens() {
        let local = |name: &str| StoreOptions::new().with(name, "http://127.0.0.1:1");
        assert!(open("s3", "bucket/a/b/", &s3()).unwrap().is_ok());
        assert!(open("s3", "bucket", &s3().with("endpoint", "http://localhost:1/")).unwrap().is_ok());
        let gcs = local("base_url").with("bearer_token", "t");
        assert!(open("gs", "bucket", &gcs).unwrap().is_ok());
        let azure = local("endpoint").with("account_name", "a").with("account_key", "a2V5");
        assert!(open("az", "container/x", &azure).unwrap().is_ok());
        assert!(open("ftp", "bucket", &s3()).is_none());
    }

    #[test]
    fn what_does_not() {
        let far = "http://10.0.0.1:9000";
        for (rest, options, says) in [
            ("", s3(), "names no bucket"),
            ("key@bucket", s3(), "names no bucket"),
            ("bucket/a//b", s3(), "no object key"),
            ("bucket", s3().with("endpoint", far), "plain HTTP"),
            ("bucket", s3().with("endpoint", "nonsense"), "endpoint"),
            ("bucket", s3().with("regoin", "x"), "regoin"),
            ("bucket", s3().with("idle_timeout", "soon"), "idle_timeout"),
            ("bucket", s3().with("ca_bundle", "/no/such/file"), "ca_bundle"),
            ("bucket", StoreOptions::new().with("access_key_id", "id"), "SecretAccessKey"),
        ] {
            let error = open("s3", rest, &options).unwrap().unwrap_err();
            assert_ne!(error.kind(), ErrorKind::Internal);
            let report = error.report();
            assert!(report.contains(says), "{rest}: {report}");
            assert!(!report.contains("hush"), "{report}");
        }
        assert!(
            open("s3", "bucket", &s3().with("endpoint", far).with("allow_http", "true")).unwrap().is_ok()
        );
    }
}
