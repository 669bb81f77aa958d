//! The rules of the graph, over a small copy of it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::counts::closure;
use crate::stop::{Result, Stop};
use crate::workspace::{COOKBOOK, CORE, Context, LEAVES, XTASK, strings};

/// Crates that do I/O, bring a runtime or a thread pool. Core may have none of them unless `testing` asks for it.
const IO: [&str; 22] = [
    "async-io",
    "async-std",
    "curl",
    "fs4",
    "hyper",
    "memmap2",
    "mio",
    "notify",
    "object_store",
    "openssl",
    "polling",
    "rayon",
    "rayon-core",
    "reqwest",
    "ring",
    "rustls",
    "smol",
    "socket2",
    "tempfile",
    "tokio",
    "ureq",
    "walkdir",
];
/// Ready-made layers and models: the engine writes its transformer itself, on differentiable operations.
const REFUSED: [&str; 2] = ["candle-nn", "candle-transformers"];
/// The one feature of core that may bring a runtime.
const TESTING: &str = "testing";

/// The members of the workspace and what they pull in.
#[derive(Debug, Default)]
pub(super) struct Graph {
    members: Vec<Member>,
    /// Every package that is resolved for the workspace.
    everything: BTreeSet<String>,
    /// Every package behind core with its default features.
    behind_core: BTreeSet<String>,
}

/// One crate of ours.
#[derive(Debug, Default)]
struct Member {
    name: String,
    edges: Vec<Edge>,
    features: BTreeMap<String, Vec<String>>,
}

/// A direct dependency.
#[derive(Debug)]
struct Edge {
    to: String,
    kind: Kind,
    optional: bool,
}

/// When a dependency is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Build,
    Dev,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Build => "build",
            Self::Dev => "dev",
        }
    }
}

impl Graph {
    /// Reads the graph from cargo.
    pub(super) fn load(context: &Context) -> Result<Self> {
        let mut graph = Self::parse(&context.metadata(true)?)
            .ok_or_else(|| Stop::failed("`cargo metadata` has another form than expected"))?;
        graph.behind_core = closure(context, CORE, false)?;
        Ok(graph)
    }

    /// The names of the members.
    pub(super) fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).collect()
    }

    /// The members that depend on the package directly, with the kind where it is not a normal dependency.
    pub(super) fn users(&self, package: &str) -> Vec<String> {
        let mut users = BTreeSet::new();
        for member in &self.members {
            let kinds: Vec<&Edge> = member.edges.iter().filter(|edge| edge.to == package).collect();
            if kinds.iter().any(|edge| edge.kind == Kind::Normal) {
                users.insert(member.name.clone());
            } else if let Some(edge) = kinds.first() {
                users.insert(format!("{} ({})", member.name, edge.kind.word()));
            }
        }
        users.into_iter().collect()
    }

    /// What breaks a rule, one line each.
    pub(super) fn broken_rules(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let ours: BTreeSet<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
        for member in &self.members {
            let name = member.name.as_str();
            if name != CORE && name != COOKBOOK && name != XTASK && !LEAVES.contains(&name) {
                broken.push(format!(
                    "`{name}` has no place in the star (help: add it to xtask/src/workspace.rs)"
                ));
            }
            for edge in member.edges.iter().filter(|edge| edge.to != name) {
                let to = edge.to.as_str();
                let words = format!("`{name}` depends on `{to}` ({})", edge.kind.word());
                if LEAVES.contains(&name) && LEAVES.contains(&to) {
                    broken.push(format!(
                        "{words}: no leaf imports a leaf (help: move what they share to core)"
                    ));
                } else if LEAVES.contains(&name) && to != CORE && ours.contains(to) {
                    broken.push(format!("{words}: a leaf imports core alone"));
                } else if (name == CORE || name == XTASK) && ours.contains(to) {
                    broken.push(format!("{words}: it imports none of ours"));
                }
            }
            if name == CORE {
                broken.extend(member.io_of_core());
            }
        }
        for package in self.behind_core.iter().filter(|package| IO.contains(&package.as_str())) {
            broken.push(format!("`{CORE}` pulls in `{package}` by default: core has no I/O and no runtime"));
        }
        for package in REFUSED.iter().filter(|package| self.everything.contains(**package)) {
            broken.push(format!("`{package}` is in the graph: the engine is written without it"));
        }
        broken
    }

    fn parse(metadata: &Value) -> Option<Self> {
        let members: BTreeSet<&str> = strings(metadata.get("workspace_members")?).collect();
        let packages = metadata.get("packages")?.as_array()?;
        let mut graph = Self::default();
        for package in packages {
            let name = package.get("name")?.as_str()?;
            graph.everything.insert(name.to_owned());
            if members.contains(package.get("id")?.as_str()?) {
                graph.members.push(Member::parse(name, package)?);
            }
        }
        Some(graph)
    }
}

