//! Files of known answers: blocks of `name = value` lines, `#` comments that name the source.

/// One vector.
pub(crate) struct Vector {
    fields: Vec<(String, String)>,
    /// The line of the file where the block begins, for messages.
    pub(crate) line: usize,
}

impl Vector {
    /// The text of a field that must be there.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.option(name).unwrap_or_else(|| panic!("the vector at line {} has no `{name}`", self.line))
    }

    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn hex(&self, name: &str) -> Vec<u8> {
        hex(self.text(name))
    }

    pub(crate) fn number(&self, name: &str) -> usize {
        self.text(name).parse().expect("a decimal number")
    }

    /// `result = fail`.
    pub(crate) fn must_fail(&self) -> bool {
        self.option("result") == Some("fail")
    }
}

/// Reads a file's text.
pub(crate) fn parse(text: &str) -> Vec<Vector> {
    let mut vectors: Vec<Vector> = Vec::new();
    let mut open = false;
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            assert!(line.trim().is_empty(), "line {}: neither `name = value` nor empty", number + 1);
            open = false;
            continue;
        };
        if !open {
            vectors.push(Vector { fields: Vec::new(), line: number + 1 });
            open = true;
        }
        vectors.last_mut().expect("a block is open").fields.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    assert!(!vectors.is_empty(), "no vectors");
    vectors
}

pub(crate) fn hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd number of hex digits in `{text}`");
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).expect("hex digits")).collect()
}
