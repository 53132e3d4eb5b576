//! Rewrites what yaml-cpp takes and the parser does not into what both take, byte for byte at the same places.
//!
//! - Lines of a flow collection may start at any column, as in `a: {` … `}` with the bracket at the margin: their
//!   line ends become blanks.
//! - A tab may separate a key from its value: it becomes a blank.
//! - A comment may follow a closing quote at once: it becomes blanks.
//!
//! Only documents that were refused come here. Should this reader misjudge one, the first refusal stands.

/// The rewritten text; `None` if there is nothing to rewrite.
pub(super) fn relax(source: &str) -> Option<String> {
    let mut reader =
        Relax { bytes: source.as_bytes(), out: source.as_bytes().to_vec(), at: 0, depth: 0, fresh: true };
    while reader.at < reader.bytes.len() {
        reader.step();
    }
    if reader.out == reader.bytes {
        return None;
    }
    String::from_utf8(reader.out).ok()
}

struct Relax<'s> {
    bytes: &'s [u8],
    out: Vec<u8>,
    at: usize,
    /// How many flow collections are open.
    depth: usize,
    /// Whether a node may begin here.
    fresh: bool,
}

impl Relax<'_> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(b'\n')
    }

    fn blank(&mut self, from: usize, to: usize) {
        for byte in &mut self.out[from..to] {
            // Continuation bytes go too: what was one character becomes several blanks, at the same bytes.
            *byte = b' ';
        }
    }

    fn line_end(&self) -> usize {
        let rest = &self.bytes[self.at..];
        self.at + rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
    }

    fn step(&mut self) {
        let byte = self.peek(0);
        let after_blank = self.at == 0 || matches!(self.bytes[self.at - 1], b' ' | b'\t' | b'\n' | b'\r');
        match byte {
            b'\n' => {
                if self.depth > 0 {
                    self.blank(self.at, self.at + 1);
                } else {
                    self.fresh = true;
                }
                self.at += 1;
            }
            b'#' if after_blank => self.comment(),
            b' ' | b'\r' => self.at += 1,
            b'\t' => {
                if self.fresh && !self.in_indentation() {
                    self.blank(self.at, self.at + 1);
                }
                self.at += 1;
            }
            b'"' | b'\'' if self.fresh => self.quoted(byte),
            b'[' | b'{' if self.fresh => {
                self.depth += 1;
                self.at += 1;
            }
            b']' | b'}' if self.depth > 0 => {
                self.depth -= 1;
                self.fresh = false;
                self.at += 1;
            }
            b',' if self.depth > 0 => {
                self.fresh = true;
                self.at += 1;
            }
            b'|' | b'>' if self.fresh && self.depth == 0 => self.block_scalar(),
            b'&' | b'!' if self.fresh => self.property(),
            b':' | b'-' | b'?' => self.indicator(byte),
            _ => {
                self.fresh = false;
                self.at += 1;
            }
        }
    }

    fn in_indentation(&self) -> bool {
        let before = &self.bytes[..self.at];
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        before[start..].iter().all(|byte| matches!(byte, b' ' | b'\t'))
    }

    fn comment(&mut self) {
        let end = self.line_end();
        if self.depth > 0 {
            self.blank(self.at, end);
        }
        self.at = end;
    }

    fn indicator(&mut self, byte: u8) {
        let separated = matches!(self.peek(1), b' ' | b'\t' | b'\n' | b'\r');
        let in_flow = self.depth > 0 && matches!(self.peek(1), b',' | b'[' | b']' | b'{' | b'}');
        self.fresh = (separated || in_flow) && (byte == b':' || self.fresh);
        self.at += 1;
    }

    fn quoted(&mut self, quote: u8) {
        self.at += 1;
        while self.at < self.bytes.len() {
            let byte = self.peek(0);
            let escaped = byte == b'\\' && quote == b'"';
            let doubled = byte == quote && quote == b'\'' && self.peek(1) == b'\'';
            if escaped || doubled {
                self.at += 2;
            } else {
                self.at += 1;
                if byte == quote {
                    break;
                }
            }
        }
        self.at = self.at.min(self.bytes.len());
        self.fresh = false;
        if self.at < self.bytes.len() && self.peek(0) == b'#' {
            let end = self.line_end();
            self.blank(self.at, end);
            self.at = end;
        }
    }

    /// An anchor or a tag: a node may still begin after it.
    fn property(&mut self) {
        while self.at < self.bytes.len() && !matches!(self.peek(0), b' ' | b'\t' | b'\n' | b'\r' | b',') {
            self.at += 1;
        }
    }

    /// Passes over a block scalar: its first line that is not empty says how far the others are indented.
    fn block_scalar(&mut self) {
        self.fresh = false;
        let header = self.line_end();
        let marks = &self.bytes[self.at + 1..header];
        let marks =
            marks.split(|byte| matches!(byte, b' ' | b'\t' | b'#' | b'\r')).next().unwrap_or_default();
        if !marks.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-')) {
            self.at += 1;
            return;
        }
        let start = self.bytes[..self.at].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let parent = self.bytes[start..self.at].iter().take_while(|byte| **byte == b' ').count();
        let mut content = None;
        self.at = header;
        while self.at < self.bytes.len() {
            let begin = self.at + 1;
            let line = &self.bytes[begin.min(self.bytes.len())..];
            let length = line.iter().position(|byte| *byte == b'\n').unwrap_or(line.len());
            let indent = line[..length].iter().take_while(|byte| **byte == b' ').count();
            let empty = line[..length].iter().all(|byte| matches!(byte, b' ' | b'\r'));
            if !empty
                && (indent <= parent && content.is_none() || content.is_some_and(|content| indent < content))
            {
                break;
            }
            if !empty && content.is_none() {
                content = Some(indent);
            }
            self.at = begin + length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::relax;

    #[test]
    fn places_stay() {
        let source =
            "a: {\nb: [c, # d\n\"e\nf\"],\n}\ng:\t\"h\"#i\nj: |\n  {\n  \tk: [\nl: m[n\no: 'p''[\n'\n";
        let relaxed = relax(source).unwrap();
        assert_eq!(
            relaxed,
            "a: { b: [c,     \"e\nf\"], }\ng: \"h\"  \nj: |\n  {\n  \tk: [\nl: m[n\no: 'p''[\n'\n"
        );
        assert_eq!(relaxed.len(), source.len());
        assert_eq!(relax("a: b\nc: [d, e]\n"), None);
        for text in ["", "\"", "'", "a: |", "a: >9\n", "[", "]", "# x", "a: \"\\", "\n\n", "&", "é: \"ü\"#ä"]
        {
            assert!(relax(text).is_none_or(|relaxed| relaxed.len() == text.len()), "{text}");
        }
    }
}
