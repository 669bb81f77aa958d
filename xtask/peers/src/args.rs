//! The command line: `--name value` in any order, flags, and one word first.

use std::path::PathBuf;
use std::str::FromStr;

use towline_core::{Error, Result};

/// What is left of the command line; taking an option removes it.
#[derive(Debug)]
pub(crate) struct Args {
    left: Vec<String>,
}

impl Args {
    pub(crate) fn new(arguments: impl IntoIterator<Item = String>) -> Self {
        Self { left: arguments.into_iter().collect() }
    }

    /// The first argument, if it is no option.
    pub(crate) fn word(&mut self) -> Option<String> {
        let is_word = self.left.first().is_some_and(|text| !text.starts_with('-'));
        is_word.then(|| self.left.remove(0))
    }

    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.left.len();
        self.left.retain(|text| text != name);
        self.left.len() != before
    }

    pub(crate) fn value(&mut self, name: &str) -> Result<Option<String>> {
        let Some(at) = self.left.iter().position(|text| text == name) else { return Ok(None) };
        if at + 1 >= self.left.len() {
            return Err(Error::invalid(format!("`{name}` wants a value")));
        }
        self.left.remove(at);
        Ok(Some(self.left.remove(at)))
    }

    pub(crate) fn path(&mut self, name: &str) -> Result<Option<PathBuf>> {
        Ok(self.value(name)?.map(PathBuf::from))
    }

    pub(crate) fn wanted(&mut self, name: &str) -> Result<String> {
        self.value(name)?.ok_or_else(|| Error::invalid(format!("`{name}` is missing")))
    }

    pub(crate) fn number<T: FromStr>(&mut self, name: &str, default: T) -> Result<T> {
        match self.value(name)? {
            None => Ok(default),
            Some(text) => {
                text.parse().map_err(|_| Error::invalid(format!("`{name}` wants a number, found `{text}`")))
            }
        }
    }

    pub(crate) fn list(&mut self, name: &str) -> Result<Vec<String>> {
        let text = self.value(name)?.unwrap_or_default();
        Ok(text.split(',').filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }

    /// Thread counts, joined by commas; 1 and 2 by default.
    pub(crate) fn threads(&mut self) -> Result<Vec<usize>> {
        let texts = self.list("--threads")?;
        let threads: Vec<usize> = texts.iter().filter_map(|text| text.parse().ok()).collect();
        if threads.len() != texts.len() || threads.contains(&0) {
            return Err(Error::invalid("`--threads` wants numbers above 0, joined by commas"));
        }
        Ok(if threads.is_empty() { vec![1, 2] } else { threads })
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.left.first() {
            None => Ok(()),
            Some(text) => Err(Error::invalid(format!("unexpected argument `{text}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_and_mistakes_named() {
        let mut args = Args::new("codec --runs 3 --threads 1,4 --x".split(' ').map(str::to_owned));
        assert_eq!(args.word().as_deref(), Some("codec"));
        assert_eq!(args.threads().unwrap(), [1, 4]);
        assert_eq!(args.number("--runs", 5usize).unwrap(), 3);
        assert!(args.wanted("--out").is_err());
        assert!(args.value("--x").is_err());
        assert!(args.flag("--x"));
        args.finish().unwrap();
        assert!(Args::new(["--threads".into(), "1,0".into()]).threads().is_err());
    }
}