impl Member {
    fn parse(name: &str, package: &Value) -> Option<Self> {
        let edges = package.get("dependencies")?.as_array()?.iter().map(|dependency| {
            Some(Edge {
                to: dependency.get("name")?.as_str()?.to_owned(),
                kind: match dependency.get("kind")?.as_str() {
                    Some("dev") => Kind::Dev,
                    Some("build") => Kind::Build,
                    _ => Kind::Normal,
                },
                optional: dependency.get("optional")?.as_bool()?,
            })
        });
        let features = package.get("features")?.as_object()?.iter();
        Some(Self {
            name: name.to_owned(),
            edges: edges.collect::<Option<_>>()?,
            features: features
                .map(|(name, on)| (name.clone(), strings(on).map(str::to_owned).collect()))
                .collect(),
        })
    }

    /// Direct dependencies on I/O: only optional ones, and only the feature `testing` may switch them on.
    fn io_of_core(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for edge in self.edges.iter().filter(|edge| edge.kind != Kind::Dev && IO.contains(&edge.to.as_str()))
        {
            let to = &edge.to;
            if !edge.optional {
                broken.push(format!("`{CORE}` depends on `{to}`: core has no I/O and no runtime"));
            }
            for (feature, on) in self.features.iter().filter(|(feature, _)| *feature != TESTING) {
                let switches = |what: &String| {
                    what == to || *what == format!("dep:{to}") || what.starts_with(&format!("{to}/"))
                };
                if on.iter().any(switches) {
                    broken.push(format!("`{CORE}` feature `{feature}` brings `{to}`: only `{TESTING}` may"));
                }
            }
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, edges: &[(&str, Kind)]) -> Member {
        let edge = |(to, kind): &(&str, Kind)| Edge { to: (*to).to_owned(), kind: *kind, optional: false };
        Member { name: name.to_owned(), edges: edges.iter().map(edge).collect(), ..Member::default() }
    }

    fn check(name: &str, edges: &[(&str, Kind)], expected: Option<&str>) {
        let names = [CORE, "towline-codec", "towline-storage", "towline-deploy", COOKBOOK, XTASK];
        let mut members: Vec<Member> =
            names.iter().filter(|other| **other != name).map(|other| member(other, &[])).collect();
        members.push(member(name, edges));
        let broken = Graph { members, ..Graph::default() }.broken_rules();
        match expected {
            None => assert!(broken.is_empty(), "{broken:?}"),
            Some(words) => {
                assert_eq!(broken.len(), 1, "{broken:?}");
                assert!(broken[0].contains(words), "{broken:?}");
            }
        }
    }

    #[test]
    fn the_star_stays_a_star() {
        use Kind::{Build, Dev, Normal};
        check("towline-codec", &[(CORE, Normal), ("serde", Normal), (CORE, Dev)], None);
        check("towline-codec", &[("towline-storage", Normal)], Some("no leaf imports a leaf"));
        check("towline-deploy", &[("towline-codec", Dev)], Some("no leaf imports a leaf"));
        check("towline-storage", &[("towline-deploy", Build)], Some("no leaf imports a leaf"));
        check("towline-storage", &[(COOKBOOK, Dev)], Some("a leaf imports core alone"));
        check(CORE, &[(CORE, Dev)], None);
        check(CORE, &[("towline-codec", Dev)], Some("none of ours"));
        check(XTASK, &[(CORE, Normal)], Some("none of ours"));
        check(COOKBOOK, &[("towline-codec", Normal), ("towline-storage", Normal)], None);
        check("towline-other", &[], Some("no place in the star"));
    }

    #[test]
    fn core_has_no_runtime_outside_testing() {
        let core = |optional: bool, feature: &str| {
            let member = Member {
                name: CORE.to_owned(),
                edges: vec![Edge { to: "tokio".to_owned(), kind: Kind::Normal, optional }],
                features: BTreeMap::from([(feature.to_owned(), vec!["dep:tokio".to_owned()])]),
            };
            Graph { members: vec![member], ..Graph::default() }.broken_rules()
        };
        assert_eq!(core(true, "testing"), Vec::<String>::new());
        assert_eq!(core(true, "default").len(), 1);
        assert_eq!(core(false, "testing").len(), 1);
        let hidden = Graph { behind_core: ["mio".to_owned()].into(), ..Graph::default() };
        assert_eq!(hidden.broken_rules().len(), 1);
    }

    #[test]
    fn ready_made_models_are_refused() {
        let graph = Graph {
            everything: ["candle-core".to_owned(), "candle-nn".to_owned()].into(),
            ..Graph::default()
        };
        let broken = graph.broken_rules();
        assert!(broken.len() == 1 && broken[0].contains("candle-nn"), "{broken:?}");
    }

    #[test]
    fn metadata_is_read() {
        let metadata = serde_json::json!({
            "workspace_members": ["a#1"],
            "packages": [
                {"name": "a", "id": "a#1", "features": {"default": ["x"]}, "dependencies": [
                    {"name": "serde", "kind": null, "optional": true},
                    {"name": "proptest", "kind": "dev", "optional": false}]},
                {"name": "serde", "id": "serde#1", "features": {}, "dependencies": []},
            ],
        });
        let graph = Graph::parse(&metadata).unwrap();
        assert_eq!(graph.names(), ["a"]);
        assert_eq!(graph.users("serde"), ["a"]);
        assert_eq!(graph.users("proptest"), ["a (dev)"]);
        assert!(graph.users("tokio").is_empty());
    }
}
