//! A document as a flat list of nodes.
//!
//! JSON and YAML are both read into this form and encoded from it. A tree of maps and strings would cost several
//! allocations for every value; here a node is 16 bytes in one list, its text stays in the source unless it had to be
//! unescaped, and an alias of YAML is an index. Look-ahead is free, which `@type` needs: it may stand anywhere in its
//! object.

use crate::error::Position;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NodeKind {
    /// `null`.
    Null,
    /// `true`.
    True,
    /// `false`.
    False,
    /// A number, as text.
    Number,
    /// A string.
    String,
    /// An array: its elements follow.
    Array,
    /// An object: keys (strings) and values follow in turns.
    Object,
    /// What stands at another index.
    Alias,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    kind: NodeKind,
    /// The text lies in the arena, not in the source.
    owned: bool,
    /// Offset of the text; or the target of an alias; or one past the last node of a container.
    a: u32,
    /// Length of the text; or how many elements or pairs a container has.
    b: u32,
    /// Where it begins: byte offset in the source.
    at: u32,
}

/// The document.
#[derive(Debug)]
pub(crate) struct Tape<'s> {
    source: &'s str,
    arena: String,
    nodes: Vec<Node>,
    open: Vec<usize>,
}

impl<'s> Tape<'s> {
    /// An empty tape over `source`. Sources of 4 GiB and more cannot be addressed: the readers refuse them.
    pub(crate) fn new(source: &'s str) -> Self {
        let nodes = Vec::with_capacity(source.len() / 24);
        Self { source, arena: String::new(), nodes, open: Vec::new() }
    }

    /// The text it was read from.
    pub(crate) fn source(&self) -> &'s str {
        self.source
    }

    /// Number of nodes so far: the index of the next one.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn count(&mut self) {
        if let Some(node) = self.open.last().and_then(|open| self.nodes.get_mut(*open)) {
            node.b += 1;
        }
    }

    fn push(&mut self, kind: NodeKind, owned: bool, a: usize, b: usize, at: usize) {
        self.count();
        self.nodes.push(Node { kind, owned, a: a as u32, b: b as u32, at: at as u32 });
    }

    /// Adds `null`, `true` or `false`.
    pub(crate) fn push_literal(&mut self, kind: NodeKind, at: usize) {
        self.push(kind, false, 0, 0, at);
    }

    /// Adds a number or string whose text is part of the source.
    pub(crate) fn push_source(&mut self, kind: NodeKind, start: usize, end: usize) {
        self.push(kind, false, start, end - start, start);
    }

    /// Adds a number or string with a text of its own.
    pub(crate) fn push_owned(&mut self, kind: NodeKind, text: &str, at: usize) {
        let start = self.arena.len();
        self.arena.push_str(text);
        self.push(kind, true, start, text.len(), at);
    }

    /// Adds a string that stands at byte `start` of the source, or stood there before the source was rewritten.
    pub(crate) fn push_text(&mut self, kind: NodeKind, text: &str, start: usize, at: usize) {
        if self.source.get(start..start.wrapping_add(text.len())) == Some(text) {
            self.push(kind, false, start, text.len(), at);
        } else {
            self.push_owned(kind, text, at);
        }
    }

    /// Adds an alias of node `target`.
    pub(crate) fn push_alias(&mut self, target: usize, at: usize) {
        self.push(NodeKind::Alias, false, target, 0, at);
    }

    /// Opens an array or object.
    pub(crate) fn open(&mut self, kind: NodeKind, at: usize) {
        self.count();
        self.open.push(self.nodes.len());
        self.nodes.push(Node { kind, owned: false, a: 0, b: 0, at: at as u32 });
    }

    /// Closes what was opened last and says which node that was.
    pub(crate) fn close(&mut self) -> usize {
        let end = self.nodes.len() as u32;
        let Some(index) = self.open.pop() else { return 0 };
        if let Some(node) = self.nodes.get_mut(index) {
            node.a = end;
        }
        index
    }

    /// Whether the container at `index` has not been closed.
    pub(crate) fn is_open(&self, index: usize) -> bool {
        self.open.contains(&index)
    }

    /// Takes the member with this key out of its object: [`Tape::pairs`] passes over it. Its nodes stay, for they
    /// may be the target of an alias.
    pub(crate) fn hide(&mut self, key: usize) {
        if let Some(node) = self.nodes.get_mut(key) {
            node.kind = NodeKind::Null;
        }
    }

    /// How many containers are open.
    pub(crate) fn depth(&self) -> usize {
        self.open.len()
    }

    /// How many members the open container has so far.
    pub(crate) fn open_members(&self) -> Option<(NodeKind, usize)> {
        let node = self.open.last().and_then(|open| self.nodes.get(*open))?;
        Some((node.kind, node.b as usize))
    }

    fn node(&self, index: usize) -> Node {
        self.nodes.get(index).copied().unwrap_or(Node {
            kind: NodeKind::Null,
            owned: false,
            a: 0,
            b: 0,
            at: 0,
        })
    }

    /// The node that `index` stands for: aliases followed.
    pub(crate) fn resolve(&self, index: usize) -> usize {
        let node = self.node(index);
        // An alias is never the target of another: the readers resolve before they add one.
        if node.kind == NodeKind::Alias { node.a as usize } else { index }
    }

    /// Kind of a resolved node.
    pub(crate) fn kind(&self, index: usize) -> NodeKind {
        self.node(index).kind
    }

    /// Text of a number or string.
    pub(crate) fn text(&self, index: usize) -> &str {
        let node = self.node(index);
        let from = if node.owned { self.arena.as_str() } else { self.source };
        from.get(node.a as usize..(node.a + node.b) as usize).unwrap_or_default()
    }

    /// About how many bytes the subtree has in the source: a guess at its encoded length.
    pub(crate) fn extent(&self, index: usize) -> usize {
        let node = self.node(index);
        let end = self.nodes.get(node.a as usize).map_or(self.source.len(), |next| next.at as usize);
        end.saturating_sub(node.at as usize)
    }

    fn after(&self, index: usize) -> usize {
        let node = self.node(index);
        match node.kind {
            NodeKind::Array | NodeKind::Object => node.a as usize,
            _ => index + 1,
        }
    }

    /// Elements of an array: indices, not resolved.
    pub(crate) fn elements(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let end = self.node(index).a as usize;
        let mut next = index + 1;
        std::iter::from_fn(move || {
            let at = next;
            (at < end).then(|| {
                next = self.after(at);
                at
            })
        })
    }

    /// Members of an object: indices of key and value, the value not resolved.
    pub(crate) fn pairs(&self, index: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut elements = self.elements(index);
        std::iter::from_fn(move || Some((elements.next()?, elements.next()?)))
            .filter(|(key, _)| self.kind(*key) == NodeKind::String)
    }

    /// Place of a node in the source.
    pub(crate) fn position(&self, index: usize) -> Position {
        Position::of(self.source, self.node(index).at as usize)
    }
}
