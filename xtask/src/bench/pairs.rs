//! What is measured: small real pairs that ship as fixtures, and the corpus that `cargo xtask corpus` makes.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::stop::{Result, Stop, file_error};
use crate::workspace::Context;

/// Two checkpoints, or one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    /// What the tables call it.
    pub(super) name: String,
    /// `None` for a base.
    pub(super) parent: Option<PathBuf>,
    /// The newer checkpoint; where there is a delta, what it is applied to.
    pub(super) current: PathBuf,
    /// What makes the newer checkpoint of the parent.
    pub(super) delta: Option<PathBuf>,
}

/// A pair's name, its parent and the delta that makes its next checkpoint.
const FIXTURES: [(&str, &str, &str); 5] = [
    ("MiniLM bf16, RL at 1e-6", "minilm-bf16-prev", "minilm-bf16-rl-lr1e-06"),
    ("MiniLM bf16, RL at 1e-5", "minilm-bf16-prev", "minilm-bf16-rl-lr1e-05"),
    ("MiniLM bf16 slice, SFT at 2e-5", "minilm-sft-slice-prev", "minilm-sft-slice"),
    ("MiniLM f16 slice, RL", "minilm-f16-slice-prev", "minilm-f16-slice"),
    ("MiniLM f32 slice, RL", "minilm-f32-slice-prev", "minilm-f32-slice"),
];
/// Fixtures that stand alone, too.
const BASES: [(&str, &str); 3] = [
    ("MiniLM bf16, base", "minilm-bf16-prev"),
    ("MiniLM f16 slice, base", "minilm-f16-slice-prev"),
    ("MiniLM f32 slice, base", "minilm-f32-slice-prev"),
];
const LIST: &str = "corpus.json";

/// The pairs of both places whose names contain one of `names`; a place that was named must be there.
pub(super) fn find(
    context: &Context,
    fixtures: Option<&Path>,
    corpus: Option<&Path>,
    names: &[String],
) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    let place = fixtures.map_or_else(|| context.root.join("../shared/fixtures/weights"), Path::to_owned);
    if place.is_dir() {
        pairs.extend(of_fixtures(&place));
    } else if fixtures.is_some() {
        return Err(Stop::failed(format!("the fixtures `{}` are not there", place.display())));
    }
    let place = match corpus {
        Some(place) => place.to_owned(),
        None => context.target()?.join("corpus"),
    };
    let list = place.join(LIST);
    if list.is_file() {
        let text = std::fs::read_to_string(&list).map_err(file_error("read", &list))?;
        pairs.extend(of_corpus(&text, &place).map_err(|stop| stop.context(&list.display().to_string()))?);
    } else if corpus.is_some() {
        return Err(Stop::failed(format!(
            "`{}` is not there (help: make it with `cargo xtask corpus`)",
            list.display()
        )));
    }
    let there = !pairs.is_empty();
    pairs.retain(|pair| names.is_empty() || names.iter().any(|name| pair.name.contains(name.as_str())));
    match (pairs.is_empty(), there) {
        (false, _) => Ok(pairs),
        (true, true) => Err(Stop::Usage(format!("no pair's name contains {}", names.join(" or ")))),
        (true, false) => Err(Stop::Skipped(
            "there are no weights to measure on (help: make some with `cargo xtask corpus`)".to_owned(),
        )),
    }
}

fn of_fixtures(place: &Path) -> Vec<Pair> {
    let file = |name: &str, ending: &str| place.join(format!("{name}{ending}"));
    let mut pairs = Vec::new();
    for (name, parent, delta) in FIXTURES {
        let parent = file(parent, ".safetensors");
        let delta = Some(file(delta, ".arc_v2.safetensors"));
        pairs.push(Pair { name: name.to_owned(), parent: Some(parent.clone()), current: parent, delta });
    }
    for (name, base) in BASES {
        let current = file(base, ".safetensors");
        pairs.push(Pair { name: name.to_owned(), parent: None, current, delta: None });
    }
    pairs
}

/// The pairs of a list: `base` and `next` are files beside it; without a next one, the base stands alone.
fn of_corpus(text: &str, place: &Path) -> Result<Vec<Pair>> {
    let list: Value =
        serde_json::from_str(text).map_err(|error| Stop::failed(format!("no JSON: {error}")))?;
    let entries = list["pairs"].as_array().ok_or_else(|| Stop::failed("it has no list `pairs`"))?;
    entries
        .iter()
        .map(|entry| {
            let file = |key: &str| entry[key].as_str().map(|name| place.join(name));
            let name = entry["name"].as_str().ok_or_else(|| Stop::failed("a pair has no name"))?.to_owned();
            let base = file("base").ok_or_else(|| Stop::failed(format!("`{name}` has no base")))?;
            let (parent, current) = match file("next") {
                Some(next) => (Some(base), next),
                None => (None, base),
            };
            Ok(Pair { name, parent, current, delta: None })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_corpus_is_read() {
        let text = r#"{"recipe": 1, "pairs": [
            {"name": "m-rl", "kind": "rl", "dtype": "bf16", "base": "a.safetensors", "next": "b.safetensors"},
            {"name": "m-base", "kind": "base", "dtype": "bf16", "base": "a.safetensors", "next": null}]}"#;
        let pairs = of_corpus(text, Path::new("corpus")).unwrap();
        assert_eq!(pairs[0].parent.as_deref(), Some(Path::new("corpus/a.safetensors")));
        assert_eq!(pairs[0].current, Path::new("corpus/b.safetensors"));
        assert_eq!(
            (&pairs[1].parent, pairs[1].current.as_path()),
            (&None, Path::new("corpus/a.safetensors"))
        );
        for bad in ["{}", "[", r#"{"pairs":[{"base":"a"}]}"#, r#"{"pairs":[{"name":"a"}]}"#] {
            assert!(of_corpus(bad, Path::new("")).is_err(), "{bad}");
        }
    }

    #[test]
    fn fixtures_are_pairs_and_bases() {
        let pairs = of_fixtures(Path::new("w"));
        assert_eq!(pairs.iter().filter(|pair| pair.delta.is_some() && pair.parent.is_some()).count(), 5);
        assert_eq!(pairs.iter().filter(|pair| pair.parent.is_none()).count(), 3);
    }
}
