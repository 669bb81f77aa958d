//! The macros: one `#[test]` for each law.

/// Checks a codec: `codec_conformance!(mine, MyCodec::default());` makes a module `mine` with one test for each law
/// of [`crate::testing::laws::codec`]. The expression is evaluated for each.
///
/// The law about memory wants [`crate::testing::CountingAllocator`] as the test crate's global allocator.
#[macro_export]
macro_rules! codec_conformance {
    ($name:ident, $codec:expr $(,)?) => {
        $crate::codec_conformance! { @laws $name, $codec,
            stable_id units_tile modes_are_honest round_trip append_only deterministic dirty_target
            truncation_is_an_error noise_never_panics bounded_allocation checksum_fits_the_framing
            revert_is_right compose_is_right; several_units
        }
    };
    (@laws $name:ident, $codec:expr, $($law:ident)*; $($large:ident)*) => {
        #[cfg(test)]
        mod $name {
            #[allow(unused_imports, reason = "the expression may name everything by its full path")]
            use super::*;
            $(
                #[test]
                fn $law() {
                    let codec = $codec;
                    if let Err(broken) =
                        $crate::testing::laws::codec::check(&codec, $crate::testing::laws::codec::$law)
                    {
                        panic!("{broken}");
                    }
                }
            )*
            $(
                #[test]
                fn $large() {
                    let codec = $codec;
                    if let Err(broken) =
                        $crate::testing::laws::codec::check_large(&codec, $crate::testing::laws::codec::$large)
                    {
                        panic!("{broken}");
                    }
                }
            )*
        }
    };
}

/// Checks a store: `store_conformance!(mine, async { MyStore::fresh().await });` makes a module `mine` with one test
/// for each law of [`crate::testing::laws::store`].
///
/// The expression is evaluated for each and gives a store with nothing in it, or a pair of a store and something
/// to keep alive meanwhile, such as its directory.
#[macro_export]
macro_rules! store_conformance {
    ($name:ident, $store:expr $(,)?) => {
        $crate::store_conformance! { @laws $name, $store,
            put_get_head ranges read_into_fills missing_is_not_found exclusive_create compare_and_swap_counter
            stale_update_conflicts overwrites_are_whole writers_are_invisible_until_finished
            unfinished_writers_leave_nothing writers_overwrite large_objects delete_is_idempotent
            prefixes_are_whole_segments lists_are_complete versions_change random_operations
        }
    };
    (@laws $name:ident, $store:expr, $($law:ident)*) => {
        #[cfg(test)]
        mod $name {
            #[allow(unused_imports, reason = "the expression may name everything by its full path")]
            use super::*;
            $(
                #[test]
                fn $law() {
                    let checked = async {
                        $crate::testing::laws::store::check($store.await, $crate::testing::laws::store::$law).await
                    };
                    if let Err(broken) = $crate::testing::block_on(checked) {
                        panic!("{broken}");
                    }
                }
            )*
        }
    };
}

/// Checks a deployment: `deployment_conformance!(mine, async { MyHarness::start().await });` makes a module `mine`
/// with one test for each law of [`crate::testing::laws::deployment`].
///
/// The expression is evaluated for each and gives a [`crate::testing::DeploymentHarness`] whose deployment was
/// just started.
#[macro_export]
macro_rules! deployment_conformance {
    ($name:ident, $harness:expr $(,)?) => {
        $crate::deployment_conformance! { @laws $name, $harness,
            serves_after_the_order bases_follow_each_other the_same_operation_is_one_swap deltas_apply
            a_wrong_parent_is_refused an_unknown_snapshot_is_refused a_corrupt_snapshot_is_refused
            denied_is_unsupported status_is_truthful warms_up
        }
    };
    (@laws $name:ident, $harness:expr, $($law:ident)*) => {
        #[cfg(test)]
        mod $name {
            #[allow(unused_imports, reason = "the expression may name everything by its full path")]
            use super::*;
            $(
                #[test]
                fn $law() {
                    let checked = async {
                        $crate::testing::laws::deployment::check(
                            $harness.await,
                            $crate::testing::laws::deployment::$law,
                        )
                        .await
                    };
                    if let Err(broken) = $crate::testing::block_on(checked) {
                        panic!("{broken}");
                    }
                }
            )*
        }
    };
}
