//! The command line, without a parser library: options in any order, then positional arguments.

use crate::stop::{Result, Stop};

/// What is left of the command line; taking an option removes it.
#[derive(Debug)]
pub(crate) struct Args {
    left: Vec<String>,
}

impl Args {
    /// Takes the arguments after the program's name.
    pub(crate) fn new(arguments: impl IntoIterator<Item = String>) -> Self {
        Self { left: arguments.into_iter().collect() }
    }

    /// Whether the flag is there.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.left.len();
        self.left.retain(|argument| argument != name);
        self.left.len() != before
    }

    /// The value of `--name VALUE` or `--name=VALUE`.
    pub(crate) fn value(&mut self, name: &str) -> Result<Option<String>> {
        let prefix = format!("{name}=");
        let Some(at) =
            self.left.iter().position(|argument| argument == name || argument.starts_with(&prefix))
        else {
            return Ok(None);
        };
        let argument = self.left.remove(at);
        if let Some(value) = argument.strip_prefix(&prefix) {
            return Ok(Some(value.to_owned()));
        }
        if at < self.left.len() {
            return Ok(Some(self.left.remove(at)));
        }
        Err(Stop::Usage(format!("`{name}` wants a value")))
    }

    /// The value as a number.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        self.value(name)?
            .map(|text| {
                text.parse().map_err(|_| Stop::Usage(format!("`{name}` wants a number, not `{text}`")))
            })
            .transpose()
    }

    /// The values of a list with commas; empty when the option is absent.
    pub(crate) fn list(&mut self, name: &str) -> Result<Vec<String>> {
        Ok(self.value(name)?.map(|text| text.split(',').map(str::to_owned).collect()).unwrap_or_default())
    }

    /// The next argument that is no option.
    pub(crate) fn positional(&mut self) -> Option<String> {
        let at = self.left.iter().position(|text| !text.starts_with('-'))?;
        Some(self.left.remove(at))
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<()> {
        match self.left.first() {
            None => Ok(()),
            Some(argument) => Err(Stop::Usage(format!("unexpected argument `{argument}` (see --help)"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Args {
        Args::new(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_stand_anywhere() {
        let mut found = args("codec --threads 4 --json --out=x.md");
        assert!(found.flag("--json"));
        assert_eq!(found.number("--threads").unwrap(), Some(4));
        assert_eq!(found.value("--out").unwrap().as_deref(), Some("x.md"));
        assert_eq!(found.positional().as_deref(), Some("codec"));
        found.finish().unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        assert!(args("--threads").value("--threads").is_err());
        assert!(args("--threads many").number("--threads").is_err());
        assert!(args("--unknown").finish().is_err());
    }
}
