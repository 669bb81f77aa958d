//! Writing tables into a file of people: between two marks, so that the rest of it stays.

use std::path::Path;

use crate::stop::{Result, file_error};

/// Puts `text` between `<!-- NAME:begin -->` and `<!-- NAME:end -->` of the file, which is made if it is not there and
/// gets the marks at its end if it has none.
pub(crate) fn write(path: &Path, name: &str, text: &str) -> Result<()> {
    let old = match std::fs::read_to_string(path) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(file_error("read", path)(error)),
    };
    std::fs::write(path, placed(&old, name, text)).map_err(file_error("write", path))
}

fn placed(old: &str, name: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->"));
    let body = format!("{begin}\n{}\n{end}", text.trim_end());
    let place = old.find(&begin).and_then(|start| {
        let length = old.get(start..)?.find(&end)? + end.len();
        Some((old.get(..start)?, old.get(start + length..)?))
    });
    match place {
        Some((before, behind)) => format!("{before}{body}{behind}"),
        None if old.is_empty() => format!("{body}\n"),
        None => format!("{}\n\n{body}\n", old.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_the_file_stays() {
        let first = placed("", "x", "one\n");
        assert_eq!(first, "<!-- x:begin -->\none\n<!-- x:end -->\n");
        let second = placed(&format!("# Title\n\n{first}behind\n"), "x", "two\n\n");
        assert_eq!(second, "# Title\n\n<!-- x:begin -->\ntwo\n<!-- x:end -->\nbehind\n");
        let third = placed(&second, "y", "three");
        assert!(
            third.starts_with(second.trim_end())
                && third.ends_with("behind\n\n<!-- y:begin -->\nthree\n<!-- y:end -->\n")
        );
    }
}
